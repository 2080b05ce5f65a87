"""Adan: a Nesterov estimate from gradient differences, with Adam's denominator."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import check_float_leaves, check_range
from gradlab.transforms.updates import _common as common
from gradlab.types import method


class AdanState(NamedTuple):
  """State of Adan; every tree has the structure and shapes of the parameters.

  Attributes:
    count: int32 scalar, the number of steps done.
    m: moving average of the gradients.
    v: moving average of the gradient differences.
    n: moving average of the squared look-ahead gradients.
    g_prev: the gradient of the step before (after clipping).
  """

  count: jax.Array  # type: ignore[assignment]
  m: optax.Updates
  v: optax.Updates
  n: optax.Updates
  g_prev: optax.Updates


def _check(b1: Any, b2: Any, b3: Any, eps: Any) -> None:
  for name, decay in (("b1", b1), ("b2", b2), ("b3", b3)):
    check_range(name, decay, 0, 1, open_high=True)
  check_range("eps", eps, 0, open_low=True)


def _init(params: optax.Params, accumulator_dtype: Any) -> AdanState:
  check_float_leaves(params, "Adan")

  def zeros() -> optax.Updates:
    return jax.tree.map(
      lambda p: jnp.zeros(
        jnp.shape(p), accumulator_dtype or common.accumulator(jnp.result_type(p))
      ),
      params,
    )

  return AdanState(jnp.zeros([], jnp.int32), zeros(), zeros(), zeros(), zeros())


def _advance(
  updates: optax.Updates,
  state: AdanState,
  b1: jax.typing.ArrayLike,
  b2: jax.typing.ArrayLike,
  b3: jax.typing.ArrayLike,
  eps: jax.typing.ArrayLike,
  clip: jax.Array | None = None,
) -> tuple[optax.Updates, AdanState]:
  """The direction, in at least float32, and the next state."""
  check_float_leaves(updates, "Adan")
  count = optax.safe_increment(state.count)
  first = state.count == 0
  c1, c2, c3 = (common.bias_correction(b, count) for b in (b1, b2, b3))
  decays = [common.scalar(b) for b in (b1, b2, b3)]
  gains = [common.scalar(1 - b) for b in (b1, b2, b3)]
  factors = (*decays, *gains, 1 / c1, decays[1] / c2, jax.lax.rsqrt(c3))

  def leaf(g: Any, m: Any, v: Any, n: Any, g_prev: Any) -> tuple[jax.Array, ...]:
    kept, dtype = m.dtype, common.accumulator(m.dtype)
    d1, d2, d3, k1, k2, k3, f_m, f_v, f_n = (x.astype(dtype) for x in factors)
    g = jnp.asarray(g)
    if clip is not None:
      g = g.astype(common.accumulator(g.dtype))
      g = g * clip.astype(g.dtype)
    # The accumulator's precision decides what a difference of gradients is.
    g = g.astype(kept)
    wide = g.astype(dtype)
    difference = jnp.where(first, 0, wide - g_prev.astype(dtype))
    m = d1 * m.astype(dtype) + k1 * wide
    v = d2 * v.astype(dtype) + k2 * difference
    n = d3 * n.astype(dtype) + k3 * jnp.square(wide + d2 * difference)
    floor = common.scalar(eps).astype(dtype)
    s = (f_m * m + f_v * v) / (f_n * jnp.sqrt(n) + floor)
    # Always g; but after v and n, so that XLA may overwrite g_prev without a copy.
    kept_g = jnp.where(count > 0, g, (v + n).astype(kept))
    return s, m.astype(kept), v.astype(kept), n.astype(kept), kept_g

  s, m, v, n, g_prev = common.unzip_map(
    leaf, 5, updates, state.m, state.v, state.n, state.g_prev
  )
  return s, AdanState(count, m, v, n, g_prev)


def _clip_factor(
  updates: optax.Updates, max_grad_norm: jax.typing.ArrayLike, eps: Any
) -> jax.Array:
  wide = jax.tree.map(
    lambda g: jnp.asarray(g).astype(common.accumulator(jnp.result_type(g))), updates
  )
  norm = common.scalar(optax.tree.norm(wide))
  limit = common.scalar(max_grad_norm)
  factor = jnp.minimum(1, limit / (norm + common.scalar(eps)))
  return jnp.where(limit > 0, factor, 1)


def scale_by_adan(
  b1: jax.typing.ArrayLike = 0.98,
  b2: jax.typing.ArrayLike = 0.92,
  b3: jax.typing.ArrayLike = 0.99,
  eps: jax.typing.ArrayLike = 1e-8,
  accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The direction of :func:`adan`: neither negated nor scaled by a learning rate.

  .. math::
    s_t = (\hat m_t + b_2 \hat v_t) / (\sqrt{\hat n_t} + \epsilon)

  Args:
    b1: decay of the average of gradients, in [0, 1).
    b2: decay of the average of differences and weight of the difference, in [0, 1).
    b3: decay of the average of squared look-ahead gradients, in [0, 1).
    eps: added to the root, > 0.
    accumulator_dtype: dtype of the state; None is float32 (or the parameter's dtype
      where that is wider).

  Returns:
    A transformation whose output has the dtype of the gradients.

  Raises:
    ValueError: an argument out of its range, or a leaf that is not floating point.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import scale_by_adan
    >>> transform = scale_by_adan()
    >>> s, state = transform.update(jnp.array([2.0, 0.0]), transform.init(jnp.ones(2)))
    >>> s.round(4).tolist()
    [1.0, 0.0]

  References:
    Xie et al., `Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models <https://arxiv.org/abs/2208.06677>`_, 2024
  """
  _check(b1, b2, b3, eps)

  def update(
    updates: optax.Updates,
    state: AdanState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, AdanState]:
    del params, extra
    s, state = _advance(updates, state, b1, b2, b3, eps)
    return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), s, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: _init(params, accumulator_dtype), update
  )


