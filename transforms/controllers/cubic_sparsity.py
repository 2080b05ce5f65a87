"""Cubic sparsity schedule: prune fast while weights are redundant, then slowly."""

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from gradlab.transforms._common import check_range, concrete
from gradlab.transforms.controllers._common import from_schedule
from gradlab.types import Controller, method


@method(
  family="controllers",
  paper="Zhu & Gupta, To prune, or not to prune: exploring the efficacy of pruning "
  "for model compression, 2017",
  arxiv="1710.01878",
)
def cubic_sparsity(
  final_sparsity: ArrayLike,
  num_updates: int,
  interval: int,
  initial_sparsity: ArrayLike = 0.0,
  start_step: int = 0,
) -> Controller:
  r"""Cubic sparsity schedule: prune fast while weights are redundant, then slowly.

  .. math::
    s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{n \, \Delta t}\right)^3,
    \qquad t_0 \le t \le t_0 + n \, \Delta t

  with :math:`s_i` before and :math:`s_f` after: ``cubic_sparsity_schedule`` as a
  controller, whose value depends on the step alone.

  Args:
    final_sparsity: the sparsity reached after ``num_updates * interval`` steps, in
      [0, 1).
    num_updates: n, the number of pruning updates, 1 or more.
    interval: steps between two updates, 1 or more.
    initial_sparsity: the sparsity until ``start_step``, in [0, 1), not above the
      final one.
    start_step: the step at which pruning begins, 0 or more.

  Returns:
    A ``Controller`` without state of its own.

  Raises:
    ValueError: a concrete sparsity outside its range, or a count below its minimum.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import cubic_sparsity
    >>> controller = cubic_sparsity(0.8, num_updates=2, interval=10)
    >>> value, state = controller.init()
    >>> value, state = controller.update({"step": jnp.int32(10)}, state)
    >>> round(float(value), 4)
    0.7

  References:
    Zhu & Gupta, To prune, or not to prune: exploring the efficacy of pruning for model
    compression, 2017, arXiv 1710.01878.
  """
  return from_schedule(
    cubic_sparsity_schedule(
      final_sparsity, num_updates, interval, initial_sparsity, start_step
    )
  )


def cubic_sparsity_schedule(
  final_sparsity: ArrayLike,
  num_updates: int,
  interval: int,
  initial_sparsity: ArrayLike = 0.0,
  start_step: int = 0,
) -> optax.Schedule:
  r"""The schedule of ``cubic_sparsity``, for use as a plain optax schedule.

  .. math::
    s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{n \, \Delta t}\right)^3,
    \qquad t_0 \le t \le t_0 + n \, \Delta t

  with :math:`s_i` before and :math:`s_f` after. The value changes at every step; when
  weights are pruned is for the caller to decide (every :math:`\Delta t` steps in the
  paper).

  Args:
    final_sparsity: :math:`s_f` in [0, 1).
    num_updates: n, 1 or more.
    interval: :math:`\Delta t` in steps, 1 or more.
    initial_sparsity: :math:`s_i` in [0, 1), not above the final one.
    start_step: :math:`t_0`, 0 or more.

  Returns:
    ``schedule(step) -> sparsity``.

  Raises:
    ValueError: a concrete sparsity outside its range, or a count below its minimum.

  Examples:
    >>> from gradlab.transforms import cubic_sparsity_schedule
    >>> schedule = cubic_sparsity_schedule(0.9, 10, 5, start_step=100)
    >>> [round(float(schedule(t)), 4) for t in (0, 100, 125, 150, 1000)]
    [0.0, 0.0, 0.7875, 0.9, 0.9]

  References:
    Zhu & Gupta, To prune, or not to prune: exploring the efficacy of pruning for model
    compression, 2017, arXiv 1710.01878.
  """
  check_range("final_sparsity", final_sparsity, 0.0, 1.0, open_high=True)
  # A traced end is compared with nothing; two numbers can be ordered now.
  highest = float(np.max(final_sparsity)) if concrete(final_sparsity) else 1.0
  check_range("initial_sparsity", initial_sparsity, 0.0, highest)
  for name, value, low in (
    ("num_updates", num_updates, 1),
    ("interval", interval, 1),
    ("start_step", start_step, 0),
  ):
    if value < low:
      raise ValueError(f"{name} must be {low} or more, got {value!r}.")
  ramp = optax.polynomial_schedule(
    initial_sparsity,
    final_sparsity,
    power=3,
    transition_steps=num_updates * interval,
    transition_begin=start_step,
  )
  return lambda step: ramp(jnp.asarray(step, jnp.float32))
