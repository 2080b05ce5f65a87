"""Helpers that the controllers share."""

import jax
import jax.numpy as jnp
import optax

from gradlab.types import Controller, Metrics


def from_schedule(schedule: optax.Schedule) -> Controller:
  """The controller that follows a schedule of the number of steps done.

  Args:
    schedule: ``schedule(step) -> value`` for an int32 scalar step.

  Returns:
    A ``Controller`` whose ``init`` gives ``schedule(0)`` and whose ``update`` gives
    ``schedule(metrics["step"])``, as float32 scalars. It has no state of its own.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.controllers import from_schedule
    >>> controller = from_schedule(lambda step: 0.5 ** step.astype(jnp.float32))
    >>> value, state = controller.init()
    >>> value, state = controller.update({"step": jnp.int32(3)}, state)
    >>> float(value)
    0.125
  """

  def value_at(step: jax.Array) -> jax.Array:
    return jnp.asarray(schedule(step), jnp.float32)

  def init() -> tuple[jax.Array, optax.EmptyState]:
    return value_at(jnp.zeros((), jnp.int32)), optax.EmptyState()

  def update(
    metrics: Metrics, state: optax.EmptyState
  ) -> tuple[jax.Array, optax.EmptyState]:
    return value_at(jnp.asarray(metrics["step"], jnp.int32)), state

  return Controller(init, update)
