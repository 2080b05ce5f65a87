"""SNIP: how much the loss feels a connection at initialisation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradlab.transforms._common import check_range
from gradlab.transforms.scores._common import Prunable, prunable_flags, widened
from gradlab.transforms.scores.keep_mask import kth_smallest, order_keys
from gradlab.types import method


@method(
  family="scores",
  paper="Lee et al., SNIP: Single-shot Network Pruning based on Connection "
  "Sensitivity, 2019",
  arxiv="1810.02340",
)
def snip(
  loss_fn: Callable[[Any, Any], jax.Array],
  params: Any,
  batch: Any,
  *,
  prunable: Prunable | None = None,
  normalize: bool = True,
) -> Any:
  r"""Connection sensitivity: weight times gradient, in absolute value.

  With a gate :math:`c = 1` on every weight, :math:`\partial L / \partial c =
  w \, \partial L / \partial w`:

  .. math::
    s_j = \Big| w_j \frac{\partial L}{\partial w_j} \Big|, \qquad
    \hat s_j = \frac{s_j}{\sum_i s_i}

  with the sum over all prunable leaves. Meant for a freshly initialised network with
  variance-scaled weights and a batch of about ten examples per class.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch.
    params: a pytree of arrays.
    batch: whatever ``loss_fn`` takes.
    prunable: ``prunable(path, leaf) -> bool`` selects leaves, with the path as
      ``jax.tree_util.tree_map_with_path`` gives it; default: two or more axes.
    normalize: divide by the sum; scores that are all zero stay zero.

  Returns:
    A pytree like ``params``, ``None`` for the leaves that are not prunable, float32
    for the others (float64 for float64 leaves): products are taken in that dtype.
    Gradients that are not finite propagate.

  Raises:
    TypeError: the loss is not a scalar (from ``jax.grad``).

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import snip
    >>> hessian = jnp.array([[2.0, 1.0], [1.0, 4.0]])
    >>> loss = lambda w, h: 0.5 * jnp.vdot(w, h @ w)
    >>> snip(loss, jnp.array([[1.0], [-0.5]]), hessian).ravel().tolist()
    [0.75, 0.25]

  References:
    Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity,
    2019, arXiv 1810.02340.
  """
  leaves, treedef = jax.tree.flatten(params)
  flags = jax.tree.leaves(prunable_flags(params, prunable))

  def loss_of_selected(selected: list[Any]) -> jax.Array:
    replacements = iter(selected)
    merged = [
      next(replacements) if flag else leaf
      for flag, leaf in zip(flags, leaves, strict=True)
    ]
    return loss_fn(jax.tree.unflatten(treedef, merged), batch)

  selected = [leaf for flag, leaf in zip(flags, leaves, strict=True) if flag]
  grads = jax.grad(loss_of_selected)(selected)
  scores = [
    jnp.abs(widened(leaf) * widened(grad))
    for leaf, grad in zip(selected, grads, strict=True)
  ]
  if normalize and scores:
    widest = max((score.dtype for score in scores), key=lambda dtype: dtype.itemsize)
    total = jnp.sum(jnp.stack([jnp.sum(score, dtype=widest) for score in scores]))
    total = jnp.where(total == 0, jnp.ones_like(total), total)
    scores = [score / total.astype(score.dtype) for score in scores]
  remaining = iter(scores)
  return jax.tree.unflatten(treedef, [next(remaining) if f else None for f in flags])


def snip_mask(scores: Any, keep_ratio: float) -> Any:
  r"""The paper's mask: at or above the ``int(n * keep_ratio)``-th largest score.

  ``keep_mask`` drops an exact number of entries instead; the two differ only in the
  rounding of that number and in that this one keeps every entry tied with the
  threshold. NaN ranks above everything and is kept.

  Args:
    scores: a pytree of arrays, ``None`` for leaves that are not pruned.
    keep_ratio: the fraction to keep over all leaves together, a number in (0, 1].

  Returns:
    A pytree of bool arrays like ``scores``, True = keep.

  Raises:
    ValueError: keep_ratio outside (0, 1], or so small that nothing would be kept.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import snip_mask
    >>> snip_mask(jnp.array([[0.1, 0.4], [0.3, 0.3]]), 0.5).tolist()
    [[False, True], [True, True]]

  References:
    Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity,
    2019, arXiv 1810.02340.
  """
  check_range("keep_ratio", keep_ratio, 0.0, 1.0, open_low=True)
  leaves, treedef = jax.tree.flatten(scores)
  size = sum(jnp.size(leaf) for leaf in leaves)
  if not size:
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bool_), scores)
  count = int(size * keep_ratio)
  if count < 1:
    raise ValueError(
      f"keep_ratio {keep_ratio!r} keeps none of {size} weights; it must be at least "
      f"1/{size}."
    )
  rank = jnp.asarray(size - count + 1, jnp.int32)
  return jax.tree.unflatten(treedef, _at_least_rank(leaves, rank))


@jax.jit
def _at_least_rank(leaves: list[Any], rank: jax.Array) -> list[jax.Array]:
  """Masks of the scores not below the one of that rank from the lowest, from 1."""
  keys = order_keys(leaves)
  threshold = kth_smallest(keys, rank)
  return [key >= threshold for key in keys]
