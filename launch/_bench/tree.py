"""The parameters that the benchmark steps, prunes and sends: those of a decoder."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.types import Params, PyTree


class Sizes(NamedTuple):
  """A decoder's: with the default ones it has 20 million parameters."""

  layers: int = 5
  width: int = 512
  vocabulary: int = 8192


def parameters(sizes: Sizes, seed: int = 0) -> Params:
  """Float32 leaves shaped and named as a decoder's parameters, drawn at random."""
  width, rng = sizes.width, np.random.default_rng(seed)

  def dense(fan_in: int, fan_out: int) -> dict[str, jax.Array]:
    return {"kernel": draw(fan_in, fan_out), "bias": draw(fan_out)}

  def draw(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(0.0, 0.02, shape).astype(np.float32))

  def layer() -> dict[str, dict[str, jax.Array]]:
    return {
      "attention_norm": {"scale": draw(width)},
      "query_key_value": dense(width, 3 * width),
      "attention_out": dense(width, width),
      "mlp_norm": {"scale": draw(width)},
      "mlp_in": dense(width, 4 * width),
      "mlp_out": dense(4 * width, width),
    }

  return {
    "embedding": draw(sizes.vocabulary, width),
    **{f"layer_{index}": layer() for index in range(sizes.layers)},
    "norm": {"scale": draw(width)},
  }


def tree_bytes(tree: PyTree) -> int:
  """Bytes of the arrays in a tree."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count(tree: PyTree) -> int:
  """Numbers in a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
