"""Random projections kept as the few numbers that define them."""

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from gradlab.transforms._common import as_key, check_range

Kind = Literal["gaussian", "srht", "ams", "countsketch"]

# A dense projection is made in blocks of at most this many entries (4 MB).
_BLOCK = 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
  """A random projection R, kept as the few random numbers that define it.

  Attributes:
    key: regenerates the rows of "gaussian" and "ams"; None otherwise.
    signs: int8[d] in {-1, 1} of "srht" and "countsketch"; None otherwise.
    index: int32: the s sampled rows of "srht", the d buckets of "countsketch".
    kind: "gaussian", "ams", "srht" or "countsketch".
    d: length of the vectors to sketch.
    s: length of the message.
  """

  key: jax.Array | None
  signs: jax.Array | None
  index: jax.Array | None
  kind: Kind = dataclasses.field(metadata={"static": True})
  d: int = dataclasses.field(metadata={"static": True})
  s: int = dataclasses.field(metadata={"static": True})


def make_sketch(kind: Kind, key: int | jax.Array, d: int, s: int) -> Sketch:
  r"""Draws a projection :math:`R \in R^{s \times d}` with :math:`E[R^\top R] = I`.

  .. math::
    \text{gaussian: } R_{ij} \sim N(0, 1/s) \qquad
    \text{ams: } R_{ij} = \pm 1/\sqrt{s} \qquad
    \text{srht: } R = \sqrt{d'/s} \, P H D \qquad
    \text{countsketch: } R_{h(j) j} = \pm 1

  D holds random signs, H is the orthonormal Hadamard matrix of the next power of two
  d', P picks s distinct rows and h is uniform. No kind stores a matrix.

  Args:
    kind: "gaussian", "srht", "ams" or "countsketch".
    key: jax key or int seed; equal keys give equal projections on every machine.
    d: length of the vectors, at least 1.
    s: length of the message, at least 1, and at most d' for "srht".

  Returns:
    A ``Sketch``, a pytree of O(d + s) numbers ("srht", "countsketch") or one key.

  Raises:
    ValueError: unknown kind, d or s below 1, or s above d' for "srht".

  Examples:
    >>> from gradlab.transforms.compressors import make_sketch
    >>> make_sketch("countsketch", 0, 1000, 10).index.shape
    (1000,)

  References:
    Zhao Song, Yitan Wang, Zheng Yu, Lichen Zhang, Sketching for First Order Method,
    ICML 2023, arXiv 2210.08371.
  """
  check_range("d", d, 1)
  check_range("s", s, 1)
  check_kind(kind)
  key = as_key(key)
  if kind in ("gaussian", "ams"):
    return Sketch(key, None, None, kind, d, s)
  sign_key, index_key = jax.random.split(key)
  signs = jax.random.rademacher(sign_key, (d,), jnp.int8)
  if kind == "countsketch":
    buckets = jax.random.randint(index_key, (d,), 0, s, jnp.int32)
    return Sketch(None, signs, buckets, kind, d, s)
  padded = _padded(d)
  if s > padded:
    raise ValueError(f"sketch larger than the padded dimension: s = {s} > {padded}.")
  rows = jax.random.permutation(index_key, padded)[:s].astype(jnp.int32)
  return Sketch(None, signs, rows, kind, d, s)


def check_kind(kind: str) -> None:
  """Raises ValueError for an unknown kind of projection."""
  if kind not in get_args(Kind):
    raise ValueError(
      f"kind must be 'gaussian', 'srht', 'ams' or 'countsketch', got {kind!r}."
    )


def sketch(sk: Sketch, g: jax.Array) -> jax.Array:
  r"""The message :math:`R g`.

  Args:
    sk: from ``make_sketch``.
    g: ``[..., d]``, any float dtype; a non-finite entry spoils the whole message of
      every kind but "countsketch".

  Returns:
    float32 ``[..., s]``, summed in float32.

  Raises:
    ValueError: the last axis is not of length d.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.compressors import make_sketch, sketch
    >>> sketch(make_sketch("srht", 0, 1000, 10), jnp.ones((4, 1000))).shape
    (4, 10)
  """
  return _project(sk, _vectors(g, sk.d, "g", "d")).reshape(*g.shape[:-1], sk.s)


