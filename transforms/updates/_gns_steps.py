"""Gradient-normalised smoothness as a loop of its own and as a transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import check_float_leaves
from gradlab.transforms.updates import _curvature as curvature
from gradlab.transforms.updates._curvature import (
  HessFn,
  LowRankHessian,
  flatten,
  unflatten,
)
from gradlab.transforms.updates._gns import Rule, search

ValueAndGrad = Callable[..., tuple[jax.Array, Any]]
_MISSING: Any = object()


class GNSState(NamedTuple):
  """Where the method stands.

  Attributes:
    params: the point, for ``step``; None in a chain, where the caller has it.
    value: scalar, the objective there; inf before it is known.
    grad: the gradient there, a tree like the parameters in at least float32.
    gamma: scalar, the radius that the next search starts from.
    count: int32 scalar, the number of iterations done.
    num_evals: int32 scalar, evaluations of value and gradient, the first included.
    accepted: whether the last search ended with a step that passed the test.
  """

  params: Any
  value: jax.Array
  grad: Any
  gamma: jax.Array
  count: jax.Array  # type: ignore[assignment]
  num_evals: jax.Array
  accepted: jax.Array


class GNSTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
  """A transformation that can also be stepped by itself.

  Attributes:
    step: ``step(state, batch=None) -> state``, the whole iteration.
  """

  step: Callable[..., GNSState]

  def __new__(
    cls, init: Any, update: Any, step: Callable[..., GNSState]
  ) -> "GNSTransformation":
    self: GNSTransformation = super().__new__(cls, init, update)
    self.step = step
    return self


class Steps(NamedTuple):
  """The functions of one choice of arguments."""

  value_and_grad_fn: ValueAndGrad | None
  hess_fn: HessFn | None
  hessian: str
  gamma_init: jax.typing.ArrayLike
  metric: Any
  rule: Rule

  def init(self, params: Any, batch: Any = None) -> GNSState:
    check_float_leaves(params, "gradient_normalized_smoothness")
    dtype = curvature.wide_dtype(params)
    count = jnp.zeros([], jnp.int32)
    start = GNSState(
      None,
      jnp.full([], jnp.inf, dtype),
      jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), dtype), params),
      # A copy, because the state may be donated.
      jnp.array(self.gamma_init, dtype),
      count,
      jnp.zeros([], jnp.int32),
      jnp.ones([], jnp.bool_),
    )
    if self.value_and_grad_fn is None:
      return start
    point = jax.tree.map(jnp.array, params)
    value, grad = curvature.call(self.value_and_grad_fn, point, batch)
    grad = unflatten(flatten(grad, dtype), point, dtype)
    one = jnp.ones([], jnp.int32)
    value = jnp.asarray(value).astype(dtype)
    return start._replace(params=point, value=value, grad=grad, num_evals=one)

  def advance(
    self, state: GNSState, params: Any, value: Any, grad: Any, evaluate: Any, hess: Any
  ) -> tuple[jax.Array, GNSState]:
    dtype = state.gamma.dtype
    x, g = flatten(params, dtype), flatten(grad, dtype)

    def value_and_grad(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
      value, grad = evaluate(unflatten(flat, params))
      return jnp.asarray(value).astype(dtype), flatten(grad, dtype)

    if hess is _MISSING:
      hess = None
      if self.hessian == "exact":
        hess = jax.jacfwd(lambda flat: value_and_grad(flat)[1])(x)
      elif self.hessian == "rank_one":
        hess = LowRankHessian(g[None])
    metric = curvature.make_metric(self.metric, x.size, dtype)
    solve = curvature.regularized_solve(hess, metric, dtype)
    now = jnp.asarray(value).astype(dtype)
    found = search(x, now, g, state.gamma, solve, metric, value_and_grad, self.rule)
    old = flatten(state.grad, dtype)
    known = state.count >= 0  # Always; every buffer of the old state has a use.
    return found.direction, GNSState(
      None,
      jnp.where(known, found.value, state.value),
      unflatten(jnp.where(known, found.grad, old), state.grad, dtype),
      found.gamma,
      optax.safe_increment(state.count),
      state.num_evals + found.num_evals,
      jnp.where(known, found.accepted, state.accepted),
    )

  def step(self, state: GNSState, batch: Any = None) -> GNSState:
    evaluate = self.value_and_grad_fn
    if evaluate is None:
      raise ValueError("step needs a method that was made with value_and_grad_fn.")
    hess = _MISSING
    if self.hess_fn is not None:
      hess = curvature.call(self.hess_fn, state.params, batch)

    def at(x: Any) -> Any:
      return curvature.call(evaluate, x, batch)

    d, new = self.advance(state, state.params, state.value, state.grad, at, hess)
    moved = flatten(state.params, d.dtype) + d
    return new._replace(params=unflatten(moved, state.params))

  def update(
    self,
    updates: optax.Updates,
    state: GNSState,
    params: optax.Params | None = None,
    *,
    value: Any = None,
    value_and_grad_fn: ValueAndGrad | None = None,
    value_fn: Callable[[Any], jax.Array] | None = None,
    grad_fn: Callable[[Any], Any] | None = None,
    hess: Any = _MISSING,
    batch: Any = None,
    **extra: Any,
  ) -> tuple[optax.Updates, GNSState]:
    del extra
    check_float_leaves(updates, "gradient_normalized_smoothness")
    evaluate = _evaluation(value_and_grad_fn, value_fn, grad_fn)
    if evaluate is None and self.value_and_grad_fn is not None:
      own = self.value_and_grad_fn
      evaluate = lambda x: curvature.call(own, x, batch)  # noqa: E731
    for name, given in (("params", params), ("value", value), ("value_fn", evaluate)):
      if given is None:
        raise ValueError(
          f"gradient_normalized_smoothness needs {name} in update, as an argument."
        )
    if hess is _MISSING and self.hess_fn is not None:
      hess = curvature.call(self.hess_fn, params, batch)
    d, new = self.advance(state, params, value, updates, evaluate, hess)
    return unflatten(d, updates), new._replace(params=state.params)


def _evaluation(value_and_grad_fn: Any, value_fn: Any, grad_fn: Any) -> Any:
  """``x -> (value, grad)`` from what the caller of update has."""
  if value_and_grad_fn is not None or value_fn is None:
    return value_and_grad_fn
  if grad_fn is None:
    return jax.value_and_grad(value_fn)
  return lambda x: (value_fn(x), grad_fn(x))