@method(
  family="updates",
  paper="Xie et al., Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing "
  "Deep Models, 2024",
  arxiv="2208.06677",
  seeds=("003:149",),
)
def adan(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.98,
  b2: jax.typing.ArrayLike = 0.92,
  b3: jax.typing.ArrayLike = 0.99,
  eps: jax.typing.ArrayLike = 1e-8,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any = None,
  prox: bool = True,
  max_grad_norm: jax.typing.ArrayLike | None = None,
  accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adan: adaptive Nesterov momentum from differences of successive gradients.

  .. math::
    d_t &= g_t - g_{t-1} \quad (d_1 = 0) \\
    m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \quad v_t = b_2 v_{t-1} + (1 - b_2) d_t \\
    n_t &= b_3 n_{t-1} + (1 - b_3) (g_t + b_2 d_t)^2 \\
    s_t &= (\hat m_t + b_2 \hat v_t) / (\sqrt{\hat n_t} + \epsilon) \\
    \theta_t &= (\theta_{t-1} - \eta s_t) / (1 + \eta \lambda) \quad \text{(prox)} \\
    \theta_t &= (1 - \eta \lambda) \theta_{t-1} - \eta s_t \quad \text{(no prox)}

  Hats divide by :math:`1 - b^t`. The betas are decays; the paper writes
  :math:`1 - b`. ``optax.adan`` weighs the difference by :math:`1 - b_2` where the
  rule asks for :math:`b_2`, hence differs from the second step on.

  Args:
    learning_rate: eta >= 0, a number or a schedule; 5 to 10 times that of AdamW.
    b1: decay of the average of gradients, in [0, 1).
    b2: decay of the average of differences and weight of the difference, in [0, 1).
    b3: decay of the average of squared look-ahead gradients, in [0, 1).
    eps: added to the root, > 0.
    weight_decay: lambda >= 0, decoupled; a Python 0 needs no params.
    mask: which leaves decay: a prefix tree of bools, a function of params that
      returns one, or None for all.
    prox: whether the decay is the proximal step or AdamW's.
    max_grad_norm: global l2 norm that gradients are clipped to before anything else;
      None or 0 is off.
    accumulator_dtype: dtype of the state; None is float32 (or the parameter's dtype
      where that is wider).

  Returns:
    A transformation with an :class:`AdanState`.

  Raises:
    ValueError: an argument out of its range, a leaf that is not floating point, or no
      params although weight_decay is on.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import adan
    >>> transform, theta = adan(0.1), jnp.array(1.0)
    >>> state = transform.init(theta)
    >>> for g in (1.0, 0.5):
    ...   update, state = transform.update(jnp.array(g), state)
    ...   theta = optax.apply_updates(theta, update)
    >>> print(f"{theta:.4f}")
    0.8281

  References:
    Xie et al., `Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models <https://arxiv.org/abs/2208.06677>`_, 2024
  """
  _check(b1, b2, b3, eps)
  check_range("learning_rate", learning_rate, 0)
  check_range("weight_decay", weight_decay, 0)
  if max_grad_norm is not None:
    check_range("max_grad_norm", max_grad_norm, 0)

  def update(
    updates: optax.Updates,
    state: AdanState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, AdanState]:
    del extra
    if not common.is_off(weight_decay):
      common.need_params(params, "adan", "weight_decay")
    rate = common.rate_at(learning_rate, state.count)
    clip = None
    if max_grad_norm is not None and not common.is_off(max_grad_norm):
      clip = _clip_factor(updates, max_grad_norm, eps)
    s, state = _advance(updates, state, b1, b2, b3, eps, clip)
    out = common.descend(s, updates, params, rate, weight_decay, mask, prox=prox)
    return out, state

  return optax.GradientTransformationExtraArgs(
    lambda params: _init(params, accumulator_dtype), update
  )
