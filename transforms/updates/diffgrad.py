"""diffGrad: Adam, damped where the gradient has stopped changing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.transforms._common import check_float_leaves, check_range, concrete
from gradlab.transforms.updates import _common as common
from gradlab.types import method


class DiffGradState(NamedTuple):
  """State of diffGrad; every tree has the structure and shapes of the parameters.

  Attributes:
    count: int32 scalar, the number of steps done.
    mu: moving average of the gradients.
    nu: moving average of the squared gradients.
    g_prev: the gradient of the step before.
  """

  count: jax.Array  # type: ignore[assignment]
  mu: optax.Updates
  nu: optax.Updates
  g_prev: optax.Updates


def _check(b1: Any, b2: Any, eps: Any) -> None:
  check_range("b1", b1, 0, 1, open_high=True)
  check_range("b2", b2, 0, 1, open_high=True)
  check_range("eps", eps, 0, open_low=True)


def _init(params: optax.Params) -> DiffGradState:
  check_float_leaves(params, "diffGrad")

  def zeros() -> optax.Updates:
    return jax.tree.map(
      lambda p: jnp.zeros(jnp.shape(p), common.accumulator(jnp.result_type(p))), params
    )

  return DiffGradState(jnp.zeros([], jnp.int32), zeros(), zeros(), zeros())


def _advance(
  gradients: optax.Updates,
  state: DiffGradState,
  b1: jax.typing.ArrayLike,
  b2: jax.typing.ArrayLike,
  eps: jax.typing.ArrayLike,
) -> tuple[optax.Updates, DiffGradState]:
  """The direction, in at least float32, and the next state."""
  count = optax.safe_increment(state.count)
  c1, c2 = common.bias_correction(b1, count), common.bias_correction(b2, count)
  factors = [common.scalar(x) for x in (b1, 1 - b1, b2, 1 - b2, jnp.sqrt(c2) / c1, eps)]

  def leaf(g: Any, mu: Any, nu: Any, g_prev: Any) -> tuple[jax.Array, ...]:
    d1, k1, d2, k2, a, floor = (x.astype(mu.dtype) for x in factors)
    g = jnp.asarray(g).astype(mu.dtype)
    mu = d1 * mu + k1 * g
    nu = d2 * nu + k2 * jnp.square(g)
    # sigmoid(|d|) = 1 / (1 + exp(-|d|)) goes into the one division; it scales the
    # output only: the average itself is Adam's.
    s = a * mu / ((1 + jnp.exp(-jnp.abs(g_prev - g))) * (jnp.sqrt(nu) + floor))
    # This is g. A plain copy of it could not be written while g_prev is still read,
    # and XLA would keep one more array.
    return s, mu, nu, jnp.where(count > 0, g, s)

  s, mu, nu, g_prev = common.unzip_map(
    leaf, 4, gradients, state.mu, state.nu, state.g_prev
  )
  return s, DiffGradState(count, mu, nu, g_prev)


def scale_by_diffgrad(
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
  r"""The direction of :func:`diffgrad`: neither negated nor scaled by a learning rate.

  .. math::
    s_t = \frac{\sqrt{1 - b_2^t}}{1 - b_1^t}
      \frac{\xi_t \mu_t}{\sqrt{\nu_t} + \epsilon}

  Args:
    b1: decay of the average of gradients, in [0, 1).
    b2: decay of the average of squared gradients, in [0, 1).
    eps: added to the root before the bias correction, > 0.

  Returns:
    A transformation with float32 state whose output has the dtype of the gradients.

  Raises:
    ValueError: an argument out of its range, or a leaf that is not floating point.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import scale_by_diffgrad
    >>> transform = scale_by_diffgrad()
    >>> s, state = transform.update(jnp.array([2.0, 0.0]), transform.init(jnp.ones(2)))
    >>> [f"{x:.4f}" for x in s]
    ['0.8808', '0.0000']

  References:
    Dubey et al., `diffGrad: An Optimization Method for Convolutional Neural Networks
    <https://arxiv.org/abs/1909.11015>`_, 2020
  """
  _check(b1, b2, eps)

  def update(
    updates: optax.Updates,
    state: DiffGradState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, DiffGradState]:
    del params, extra
    check_float_leaves(updates, "diffGrad")
    s, state = _advance(updates, state, b1, b2, eps)
    return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), s, updates), state

  return optax.GradientTransformationExtraArgs(_init, update)


@method(
  family="updates",
  paper="Dubey et al., diffGrad: An Optimization Method for Convolutional Neural "
  "Networks, 2020",
  arxiv="1909.11015",
  seeds=("004:24",),
)
def diffgrad(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  l2: jax.typing.ArrayLike = 0.0,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""diffGrad: Adam times a friction in [1/2, 1) that grows with the gradient's change.

  .. math::
    g_t &\leftarrow g_t + \lambda_2 \theta_{t-1} \\
    \mu_t &= b_1 \mu_{t-1} + (1 - b_1) g_t, \quad
    \nu_t = b_2 \nu_{t-1} + (1 - b_2) g_t^2 \\
    \xi_t &= \mathrm{sigmoid}(|g_{t-1} - g_t|), \quad g_0 = 0 \\
    s_t &= \frac{\sqrt{1 - b_2^t}}{1 - b_1^t}
      \frac{\xi_t \mu_t}{\sqrt{\nu_t} + \epsilon} \\
    \theta_t &= \theta_{t-1} - \eta (s_t + \lambda \theta_{t-1})

  The friction is not scale invariant: where gradients change by much less than one
  it is 1/2, and diffGrad is Adam at half the learning rate.

  Args:
    learning_rate: eta >= 0, a number or a schedule.
    b1: decay of the average of gradients, in [0, 1).
    b2: decay of the average of squared gradients, in [0, 1).
    eps: added to the root before the bias correction, > 0.
    l2: coupled decay >= 0, added to the gradient as params times l2.
    weight_decay: lambda >= 0, decoupled as in AdamW; not together with l2.
    mask: which leaves decay (either way): a prefix tree of bools, a function of
      params that returns one, or None for all.

  Returns:
    A transformation with a float32 :class:`DiffGradState`.

  Raises:
    ValueError: an argument out of its range, l2 and weight_decay both on, a leaf that
      is not floating point, or no params although a decay is on.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import diffgrad
    >>> transform, theta = diffgrad(0.1), jnp.array(1.0)
    >>> state = transform.init(theta)
    >>> for g in (1.0, 0.5):
    ...   update, state = transform.update(jnp.array(g), state)
    ...   theta = optax.apply_updates(theta, update)
    >>> print(f"{theta:.4f}")
    0.8689

  References:
    Dubey et al., `diffGrad: An Optimization Method for Convolutional Neural Networks
    <https://arxiv.org/abs/1909.11015>`_, 2020
  """
  _check(b1, b2, eps)
  check_range("learning_rate", learning_rate, 0)
  check_range("l2", l2, 0)
  check_range("weight_decay", weight_decay, 0)
  both = (l2, weight_decay)
  if all(concrete(x) and np.all(np.asarray(x) > 0) for x in both):
    raise ValueError(
      "diffgrad takes l2 or weight_decay, not both: set one of them to 0."
    )

  def update(
    updates: optax.Updates,
    state: DiffGradState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, DiffGradState]:
    del extra
    check_float_leaves(updates, "diffGrad")
    for name, value in (("l2", l2), ("weight_decay", weight_decay)):
      if not common.is_off(value):
        common.need_params(params, "diffgrad", name)
    gradients = updates
    if not common.is_off(l2):
      gradients = _add_l2(updates, params, l2, mask)
    rate = common.rate_at(learning_rate, state.count)
    s, state = _advance(gradients, state, b1, b2, eps)
    return common.descend(s, updates, params, rate, weight_decay, mask), state

  return optax.GradientTransformationExtraArgs(_init, update)


def _add_l2(
  updates: optax.Updates, params: optax.Params, l2: jax.typing.ArrayLike, mask: Any
) -> optax.Updates:
  def leaf(g: Any, theta: Any, decays: bool) -> jax.Array:
    g = jnp.asarray(g).astype(common.accumulator(jnp.result_type(g)))
    coefficient = common.scalar(l2).astype(g.dtype)
    return g + coefficient * jnp.asarray(theta).astype(g.dtype) if decays else g

  return jax.tree.map(leaf, updates, params, common.decayed(mask, params))
