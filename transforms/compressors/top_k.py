"""Top-k sparsification."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import check_float_leaves
from gradlab.transforms.compressors._common import wire_size
from gradlab.types import Compressor, method


class TopKMessage(NamedTuple):
  """What travels: two trees like the updates, whose leaves have length k.

  Attributes:
    values: the kept entries with their signs, in the updates' dtype, largest first.
    indices: int32 positions of these entries in the flattened leaf.
  """

  values: optax.Updates
  indices: optax.Updates


@method(
  family="compressors",
  paper="Stich et al., Sparsified SGD with Memory, 2018",
  arxiv="1809.07599",
  static=("ratio",),
)
def top_k(ratio: float | None = 0.01, k: int | None = None) -> Compressor:
  r"""Sends the k entries of largest magnitude of every leaf, with their positions.

  .. math::
    \hat g_j = g_j \text{ if } j \text{ is among the } k \text{ largest } |g_j|,
    \text{ else } 0, \qquad \|g - \hat g\|^2 \le (1 - k/d) \, \|g\|^2

  The output is biased: use ``compressed(top_k(...), error_feedback=True)``. Of equal
  magnitudes the earlier entry is kept. NaN counts as largest, so it is sent.

  Args:
    ratio: share of a leaf's d entries to keep, in (0, 1]: k = max(1, round(ratio d)).
      It sets the message's shape, so it is a Python number, never traced: arms of a
      sweep over it are compiled one by one.
    k: entries to keep per leaf, at least 1, at most all; takes the place of ``ratio``.

  Returns:
    A ``Compressor`` without state. Messages are ``TopKMessage``: k values in the leaf's
    dtype and k int32 positions; ``decompress`` puts the values into zeros.

  Raises:
    ValueError: ``ratio`` or ``k`` is traced or out of range; by ``compress``, a leaf
      that is not floating point.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.compressors import message_bytes, top_k
    >>> compressor = top_k(ratio=0.5)
    >>> g = jnp.array([1., -4., 0., 3.])
    >>> message, state = compressor.compress(g, compressor.init(g))
    >>> print(message.values, message.indices, message_bytes(message))
    [-4.  3.] [1 3] 16
    >>> print(compressor.decompress(message, state, g))
    [ 0. -4.  0.  3.]

  References:
    Sebastian U. Stich, Jean-Baptiste Cordonnier, Martin Jaggi, Sparsified SGD with
    Memory, NeurIPS 2018, arXiv 1809.07599.
  """
  wire_size(1, ratio, k, names=("ratio", "k"))

  def init(params: optax.Params) -> optax.EmptyState:
    del params
    return optax.EmptyState()

  def compress(
    updates: optax.Updates,
    state: optax.EmptyState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[TopKMessage, optax.EmptyState]:
    del params, extra
    check_float_leaves(updates, "top_k")

    def positions(leaf: jax.Array) -> jax.Array:
      size = min(leaf.size, wire_size(leaf.size, ratio, k, names=("ratio", "k")))
      return jax.lax.top_k(jnp.abs(leaf.reshape(-1)), size)[1]

    indices = jax.tree.map(positions, updates)
    values = jax.tree.map(lambda leaf, i: leaf.reshape(-1)[i], updates, indices)
    return TopKMessage(values, indices), state

  def decompress(
    message: TopKMessage, state: optax.EmptyState, like: optax.Updates, **extra: Any
  ) -> optax.Updates:
    del state, extra

    def scatter(leaf: Any, values: jax.Array, indices: jax.Array) -> jax.Array:
      flat = jnp.zeros(leaf.size, leaf.dtype)
      kept = flat.at[indices].set(values.astype(leaf.dtype), unique_indices=True)
      return kept.reshape(leaf.shape)

    return jax.tree.map(scatter, like, message.values, message.indices)

  return Compressor(init, compress, decompress)
