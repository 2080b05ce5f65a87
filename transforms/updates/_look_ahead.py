"""One iteration of self-training whose teacher follows students that look ahead."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import check_range
from gradlab.transforms.updates import _common as common

MODES = ("deep", "wide", "none")
Gradient = Callable[[Any, Any, Any], Any]


class Rule(NamedTuple):
  """How far ahead, and what is kept of it; see ``future_self_training``."""

  optimizer: optax.GradientTransformation
  ema_decay: jax.typing.ArrayLike
  num_ahead: int
  mode: str
  legacy_order: bool
  commit_opt_state: bool


class Iteration(NamedTuple):
  """What one iteration leaves."""

  updates: Any
  params: Any
  teacher: Any
  opt_state: Any
  virtual_norm: jax.Array


def check(rule: Rule) -> None:
  """Raises ValueError for settings that make no sense."""
  if rule.mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {rule.mode!r}.")
  check_range("num_ahead", rule.num_ahead, 1)
  check_range("ema_decay", rule.ema_decay, 0, 1)


def check_futures(future_batches: Any, num_ahead: int) -> None:
  """Raises ValueError unless every leaf has the leading axis ``num_ahead``."""
  if future_batches is None:
    raise ValueError(
      "mode='wide' needs future_batches, one batch per virtual student, got None."
    )
  for leaf in jax.tree.leaves(future_batches):
    if jnp.shape(leaf)[:1] != (num_ahead,):
      raise ValueError(
        f"future_batches need the leading axis num_ahead = {num_ahead}, got a leaf of "
        f"shape {jnp.shape(leaf)}."
      )


def _averaged(leaf: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _trained(params: Any, tree: Any) -> Any:
  """The tree without what belongs to integer and bool parameters."""
  return jax.tree.map(
    lambda p, leaf: leaf if _averaged(p) else optax.MaskedNode(), params, tree
  )


def copy_params(params: Any) -> Any:
  """Params in buffers of their own."""
  return jax.tree.map(lambda p: jnp.array(p, dtype=jnp.result_type(p)), params)


def copy_teacher(params: Any) -> Any:
  """A teacher equal to params, in at least float32."""

  def leaf(p: Any) -> jax.Array:
    dtype = jnp.result_type(p)
    wide = jnp.issubdtype(dtype, jnp.floating)
    return jnp.array(p, dtype=common.accumulator(dtype) if wide else dtype)

  return jax.tree.map(leaf, params)


def init_optimizer(optimizer: optax.GradientTransformation, params: Any) -> Any:
  """The optimizer's state for what can be trained."""
  return optimizer.init(_trained(params, params))


def _move(rule: Rule, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any, Any]:
  """The optimizer's updates, where they lead and its next state."""
  floats = _trained(params, params)
  # optax mixes counters and hyperparameters with floats of other dtypes freely.
  with jax.numpy_dtype_promotion("standard"):
    updates, opt_state = rule.optimizer.update(
      _trained(params, grads), opt_state, floats
    )
    moved = optax.apply_updates(floats, updates)
  moved = jax.tree.map(lambda p, new: new if _averaged(p) else p, params, moved)
  return updates, moved, opt_state


def like_gradients(params: Any, updates: Any, grads: Any) -> Any:
  """The updates in the gradients' dtypes; zero for what is not trained."""
  return jax.tree.map(
    lambda p, u, g: u.astype(jnp.result_type(g)) if _averaged(p) else jnp.zeros_like(p),
    params,
    updates,
    grads,
  )


def _blend(gain: jax.Array, teacher: Any, params: Any) -> Any:
  """``(1 - gain) teacher + gain params``; exact where both agree, at gains 0 and 1."""

  def leaf(p: jax.Array, v: Any) -> jax.Array:
    v = jnp.asarray(v).astype(p.dtype)
    if not _averaged(p):
      return v
    return jnp.where(gain >= 1, v, p + gain.astype(p.dtype) * (v - p))

  return jax.tree.map(leaf, teacher, params)


