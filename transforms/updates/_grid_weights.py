"""Weights on a grid of few bits: as floats on its points, or stored as codes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import as_key, leaf_keys
from gradlab.transforms.updates import _matrices
from gradlab.transforms.updates._alike import map_alike
from gradlab.transforms.updates._quantise import (
  QTensor,
  affine_dequantize,
  affine_quantize,
)


def quantize_params(
  params: optax.Params,
  weight_bits: int = 8,
  weight_group_size: int = 256,
  *,
  storage: bool = False,
  zero_in_range: bool = True,
  label_fn: Callable[[optax.Params], Any] | None = None,
) -> optax.Params:
  """Rounds the matrices to the nearest points of the grid that :func:`q_galore` uses.

  Args:
    params: the initial parameters.
    weight_bits: as in :func:`q_galore`.
    weight_group_size: as in :func:`q_galore`.
    storage: whether matrices become ``QTensor`` nodes, rather than floats on the grid.
    zero_in_range: as in :func:`q_galore`.
    label_fn: as in :func:`q_galore`.

  Returns:
    The tree with every matrix rounded; other leaves are as they were.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import quantize_params
    >>> params = {"kernel": jnp.array([[-0.3, 0.25, 0.6]]), "bias": jnp.array([0.25])}
    >>> grid = quantize_params(params, weight_bits=4)
    >>> [f"{x:.2f}" for x in grid["kernel"][0]], grid["bias"].tolist()
    (['-0.30', '0.24', '0.60'], [0.25])
  """

  def leaf(p: Any, chosen: bool) -> Any:
    if not chosen:
      return p
    q = affine_quantize(p, weight_bits, weight_group_size, zero_in_range=zero_in_range)
    return q if storage else affine_dequantize(q).astype(jnp.result_type(p))

  chosen = _matrices.selected(label_fn, params, "quantize_params")
  return jax.tree.map(leaf, params, chosen)


def is_stored(node: Any) -> bool:
  """Whether the node is a leaf in its storage form."""
  return isinstance(node, QTensor)


def dequantize_params(qparams: optax.Params) -> optax.Params:
  """The float parameters of a tree with ``QTensor`` nodes."""
  return jax.tree.map(
    lambda q: affine_dequantize(q) if is_stored(q) else q, qparams, is_leaf=is_stored
  )


def store(
  qparams: optax.Params,
  params: optax.Params,
  updates: optax.Updates,
  key: int | jax.Array | None,
  zero_in_range: bool,
) -> optax.Params:
  """``params + updates`` in the form of ``qparams``, rounded with ``key``, if any."""
  keys: Any = jax.tree.map(lambda _: None, params)
  if key is not None:
    keys = leaf_keys(as_key(key), params)

  def leaf(w: Any, q: Any, u: Any, key: Any) -> tuple[Any]:
    new = w + u.astype(jnp.result_type(w))
    if not is_stored(q):
      return (new,)
    return (
      affine_quantize(new, q.bits, q.group_size, key=key, zero_in_range=zero_in_range),
    )

  (out,) = map_alike(leaf, 1, params, qparams, updates, keys)
  return out
