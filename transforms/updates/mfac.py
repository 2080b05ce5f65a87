"""M-FAC: steps preconditioned by the inverse Fisher of the last m gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.transforms._common import check_range
from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates._fisher import (
  fisher_inverse_diag as fisher_inverse_diag,
)
from gradlab.transforms.updates._fisher import fisher_ivp as fisher_ivp
from gradlab.transforms.updates._fisher import fisher_ivp_blocked as fisher_ivp_blocked
from gradlab.transforms.updates._gradient_window import MFACState as MFACState
from gradlab.transforms.updates._gradient_window import advance, floating, init_window
from gradlab.transforms.updates._gradient_window import flat_window as flat_window
from gradlab.types import method


class MFACOptimizerState(NamedTuple):
  """State of the optimiser.

  Attributes:
    count: int32 scalar, the number of steps done.
    mfac: the window.
    velocity: average of the preconditioned gradients, a tree like the parameters.
  """

  count: jax.Array  # type: ignore[assignment]
  mfac: MFACState
  velocity: optax.Updates


def _check(num_grads: int, damping: Any) -> None:
  if num_grads < 1:
    raise ValueError(f"num_grads must be at least 1, got {num_grads}.")
  check_range("damping", damping, 0, open_low=True)


def scale_by_mfac(
  num_grads: int = 1024,
  damping: jax.typing.ArrayLike = 1e-5,
  grad_dtype: jax.typing.DTypeLike | None = None,
  skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""The direction of :func:`mfac`: neither negated nor scaled by a learning rate.

  .. math::
    u = F^{-1} g = m G^\top (m \lambda I + G G^\top)^{-1} e_j, \qquad G_j = g

  Args:
    num_grads: m >= 1, gradients in the window; the state holds m copies of the model.
    damping: lambda > 0.
    grad_dtype: dtype of the window; None is float32 (or the parameter's dtype where
      that is wider). Inner products are float32 for a narrower one, too.
    skip_nonfinite: whether a gradient that is not finite leaves the window as it is
      and gives zeros; otherwise that step and the next m - 1 give NaN.

  Returns:
    A transformation whose output has the dtype of the gradients. Leaves that are not
    floating point take no part and get zeros.

  Raises:
    ValueError: an argument out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import scale_by_mfac
    >>> transform = scale_by_mfac(num_grads=2, damping=0.5)
    >>> state = transform.init(jnp.zeros(2))
    >>> for g in ((1.0, 0.0), (1.0, 1.0)):
    ...   u, state = transform.update(jnp.array(g), state)
    >>> print(*(f"{number:.4f}" for number in u))
    0.4000 0.8000

  References:
    Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information <https://arxiv.org/abs/2107.03356>`_, 2021
  """
  _check(num_grads, damping)

  def update(
    updates: optax.Updates,
    state: MFACState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, MFACState]:
    del params, extra
    u, state = advance(floating(updates), state, damping, skip_nonfinite)
    return _fill(u, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: init_window(params, num_grads, grad_dtype), update
  )


def _fill(u: Any, updates: Any) -> Any:
  """``u`` in the dtypes of the updates, with zeros where it is masked out."""

  def leaf(g: Any, u: Any) -> jax.Array:
    if isinstance(u, optax.MaskedNode):
      return jnp.zeros_like(g)
    return u.astype(jnp.result_type(g))

  return jax.tree.map(leaf, updates, u)


def _shown(mask: Any, tree: Any) -> Any:
  """Floating leaves that the mask lets pass, with zeros at masked entries."""

  def leaf(x: Any, keep: Any) -> Any:
    if isinstance(keep, bool | np.bool_):
      return x if keep else optax.MaskedNode()
    return jnp.where(keep, x, jnp.zeros_like(x))

  return floating(jax.tree.map(leaf, tree, common.decayed(mask, tree)))