def _norm(params: Any, grads: Any) -> jax.Array:
  squares = [
    jnp.sum(jnp.square(common.scalar(jnp.abs(g))))
    for g in jax.tree.leaves(_trained(params, grads))
  ]
  return jnp.sqrt(jnp.sum(jnp.stack(squares))) if squares else common.scalar(0)


def iterate(
  rule: Rule,
  gradient: Gradient,
  real_gradient: Callable[[Any], Any],
  params: Any,
  teacher: Any,
  opt_state: Any,
  count: jax.Array,
  batch: Any,
  future_batches: Any,
) -> Iteration:
  """One iteration: the teacher looks ahead, then the student takes its real step.

  ``gradient(params, teacher, batch)`` is that of the virtual students;
  ``real_gradient(teacher)`` that of the real one under the new teacher.
  """
  ahead = 0 if rule.mode == "none" else rule.num_ahead
  kept = common.scalar(1 - rule.ema_decay)
  # Forward passes done, the virtual ones included; the first iteration has one.
  passes = 1 + (count.astype(kept.dtype) - 1) * (ahead + 1)

  def gain(virtual: Any) -> jax.Array:
    """1 - mu when ``virtual`` passes of this iteration are done."""
    if not rule.legacy_order:
      return kept
    done = passes + jnp.asarray(virtual, kept.dtype)
    return jnp.maximum(kept, 1 / (done + 1))

  def deep() -> tuple[Any, Any, jax.Array]:
    def virtual(carry: Any, k: jax.Array) -> tuple[Any, jax.Array]:
      student, phi, inner = carry
      if rule.legacy_order:
        phi = _blend(gain(k), phi, student)
      grads = gradient(student, phi, batch)
      norm = _norm(student, grads)
      _, student, inner = _move(rule, grads, inner, student)
      if not rule.legacy_order:
        phi = _blend(kept, phi, student)
      return (student, phi, inner), norm

    student, phi, inner = params, teacher, opt_state
    norm = common.scalar(0)
    if ahead:
      (student, phi, inner), norms = jax.lax.scan(
        virtual, (student, phi, inner), jnp.arange(ahead)
      )
      norm = jnp.max(norms)
    if rule.legacy_order or not ahead:
      phi = _blend(gain(ahead), phi, student)
    return phi, inner, norm

  def wide() -> tuple[Any, Any, jax.Array]:
    def virtual(inner: Any, future: Any) -> tuple[Any, tuple[Any, jax.Array]]:
      grads = gradient(params, teacher, future)
      norm = _norm(params, grads)
      _, student, inner = _move(rule, grads, inner, params)
      return inner, (student, norm)

    inner = opt_state
    if rule.commit_opt_state:
      inner, (students, norms) = jax.lax.scan(virtual, inner, future_batches)
    else:
      students, norms = jax.vmap(lambda b: virtual(opt_state, b)[1])(future_batches)
    mean = jax.tree.map(
      lambda phi, v, p: jnp.mean(v.astype(phi.dtype), axis=0) if _averaged(p) else p,
      teacher,
      students,
      params,
    )
    return _blend(gain(ahead), teacher, mean), inner, jnp.max(norms)

  def later() -> Iteration:
    phi, inner, norm = wide() if rule.mode == "wide" else deep()
    start = inner if rule.commit_opt_state else opt_state
    updates, moved, after = _move(rule, real_gradient(phi), start, params)
    if rule.legacy_order and rule.mode == "wide":
      phi = _blend(gain(ahead + 1), phi, moved)
    return Iteration(updates, moved, phi, after, norm)

  def first() -> Iteration:
    phi = jax.tree.map(lambda old, p: jnp.asarray(p, old.dtype), teacher, params)
    updates, moved, after = _move(rule, real_gradient(phi), opt_state, params)
    phi = _blend(jnp.maximum(kept, 0.5), phi, moved)
    return Iteration(updates, moved, phi, after, common.scalar(0))

  return jax.lax.cond(count == 0, first, later) if rule.legacy_order else later()
