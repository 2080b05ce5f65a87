"""A window of gradients kept leaf by leaf, and the inverse-Fisher step in it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates._fisher import step_weights


class MFACState(NamedTuple):
  """The window of the last m gradients.

  Attributes:
    count: int32 scalar, the number of gradients taken in; the next goes into slot
      ``count % m``.
    grads: tree like the parameters; a leaf holds its part of the window, [m, ...].
    gram: [m, m], inner products of the window's gradients.
  """

  count: jax.Array  # type: ignore[assignment]
  grads: optax.Updates
  gram: jax.Array


def flat_window(state: MFACState) -> jax.Array:
  """The window as one array [m, d], parameters in the order of the tree."""
  m = state.gram.shape[0]
  dtype = state.gram.dtype
  rows = [leaf.reshape(m, -1).astype(dtype) for leaf in jax.tree.leaves(state.grads)]
  return jnp.concatenate([jnp.zeros((m, 0), dtype), *rows], axis=1)


def floating(tree: Any) -> Any:
  """The tree with every leaf that is not floating point masked out."""

  def leaf(x: Any) -> Any:
    floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return x if floating else optax.MaskedNode()

  return jax.tree.map(leaf, tree)


def _wide(leaves: list[Any]) -> Any:
  """The dtype in which the inner products of these leaves are summed."""
  dtypes = [common.accumulator(jnp.result_type(leaf)) for leaf in leaves]
  return max(dtypes, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def init_window(params: optax.Params, m: int, grad_dtype: Any) -> MFACState:
  """An empty window for ``m`` gradients of these parameters."""
  params = floating(params)

  def rows(p: Any) -> jax.Array:
    dtype = grad_dtype or common.accumulator(jnp.result_type(p))
    return jnp.zeros((m, *jnp.shape(p)), dtype)

  gram = jnp.zeros((m, m), _wide(jax.tree.leaves(params)))
  return MFACState(jnp.zeros([], jnp.int32), jax.tree.map(rows, params), gram)


def _products(rows: jax.Array, g: jax.Array, dtype: Any) -> jax.Array:
  """The inner product of every row with ``g``: [m]."""
  axes = tuple(range(g.ndim))
  contract = (tuple(axis + 1 for axis in axes), axes)
  return lax.dot_general(
    rows,
    g,
    (contract, ((), ())),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=dtype,
  )


def _combination(weights: jax.Array, rows: jax.Array) -> jax.Array:
  """The sum of the rows with these weights, in the dtype of the weights."""
  if rows.dtype == weights.dtype:
    contract = (((0,), (0,)), ((), ()))
    return lax.dot_general(weights, rows, contract, precision=lax.Precision.HIGHEST)

  def add(i: jax.Array, total: jax.Array) -> jax.Array:
    return total + weights[i] * rows[i].astype(weights.dtype)

  # Row by row, so that no wide copy of a narrow window is made.
  start = jnp.zeros(rows.shape[1:], weights.dtype)
  return lax.fori_loop(0, rows.shape[0], add, start, unroll=min(4, rows.shape[0]))


def advance(
  updates: optax.Updates, state: MFACState, damping: Any, skip_nonfinite: bool
) -> tuple[optax.Updates, MFACState]:
  """``F^{-1} g`` in at least float32, and the window with ``g`` in it."""
  leaves = jax.tree.leaves(updates)
  treedef: Any = jax.tree.structure(updates)
  window = treedef.flatten_up_to(state.grads)
  m, dtype = state.gram.shape[0], state.gram.dtype
  slot = state.count % m
  # As they are stored, so that the Gram matrix is that of the stored rows.
  new = [jnp.asarray(g).astype(w.dtype) for g, w in zip(leaves, window, strict=True)]
  none = jnp.zeros([m], dtype)
  row = none + sum(_products(w, g, dtype) for w, g in zip(window, new, strict=True))
  own = sum((_products(g[None], g, dtype)[0] for g in new), none[0])
  finite = jnp.isfinite(own)
  row = jnp.where(finite, row.at[slot].set(own), jnp.nan)
  gram = state.gram.at[slot, :].set(row).at[:, slot].set(row)
  weights = step_weights(gram, slot, common.scalar(damping).astype(dtype))
  others = weights.at[slot].set(0)
  skipped = ~finite if skip_nonfinite else None

  def leaf(g: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = common.accumulator(g.dtype)
    u = _combination(others.astype(wide), rows)
    u = u + weights[slot].astype(wide) * g.astype(wide)
    # The Gram matrix remembers that a row was not finite; as zeros it can be replaced.
    kept = jnp.where(finite, g, 0)
    if skipped is not None:
      u = jnp.where(skipped, 0, u)
      kept = jnp.where(skipped, rows[slot], kept)
    # Always kept; but after u, so that XLA may overwrite the slot without a copy.
    kept = jnp.where(state.count >= 0, kept, u.astype(g.dtype))
    return u, lax.dynamic_update_index_in_dim(rows, kept, slot, 0)

  pairs = [leaf(g, rows) for g, rows in zip(new, window, strict=True)]
  count = optax.safe_increment(state.count)
  if skipped is not None:
    count = jnp.where(skipped, state.count, count)
    gram = jnp.where(skipped, state.gram, gram)
  grads = treedef.unflatten([rows for _, rows in pairs])
  return treedef.unflatten([u for u, _ in pairs]), MFACState(count, grads, gram)
