"""The damped empirical Fisher of a window of gradients, through its Gram matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular

from gradlab.transforms._common import check_range, one_by_one
from gradlab.transforms.updates import _common as common


def _window(grads: Any, damping: Any) -> tuple[jax.Array, jax.Array]:
  """The checked window and damping in at least float32."""
  grads = jnp.asarray(grads)
  if grads.ndim != 2 or not grads.size:
    raise ValueError(
      f"the gradients must be m >= 1 rows of d >= 1 numbers, got {grads.shape}."
    )
  check_range("damping", damping, 0, open_low=True)
  dtype = common.accumulator(grads.dtype)
  return grads.astype(dtype), common.scalar(damping).astype(dtype)


def _root(gram: jax.Array, damping: jax.Array) -> jax.Array:
  """The lower Cholesky factor of ``m damping I + gram``."""
  m = gram.shape[0]
  eye = jnp.eye(m, dtype=gram.dtype)
  factorised = one_by_one(jnp.linalg.cholesky)
  root = factorised(gram + m * damping * eye)
  # Nearly dependent gradients: rounding may have made the matrix indefinite.
  lift = m * damping + 4 * float(np.finfo(gram.dtype).eps) * jnp.trace(gram)
  return lax.cond(
    jnp.all(jnp.isfinite(root)), lambda: root, lambda: factorised(gram + lift * eye)
  )


def _gram(grads: jax.Array) -> jax.Array:
  return jnp.matmul(grads, grads.T, precision=lax.Precision.HIGHEST)


def _ivp(grads: jax.Array, x: jax.Array, damping: jax.Array) -> jax.Array:
  """``F^{-1} x`` for the columns of ``x`` [d, k]."""
  high = lax.Precision.HIGHEST
  seen = jnp.matmul(grads, x, precision=high)
  weights = cho_solve((_root(_gram(grads), damping), True), seen)
  return (x - jnp.matmul(grads.T, weights, precision=high)) / damping


def _columns(x: Any, d: int, dtype: Any) -> jax.Array:
  x = jnp.asarray(x)
  if x.ndim not in (1, 2) or x.shape[-1] != d:
    raise ValueError(f"x must have shape ({d},) or (k, {d}), got {x.shape}.")
  return x.reshape(-1, d).T.astype(dtype)


def fisher_ivp(
  G: jax.typing.ArrayLike, x: jax.typing.ArrayLike, damping: jax.typing.ArrayLike
) -> jax.Array:
  r"""The inverse of a damped empirical Fisher times a vector.

  .. math::
    F = \lambda I + G^\top G / m, \qquad S = m \lambda I + G G^\top, \qquad
    F^{-1} x = (x - G^\top S^{-1} G x) / \lambda

  For an ``x`` in the span of the rows and a small damping the difference cancels:
  there, in float32, use :func:`scale_by_mfac`, which does not subtract.

  Args:
    G: m gradients of d numbers, [m, d].
    x: [d], or k of them, [k, d].
    damping: lambda > 0.

  Returns:
    An array of the shape and dtype of ``x``; computed in at least float32.

  Raises:
    ValueError: an empty window, shapes that do not fit, or a damping <= 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import fisher_ivp
    >>> window = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> fisher_ivp(window, jnp.array([2.0, -1.0]), 0.5).round(4).tolist()
    [2.0, -2.0]

  References:
    Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information <https://arxiv.org/abs/2107.03356>`_, 2021
  """
  grads, ridge = _window(G, damping)
  out = _ivp(grads, _columns(x, grads.shape[1], grads.dtype), ridge)
  return out.T.reshape(jnp.shape(x)).astype(jnp.result_type(x))


def fisher_inverse_diag(
  G: jax.typing.ArrayLike, damping: jax.typing.ArrayLike
) -> jax.Array:
  r"""The diagonal of the inverse of a damped empirical Fisher.

  .. math::
    [F^{-1}]_{ii} = (1 - \|L^{-1} G_{:, i}\|^2) / \lambda, \qquad
    L L^\top = m \lambda I + G G^\top

  :math:`\theta_i^2 / (2 [F^{-1}]_{ii})` is what pruning :math:`\theta_i` costs.

  Args:
    G: m gradients of d numbers, [m, d].
    damping: lambda > 0.

  Returns:
    Positive numbers [d] in the dtype of ``G``; computed in at least float32.

  Raises:
    ValueError: an empty window or a damping <= 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import fisher_inverse_diag
    >>> window = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> print(*(f"{number:.4f}" for number in fisher_inverse_diag(window, 0.5)))
    0.8000 1.2000

  References:
    Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information <https://arxiv.org/abs/2107.03356>`_, 2021
  """
  grads, ridge = _window(G, damping)
  z = solve_triangular(_root(_gram(grads), ridge), grads, lower=True)
  diagonal = (1 - jnp.sum(jnp.square(z), axis=0)) / ridge
  # 1 / F_ii bounds it from below; rounding may have taken the difference under that.
  floor = 1 / (ridge + jnp.mean(jnp.square(grads), axis=0))
  return jnp.maximum(diagonal, floor).astype(jnp.result_type(G))


def fisher_ivp_blocked(
  G: jax.typing.ArrayLike,
  x: jax.typing.ArrayLike,
  block_size: int,
  damping: jax.typing.ArrayLike,
) -> jax.Array:
  r"""Like :func:`fisher_ivp` for the diagonal blocks of the Fisher alone.

  .. math::
    F = \operatorname{diag}(F_1, F_2, \dots), \qquad
    F_b = \lambda I + G_{:, b}^\top G_{:, b} / m

  Args:
    G: m gradients of d numbers, [m, d].
    x: [d], or k of them, [k, d].
    block_size: successive parameters per block, >= 1; the last block may be short.
    damping: lambda > 0.

  Returns:
    An array of the shape and dtype of ``x``; computed in at least float32.

  Raises:
    ValueError: an empty window, shapes that do not fit, a block size below 1, or a
      damping <= 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import fisher_ivp_blocked
    >>> window = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> fisher_ivp_blocked(window, jnp.array([3.0, -1.0]), 1, 0.5).round(4).tolist()
    [2.0, -1.0]

  References:
    Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information <https://arxiv.org/abs/2107.03356>`_, 2021
  """
  if block_size < 1:
    raise ValueError(f"block_size must be at least 1, got {block_size}.")
  grads, ridge = _window(G, damping)
  m, d = grads.shape
  columns = _columns(x, d, grads.dtype)
  size = min(block_size, d)
  # Columns of zeros decouple from the rest, so the last block may be padded.
  pad = -d % size
  blocks = jnp.pad(grads, ((0, 0), (0, pad))).reshape(m, -1, size)
  parts = jnp.pad(columns, ((0, pad), (0, 0))).reshape(-1, size, columns.shape[1])
  out = jax.vmap(_ivp, in_axes=(1, 0, None))(blocks, parts, ridge)
  out = out.reshape(d + pad, -1)[:d]
  return out.T.reshape(jnp.shape(x)).astype(jnp.result_type(x))


def step_weights(gram: jax.Array, slot: jax.Array, damping: jax.Array) -> jax.Array:
  """``m S^{-1} e_slot``: the weights of the rows in ``F^{-1} G_slot``."""
  m = gram.shape[0]
  unit = jax.nn.one_hot(slot, m, dtype=gram.dtype)
  return m * cho_solve((_root(gram, damping), True), unit)
