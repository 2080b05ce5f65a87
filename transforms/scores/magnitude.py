"""Magnitude: a weight is as important as it is large."""

from typing import Any

import jax
import jax.numpy as jnp

from gradlab.transforms.scores._common import (
  Prunable,
  prunable_flags,
  where_in_tree,
  widened,
)
from gradlab.transforms.scores.keep_mask import Scope
from gradlab.types import method


@method(
  family="scores",
  paper="Han et al., Learning both Weights and Connections for Efficient Neural "
  "Networks, 2015",
  arxiv="1506.02626",
)
def magnitude(
  params: Any,
  *,
  scope: Scope = "global",
  unit_axis: int | None = None,
  p: int = 2,
  prunable: Prunable | None = None,
) -> Any:
  r"""Absolute value of every weight, or norm of every unit.

  .. math::
    s = |w| \qquad \text{or} \qquad
    s_i = \Big(\sum_{j} |w_{ij}|^p\Big)^{1/p}
    \text{ for the units } i \text{ along } \texttt{unit\_axis}

  Args:
    params: a pytree of arrays.
    scope: "global" or "leaf", over what ``keep_mask`` is going to rank; the scores
      are the same for both.
    unit_axis: the axis whose entries are the units (of a flax kernel ``[in, out]``,
      1 or -1 scores the output units); None scores single weights.
    p: 1 or 2, the norm of a unit.
    prunable: ``prunable(path, leaf) -> bool`` selects leaves, with the path as
      ``jax.tree_util.tree_map_with_path`` gives it; default: two or more axes.

  Returns:
    A pytree like ``params``, ``None`` for the leaves that are not prunable. The others
    are float32 (float64 for float64 leaves), of the leaf's shape or, with
    ``unit_axis``, vectors with one score per unit. NaN weights score NaN.

  Raises:
    ValueError: unknown scope, p other than 1 or 2, or a prunable leaf without the
      unit axis.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import magnitude
    >>> params = {"kernel": jnp.array([[3.0, -1.0], [-4.0, 0.5]]), "bias": jnp.ones(2)}
    >>> magnitude(params)["kernel"].tolist()
    [[3.0, 1.0], [4.0, 0.5]]
    >>> magnitude(params, unit_axis=1, p=1)
    {'bias': None, 'kernel': Array([7. , 1.5], dtype=float32)}

  References:
    Han et al., Learning both Weights and Connections for Efficient Neural Networks,
    2015, arXiv 1506.02626.
  """
  if scope not in ("global", "leaf"):
    raise ValueError(f"scope must be 'global' or 'leaf', got {scope!r}.")
  if p not in (1, 2):
    raise ValueError(f"p must be 1 or 2, got {p!r}.")

  def score(path: tuple[Any, ...], leaf: Any, selected: bool) -> jax.Array | None:
    if not selected:
      return None
    size = jnp.abs(widened(leaf))
    if unit_axis is None:
      return size
    if not -size.ndim <= unit_axis < size.ndim:
      raise ValueError(
        f"unit_axis {unit_axis} does not exist in {where_in_tree(path)} of shape "
        f"{size.shape}; choose another axis or leave that leaf out by `prunable`."
      )
    others = tuple(i for i in range(size.ndim) if i != unit_axis % size.ndim)
    if p == 1:
      return jnp.sum(size, axis=others)
    return jnp.sqrt(jnp.sum(jnp.square(size), axis=others))

  flags = prunable_flags(params, prunable)
  return jax.tree_util.tree_map_with_path(score, params, flags)
