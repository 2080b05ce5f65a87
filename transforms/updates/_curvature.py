"""Approximate Hessians: their forms, solves with them, functions that make them."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from gradlab.transforms._common import concrete
from gradlab.transforms.updates import _common as common

Solve = Callable[[jax.Array, jax.Array], jax.Array]
HessFn = Callable[..., Any]


class LowRankHessian(NamedTuple):
  """``c G^T G`` with ``G`` [m, d] and a number ``c >= 0``."""

  G: jax.Array
  c: jax.typing.ArrayLike = 1.0


class DiagonalHessian(NamedTuple):
  """A diagonal matrix with ``diagonal`` [d] >= 0."""

  diagonal: jax.Array


class Metric(NamedTuple):
  """An SPD matrix B, ready for solves.

  Attributes:
    diagonal: ones, or the diagonal of B, [d]; None for a full B.
    matrix: B [d, d]; None for a diagonal B.
    root: the lower Cholesky factor of a full B.
  """

  diagonal: Any
  matrix: Any
  root: Any

  def inverse(self, x: jax.Array) -> jax.Array:
    """``B^{-1} x`` for ``x`` [d] or the columns of [d, k]."""
    if self.diagonal is None:
      return cho_solve((self.root, True), x)
    return x / self.diagonal.reshape(-1, *(1,) * (x.ndim - 1))

  def dense(self) -> jax.Array:
    """B [d, d]."""
    return jnp.diag(self.diagonal) if self.matrix is None else self.matrix

  def dual_norm(self, g: jax.Array) -> jax.Array:
    """``sqrt(g^T B^{-1} g)``."""
    return jnp.sqrt(jnp.vdot(g, self.inverse(g)))


def check_metric(metric: Any) -> None:
  """Raises ValueError unless ``metric`` is None or, as far as known, SPD."""
  if metric is None:
    return
  shape = jnp.shape(metric)
  if len(shape) not in (1, 2) or shape[0] != shape[-1]:
    raise ValueError(f"metric must have shape (d,) or (d, d), got {shape}.")
  if not concrete(metric):
    return
  matrix = jnp.asarray(metric, float)
  definite = jnp.all(matrix > 0) & jnp.all(jnp.isfinite(matrix))
  if matrix.ndim == 2:
    symmetric = jnp.allclose(matrix, matrix.T, rtol=1e-5, atol=0.0)
    definite = symmetric & jnp.all(jnp.isfinite(jnp.linalg.cholesky(matrix)))
  if not definite:
    raise ValueError("metric must be symmetric and positive definite.")


def make_metric(metric: Any, d: int, dtype: Any) -> Metric:
  """The metric of ``d`` parameters; None is the identity."""
  if metric is None:
    return Metric(jnp.ones([d], dtype), None, None)
  values = jnp.asarray(metric).astype(dtype)
  if values.shape[0] != d:
    raise ValueError(f"metric is for {values.shape[0]} parameters, but there are {d}.")
  if values.ndim == 1:
    return Metric(values, None, None)
  return Metric(None, values, jnp.linalg.cholesky(values))


def regularized_solve(hessian: Any, metric: Metric, dtype: Any) -> Solve:
  """``solve(lam, b) -> (H + lam B)^{-1} b``; NaN where not positive definite."""
  if isinstance(hessian, LowRankHessian):
    factor, c = hessian.G.astype(dtype), jnp.asarray(hessian.c).astype(dtype)
    spread = metric.inverse(factor.T)
    gram = jnp.matmul(factor, spread, precision=lax.Precision.HIGHEST)
    eye = jnp.eye(gram.shape[0], dtype=dtype)

    def woodbury(lam: jax.Array, b: jax.Array) -> jax.Array:
      root = jnp.linalg.cholesky(lam * eye + c * gram)
      weights = cho_solve((root, True), spread.T @ b)
      return (metric.inverse(b) - c * (spread @ weights)) / lam

    return woodbury
  if hessian is None or isinstance(hessian, DiagonalHessian):
    if metric.diagonal is not None:
      own = jnp.zeros([], dtype) if hessian is None else hessian.diagonal.astype(dtype)

      def elementwise(lam: jax.Array, b: jax.Array) -> jax.Array:
        total = own + lam * metric.diagonal
        return jnp.where(total > 0, b / total, jnp.nan)

      return elementwise
    if hessian is None:
      return lambda lam, b: metric.inverse(b) / lam
  full = jnp.diag(hessian.diagonal) if isinstance(hessian, DiagonalHessian) else hessian
  fixed = metric.dense()
  if jnp.size(full) != fixed.size:
    raise ValueError(f"hess must have shape {fixed.shape}, got {jnp.shape(full)}.")
  matrix = jnp.asarray(full).astype(dtype).reshape(fixed.shape)

  def cholesky(lam: jax.Array, b: jax.Array) -> jax.Array:
    return cho_solve((jnp.linalg.cholesky(matrix + lam * fixed), True), b)

  return cholesky


def flatten(tree: Any, dtype: Any) -> jax.Array:
  """The leaves of a tree as one vector."""
  parts = [
    jnp.asarray(leaf).astype(dtype).reshape(-1) for leaf in jax.tree.leaves(tree)
  ]
  return jnp.concatenate([jnp.zeros([0], dtype), *parts])


def unflatten(vector: jax.Array, like: Any, dtype: Any = None) -> Any:
  """The vector cut into leaves like those of ``like``, in their dtypes or in one."""
  leaves = jax.tree.leaves(like)
  treedef: Any = jax.tree.structure(like)
  out, start = [], 0
  for leaf in leaves:
    size, shape = jnp.size(leaf), jnp.shape(leaf)
    part = vector[start : start + size].reshape(shape)
    out.append(part.astype(dtype or jnp.result_type(leaf)))
    start += size
  return treedef.unflatten(out)


def wide_dtype(tree: Any) -> Any:
  """The dtype in which the leaves of ``tree`` are computed with as one vector."""
  dtypes = [common.accumulator(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]
  return max(dtypes, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def _rows(tree: Any, count: int, dtype: Any) -> jax.Array:
  """Leaves with a leading axis as one matrix [count, d]."""
  parts = [leaf.reshape(count, -1).astype(dtype) for leaf in jax.tree.leaves(tree)]
  return jnp.concatenate(parts, axis=1)


def _gram_form(rows: jax.Array, c: Any) -> Any:
  """``c G^T G``, dense when that is the smaller."""
  if rows.shape[0] < rows.shape[1]:
    return LowRankHessian(rows, c)
  return c * jnp.matmul(rows.T, rows, precision=lax.Precision.HIGHEST)


def call(function: Callable[..., Any], x: Any, batch: Any) -> Any:
  """``function(x, batch)``, or ``function(x)`` where it takes no batch."""
  named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  parameters = inspect.signature(function).parameters.values()
  positional = [p for p in parameters if p.kind in named]
  required = sum(p.default is p.empty for p in positional)
  several = len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
  if required > 1 or (several and batch is not None):
    return function(x, batch)
  return function(x)


def exact_hessian(value_fn: Callable[..., jax.Array]) -> HessFn:
  """``hess_fn(x, batch=None)``: the Hessian [d, d] of ``value_fn(x[, batch])``."""

  def hess_fn(x: Any, batch: Any = None) -> jax.Array:
    dtype = wide_dtype(x)

    def gradient(flat: jax.Array) -> jax.Array:
      grad = jax.grad(lambda x: call(value_fn, x, batch))(unflatten(flat, x))
      return flatten(grad, dtype)

    return jax.jacfwd(gradient)(flatten(x, dtype))

  return hess_fn


def empirical_fisher(losses_fn: Callable[..., jax.Array]) -> HessFn:
  """``hess_fn(x, batch=None)``: the mean of ``g g^T`` over examples.

  Args:
    losses_fn: ``losses_fn(x[, batch]) -> [n]``, the loss of every example.

  Returns:
    A function whose result is low-rank where n < d, and dense otherwise.
  """

  def hess_fn(x: Any, batch: Any = None) -> Any:
    grads = jax.jacrev(lambda x: call(losses_fn, x, batch))(x)
    count = jax.tree.leaves(grads)[0].shape[0]
    return _gram_form(_rows(grads, count, wide_dtype(x)), 1 / count)

  return hess_fn


def gauss_newton(
  outputs_fn: Callable[..., jax.Array],
  output_loss: Callable[..., jax.Array] | None = None,
) -> HessFn:
  """``hess_fn(x, batch=None)``: ``J^T H_out J``.

  Args:
    outputs_fn: ``outputs_fn(x[, batch])``, an array of k outputs with Jacobian J.
    output_loss: the loss as a function of ``outputs[, batch]``, with Hessian H_out;
      None is half the sum of squares.

  Returns:
    A function whose result is [d, d], or low-rank where k < d and H_out is one.
  """

  def hess_fn(x: Any, batch: Any = None) -> Any:
    def outputs_at(x: Any) -> jax.Array:
      return jnp.ravel(call(outputs_fn, x, batch))

    outputs, dtype = call(outputs_fn, x, batch), wide_dtype(x)
    rows = _rows(jax.jacrev(outputs_at)(x), outputs.size, dtype)
    if output_loss is None:
      return _gram_form(rows, 1.0)
    inner = jax.hessian(lambda z: call(output_loss, z, batch))(outputs)
    square = inner.reshape(outputs.size, outputs.size).astype(dtype)
    half = jnp.matmul(square, rows, precision=lax.Precision.HIGHEST)
    return jnp.matmul(rows.T, half, precision=lax.Precision.HIGHEST)

  return hess_fn


def rank_one(vector_fn: Callable[..., Any], c: jax.typing.ArrayLike = 1.0) -> HessFn:
  """``hess_fn(x, batch=None)``: ``c v v^T`` with ``v = vector_fn(x[, batch])``."""

  def hess_fn(x: Any, batch: Any = None) -> LowRankHessian:
    vector = flatten(call(vector_fn, x, batch), wide_dtype(x))
    return LowRankHessian(vector[None], c)

  return hess_fn


def zero(x: Any, batch: Any = None) -> None:
  """``hess_fn(x, batch=None)``: no curvature at all."""
  del x, batch
