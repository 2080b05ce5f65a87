"""Which entries are the largest: exact, by counting, without a sort."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

By = Literal["abs", "signed"]


def num_dropped(k: Any, size: int) -> int | jax.Array:
  """``floor(k * size + 1e-6)``: exact for a Python number, else an int32 array.

  A float32 k is not the decimal number that it came from. A product that lies below
  an integer by no more than this rounding, k * size / 2**24, counts as the integer.
  So both agree, up to 2**23 entries, unless the product of the decimal number itself
  lies below an integer by less than twice as much.
  """
  if isinstance(k, int | float):
    return min(size, math.floor(k * size + 1e-6))
  fraction = jnp.asarray(k)
  if fraction.dtype == jnp.float64:
    count = jnp.floor(fraction * float(size) + 1e-6).astype(jnp.int32)
    return jnp.clip(count, 0, size)
  fraction = jnp.clip(fraction.astype(jnp.float32), 0.0, 1.0)
  # Twelve leading bits are multiplied in integers, so that nothing large is rounded.
  leading = jnp.floor(fraction * 4096.0)
  rest = (fraction - leading / 4096.0) * float(size)
  bits = leading.astype(jnp.int32)
  low = bits * (size % 4096)
  part = (low % 4096).astype(jnp.float32) / 4096.0 + rest
  whole = jnp.floor(part)
  guard = jnp.clip(fraction * (float(size) * 2.0**-24), 1e-6, 0.49)
  # Apart from its integer, so that the guard is not rounded away.
  up = (part - whole) + guard >= 1.0
  count = bits * (size // 4096) + low // 4096
  count += whole.astype(jnp.int32) + up.astype(jnp.int32)
  return jnp.clip(count, 0, size)


def _common_float(dtypes: set[Any]) -> Any:
  """The smallest float that we rank in which every one of ``dtypes`` is exact."""
  if jnp.dtype(jnp.float64) in dtypes:
    return jnp.dtype(jnp.float64)
  single = len(dtypes) == 1 and next(iter(dtypes)).itemsize == 2
  return next(iter(dtypes)) if single else jnp.dtype(jnp.float32)


def _key(leaf: jax.Array, dtype: Any, by: By) -> jax.Array:
  """Signed integers in the order of the entries; NaN is one above infinity."""
  signed = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[dtype.itemsize]
  rest = jnp.asarray(2 ** (8 * dtype.itemsize - 1) - 1, signed)
  infinity = lax.bitcast_convert_type(jnp.asarray(jnp.inf, dtype), signed)
  bits = lax.bitcast_convert_type(leaf.astype(dtype), signed)
  magnitude = jnp.minimum(bits & rest, infinity + jnp.ones((), signed))
  if by == "abs":
    return magnitude
  return jnp.where((bits < 0) & (magnitude <= infinity), -magnitude, magnitude)


def _places(
  leaves: Sequence[jax.Array], groups: Sequence[int]
) -> tuple[list[jax.Array], list[int]]:
  """Each entry's number in its group, without flattening a leaf; the groups' sizes."""
  out, starts = [], [0] * (max(groups) + 1)
  for leaf, group in zip(leaves, groups, strict=True):
    place = jnp.full(leaf.shape, starts[group], jnp.int32)
    for axis in range(leaf.ndim):
      stride = jnp.int32(math.prod(leaf.shape[axis + 1 :]))
      place += stride * lax.broadcasted_iota(jnp.int32, leaf.shape, axis)
    out.append(place)
    starts[group] += leaf.size
  return out, starts


@functools.partial(jax.jit, static_argnames=("groups", "by"))
def drop_largest(
  leaves: list[jax.Array], num: jax.Array, groups: tuple[int, ...], by: By
) -> list[jax.Array]:
  """Masks, True = keep, without the largest entries of every group of leaves.

  The threshold of a group is found bit by bit, with one count of its entries per bit;
  the ties at it lose those that come first, found by as many counts as their places
  have bits, if some of the ties stay. Only counts leave a leaf: on sharded leaves a
  round is one all-reduce of a number per group, and nothing is gathered.

  Args:
    leaves: float arrays; where dtypes differ, they are compared in the widest.
    num: int32 [groups], how many entries each group loses; at most all.
    groups: for each leaf the number of its group, whose leaves have fewer than 2**31
      entries together.
    by: "abs" ranks magnitudes, "signed" the numbers themselves; NaN is largest.
  """
  dtype = _common_float({leaf.dtype for leaf in leaves})
  keys = [_key(leaf, dtype, by) for leaf in leaves]
  places, sizes = _places(leaves, groups)
  integer = keys[0].dtype
  rounds = 8 * integer.itemsize - 1

  def total(parts: list[jax.Array]) -> jax.Array:
    sums = [jnp.zeros((), jnp.int32)] * len(num)
    for part, group in zip(parts, groups, strict=True):
      sums[group] = sums[group] + jnp.sum(part, dtype=jnp.int32)
    return jnp.stack(sums)

  def reaching(threshold: jax.Array) -> jax.Array:
    return total([key >= threshold[g] for key, g in zip(keys, groups, strict=True)])

  def raise_bit(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    threshold, reach, exceed = found
    bit = jnp.ones((), integer) << (rounds - 1 - i).astype(integer)
    count = reaching(threshold | bit)
    up = count >= num
    return (
      jnp.where(up, threshold | bit, threshold),
      jnp.where(up, count, reach),
      jnp.where(up, exceed, count),
    )

  # The largest number that at least ``num`` entries reach, how many reach it, and how
  # many exceed it; none is negative when magnitudes are ranked.
  zero, nothing = jnp.zeros(len(num), integer), jnp.zeros_like(num)
  every = jnp.asarray(sizes, jnp.int32)
  start = zero, every, nothing
  if by == "signed":
    count, low = reaching(zero), jnp.full_like(zero, -(2**rounds))
    up = count >= num
    start = (
      jnp.where(up, zero, low),
      jnp.where(up, count, every),
      jnp.where(up, nothing, count),
    )
  threshold, reach, exceed = lax.fori_loop(0, rounds, raise_bit, start)
  quota, ties = num - exceed, reach - exceed

  def first_ties(end: jax.Array) -> list[jax.Array]:
    rows = zip(keys, places, groups, strict=True)
    return [(key == threshold[g]) & (place < end[g]) for key, place, g in rows]

  def narrow(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    short, enough = ends
    middle = short + (enough - short) // 2
    fits = total(first_ties(middle)) >= quota
    return jnp.where(fits, short, middle), jnp.where(fits, middle, enough)

  # Of the ties before place ``short`` there are fewer than the quota, before
  # ``enough`` as many. Nothing is left to find where all or none of them go.
  partly = (quota > 0) & (quota < ties)
  enough = jnp.where(quota > 0, every, nothing)
  short = jnp.where(partly, nothing, enough)
  _, end = lax.while_loop(
    lambda ends: jnp.any(ends[1] - ends[0] > 1), narrow, (short, enough)
  )
  rows = zip(keys, first_ties(end), groups, strict=True)
  return [~((key > threshold[g]) | first) for key, first, g in rows]