@method(
  family="updates",
  paper="Frantar et al., M-FAC: Efficient Matrix-Free Approximations of Second-Order "
  "Information, 2021",
  arxiv="2107.03356",
  seeds=("004:42",),
)
def mfac(
  learning_rate: optax.ScalarOrSchedule,
  num_grads: int = 1024,
  damping: jax.typing.ArrayLike = 1e-5,
  momentum: jax.typing.ArrayLike = 0.0,
  l2: jax.typing.ArrayLike = 0.0,
  mask: Any = None,
  grad_dtype: jax.typing.DTypeLike | None = None,
  skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""M-FAC: the exact inverse of a damped Fisher of the last m gradients as metric.

  .. math::
    g_t &= \nabla f(\theta_t) + \rho \theta_t, \qquad
    F_t = \lambda I + \tfrac1m \sum_{s = t - m + 1}^{t} g_s g_s^\top \\
    u_t &= F_t^{-1} g_t = m G^\top (m \lambda I + G G^\top)^{-1} e_j
    \quad \text{(slot } j = t \bmod m \text{ holds } g_t) \\
    v_t &= \mu v_{t-1} + (1 - \mu) u_t, \qquad
    \theta_{t+1} = \theta_t - \eta v_t

  Slots not yet filled are zeros and the divisor is m from the first step on. The form
  with :math:`e_j` subtracts nothing, so that it is accurate in float32 where the
  recursion of the paper loses all digits. Every entry of the m x m Gram matrix is
  computed anew from the stored rows within m steps, so that nothing drifts. The window
  is kept leaf by leaf: each part is placed like its parameter.

  Args:
    learning_rate: eta >= 0, a number or a schedule.
    num_grads: m >= 1, gradients in the window; the state holds m copies of the model.
    damping: lambda > 0; 1e-5 to 1e-2, the more the smaller the model.
    momentum: mu in [0, 1), of the average of preconditioned gradients.
    l2: rho >= 0, decay that is part of the gradient; a Python 0 needs no params.
    mask: what is trained: a prefix tree of bools or of bool arrays shaped like the
      leaves, a function of the updates that returns one, or None for all. The rest
      is not in the window and does not move.
    grad_dtype: dtype of the window; None is float32 (or the parameter's dtype where
      that is wider).
    skip_nonfinite: whether a gradient that is not finite is left out of the window;
      otherwise it gives NaN.

  Returns:
    A transformation with an :class:`MFACOptimizerState`. Leaves that are not floating
    point do not move.

  Raises:
    ValueError: an argument out of its range, or no params although l2 is on.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import mfac
    >>> transform, theta = mfac(0.1, num_grads=1, damping=1.0), jnp.array([3.0, 4.0])
    >>> update, _ = transform.update(theta, transform.init(theta))
    >>> print(*(f"{number:.4f}" for number in update))
    -0.0115 -0.0154

  References:
    Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information <https://arxiv.org/abs/2107.03356>`_, 2021
  """
  _check(num_grads, damping)
  check_range("learning_rate", learning_rate, 0)
  check_range("momentum", momentum, 0, 1, open_high=True)
  check_range("l2", l2, 0)

  def init(params: optax.Params) -> MFACOptimizerState:
    shown = _shown(mask, params)
    velocity = jax.tree.map(jnp.zeros_like, common.widen(shown))
    return MFACOptimizerState(
      jnp.zeros([], jnp.int32), init_window(shown, num_grads, grad_dtype), velocity
    )

  def update(
    updates: optax.Updates,
    state: MFACOptimizerState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, MFACOptimizerState]:
    del extra
    g = common.widen(_shown(mask, updates))
    if not common.is_off(l2):
      common.need_params(params, "mfac", "l2")
      theta = common.widen(_shown(mask, params))
      g = jax.tree.map(lambda a, b: a + common.scalar(l2).astype(a.dtype) * b, g, theta)
    u, inner = advance(g, state.mfac, damping, skip_nonfinite)
    rate = common.rate_at(learning_rate, state.count)
    mu, rest = common.scalar(momentum), common.scalar(1 - momentum)

    def average(u: jax.Array, v: jax.Array) -> jax.Array:
      mixed = mu.astype(v.dtype) * v + rest.astype(v.dtype) * u.astype(v.dtype)
      # Without momentum, a velocity that is not finite is forgotten.
      return jnp.where(mu > 0, mixed, u.astype(v.dtype))

    velocity = jax.tree.map(average, u, state.velocity)
    step = jax.tree.map(lambda v: -rate.astype(v.dtype) * v, velocity)
    count = optax.safe_increment(state.count)
    return _fill(step, updates), MFACOptimizerState(count, inner, velocity)

  return optax.GradientTransformationExtraArgs(init, update)
