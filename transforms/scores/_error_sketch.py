"""A sketch of constant size of the mean error around a point; unit feature rows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from gradlab.transforms._common import as_key, check_range


class ErrorSketch(NamedTuple):
  """Sums of errors per bucket of L random hash tables.

  Attributes:
    projections: [L, m, d] normal directions whose signs are the bits of a bucket.
    total: [L, 2**m] sums of errors.
    count: [L, 2**m] numbers of errors, exact below 2**24 in float32.
  """

  projections: jax.Array
  total: jax.Array
  count: jax.Array  # type: ignore[assignment]


def error_sketch_init(
  key: int | jax.Array,
  num_tables: int,
  num_bits: int,
  feature_dim: int,
  dtype: DTypeLike = jnp.float32,
) -> ErrorSketch:
  """An empty sketch of ``2 L 2**m`` numbers, however long the stream will be.

  Args:
    key: jax key or int seed of the projections, all the randomness there is.
    num_tables: L >= 1; 16 is usual. More tables, less noise.
    num_bits: m in 1..24; 8 is usual. More bits, narrower neighbourhoods.
    feature_dim: d >= 1, length of a feature vector.
    dtype: float32, or float64 for streams of that dtype.

  Returns:
    The sketch, with all sums zero.

  Raises:
    ValueError: a size outside its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.scores import (
    ...   error_sketch_init, error_sketch_read, error_sketch_write
    ... )
    >>> z = jnp.array([[1.0, 2.0], [-2.0, -1.0]])
    >>> sketch = error_sketch_init(0, num_tables=4, num_bits=8, feature_dim=2)
    >>> sketch = error_sketch_write(sketch, z, jnp.array([0.5, -0.25]))
    >>> print(error_sketch_read(sketch, z[:1]))
    [0.5]
  """
  check_range("num_tables", num_tables, 1)
  check_range("num_bits", num_bits, 1, 24)
  check_range("feature_dim", feature_dim, 1)
  shape = num_tables, num_bits, feature_dim
  table = num_tables, 2**num_bits
  projections = jax.random.normal(as_key(key), shape, dtype)
  return ErrorSketch(projections, jnp.zeros(table, dtype), jnp.zeros(table, dtype))


def error_sketch_write(
  sk: ErrorSketch, features: ArrayLike, errors: ArrayLike, decay: ArrayLike = 1.0
) -> ErrorSketch:
  r"""Forgets by ``decay``, then adds every error to its bucket in every table.

  .. math::
    h_l(z) = \sum_b 2^b [\langle A_{l,b}, z \rangle > 0], \qquad
    T_{l,h} \leftarrow \gamma T_{l,h} + \sum_{i: h_l(z_i) = h} e_i, \qquad
    N_{l,h} \leftarrow \gamma N_{l,h} + \#\{i: h_l(z_i) = h\}

  Args:
    sk: the sketch.
    features: ``[n, d]``, of any float dtype.
    errors: ``[n]``, label minus prediction of the base model. Rows with a non-finite
      feature or error are not stored.
    decay: :math:`\gamma` in [0, 1], once per batch; 1 never forgets. A batch of no
      rows changes nothing.

  Returns:
    The new sketch, of the same shapes. No gradient flows into it.

  Raises:
    ValueError: shapes that do not fit, or a decay outside [0, 1].
  """
  check_range("decay", decay, 0.0, 1.0)
  dtype = sk.total.dtype
  rows, values, stored = checked_rows(features, errors, sk.projections.shape[2], dtype)
  if not values.size:
    return sk
  where = (_tables(sk), _buckets(sk, rows))
  kept = jnp.asarray(decay).astype(dtype)

  def add(table: jax.Array, per_row: jax.Array) -> jax.Array:
    spread = jnp.broadcast_to(per_row[:, None], where[1].shape)
    return (kept * table).at[where].add(spread)

  total, count = add(sk.total, values), add(sk.count, stored.astype(dtype))
  return sk._replace(total=total, count=count)


def error_sketch_read(sk: ErrorSketch, features: ArrayLike) -> jax.Array:
  r"""The mean error of the buckets that a query falls into.

  .. math::
    e(z) = \frac{\sum_l T_{l, h_l(z)}}{\sum_l N_{l, h_l(z)}}

  For many tables this is regression with the kernel
  :math:`(1 - \text{angle}/\pi)^m`.

  Args:
    sk: the sketch.
    features: queries ``[n, d]``, of any float dtype.

  Returns:
    ``[n]`` in the dtype of the sketch; 0 where nothing was stored or the query is not
    finite. No gradient flows through it.

  Raises:
    ValueError: features that are not ``[n, d]``.
  """
  rows, finite = checked_queries(features, sk.projections.shape[2], sk.total.dtype)
  where = (_tables(sk), _buckets(sk, rows))
  total, count = (jnp.sum(t[where], axis=1) for t in (sk.total, sk.count))
  known = finite & (count > 0)
  return jnp.where(known, total / jnp.where(count > 0, count, 1.0), 0.0)


def checked_rows(
  features: ArrayLike, errors: ArrayLike, dim: int, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rows and errors with zeros for what cannot be stored, and which can be."""
  rows, finite = checked_queries(features, dim, dtype)
  values = jax.lax.stop_gradient(jnp.asarray(errors)).astype(dtype)
  if values.shape != finite.shape:
    raise ValueError(
      f"errors must be [{finite.shape[0]}], one per feature row, got shape "
      f"{values.shape}."
    )
  stored = finite & jnp.isfinite(values)
  return rows, jnp.where(stored, values, 0.0), stored


def checked_queries(
  features: ArrayLike, dim: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """Rows scaled to about one, with zeros for the non-finite, and which are finite."""
  rows = jax.lax.stop_gradient(jnp.asarray(features)).astype(dtype)
  if rows.ndim != 2 or rows.shape[1] != dim:
    raise ValueError(f"features must be [n, {dim}], got shape {rows.shape}.")
  finite = jnp.all(jnp.isfinite(rows), axis=1)
  rows = jnp.where(jnp.broadcast_to(finite[:, None], rows.shape), rows, 0.0)
  # By a power of two: exact, and no square or product overflows or vanishes.
  _, exponent = jnp.frexp(jnp.max(jnp.abs(rows), axis=1, keepdims=True))
  return jnp.ldexp(rows, -jnp.broadcast_to(exponent, rows.shape)), finite


def _tables(sk: ErrorSketch) -> jax.Array:
  return jnp.arange(sk.projections.shape[0], dtype=jnp.int32)[None, :]


def _buckets(sk: ErrorSketch, rows: jax.Array) -> jax.Array:
  """h_l(z): int32 [n, L]."""
  tables, bits, dim = sk.projections.shape
  directions = sk.projections.reshape(tables * bits, dim)
  sides = jnp.matmul(rows, directions.T, precision=jax.lax.Precision.HIGHEST) > 0
  powers = jnp.left_shift(jnp.int32(1), jnp.arange(bits, dtype=jnp.int32))
  sides = sides.reshape(-1, tables, bits).astype(jnp.int32)
  return jnp.sum(sides * powers[None, None, :], axis=2, dtype=jnp.int32)
