"""Magnitude pruning: zero the weights, or units, with the lowest scores."""

import warnings
from typing import Any

import jax
from jax.typing import ArrayLike

from gradlab.transforms._common import concrete
from gradlab.transforms.scores._common import Prunable, prunable_flags
from gradlab.transforms.scores.keep_mask import (
  Scope,
  apply_mask,
  collapsed,
  keep_mask,
)
from gradlab.transforms.scores.magnitude import magnitude
from gradlab.types import method


@method(
  family="params",
  paper="Han et al., Learning both Weights and Connections for Efficient Neural "
  "Networks, 2015",
  arxiv="1506.02626",
)
def magnitude_prune(
  params: Any,
  *,
  sparsity: ArrayLike,
  scope: Scope = "global",
  unit_axis: int | None = None,
  p: int = 2,
  prunable: Prunable | None = None,
  scores: Any = None,
) -> Any:
  r"""Zeroes the ``round(sparsity * n)`` entries with the lowest scores.

  .. math::
    \theta' = m \odot \theta, \qquad
    m = \operatorname{keep\_mask}(s, \text{sparsity}), \quad s = |\theta|

  Among all masks with that many zeros this one changes the parameters least in the
  Euclidean norm. Already pruned entries have score 0 and go first, so that a growing
  sparsity prunes on from where it was.

  Args:
    params: a pytree of arrays.
    sparsity: the fraction of the prunable entries (of the units, with ``unit_axis``)
      to zero, in [0, 1). May be traced, so that a schedule drives it inside one
      compiled program; ``keep_mask`` says how the count is rounded.
    scope: "global" ranks all prunable leaves together, "leaf" each by itself.
    unit_axis: zero whole units along this axis; None zeroes single weights.
    p: 1 or 2, the norm of a unit.
    prunable: ``prunable(path, leaf) -> bool`` selects leaves, with the path as
      ``jax.tree_util.tree_map_with_path`` gives it; default: two or more axes.
    scores: a pytree like ``params`` to rank by, vectors with ``unit_axis``, in place
      of the magnitudes; leaves with ``None`` are not pruned, nor are leaves that
      ``prunable`` leaves out.

  Returns:
    A pytree like ``params``, same dtypes.

  Raises:
    ValueError: a concrete sparsity outside [0, 1), an unknown scope, p other than 1
      or 2, or scores whose shapes do not fit.

  Warns:
    UserWarning: a leaf lost all its entries (layer collapse). Only outside ``jax.jit``
      and its kin; inside, look at ``collapsed(keep_mask(...))`` afterwards.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import magnitude_prune
    >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "bias": jnp.ones(2)}
    >>> magnitude_prune(params, sparsity=0.5)["kernel"].tolist()
    [[3.0, 0.0], [0.0, 2.0]]

  References:
    Han et al., Learning both Weights and Connections for Efficient Neural Networks,
    2015, arXiv 1506.02626.
  """
  if scores is None:
    scores = magnitude(params, scope=scope, unit_axis=unit_axis, p=p, prunable=prunable)
  else:
    flags = prunable_flags(params, prunable)
    scores = jax.tree.map(
      lambda score, flag: score if score is not None and flag else None,
      scores,
      flags,
      is_leaf=lambda node: node is None,
    )
  mask = keep_mask(scores, sparsity, scope)
  pruned = apply_mask(params, mask, unit_axis=unit_axis)
  if all(concrete(leaf) for leaf in jax.tree.leaves(mask)):
    empty = collapsed(mask)
    if empty:
      warnings.warn(
        f"layer collapse: sparsity {sparsity} leaves nothing of {', '.join(empty)}.",
        stacklevel=2,
      )
  return pruned
