"""What aggregators share: the checks of a stack, Gram matrices and mixtures."""

from typing import Any

import jax
import jax.numpy as jnp

from gradlab.transforms._common import check_float_leaves


def num_sources(stacked: Any, method: str) -> int:
  """The length K of the leading axis of every leaf; 0 for a tree without leaves.

  Raises:
    ValueError: a leaf is not floating point, has no source axis, has no sources or
      has another number of them than the first leaf.
  """
  check_float_leaves(stacked, method)
  count = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
    where = jax.tree_util.keystr(path) or "the only leaf"
    shape = jnp.shape(leaf)
    if not shape or not shape[0]:
      raise ValueError(
        f"{method} needs a leading axis of at least one source, but {where} has "
        f"shape {shape}."
      )
    count = count or shape[0]
    if shape[0] != count:
      raise ValueError(
        f"{method} needs the same number of sources in every leaf, but {where} has "
        f"{shape[0]} and the first leaf {count}."
      )
  return count


def gram(stacked: jax.Array) -> jax.Array:
  """float32[K, K] inner products of a leaf's K sources, summed in float32."""
  # Contracting the axes as they are, not a reshaped copy, keeps a sharded leaf where
  # it lies: only the K x K result is all-reduced.
  values = stacked.astype(jnp.float32)
  axes = tuple(range(1, values.ndim))
  return jnp.tensordot(
    values, values, axes=(axes, axes), precision=jax.lax.Precision.HIGHEST
  )


def mixture(weights: jax.Array, stacked: jax.Array) -> jax.Array:
  """``sum_k weights[k] stacked[k]`` in float32, returned in the leaf's dtype."""
  mixed = jnp.tensordot(
    weights,
    stacked.astype(jnp.float32),
    axes=1,
    precision=jax.lax.Precision.HIGHEST,
  )
  return mixed.astype(stacked.dtype)
