"""Maps: the few numbers that codes stand for, and fast lookups in both directions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
  """Raises ValueError when ``value`` lies outside the range."""
  if value < low or (high is not None and value > high):
    allowed = f"at least {low}" if high is None else f"from {low} to {high}"
    raise ValueError(f"{name} must be {allowed}, got {value!r}.")


@functools.cache
def dynamic_map(signed: bool, bits: int = 8) -> np.ndarray:
  r"""The dynamic map: 2**bits numbers in [-1, 1] or [0, 1], denser towards zero.

  For :math:`i = 0, \dots, bits - 2` the interval [0.1, 1] is cut into :math:`N_i = 2^i`
  (signed) or :math:`2^{i+1}` equal parts, whose midpoints times
  :math:`10^{i - bits + 2}` are entries, with their negatives if signed; 0 and 1 are
  the last two. There is no -1.

  Args:
    signed: whether half of the entries are negative.
    bits: 2 to 8.

  Returns:
    float32 [2**bits], ascending; a NumPy array, because lookups precompute from it.

  Raises:
    ValueError: bits out of range.

  Examples:
    >>> from gradlab.transforms.updates import dynamic_map
    >>> [f"{x:.4f}" for x in dynamic_map(signed=False, bits=3)]
    ['0.0000', '0.0325', '0.0775', '0.2125', '0.4375', '0.6625', '0.8875', '1.0000']

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """
  check_int("bits", bits, 2, 8)
  entries = [0.0, 1.0]
  for i in range(bits - 1):
    edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
    middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - bits + 2)
    entries += [*middles, *(-middles if signed else ())]
  out = np.sort(np.asarray(entries)).astype(np.float32)
  out.flags.writeable = False  # shared by all callers
  return out


def lookup(table: jax.typing.ArrayLike, index: jax.Array) -> jax.Array:
  """``table[index]`` for indices that are within its bounds."""
  # Checking bounds that always hold costs a third of the time.
  return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


def nearest(unit: jax.Array, map: jax.typing.ArrayLike) -> jax.Array:
  """int32 codes of the entries nearest to ``unit``, float32 within [-1, 1].

  Of two equally near entries a map that is not traced gives the one closer to zero.
  """
  if isinstance(map, jax.core.Tracer):
    between = (map[1:] + map[:-1]) / 2
    return jnp.searchsorted(between, unit, method="scan_unrolled").astype(jnp.int32)
  entries = np.asarray(map, np.float32)
  middles = (entries[1:].astype(np.float64) + entries[:-1]) / 2
  codes, limits, first, shift = _cells(middles.astype(np.float32).tobytes())
  cells = len(codes) // 2
  bits = jax.lax.bitcast_convert_type(unit, jnp.int32)
  negative = bits < 0
  cell = ((bits & 0x7FFFFFFF) >> shift) - first
  cell = jnp.clip(cell, 0, cells - 1) + jnp.where(negative, cells, 0)
  # A cell holds at most one boundary between codes: one comparison settles it.
  past = (jnp.abs(unit) > lookup(limits, cell)).astype(jnp.int32)
  return lookup(codes, cell) + jnp.where(negative, -past, past)


def dithered(unit: jax.Array, map: jax.typing.ArrayLike, key: jax.Array) -> jax.Array:
  """int32 codes of one of the two entries around ``unit``: their mean is ``unit``."""
  code = nearest(unit, map)
  below = code - (lookup(map, code) > unit).astype(jnp.int32)
  below = jnp.clip(below, 0, np.shape(map)[0] - 2)
  low, high = lookup(map, below), lookup(map, below + 1)
  # 16 bits per entry: half the time of 32, and a chance good to 2**-17.
  words = jax.random.bits(key, (-(-unit.size // 2),), jnp.uint32)
  drawn = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
  uniform = (drawn[: unit.size].astype(jnp.float32) + 0.5) * 2.0**-16
  up = uniform.reshape(unit.shape) * (high - low) < unit - low
  return below + up.astype(jnp.int32)


@functools.lru_cache(maxsize=16)
def _cells(boundaries: bytes) -> tuple[np.ndarray, np.ndarray, int, int]:
  """A table over the leading bits of float32 magnitudes, positive then negative.

  Returns:
    (codes, limits, first, shift): cell k is the magnitudes whose bits shifted by
    ``shift`` are ``first`` + k (below and above the ends: the end cells). Its numbers
    up to limits[k] have codes[k], those beyond the next code away from zero.
  """
  middles = np.frombuffer(boundaries, np.float32)
  sizes = np.abs(middles[middles != 0])
  smallest, largest = (sizes.min(), sizes.max()) if sizes.size else (0.5, 1.0)
  for shift in range(20, 7, -1):
    first = int(np.float32(smallest).view(np.int32) >> shift) - 1
    last = int(np.float32(largest).view(np.int32) >> shift) + 1
    low = (np.arange(first, last + 1, dtype=np.int32) << shift).view(np.float32)
    low[0] = 0
    high = np.append(low[1:], np.float32(np.inf))
    up = [np.searchsorted(middles, edge, side="left") for edge in (low, high)]
    down = [np.searchsorted(middles, -edge, side="right") for edge in (low, high)]
    if max((up[1] - up[0]).max(), (down[0] - down[1]).max()) <= 1:
      break
  else:
    raise ValueError("map has entries too close to each other for float32 lookups.")
  padded = np.concatenate([[-np.inf], middles, [np.inf]]).astype(np.float32)
  limits = np.concatenate(
    [
      np.where(up[1] > up[0], padded[up[0] + 1], np.inf),
      np.where(down[0] > down[1], -padded[down[0]], np.inf),
    ]
  )
  codes = np.concatenate([up[0], down[0]]).astype(np.int32)
  return codes, limits.astype(np.float32), first, shift
