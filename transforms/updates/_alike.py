"""One program for leaves that are alike, so that deep trees compile quickly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Leaves per loop: more compile faster, but each loop holds copies of all its leaves.
_AT_ONCE = 8


def map_alike(
  function: Callable[..., tuple[Any, ...]], width: int, tree: Any, *rest: Any
) -> tuple[Any, ...]:
  """``common.unzip_map``, with a loop over rows of the same shapes and dtypes.

  Unrolled, the layers of a deep model would be compiled one by one. Inside the loop a
  ``lax.cond`` still runs one branch only, which it wouldn't under ``jax.vmap``.

  Args:
    function: of one leaf of every tree; must treat rows that are alike in one way.
    width: number of results.
    tree: the tree whose leaves are mapped.
    *rest: trees that have it as a prefix.

  Returns:
    ``width`` trees with the structure of ``tree``, of results.
  """
  treedef: Any = jax.tree.structure(tree)
  rows = list(
    zip(*(treedef.flatten_up_to(other) for other in (tree, *rest)), strict=True)
  )
  alike: dict[Any, list[int]] = {}
  for i, row in enumerate(rows):
    leaves, structure = jax.tree.flatten(row)
    kinds = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    alike.setdefault((structure, kinds), []).append(i)
  results: list[Any] = [None] * len(rows)
  for members in alike.values():
    for start in range(0, len(members), _AT_ONCE):
      group = members[start : start + _AT_ONCE]
      if len(group) == 1:
        results[group[0]] = function(*rows[group[0]])
        continue
      stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(rows[i] for i in group))
      out = jax.lax.map(lambda row: function(*row), stacked)
      for k, i in enumerate(group):
        results[i] = jax.tree.map(lambda x, k=k: x[k], out)
  return tuple(treedef.unflatten([row[i] for row in results]) for i in range(width))
