"""Reverse-mode differentiation: the default estimator."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradlab.types import Estimator, LossFn, Params, State, method


@method(
  family="estimators",
  paper=(
    "Rumelhart, Hinton and Williams, Learning Representations by Back-Propagating "
    "Errors, 1986"
  ),
)
def backprop() -> Estimator:
  r"""The exact gradient, by ``jax.value_and_grad``.

  .. math::

    g = \nabla_\theta L(\theta)

  Integer and boolean leaves of the parameters reach the loss untouched and get a
  zero gradient of their own dtype, so that ``grads`` always looks like ``params``.

  Returns:
    An ``Estimator`` without state (``optax.EmptyState``). ``estimate`` swallows
    every extra keyword. Inside ``jax.pmap`` the gradient is the replica's own: the
    average over replicas is the caller's.

  Raises:
    TypeError: from jax, when the loss is not a real scalar.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.estimators import backprop
    >>> estimator = backprop()
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> state = estimator.init(params)
    >>> def loss_fn(p):
    ...   return jnp.sum(p["w"] ** 2), {}
    >>> (loss, aux), grads, state = estimator.estimate(loss_fn, params, state)
    >>> print(loss, grads["w"])
    5.0 [ 2. -4.]

  References:
    Rumelhart, Hinton and Williams, Learning Representations by Back-Propagating
    Errors, Nature, 1986.
  """

  def init(params: Params) -> optax.EmptyState:
    del params
    return optax.EmptyState()

  def estimate(
    loss_fn: LossFn, params: Params, state: State, **extra: Any
  ) -> tuple[tuple[jax.Array, Any], Params, State]:
    del extra
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True, allow_int=True)
    value, grads = value_and_grad(params)
    return value, jax.tree.map(_in_dtype_of, params, grads), state

  return Estimator(init, estimate)


def _in_dtype_of(param: jax.Array, grad: jax.Array) -> jax.Array:
  # jax gives integer inputs a float0 cotangent, which no arithmetic accepts.
  return jnp.zeros_like(param) if grad.dtype == jax.dtypes.float0 else grad