def desketch(sk: Sketch, m: jax.Array) -> jax.Array:
  r"""The estimate :math:`R^\top m`; :math:`R^\top R g` has mean g.

  Args:
    sk: the ``Sketch`` that made the message.
    m: message ``[..., s]``, any float dtype.

  Returns:
    float32 ``[..., d]``.

  Raises:
    ValueError: the last axis is not of length s.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.compressors import desketch, make_sketch, sketch
    >>> sk = make_sketch("srht", 0, 2, 2)
    >>> print(desketch(sk, sketch(sk, jnp.array([3., 1.]))).round(5))
    [3. 1.]
  """
  return _lift(sk, _vectors(m, sk.s, "m", "s")).reshape(*m.shape[:-1], sk.d)


def _vectors(x: jax.Array, length: int, name: str, symbol: str) -> jax.Array:
  """float32[n, length]: the vectors along the last axis of ``x``."""
  if not x.ndim or x.shape[-1] != length:
    raise ValueError(
      f"the last axis of {name} must have length {symbol} = {length}, got shape "
      f"{x.shape}."
    )
  return x.astype(jnp.float32).reshape(-1, length)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def _project(sk: Sketch, vector: jax.Array) -> jax.Array:
  if sk.signs is None or sk.index is None:
    blocks: jax.Array = jax.lax.map(lambda i: _dot(_rows(sk, i), vector), _blocks(sk))
    return blocks.reshape(-1)[: sk.s]
  signed: jax.Array = sk.signs.astype(jnp.float32) * vector
  if sk.kind == "countsketch":
    return jax.ops.segment_sum(signed, sk.index, num_segments=sk.s)
  spectrum = _hadamard(jnp.pad(signed, (0, _padded(sk.d) - sk.d)))
  return spectrum[sk.index] / math.sqrt(sk.s)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def _lift(sk: Sketch, message: jax.Array) -> jax.Array:
  if sk.signs is None or sk.index is None:
    blocks, rows = _blocks(sk), _block_rows(sk)
    parts = jnp.pad(message, (0, blocks.size * rows - sk.s)).reshape(-1, rows)

    def add(
      total: jax.Array, block: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
      return total + _dot(block[1], _rows(sk, block[0])), None

    return jax.lax.scan(add, jnp.zeros(sk.d, jnp.float32), (blocks, parts))[0]
  signs = sk.signs.astype(jnp.float32)
  if sk.kind == "countsketch":
    return signs * message[sk.index]
  spectrum = jnp.zeros(_padded(sk.d), jnp.float32).at[sk.index].set(message)
  return signs * _hadamard(spectrum)[: sk.d] / math.sqrt(sk.s)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _padded(d: int) -> int:
  return 1 << (d - 1).bit_length()


def _hadamard(x: jax.Array) -> jax.Array:
  """``H x`` with the unnormalised Hadamard matrix in its natural order."""

  def butterfly(_: jax.Array, y: jax.Array) -> jax.Array:
    # Each pass transforms the top bit of the index and moves it to the bottom, so
    # that after all passes every bit is back in its place.
    low, high = jnp.split(y, 2)
    return jnp.stack([low + high, low - high], axis=1).reshape(-1)

  passes = x.size.bit_length() - 1
  if not passes:
    return x
  spectrum: jax.Array = jax.lax.fori_loop(0, passes, butterfly, x)
  return spectrum


def _block_rows(sk: Sketch) -> int:
  return max(1, min(sk.s, _BLOCK // sk.d))


def _blocks(sk: Sketch) -> jax.Array:
  return jnp.arange(-(-sk.s // _block_rows(sk)), dtype=jnp.int32)


def _rows(sk: Sketch, block: jax.Array) -> jax.Array:
  """The rows of a dense projection that belong to one block, scaled."""
  assert sk.key is not None
  key, shape = jax.random.fold_in(sk.key, block), (_block_rows(sk), sk.d)
  draw = jax.random.normal if sk.kind == "gaussian" else jax.random.rademacher
  return draw(key, shape, jnp.float32) / math.sqrt(sk.s)
