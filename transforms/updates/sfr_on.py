"""SFR-on: unlearning by a masked, weighted ascent between steps on what remains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from gradlab.transforms._common import check_float_leaves, check_range, concrete
from gradlab.transforms.updates import _common as common
from gradlab.types import method


class SfrOnState(NamedTuple):
  """State of SFR-on.

  Attributes:
    count: int32 scalar, the number of iterations done.
    inner: the state of ``inner``.
  """

  count: jax.Array  # type: ignore[assignment]
  inner: optax.OptState


def forget_remain_mask(
  forget_fisher: Any,
  remain_fisher: Any,
  threshold: ArrayLike = 1.0,
  eps: ArrayLike = 1e-15,
) -> Any:
  r"""The parameters that matter more for what is forgotten than for what remains.

  .. math::
    m = \left[ (F_f + \epsilon) / (F_r + \epsilon) \ge \gamma \right]

  F is the mean over mini-batches of the squared gradient of the mean loss, at the
  pretrained parameters; it depends on the batch size, so use one for both.

  Args:
    forget_fisher: F_f, a pytree of arrays.
    remain_fisher: F_r, a pytree like it.
    threshold: gamma > 0; larger selects less.
    eps: added to both, >= 0. Where both are 0 the ratio is 1.

  Returns:
    A pytree of bool arrays of that structure; compared in at least float32.

  Raises:
    ValueError: an argument out of range, or trees that do not agree.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import forget_remain_mask
    >>> forget, remain = jnp.array([4e-4, 0.0, 9e-4]), jnp.array([1e-4, 0.0, 1e-3])
    >>> forget_remain_mask(forget, remain).tolist()
    [True, True, False]
  """
  check_range("threshold", threshold, 0, open_low=True)
  check_range("eps", eps, 0)
  _check_like("remain_fisher", remain_fisher, "forget_fisher", forget_fisher)

  def leaf(forget: jax.Array, remain: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(forget.dtype, remain.dtype)
    floor = common.scalar(eps).astype(dtype)
    ratio = (forget.astype(dtype) + floor) / (remain.astype(dtype) + floor)
    return ratio >= common.scalar(threshold).astype(dtype)

  return jax.tree.map(leaf, common.widen(forget_fisher), common.widen(remain_fisher))


def adaptive_forget_weights(
  losses: jax.Array, power: ArrayLike = 0.5, eps: ArrayLike = 1e-15
) -> jax.Array:
  r"""Weights of examples to forget: the well remembered ones weigh more.

  .. math::
    w_i = c_i / \textstyle\sum_j c_j, \qquad c_i = 1 / (l_i^{\lambda} + \epsilon)

  The loss that goes down to forget is ``-jnp.sum(weights * losses)``.

  Args:
    losses: [n], not negative; a traced negative loss gives NaN for most powers.
    power: lambda; 0 gives 1 / n.
    eps: added to the powers, > 0.

  Returns:
    [n] in at least float32, summing to 1. No gradient flows through them.

  Raises:
    ValueError: ``eps`` out of range, or a concrete negative loss.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import adaptive_forget_weights
    >>> weights = adaptive_forget_weights(jnp.array([0.5, 2.0, 4.0]))
    >>> [f"{weight:.4f}" for weight in weights]
    ['0.5395', '0.2698', '0.1907']
  """
  check_range("eps", eps, 0, open_low=True)
  if concrete(losses) and (np.asarray(losses, np.float64) < 0).any():
    raise ValueError("the losses of adaptive_forget_weights must not be negative.")
  losses = jax.lax.stop_gradient(common.widen(losses))
  exponent, floor = (common.scalar(x).astype(losses.dtype) for x in (power, eps))
  c = 1 / (losses**exponent + floor)
  return jax.lax.stop_gradient(c / jnp.sum(c))


def _check_like(name: str, tree: Any, other_name: str, other: Any) -> None:
  """Raises ValueError unless both trees have one structure and equal shapes."""
  ours: Any = jax.tree.structure(tree)
  theirs: Any = jax.tree.structure(other)
  if ours != theirs:
    raise ValueError(
      f"{name} must have the structure of {other_name}, {theirs}, got {ours}."
    )
  rows = zip(
    jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True
  )
  for (path, leaf), like in rows:
    if jnp.shape(leaf) != jnp.shape(like):
      raise ValueError(
        f"{name}{jax.tree_util.keystr(path)} must have the shape of {other_name}, "
        f"{jnp.shape(like)}, got {jnp.shape(leaf)}."
      )


@method(
  family="updates",
  paper="Huang et al., Unified Gradient-Based Machine Unlearning with Remain Geometry "
  "Enhancement, 2024",
  arxiv="2409.19732",
  seeds=("002:7",),
)
def sfr_on(
  inner: optax.GradientTransformation,
  forget_scale: ArrayLike,
  num_steps: int,
  *,
  mask: Any = None,
  max_norm: ArrayLike = 7.0,
  forget_every: int = 5,
  slow_step_size: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
  r"""SFR-on: a forget step whose damage the remain steps after it repair.

  .. math::
    \theta' &= \theta + \text{inner}\big(\operatorname{clip}(m \odot \alpha_s
    \nabla L_f(\theta))\big), \quad
    \alpha_s = \alpha \, \tfrac{1 + \cos(\pi s / T)}{2}
    \quad \text{if } s \bmod n = 0, \text{ else } \theta' = \theta \\
    \theta'' &= \theta' + \text{inner}(\nabla L_r(\theta')), \qquad
    \theta \leftarrow \theta + \beta (\theta'' - \theta)

  ``update(forget_grads, state, params, *, remain_grad_fn)`` is one iteration.
  ``forget_grads`` is the gradient at ``params`` of the loss that goes DOWN to forget,
  the negative weighted loss of ``adaptive_forget_weights``, not yet scaled; only
  every n-th is read, so zeros will do in between. ``remain_grad_fn(params)`` gives the
  gradient of a mini-batch of what remains. For a quadratic loss with Hessian H, K
  plain steps of rate eta multiply the forget step by :math:`(I - \eta H)^K`: what
  matters for the remaining data is taken back most.

  Args:
    inner: any transformation, shared by both steps: its momentum mixes them, and its
      state is float32. A schedule in it would advance twice in iterations that
      forget; set the rate from outside through ``optax.inject_hyperparams``, whose
      state is ``state.inner``. Its weight decay is neither masked nor clipped.
    forget_scale: alpha > 0, falls to 0 along a cosine.
    num_steps: T, iterations of that cosine, at least 1.
    mask: m, a pytree of bools like params (``forget_remain_mask``); None is all.
    max_norm: the forget gradient, scaled and masked, is clipped to this global l2
      norm, > 0.
    forget_every: n, iterations per forget step, at least 1.
    slow_step_size: beta, in (0, 1].

  Returns:
    A transformation with an :class:`SfrOnState`; its update leads to the parameters
    after the whole iteration.

  Raises:
    ValueError: an argument out of range, a mask unlike params, a leaf that is not
      floating point, no params, or no ``remain_grad_fn``.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import sfr_on
    >>> transform = sfr_on(optax.sgd(0.2), 1.0, 10)
    >>> theta, hessian = jnp.zeros(2), jnp.array([4.0, 1.0])
    >>> state = transform.init(theta)
    >>> for _ in range(2):
    ...   step, state = transform.update(
    ...     -1.5 * jnp.ones(2), state, theta, remain_grad_fn=lambda p: hessian * p
    ...   )
    ...   theta = theta + step
    >>> [f"{x:.4f}" for x in theta]
    ['0.0120', '0.1920']

  References:
    Huang et al., `Unified Gradient-Based Machine Unlearning with Remain Geometry
    Enhancement <https://arxiv.org/abs/2409.19732>`_, 2024
  """
  check_range("forget_scale", forget_scale, 0, open_low=True)
  check_range("num_steps", num_steps, 1)
  check_range("max_norm", max_norm, 0, open_low=True)
  check_range("forget_every", forget_every, 1)
  check_range("slow_step_size", slow_step_size, 0, 1, open_low=True)
  step = common.in_float32(inner)

  def init(params: optax.Params) -> SfrOnState:
    check_float_leaves(params, "sfr_on")
    return SfrOnState(jnp.zeros([], jnp.int32), step.init(params))

  def scaled(grads: optax.Updates, count: jax.Array) -> optax.Updates:
    share = jnp.minimum(count, num_steps).astype(float) / float(num_steps)
    alpha = common.scalar(forget_scale) * (1 + jnp.cos(jnp.pi * share)) / 2
    grads = jax.tree.map(lambda g: g * alpha.astype(g.dtype), grads)
    if mask is not None:
      # Selected, not multiplied: a masked NaN is no gradient.
      grads = jax.tree.map(lambda m, g: jnp.where(m, g, 0), mask, grads)
    with jax.numpy_dtype_promotion("standard"):
      limit = optax.clip_by_global_norm(common.scalar(max_norm))
      clipped: optax.Updates = limit.update(grads, optax.EmptyState())[0]
    return clipped

  def update(
    updates: optax.Updates,
    state: SfrOnState,
    params: optax.Params | None = None,
    *,
    remain_grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, SfrOnState]:
    if params is None:
      raise ValueError("sfr_on needs params in update.")
    if remain_grad_fn is None:
      raise ValueError(
        "sfr_on needs remain_grad_fn in update: params -> gradient of the remain loss."
      )
    check_float_leaves(updates, "sfr_on")
    if mask is not None:
      _check_like("mask", mask, "params", params)
    forget, wide = common.widen(updates), common.widen(params)

    def fast(inner_state: optax.OptState) -> tuple[optax.Updates, optax.OptState]:
      return step.update(scaled(forget, state.count), inner_state, wide, **extra)

    def idle(inner_state: optax.OptState) -> tuple[optax.Updates, optax.OptState]:
      return jax.tree.map(jnp.zeros_like, forget), inner_state

    moved, inner_state = jax.lax.cond(
      state.count % forget_every == 0, fast, idle, state.inner
    )
    middle = jax.tree.map(jnp.add, wide, moved)
    rounded = jax.tree.map(lambda p, m: m.astype(jnp.result_type(p)), params, middle)
    remain = common.widen(remain_grad_fn(rounded))
    repair, inner_state = step.update(remain, inner_state, middle, **extra)
    beta = common.scalar(slow_step_size)
    out = jax.tree.map(
      lambda a, b, u: ((a + b) * beta.astype(a.dtype)).astype(jnp.result_type(u)),
      moved,
      repair,
      updates,
    )
    return out, SfrOnState(optax.safe_increment(state.count), inner_state)

  return optax.GradientTransformationExtraArgs(init, update)
