"""FST: self-training whose teacher follows students that look ahead."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms.updates import _look_ahead as look_ahead
from gradlab.types import method


class FSTState(NamedTuple):
  """State of self-training.

  Attributes:
    params: the student.
    teacher: tree like params, in at least float32.
    opt_state: state of the student's optimizer.
    count: int32 scalar, the number of iterations done.
  """

  params: optax.Params
  teacher: optax.Params
  opt_state: optax.OptState
  count: jax.Array  # type: ignore[assignment]


class FST(NamedTuple):
  """Self-training as two functions.

  Attributes:
    init: ``init(params) -> FSTState``.
    step: ``step(state, batch, grad_fn, future_batches=None) -> (state, aux)``.
  """

  init: Callable[[optax.Params], FSTState]
  step: Callable[..., tuple[FSTState, dict[str, jax.Array]]]


class FutureSelfTrainingState(NamedTuple):
  """State of ``future_self_training``.

  Attributes:
    count: int32 scalar, the number of steps done.
    teacher: tree like params, in at least float32.
    opt_state: state of the student's optimizer.
  """

  count: jax.Array  # type: ignore[assignment]
  teacher: optax.Params
  opt_state: optax.OptState


def fst(
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: jax.typing.ArrayLike = 0.999,
  num_ahead: int = 3,
  mode: str = "deep",
  legacy_order: bool = False,
  commit_opt_state: bool = False,
) -> FST:
  r"""The rule of ``future_self_training`` as a training step of student and teacher.

  .. math::
    v_k = v_{k-1} + U(G(v_{k-1}, p_{k-1}; B_t)), \qquad
    p_k = \mu p_{k-1} + (1 - \mu) v_k, \qquad
    \phi_{t+1} = p_K, \qquad
    \theta_{t+1} = \theta_t + U(G(\theta_t, \phi_{t+1}; B_t))

  Args:
    optimizer: the student's; any optax transformation, its learning rate included.
    ema_decay: mu in [0, 1], how much of the teacher stays at each of its moves.
    num_ahead: virtual students, >= 1: K in a row ("deep") or N side by side ("wide").
    mode: "deep", "wide", or "none" for a mean teacher that does not look ahead.
    legacy_order: the order of the authors' segmentation code; see
      ``future_self_training``.
    commit_opt_state: whether the optimizer's states of virtual steps are kept.

  Returns:
    ``FST(init, step)``. In ``step``, ``grad_fn(params, teacher, batch) -> grads`` must
    label by the teacher under ``stop_gradient``; the teacher is float32 for bfloat16
    parameters. ``future_batches`` has the leading axis ``num_ahead`` and is used by
    "wide" only. ``aux["virtual_grad_norm"]`` is the largest norm of a virtual gradient:
    one that is not finite has spoilt the teacher, which ``optax.apply_if_finite``
    around the optimizer prevents.

  Raises:
    ValueError: an unknown mode, ``num_ahead`` below 1, ``ema_decay`` outside [0, 1],
      or "wide" without future batches or with another number of them.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import fst
    >>> def grad_fn(params, teacher, batch):
    ...   return (params - batch) + 0.5 * (params - teacher)
    >>> init, step = fst(optax.sgd(0.2), ema_decay=0.9, num_ahead=2)
    >>> state, aux = step(init(jnp.array(0.0)), jnp.array(1.0), grad_fn)
    >>> print(f"{state.params:.5f} {state.teacher:.4f}")
    0.20522 0.0522

  References:
    Du et al., Learning from Future: A Novel Self-Training Framework for Semantic
    Segmentation, NeurIPS 2022, arXiv:2209.06993.
  """
  rule = look_ahead.Rule(
    optimizer, ema_decay, num_ahead, mode, legacy_order, commit_opt_state
  )
  look_ahead.check(rule)

  def init(params: optax.Params) -> FSTState:
    return FSTState(
      params=look_ahead.copy_params(params),
      teacher=look_ahead.copy_teacher(params),
      opt_state=look_ahead.init_optimizer(optimizer, params),
      count=jnp.zeros([], jnp.int32),
    )

  def step(
    state: FSTState,
    batch: Any,
    grad_fn: look_ahead.Gradient,
    future_batches: Any = None,
  ) -> tuple[FSTState, dict[str, jax.Array]]:
    if mode == "wide":
      look_ahead.check_futures(future_batches, num_ahead)
    done = look_ahead.iterate(
      rule,
      grad_fn,
      lambda teacher: grad_fn(state.params, teacher, batch),
      *state,
      batch,
      future_batches,
    )
    count = optax.safe_increment(state.count)
    after = FSTState(done.params, done.teacher, done.opt_state, count)
    return after, {"virtual_grad_norm": done.virtual_norm}

  return FST(init, step)


def _gradients(
  grad_fn: Callable[..., Any], batch: Any, params: Any, updates: Any, mode: str
) -> tuple[look_ahead.Gradient, Callable[[Any], Any]]:
  """The gradients of virtual students and of the real one, from either ``grad_fn``."""
  try:
    inspect.signature(grad_fn).bind(params, params, batch)
  except TypeError:
    if mode == "wide":
      raise ValueError(
        "mode='wide' needs a grad_fn of (params, teacher, batch), got one of params."
      ) from None
    return lambda student, teacher, batch: grad_fn(student), lambda teacher: updates
  return grad_fn, lambda teacher: grad_fn(params, teacher, batch)


@method(
  family="updates",
  paper="Du et al., Learning from Future: A Novel Self-Training Framework for Semantic "
  "Segmentation, 2022",
  arxiv="2209.06993",
  seeds=("003:28",),
)
def future_self_training(
  optimizer: optax.GradientTransformation,
  ema_decay: jax.typing.ArrayLike = 0.999,
  num_ahead: int = 3,
  mode: str = "deep",
  legacy_order: bool = False,
  commit_opt_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""A student's optimizer with a teacher that learns from the student's future.

  Student :math:`\theta`, teacher :math:`\phi`, :math:`G(\theta, \phi; B)` the gradient
  of a loss whose pseudo-labels come from the teacher, :math:`U` the optimizer:

  .. math::

    \text{deep: } v_0 &= \theta_t,\; p_0 = \phi_t, \quad
    v_k = v_{k-1} + U(G(v_{k-1}, p_{k-1}; B_t)), \quad
    p_k = \mu p_{k-1} + (1 - \mu) v_k, \quad \phi_{t+1} = p_K \\
    \text{wide: } v^j &= \theta_t + U(G(\theta_t, \phi_t; B^j)), \quad
    \phi_{t+1} = \mu \phi_t + (1 - \mu)\, \tfrac1N \textstyle\sum_j v^j \\
    \text{none: } \phi_{t+1} &= \mu \phi_t + (1 - \mu)\, \theta_t \\
    \theta_{t+1} &= \theta_t + U(G(\theta_t, \phi_{t+1}; B_t))

  Virtual students are thrown away, and so are the states of their optimizer, which
  start from the real one: a step costs ``num_ahead`` more gradients. Without labels
  from the teacher the student is that of the plain optimizer, bit for bit.

  ``legacy_order`` is the authors' segmentation code: with c the forward passes done,
  the decay is min(1 - 1/(c + 1), mu); the first iteration takes an ordinary step and
  moves the teacher after it; "deep" moves the teacher to the current student before
  each virtual step too, and "wide" to the new student at the end. It must then be the
  last transformation of a chain. Together with ``commit_opt_state`` and a stateful
  optimizer it is that code exactly.

  Integer and bool parameters are copied to the teacher, and do not move.

  Args:
    optimizer: the student's; its learning rate included. A config names update rules.
    ema_decay: mu in [0, 1]; 0.999 for domain adaptation, 0.99 for few labels.
    num_ahead: virtual students, >= 1: K in a row ("deep") or N side by side ("wide").
    mode: "deep", "wide", or "none" for a mean teacher that does not look ahead.
    legacy_order: whether to take the order of the authors' code.
    commit_opt_state: whether the optimizer's states of virtual steps are kept, as
      the authors' code does; "wide" then runs its students one after another.

  Returns:
    A transformation with a :class:`FutureSelfTrainingState`. Its ``update`` needs
    params and the extra argument ``grad_fn``: either ``(params, teacher, batch) ->
    grads``, which also needs ``batch`` (and ``future_batches`` for "wide") and in whose
    place the given gradients are not used; or ``params -> grads`` of a loss that knows
    no teacher, which then only looks ahead: the real step takes the given gradients.

  Raises:
    ValueError: an argument out of its range, an unknown mode, missing params or extra
      arguments, or "wide" with a ``grad_fn`` that takes no batch.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import future_self_training
    >>> def grad_fn(params, teacher, batch):
    ...   return (params - batch) + 0.5 * (params - teacher)
    >>> transform = future_self_training(optax.sgd(0.2), ema_decay=0.9, num_ahead=2)
    >>> theta = jnp.array(0.0)
    >>> state, extra = transform.init(theta), {"grad_fn": grad_fn, "batch": 1.0}
    >>> update, state = transform.update(theta, state, theta, **extra)
    >>> print(f"{update:.5f} {state.teacher:.4f}")
    0.20522 0.0522

  References:
    Du et al., Learning from Future: A Novel Self-Training Framework for Semantic
    Segmentation, NeurIPS 2022, arXiv:2209.06993.
  """
  rule = look_ahead.Rule(
    optimizer, ema_decay, num_ahead, mode, legacy_order, commit_opt_state
  )
  look_ahead.check(rule)

  def init(params: optax.Params) -> FutureSelfTrainingState:
    return FutureSelfTrainingState(
      jnp.zeros([], jnp.int32),
      look_ahead.copy_teacher(params),
      look_ahead.init_optimizer(optimizer, params),
    )

  def update(
    updates: optax.Updates,
    state: FutureSelfTrainingState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, FutureSelfTrainingState]:
    if params is None:
      raise ValueError("future_self_training needs params in update.")
    if extra.get("grad_fn") is None:
      raise ValueError("future_self_training needs the extra argument grad_fn.")
    grad_fn, batch = extra["grad_fn"], extra.get("batch")
    futures = extra.get("future_batches")
    gradient, real_gradient = _gradients(grad_fn, batch, params, updates, mode)
    if gradient is grad_fn and "batch" not in extra:
      raise ValueError("future_self_training needs the extra argument batch.")
    if mode == "wide":
      look_ahead.check_futures(futures, num_ahead)
    done = look_ahead.iterate(
      rule, gradient, real_gradient, params, *state[1:], state.count, batch, futures
    )
    out = look_ahead.like_gradients(params, done.updates, updates)
    count = optax.safe_increment(state.count)
    return out, FutureSelfTrainingState(count, done.teacher, done.opt_state)

  return optax.GradientTransformationExtraArgs(init, update)
