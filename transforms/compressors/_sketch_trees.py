"""Projections of whole trees, leaf by leaf or flattened."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from gradlab.transforms._common import as_key, check_float_leaves, leaf_keys
from gradlab.transforms.compressors._common import wire_size
from gradlab.transforms.compressors._sketches import (
  Kind,
  Sketch,
  check_kind,
  desketch,
  make_sketch,
  sketch,
)
from gradlab.types import PyTree

Scope = Literal["leaf", "global"]


def sketch_tree(
  kind: Kind,
  key: int | jax.Array,
  tree: PyTree,
  ratio: float | None,
  *,
  s: int | None = None,
  scope: Scope = "leaf",
) -> PyTree:
  r"""Sketches a tree leaf by leaf, or as one flattened vector.

  A vector with d <= s travels whole, so scalars and empty leaves always do.

  Args:
    kind: as in ``make_sketch``.
    key: jax key or int seed; a leaf's own key is folded with the leaf's path.
    tree: leaves of any shape and float dtype.
    ratio: s/d in (0, 1], with s = max(1, round(ratio d)); a Python number.
    s: message length per sketched vector, at least 1; takes the place of ``ratio``.
    scope: "leaf", or "global" for one sketch of the whole tree.

  Returns:
    float32 messages ``[s]``: a tree like ``tree``, or one array for "global".

  Raises:
    ValueError: unknown kind or scope, ``ratio`` or ``s`` traced or out of range, or a
      leaf that is not floating point.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.compressors import sketch_tree
    >>> tree = {"w": jnp.ones((8, 8)), "b": jnp.ones(())}
    >>> jax.tree.map(jnp.shape, sketch_tree("srht", 0, tree, 0.25))
    {'b': (1,), 'w': (16,)}
  """
  check_scope(scope)
  check_float_leaves(tree, "sketch_tree")

  def one(leaf: jax.Array, leaf_key: jax.Array) -> jax.Array:
    flat = leaf.astype(jnp.float32).reshape(-1)
    sk = _plan(kind, leaf_key, flat.size, ratio, s)
    return flat if sk is None else sketch(sk, flat)

  if scope == "global":
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    return one(ravel_pytree(wide)[0], as_key(key))
  return jax.tree.map(one, tree, leaf_keys(as_key(key), tree))


def desketch_tree(
  kind: Kind,
  key: int | jax.Array,
  message: PyTree,
  ratio: float | None,
  like: PyTree,
  *,
  s: int | None = None,
  scope: Scope = "leaf",
) -> PyTree:
  """Applies the transpose of what ``sketch_tree`` applied, with the same arguments.

  Args:
    kind: as in ``sketch_tree``.
    key: as in ``sketch_tree``.
    message: from ``sketch_tree``, or a mean of such messages.
    ratio: as in ``sketch_tree``.
    like: tree with the shapes and dtypes of the result.
    s: as in ``sketch_tree``.
    scope: as in ``sketch_tree``.

  Returns:
    A tree like ``like``.

  Raises:
    ValueError: as ``sketch_tree``, or a message of another length than the arguments
      say.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.compressors import desketch_tree, sketch_tree
    >>> message = sketch_tree("srht", 0, jnp.ones((2, 3)), 1.0)
    >>> print(desketch_tree("srht", 0, message, 1.0, jnp.zeros((2, 3))))
    [[1. 1. 1.]
     [1. 1. 1.]]
  """
  check_scope(scope)

  def lift(size: int, own_key: jax.Array, m: jax.Array) -> jax.Array:
    sk = _plan(kind, own_key, size, ratio, s)
    if sk is not None:
      return desketch(sk, m)
    if m.shape != (size,):
      raise ValueError(
        f"an unsketched message must have shape {(size,)}, got {m.shape}."
      )
    return m

  def shaped(flat: jax.Array, leaf: Any) -> jax.Array:
    return flat.reshape(leaf.shape).astype(leaf.dtype)

  if scope == "global":
    leaves, treedef = jax.tree.flatten(like)
    sizes = [leaf.size for leaf in leaves]
    whole = lift(sum(sizes), as_key(key), message)
    parts = jnp.split(whole, np.cumsum(sizes)[:-1])
    return jax.tree.unflatten(treedef, map(shaped, parts, leaves))
  return jax.tree.map(
    lambda leaf, leaf_key, m: shaped(lift(leaf.size, leaf_key, m), leaf),
    like,
    leaf_keys(as_key(key), like),
    message,
  )


def check_scope(scope: str) -> None:
  """Raises ValueError for anything but "leaf" and "global"."""
  if scope not in ("leaf", "global"):
    raise ValueError(f"scope must be 'leaf' or 'global', got {scope!r}.")


def _plan(
  kind: Kind, key: jax.Array, d: int, ratio: float | None, s: int | None
) -> Sketch | None:
  """The sketch of a vector of length d; None where the vector travels whole."""
  check_kind(kind)
  length = wire_size(d, ratio, s, names=("ratio", "s"))
  return None if d <= length else make_sketch(kind, key, d, length)
