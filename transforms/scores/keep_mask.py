r"""From scores to masks: drop an exact number of the lowest entries."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gradlab.transforms._common import check_range, concrete
from gradlab.transforms.scores._common import where_in_tree, widened

Scope = Literal["global", "leaf"]


def keep_mask(
  scores: Any,
  sparsity: ArrayLike,
  scope: Scope = "global",
  *,
  checked: bool = False,
) -> Any:
  r"""Masks that keep all but the ``round(sparsity * n)`` lowest scores.

  .. math::
    m_i = \mathbb{1}[\operatorname{rank}(s_i) \ge k], \qquad
    k = \operatorname{round}(\text{sparsity} \cdot n)

  Ranks count from 0 in increasing order of score; of equal scores the one that comes
  first in traversal order ranks lower, and NaN ranks above everything, so that it is
  kept. Halves round to even. Masks are nested as ``sparsity`` grows.

  The k-th lowest score is found by bisection on the bits of the scores (one count per
  bit), which needs no sort, no concatenation of the leaves, and one scalar
  all-reduce per bit when they are sharded.

  Args:
    scores: a pytree of arrays of any shape, compared in float32 (float64 where a leaf
      is); ``None`` nodes stand for leaves that are not pruned and stay ``None``.
    sparsity: the fraction to drop, in [0, 1). A Python number gives the count
      ``round(sparsity * n)`` exactly. An array, traced or not, is read as float32:
      its 24 bits fix the count for n up to about 4 million; beyond that the count is
      right for the float32 value, which may differ from the decimal number it came
      from by up to n / 2**25 entries.
    scope: "global" counts and ranks over all leaves together, "leaf" in each leaf.
    checked: raise on NaN scores instead of keeping them; needs concrete scores.

  Returns:
    A pytree of bool arrays like ``scores``, True = keep. A leaf may lose all its
    entries: ``collapsed`` names such leaves.

  Raises:
    ValueError: a concrete sparsity outside [0, 1), an unknown scope, 2**31 or more
      entries ranked together, or ``checked`` with NaN or traced scores.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import keep_mask
    >>> scores = (jnp.array([3.0, 1.0, 0.5]), jnp.array([0.2, 0.4]), None)
    >>> [m if m is None else m.tolist() for m in keep_mask(scores, 0.6, "global")]
    [[True, True, False], [False, False], None]
    >>> [m if m is None else m.tolist() for m in keep_mask(scores, 0.6, "leaf")]
    [[True, False, False], [False, True], None]

  References:
    Han et al., Learning both Weights and Connections for Efficient Neural Networks,
    2015, arXiv 1506.02626.
  """
  check_range("sparsity", sparsity, 0.0, 1.0, open_high=True)
  if scope not in ("global", "leaf"):
    raise ValueError(f"scope must be 'global' or 'leaf', got {scope!r}.")
  if checked:
    _check_no_nan(scores)
  leaves, treedef = jax.tree.flatten(scores)
  groups = [leaves] if scope == "global" else [[leaf] for leaf in leaves]
  masks = []
  for group in groups:
    size = sum(jnp.size(leaf) for leaf in group)
    if size >= 2**31:
      raise ValueError(
        f"at most 2**31 - 1 scores can be ranked together, got {size}; "
        "use scope='leaf' or fewer leaves."
      )
    masks += _drop_lowest(group, _num_dropped(sparsity, size))
  return jax.tree.unflatten(treedef, masks)


def apply_mask(params: Any, mask: Any, *, unit_axis: int | None = None) -> Any:
  """Zeroes the entries whose mask is False; the mask may be applied to updates too.

  Args:
    params: a pytree of arrays.
    mask: a pytree of bool arrays like ``params``, ``None`` for leaves (or whole
      subtrees) left as they are.
    unit_axis: the axis that the mask vectors run along, None for masks of the shape
      of the parameters.

  Returns:
    A pytree like ``params``, same dtypes. A dropped NaN becomes 0 as well.

  Raises:
    ValueError: a mask that does not fit its leaf.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.scores import apply_mask
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> mask = {"kernel": jnp.array([True, False]), "bias": None}
    >>> apply_mask(params, mask, unit_axis=1)["kernel"].tolist()
    [[1.0, 0.0], [1.0, 0.0]]
  """

  def apply(path: tuple[Any, ...], keep: Any, leaf: Any) -> Any:
    if keep is None:
      return leaf
    shape = jnp.shape(leaf)
    if unit_axis is None:
      fits = jnp.shape(keep) == shape
    else:
      fits = -len(shape) <= unit_axis < len(shape)
      fits = fits and jnp.shape(keep) == (shape[unit_axis],)
    if not fits:
      raise ValueError(
        f"the mask of {where_in_tree(path)} has shape {jnp.shape(keep)}, which does "
        f"not fit a leaf of shape {shape} with unit_axis={unit_axis}."
      )
    if unit_axis is not None:
      spread = [1] * len(shape)
      spread[unit_axis] = -1
      keep = jnp.reshape(keep, spread)
    return jnp.where(keep, leaf, jnp.zeros((), jnp.result_type(leaf)))

  return jax.tree_util.tree_map_with_path(
    apply, mask, params, is_leaf=lambda node: node is None
  )


def collapsed(mask: Any) -> tuple[str, ...]:
  """Paths of the leaves of which a concrete mask keeps nothing (layer collapse).

  Args:
    mask: a pytree of concrete bool arrays; ``None`` nodes and leaves without entries
      cannot collapse.

  Returns:
    The paths as ``jax.tree_util.keystr`` writes them, in traversal order.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.scores import collapsed
    >>> collapsed({"a": jnp.array([True, False]), "b": jnp.array([False]), "c": None})
    ("['b']",)
  """
  named = jax.tree_util.tree_leaves_with_path(mask)
  kept = jax.device_get([jnp.any(leaf) for _, leaf in named])
  return tuple(
    where_in_tree(path)
    for (path, leaf), any_kept in zip(named, kept, strict=True)
    if leaf.size and not any_kept
  )


def _check_no_nan(scores: Any) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(scores):
    if not concrete(leaf):
      raise ValueError("checked=True needs concrete scores, got traced ones.")
    if bool(jnp.any(jnp.isnan(leaf))):
      raise ValueError(
        f"the scores of {where_in_tree(path)} contain NaN; scores must be numbers."
      )


def _num_dropped(sparsity: ArrayLike, size: int) -> jax.Array:
  """``round(sparsity * size)``, halves to even, also where float32 has no integers."""
  if isinstance(sparsity, int | float):
    return jnp.asarray(round(sparsity * size), jnp.int32)
  fraction = jnp.asarray(sparsity)
  if fraction.dtype == jnp.float64:
    count = jnp.round(fraction * size).astype(jnp.int32)
    return jnp.clip(count, 0, size)
  fraction = jnp.clip(fraction.astype(jnp.float32), 0.0, 1.0 - 2.0**-24)
  # Twelve leading bits are multiplied in integers, so that nothing large is rounded.
  leading = jnp.floor(fraction * 4096.0)
  rest = (fraction - leading / 4096.0) * float(size)
  bits = leading.astype(jnp.int32)
  low = bits * (size % 4096)
  part = (low % 4096).astype(jnp.float32) / 4096.0 + rest
  whole = bits * (size // 4096) + low // 4096 + jnp.floor(part).astype(jnp.int32)
  part = part - jnp.floor(part)
  # 0.35 is not a float32 number: within its rounding error a half counts as a half.
  resolution = jnp.minimum(fraction * (float(size) * 2.0**-24), 0.25)
  half = jnp.abs(part - 0.5) <= resolution
  up = jnp.where(half, whole % 2 == 1, part > 0.5)
  return jnp.clip(whole + up.astype(jnp.int32), 0, size)


@jax.jit
def _drop_lowest(leaves: list[Any], k: jax.Array) -> list[jax.Array]:
  """Masks that drop exactly the k lowest scores of all leaves together."""
  keys = order_keys(leaves)
  threshold = kth_smallest(keys, k)
  # Of the entries equal to the threshold the first ones go, until the count is met.
  quota = k - count_below(keys, threshold)
  masks = []
  for key in keys:
    tied = jnp.ravel(key == threshold)
    order = jnp.cumsum(tied, dtype=jnp.int32)
    dropped_tie = jnp.reshape(tied & (order <= quota), key.shape)
    masks.append(~((key < threshold) | dropped_tie))
    quota = quota - jnp.sum(tied, dtype=jnp.int32)
  return masks


def order_keys(leaves: list[Any]) -> list[jax.Array]:
  """Unsigned integers in the order of the scores: -0 equals 0, NaN is the largest."""
  wide = [widened(jax.lax.stop_gradient(leaf)) for leaf in leaves]
  double = any(leaf.dtype == jnp.float64 for leaf in wide)
  floating, unsigned = (
    (jnp.float64, jnp.uint64) if double else (jnp.float32, jnp.uint32)
  )
  sign = jnp.asarray(1 << (63 if double else 31), unsigned)

  def key(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(floating), unsigned)
    negative = bits > sign
    ordered = jnp.where(negative, ~bits, bits | sign)
    return jnp.where(jnp.isnan(leaf), ~jnp.zeros((), unsigned), ordered)

  return [key(leaf) for leaf in wide]


def kth_smallest(keys: list[jax.Array], k: jax.Array) -> jax.Array:
  """The largest threshold with fewer than k keys below it: bit by bit from the top."""
  unsigned = keys[0].dtype if keys else jnp.dtype(jnp.uint32)
  num_bits = 8 * unsigned.itemsize

  def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
    top = jnp.ones((), unsigned) << (num_bits - 1 - i).astype(unsigned)
    candidate = threshold | top
    return jnp.where(count_below(keys, candidate) < k, candidate, threshold)

  found: jax.Array = jax.lax.fori_loop(0, num_bits, set_bit, jnp.zeros((), unsigned))
  return found


def count_below(keys: list[jax.Array], threshold: jax.Array) -> jax.Array:
  """How many keys of all leaves together lie below the threshold, int32."""
  counts = [jnp.sum(key < threshold, dtype=jnp.int32) for key in keys]
  return sum(counts, jnp.zeros((), jnp.int32))
