"""Linear warmup, then one cosine from the peak to the end value."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gradlab.transforms.controllers._common import from_schedule
from gradlab.types import Controller, method


@method(
  family="controllers",
  paper="Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, "
  "2017",
  arxiv="1608.03983",
)
def warmup_cosine(
  peak_value: ArrayLike,
  warmup_steps: int,
  decay_steps: int,
  init_value: ArrayLike = 0.0,
  end_value: ArrayLike = 0.0,
) -> Controller:
  r"""Linear warmup, then one cosine from the peak to the end value.

  .. math::
    v_t = \begin{cases}
      v_0 + (v_{peak} - v_0) \, t / W, & t < W \\
      v_{end} + \tfrac12 (v_{peak} - v_{end})
        \left(1 + \cos \frac{\pi \min(t - W, D - W)}{D - W}\right), & t \ge W
    \end{cases}

  with W = ``warmup_steps`` and D = ``decay_steps``: ``warmup_cosine_schedule`` as a
  controller, whose value depends on the step alone.

  Args:
    peak_value: the value at step ``warmup_steps``.
    warmup_steps: steps of linear warmup, 0 or more.
    decay_steps: steps of warmup and cosine together, more than ``warmup_steps``.
    init_value: the value at step 0 (when there is a warmup).
    end_value: the value from step ``decay_steps`` on.

  Returns:
    A ``Controller`` without state of its own.

  Raises:
    ValueError: ``warmup_steps`` below 0, or ``decay_steps`` not above it.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import warmup_cosine
    >>> controller = warmup_cosine(1.0, warmup_steps=2, decay_steps=6)
    >>> value, state = controller.init()
    >>> values = [float(value)]
    >>> for step in range(1, 7):
    ...   value, state = controller.update({"step": jnp.int32(step)}, state)
    ...   values.append(round(float(value), 4))
    >>> values
    [0.0, 0.5, 1.0, 0.8536, 0.5, 0.1464, 0.0]

  References:
    Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017,
    arXiv 1608.03983.
  """
  return from_schedule(
    warmup_cosine_schedule(peak_value, warmup_steps, decay_steps, init_value, end_value)
  )


def warmup_cosine_schedule(
  peak_value: ArrayLike,
  warmup_steps: int,
  decay_steps: int,
  init_value: ArrayLike = 0.0,
  end_value: ArrayLike = 0.0,
) -> optax.Schedule:
  r"""The schedule of ``warmup_cosine``, for use as a plain optax schedule.

  .. math::
    v_t = \begin{cases}
      v_0 + (v_{peak} - v_0) \, t / W, & t < W \\
      v_{end} + \tfrac12 (v_{peak} - v_{end})
        \left(1 + \cos \frac{\pi \min(t - W, D - W)}{D - W}\right), & t \ge W
    \end{cases}

  It is ``optax.warmup_cosine_decay_schedule`` with values that may be traced, and
  with ``end_value`` honoured also when the peak is 0.

  Args:
    peak_value: the value at step W = ``warmup_steps``.
    warmup_steps: steps of linear warmup, 0 or more.
    decay_steps: D, steps of warmup and cosine together, more than ``warmup_steps``.
    init_value: the value at step 0 (when there is a warmup).
    end_value: the value from step D on.

  Returns:
    ``schedule(step) -> value``.

  Raises:
    ValueError: ``warmup_steps`` below 0, or ``decay_steps`` not above it.

  Examples:
    >>> from gradlab.transforms import warmup_cosine_schedule
    >>> schedule = warmup_cosine_schedule(0.1, warmup_steps=10, decay_steps=100)
    >>> round(float(schedule(5)), 6)
    0.05

  References:
    Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017,
    arXiv 1608.03983.
  """
  if warmup_steps < 0:
    raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps!r}.")
  if decay_steps <= warmup_steps:
    raise ValueError(
      f"decay_steps counts the warmup too and must be more than warmup_steps, got "
      f"{decay_steps!r} and {warmup_steps!r}."
    )
  warmup = optax.linear_schedule(init_value, peak_value, warmup_steps)
  cosine = optax.cosine_decay_schedule(1.0, decay_steps - warmup_steps)

  def decay(step: jax.Array) -> jax.Array:
    share = cosine(step)
    # Two products, so that both ends are met exactly.
    value: jax.Array = peak_value * share + end_value * (1.0 - share)
    return value

  joined = optax.join_schedules([warmup, decay], [warmup_steps])
  return lambda step: joined(jnp.asarray(step, jnp.float32))
