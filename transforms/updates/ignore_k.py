"""Ignore-k: the largest changes are thrown away, the others stay as they are."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gradlab.transforms._common import check_float_leaves, check_range
from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates._largest import By, drop_largest, num_dropped
from gradlab.types import method

Scope = Literal["leaf", "global"]


class IgnoreKState(NamedTuple):
  """State of ``ignore_k`` with a window of several steps.

  Attributes:
    count: int32 scalar, the number of steps done.
    anchor: the parameters after the last pruning, in at least float32.
  """

  count: jax.Array  # type: ignore[assignment]
  anchor: optax.Params


def _check(k: ArrayLike, scope: str, by: str) -> None:
  check_range("k", k, 0, 1)
  if scope not in ("leaf", "global"):
    raise ValueError(f"scope must be 'leaf' or 'global', got {scope!r}.")
  if by not in ("abs", "signed"):
    raise ValueError(f"by must be 'abs' or 'signed', got {by!r}.")


def ignore_k_mask(
  delta: Any, k: ArrayLike, scope: Scope = "leaf", *, by: By = "abs"
) -> Any:
  r"""Masks that keep all but the ``floor(k * size + 1e-6)`` largest entries.

  Of equal magnitudes the entry with the lower flattened index is dropped first; in
  "global" scope leaves follow each other as ``jax.tree.leaves`` gives them. NaN ranks
  above infinity. The threshold is found by counting, one pass over the entries per bit
  of their magnitude (31, or 15 in half precision), and further passes only where some
  of the entries that tie at it stay; there is no sort. On sharded leaves a pass ends
  in the all-reduce of one number per ranking, and nothing is gathered.

  Args:
    delta: a pytree of float arrays of any shape.
    k: the fraction to drop, in [0, 1], which may be traced. A Python number gives the
      count exactly; a float32 one counts a product that lies below an integer by no
      more than the rounding of k as that integer.
    scope: "leaf" ranks the entries of each leaf, "global" all of them together (fewer
      than 2**31).
    by: "abs" drops the largest magnitudes, "signed" the largest numbers.

  Returns:
    A pytree of bool arrays like ``delta``, True = keep.

  Raises:
    ValueError: an argument out of range, a leaf that is not floating point, or too
      many entries.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import ignore_k_mask
    >>> ignore_k_mask(jnp.array([0.5, -3.0, 1.0, 2.0, -1.0]), 0.4).tolist()
    [True, False, True, False, True]
  """
  _check(k, scope, by)
  check_float_leaves(delta, "ignore_k")
  leaves, treedef = jax.tree.flatten(delta)
  leaves = [jnp.asarray(leaf) for leaf in leaves]
  # Groups of leaves that are ranked together; those of one dtype run in one loop.
  apart = [[i] for i in range(len(leaves))]
  groups = [list(range(len(leaves)))] if scope == "global" and leaves else apart
  masks = [jnp.ones(leaf.shape, bool) for leaf in leaves]
  due: dict[Any, list[tuple[list[int], Any]]] = {}
  for group in groups:
    num = _count(k, sum(leaves[i].size for i in group))
    if not (isinstance(num, int) and num == 0):
      dtype = leaves[group[0]].dtype if scope == "leaf" else None
      due.setdefault(dtype, []).append((group, num))
  for found in due.values():
    members = [(i, number) for number, (group, _) in enumerate(found) for i in group]
    nums = jnp.stack([jnp.asarray(num, jnp.int32) for _, num in found])
    chosen, numbers = [leaves[i] for i, _ in members], tuple(g for _, g in members)
    kept = drop_largest(chosen, nums, numbers, by)
    for (i, _), mask in zip(members, kept, strict=True):
      masks[i] = mask
  return jax.tree.unflatten(treedef, masks)


def _count(k: ArrayLike, size: int) -> int | jax.Array:
  if size >= 2**31:
    raise ValueError(
      f"ignore_k ranks at most 2**31 - 1 entries together, got {size}; use "
      "scope='leaf' or smaller leaves."
    )
  return num_dropped(k, size) if size else 0


def _keep(mask: Any, kept: Any, other: Any) -> Any:
  return jax.tree.map(jnp.where, mask, kept, other)


def _zeros(tree: Any) -> Any:
  return jax.tree.map(jnp.zeros_like, tree)


def ignore_k_delta(
  params_before: Any,
  params_after: Any,
  k: ArrayLike,
  scope: Scope = "leaf",
  *,
  by: By = "abs",
) -> Any:
  """The rule once, on the change between two sets of parameters.

  Args:
    params_before: a pytree of float arrays, where dropped entries return to.
    params_after: a pytree like it.
    k: the fraction to drop, in [0, 1]; may be traced.
    scope: "leaf" or "global", as in ``ignore_k_mask``.
    by: "abs" or "signed", as in ``ignore_k_mask``.

  Returns:
    A pytree like ``params_after``: every entry is that of one or the other, bit for
    bit.

  Raises:
    ValueError: as ``ignore_k_mask``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import ignore_k_delta
    >>> ignore_k_delta(jnp.ones(3), jnp.array([1.5, 3.0, 0.0]), 0.4).tolist()
    [1.5, 1.0, 0.0]
  """
  check_float_leaves(params_after, "ignore_k")
  after, before = common.widen(params_after), common.widen(params_before)
  delta = jax.tree.map(jnp.subtract, after, before)
  return _keep(ignore_k_mask(delta, k, scope, by=by), params_after, params_before)


def keep_topk(
  k: ArrayLike = 0.08, scope: Scope = "leaf", *, by: By = "abs"
) -> optax.GradientTransformationExtraArgs:
  """The complement of ``ignore_k``: only what that would drop passes.

  Args:
    k: the fraction to keep, in [0, 1]; may be traced.
    scope: "leaf" or "global", as in ``ignore_k_mask``.
    by: "abs" or "signed", as in ``ignore_k_mask``.

  Returns:
    A transformation without state.

  Raises:
    ValueError: as ``ignore_k_mask``.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import keep_topk
    >>> u = jnp.array([0.5, -3.0, 1.0, 2.0, -1.0])
    >>> keep_topk(0.4).update(u, optax.EmptyState())[0].tolist()
    [0.0, -3.0, 0.0, 2.0, 0.0]
  """
  _check(k, scope, by)

  def update(
    updates: optax.Updates, state: Any, params: Any = None, **extra: Any
  ) -> tuple[optax.Updates, Any]:
    del params, extra
    mask = ignore_k_mask(updates, k, scope, by=by)
    return _keep(mask, _zeros(updates), updates), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


@method(
  family="updates",
  paper="Sun et al., How new data permeates LLM knowledge and how to dilute it, 2025",
  arxiv="2504.09522",
  seeds=("004:49",),
)
def ignore_k(
  k: ArrayLike = 0.08, scope: Scope = "leaf", window: int = 1, *, by: By = "abs"
) -> optax.GradientTransformationExtraArgs:
  r"""Ignore-k: drops the largest fraction k of the change of the parameters.

  .. math::
    u'_t &= u_t \odot S(u_t), \quad
    S(\Delta)_i = 0 \text{ for the } \lfloor k n + 10^{-6} \rfloor
    \text{ largest } |\Delta_i|, \text{ else } 1 \\
    p &= \theta_{t-1} + u_t, \quad \theta_t = a + (p - a) \odot S(p - a), \quad
    a \leftarrow \theta_t \quad \text{(every window-th step)}

  The last piece of a chain, after the learning rate: it edits the change of the
  parameters, so that moments see every gradient. Kept entries pass bit for bit and
  are not rescaled. In a window of several steps updates pass until its last step,
  when the largest changes since the anchor a are taken back: exactly in the state,
  in the parameters up to the rounding of one float subtraction. ``ignore_k_mask``
  says how entries are ranked and what runs on sharded leaves.

  Args:
    k: fraction dropped, in [0, 1]; may be traced. A leaf of fewer than 1 / k entries
      loses none in "leaf" scope.
    scope: "leaf" ranks the entries of each leaf, "global" all of them together.
    window: steps between prunings, at least 1. 1 has no state; with more, params are
      needed and one copy of them is kept.
    by: "abs" drops the largest magnitudes, "signed" the largest numbers.

  Returns:
    A transformation; with ``window > 1`` its state is an :class:`IgnoreKState`.

  Raises:
    ValueError: an argument out of range, a leaf that is not floating point, too many
      entries, or no params although window > 1.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import ignore_k
    >>> transform, theta = optax.chain(optax.sgd(1.0), ignore_k(0.4)), jnp.zeros(5)
    >>> g = jnp.array([0.5, -3.0, 1.0, 2.0, -1.0])
    >>> update, _ = transform.update(g, transform.init(theta))
    >>> (theta + update).tolist()
    [-0.5, 0.0, -1.0, 0.0, 1.0]

  References:
    Sun et al., `How new data permeates LLM knowledge and how to dilute it
    <https://arxiv.org/abs/2504.09522>`_, 2025
  """
  _check(k, scope, by)
  if window < 1:
    raise ValueError(f"window must be at least 1, got {window!r}.")

  def init(params: optax.Params) -> IgnoreKState | optax.EmptyState:
    check_float_leaves(params, "ignore_k")
    if window == 1:
      return optax.EmptyState()

    def copy(p: Any) -> jax.Array:
      return jnp.array(p, common.accumulator(jnp.result_type(p)))

    return IgnoreKState(jnp.zeros([], jnp.int32), jax.tree.map(copy, params))

  def update(
    updates: optax.Updates, state: Any, params: Any = None, **extra: Any
  ) -> tuple[optax.Updates, Any]:
    del extra
    check_float_leaves(updates, "ignore_k")
    if window == 1:
      mask = ignore_k_mask(updates, k, scope, by=by)
      return _keep(mask, updates, _zeros(updates)), state
    if params is None:
      raise ValueError("ignore_k needs params in update when window is more than 1.")

    def prune() -> tuple[optax.Updates, optax.Params]:
      def moved(u: Any, p: Any, a: jax.Array) -> tuple[jax.Array, ...]:
        wide = jnp.asarray(p).astype(a.dtype)
        # As they will be stored: bf16 parameters round what is added to them.
        after = (wide + jnp.asarray(u).astype(a.dtype)).astype(jnp.result_type(p))
        after = after.astype(a.dtype)
        return after, after - a, (a - wide).astype(jnp.result_type(u))

      after, delta, back = common.unzip_map(moved, 3, updates, params, state.anchor)
      mask = ignore_k_mask(delta, k, scope, by=by)
      return _keep(mask, updates, back), _keep(mask, after, state.anchor)

    count = optax.safe_increment(state.count)
    updates, anchor = jax.lax.cond(
      count % window == 0,
      prune,
      lambda: (jax.tree.map(jnp.asarray, updates), state.anchor),
    )
    return updates, IgnoreKState(count, anchor)

  return optax.GradientTransformationExtraArgs(init, update)
