"""Adam whose moments may be kept in eight bits, of plain and of projected leaves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates._projection import ProjectorState
from gradlab.transforms.updates._quantise import (
  blockwise_dequantize,
  blockwise_quantize,
  dynamic_map,
)


class BlockCodes(NamedTuple):
  """An array in eight bits: ``codes`` uint8 of its shape, ``absmax`` per block.

  Both have the stacking axis in front where matrices are stacked.
  """

  codes: jax.Array
  absmax: jax.Array


class BlockAdam(NamedTuple):
  """Adam's arguments, and how its moments are kept."""

  b1: jax.typing.ArrayLike
  b2: jax.typing.ArrayLike
  eps: jax.typing.ArrayLike
  quantize: bool
  block_size: int
  min_size: int

  def init(self, params: Any, states: Any, shapes: Any, signed: bool) -> Any:
    """Zero first (signed) or second moments of the given shapes."""

    def leaf(p: Any, state: Any, low: Any) -> Any:
      zeros = jnp.zeros(low.shape, common.accumulator(jnp.result_type(p)))
      stacked = isinstance(state, ProjectorState) and zeros.ndim == 3
      one = zeros[0] if stacked else zeros
      if not (self.quantize and one.size and one.size >= self.min_size):
        return zeros
      # As constants, they would be quantised by the compiler, for minutes.
      return self.pack(jax.lax.optimization_barrier(zeros), signed, stacked)

    return jax.tree.map(leaf, params, states, shapes)

  def pack(self, x: jax.Array, signed: bool, stacked: bool) -> BlockCodes:
    def one(x: jax.Array) -> BlockCodes:
      return BlockCodes(*blockwise_quantize(x, dynamic_map(signed), self.block_size))

    return jax.vmap(one)(x) if stacked else one(x)

  def unpack(self, x: Any, signed: bool) -> Any:
    if not isinstance(x, BlockCodes):
      return x

    def one(x: BlockCodes) -> jax.Array:
      return blockwise_dequantize(*x, dynamic_map(signed), self.block_size)

    return jax.vmap(one)(x) if x.absmax.ndim == 2 else one(x)

  def step(
    self, r: jax.Array, mu: Any, nu: Any, count: jax.Array
  ) -> tuple[jax.Array, Any, Any]:
    """The direction for a gradient ``r`` and the next moments."""
    c1, c2 = (common.bias_correction(b, count) for b in (self.b1, self.b2))
    factors = (self.b1, 1 - self.b1, self.b2, 1 - self.b2, c1, jnp.sqrt(c2), self.eps)
    d1, k1, d2, k2, c1, root, floor = (
      common.scalar(x).astype(r.dtype) for x in factors
    )
    m = d1 * self.unpack(mu, True).astype(r.dtype) + k1 * r
    v = d2 * self.unpack(nu, False).astype(r.dtype) + k2 * jnp.square(r)
    below = jnp.sqrt(v) / root + floor
    a = jnp.where(below == 0, 0, m / c1 / jnp.where(below == 0, 1, below))
    if isinstance(mu, BlockCodes):
      stacked = mu.absmax.ndim == 2
      return a, self.pack(m, True, stacked), self.pack(v, False, stacked)
    return a, m, v
