"""GaLore's projection: an optimiser that sees gradients in a low-rank subspace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from gradlab.transforms._common import check_float_leaves, check_range
from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates._alike import map_alike
from gradlab.transforms.updates._chain import Around
from gradlab.transforms.updates._projection import Projection, ProjectorFn
from gradlab.transforms.updates._projection import ProjectorState as ProjectorState
from gradlab.transforms.updates._projection import init_projector as init_projector
from gradlab.transforms.updates._projection import lazy_refresh as lazy_refresh
from gradlab.types import method


class LowRankState(NamedTuple):
  """State of the projection.

  Attributes:
    count: int32 scalar, the number of steps done.
    projector: a ``ProjectorState`` for every projected leaf, else a masked node.
    inner: state of the transformation that sees the projected gradients.
  """

  count: jax.Array  # type: ignore[assignment]
  projector: Any
  inner: optax.OptState


def _around(
  projection: Projection,
  scale: jax.typing.ArrayLike,
  inner: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
  within = common.in_float32(optax.identity() if inner is None else inner)

  def init(params: optax.Params) -> LowRankState:
    check_float_leaves(params, "low_rank_projection")
    states = projection.init(params, "low_rank_projection")
    low = jax.tree.map(projection.down, params, states)
    return LowRankState(jnp.zeros([], jnp.int32), states, within.init(low))

  def update(
    updates: optax.Updates,
    state: LowRankState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, LowRankState]:
    check_float_leaves(updates, "low_rank_projection")
    (states,) = map_alike(
      lambda g, s: (projection.refresh(g, s, state.count),),
      1,
      updates,
      state.projector,
    )
    low = jax.tree.map(projection.down, updates, states)
    if params is not None:
      params = jax.tree.map(projection.down, params, states)
    low, kept = within.update(low, state.inner, params, **extra)

    def leaf(a: Any, g: Any, s: Any) -> Any:
      out = projection.up(a, g, s)
      if isinstance(s, ProjectorState):
        out = out * common.scalar(scale).astype(out.dtype)
      return out.astype(jnp.result_type(g))

    out = jax.tree.map(leaf, low, updates, states)
    return out, LowRankState(optax.safe_increment(state.count), states, kept)

  if inner is not None:
    return optax.GradientTransformationExtraArgs(init, update)
  transform = Around(init, update)
  transform.around = lambda inner: _around(projection, scale, inner)
  return transform


@method(
  family="updates",
  paper="Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank "
  "Projection, 2024",
  arxiv="2403.03507",
)
def low_rank_projection(
  rank: int,
  update_proj_gap: int = 200,
  scale: jax.typing.ArrayLike = 1.0,
  *,
  quantize_projector: bool = False,
  proj_bits: int = 4,
  proj_group_size: int = 256,
  lazy: bool = False,
  cos_threshold: jax.typing.ArrayLike = 0.4,
  gamma_proj: jax.typing.ArrayLike = 2.0,
  queue_size: int = 5,
  side: str = "small",
  zero_in_range: bool = True,
  abs_cosine: bool = True,
  label_fn: Callable[[optax.Params], Any] | None = None,
  dimension_numbers: MuonDimensionNumbers | None = None,
  projector_fn: ProjectorFn | None = None,
  inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Gives ``inner`` the gradients of matrices in the span of their singular vectors.

  .. math::
    R = G P^T, \qquad A = \mathrm{inner}(R), \qquad u = \alpha A P

  for m >= n, where the rows of P are the leading right singular vectors of the
  gradient at the last refresh; :math:`R = P^T G` and :math:`u = \alpha P A` for
  m < n. The state of ``inner`` (moments) has the shape of R and is kept as it is when
  P changes. Leaves that aren't projected go to ``inner`` as they are.

  In a chain of :func:`gradlab.transforms.updates.chain` a projection without
  ``inner`` is put around all transformations that follow it.

  Args:
    rank: r >= 1, at most the smaller dimension of each matrix (clipped).
    update_proj_gap: steps between refreshes, >= 1; with ``lazy`` the first gap.
    scale: alpha > 0; 0.25 in the paper.
    quantize_projector: whether P is kept on a grid of ``proj_bits``.
    proj_bits: bits of that grid, 2 to 8.
    proj_group_size: entries that share a scale and a zero, >= 1.
    lazy: whether the gap of a matrix grows while its leading vector stays.
    cos_threshold: mean cosine from which on it grows, in [0, 1].
    gamma_proj: by which factor, > 1.
    queue_size: cosines that are averaged, >= 1.
    side: which dimension is projected: "small" (the other keeps its size in the
      moments), "large", or "right" or "left" for all matrices.
    zero_in_range: whether every group's grid contains zero.
    abs_cosine: whether the sign of cosines is dropped.
    label_fn: ``label_fn(params)`` is a tree with "matrix" or "other" (or a bool) per
      leaf. By default what has two or more axes is a matrix unless its path names an
      embedding, a head, a norm, a scale or a bias.
    dimension_numbers: how leaves are matrices; axes it doesn't name are stacked. By
      default three axes are a stack (L, m, n), each of them with a basis and a gap of
      its own, and of four or more all but the last are rows.
    projector_fn: ``projector_fn(gradient, rank, side)`` gives P, the leading vector
      first, instead of the singular value decomposition.
    inner: the transformation in the subspace; None is the identity. It runs in
      float32 and sees params projected in the same way.

  Returns:
    A transformation with a :class:`LowRankState`; its output has the dtype of the
    gradients.

  Raises:
    ValueError: an argument out of its range, an unknown label, a "matrix" with fewer
      than two axes, or a leaf that is not floating point.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import low_rank_projection
    >>> transform = low_rank_projection(rank=1, inner=optax.scale_by_adam())
    >>> g = jnp.array([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 1.0]])
    >>> u, _ = transform.update(g, transform.init(g))
    >>> [[f"{x:.4f}" for x in row] for row in u[2:]]
    [['0.9571', '0.2898'], ['-0.9571', '-0.2898']]

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024
  """
  check_range("scale", scale, 0, open_low=True)
  projection = Projection(
    rank,
    update_proj_gap,
    quantize_projector,
    proj_bits,
    proj_group_size,
    lazy,
    cos_threshold,
    gamma_proj,
    queue_size,
    side,
    zero_in_range,
    abs_cosine,
    label_fn,
    dimension_numbers,
    projector_fn,
  )
  projection.check()
  return _around(projection, scale, inner)
