r"""Low-rank projection of gradients: bases of singular vectors, refreshed lazily.

A matrix G of shape (m, n) has a basis P of orthonormal rows (r, n), the "right" side,
or of orthonormal columns (m, r), the "left" one; what an optimiser then sees is
:math:`R = G P^T` or :math:`R = P^T G`. Bases are kept in floats or as a ``QTensor``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import check_range, one_by_one
from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates import _matrices
from gradlab.transforms.updates import _quantise as quantise

# projector_fn(gradient (m, n), rank, "right" or "left") -> P, lead vector first.
ProjectorFn = Callable[[jax.Array, int, str], jax.Array]
SIDES = ("small", "large", "right", "left")
# Gaps double; beyond this they would leave int32.
MAX_GAP = 2**30


class ProjectorState(NamedTuple):
  """The basis of one matrix, or of a stack of L (every field has L in front).

  Attributes:
    projector: P, a float array (r, n) or (m, r), or a ``QTensor`` of that shape;
      zeros before the first refresh.
    lead: the last leading singular vector, (n,) or (m,), not quantised.
    cosines: the last cosines between leading vectors, (queue_size,), oldest first.
    num_cosines: int32, how many of them are known.
    gap: int32, steps between refreshes.
    num_svd: int32, refreshes done.
  """

  projector: Any
  lead: jax.Array
  cosines: jax.Array
  num_cosines: jax.Array
  gap: jax.Array
  num_svd: jax.Array


def side_of(shape: tuple[int, ...], side: str) -> str:
  """ "right" or "left": which side of a matrix (..., m, n) ``side`` means."""
  m, n = shape[-2:]
  if side in ("small", "large"):
    return "right" if (m >= n) == (side == "small") else "left"
  return side


def _of_each(function: Callable[..., Any], stacked: bool) -> Callable[..., Any]:
  return jax.vmap(function) if stacked else function


def init_projector(
  matrices: jax.Array,
  rank: int,
  *,
  side: str = "small",
  update_proj_gap: int = 200,
  queue_size: int = 5,
  proj_bits: int | None = 4,
  proj_group_size: int = 256,
  zero_in_range: bool = True,
) -> ProjectorState:
  """A state without a basis for an array (m, n) or (L, m, n) of gradients.

  ``proj_bits`` None keeps the basis in floats.
  """
  *lead, m, n = matrices.shape
  dtype = common.accumulator(matrices.dtype)
  right = side_of(matrices.shape, side) == "right"
  r = min(rank, m, n)
  projector: Any = jnp.zeros((*lead, r, n) if right else (*lead, m, r), dtype)
  if proj_bits is not None:
    pack = functools.partial(
      quantise.affine_quantize,
      bits=proj_bits,
      group_size=proj_group_size,
      zero_in_range=zero_in_range,
    )
    projector = _of_each(pack, bool(lead))(jax.lax.optimization_barrier(projector))
  counter = jnp.zeros(lead, jnp.int32)
  return ProjectorState(
    projector,
    jnp.zeros((*lead, n if right else m), dtype),
    jnp.zeros((*lead, queue_size), dtype),
    counter,
    jnp.full(lead, min(update_proj_gap, MAX_GAP), jnp.int32),
    jnp.zeros(lead, jnp.int32),
  )


def basis(state: ProjectorState) -> Any:
  """P in floats, as it is used: dequantised where it is kept quantised."""
  p = state.projector
  if isinstance(p, quantise.QTensor):
    p = _of_each(quantise.affine_dequantize, state.lead.ndim == 2)(p)
  return p.astype(state.lead.dtype)


def singular_vectors(gradient: jax.Array, rank: int, side: str) -> jax.Array:
  """The leading right singular vectors as rows, or the left ones as columns."""
  u, _, vt = one_by_one(lambda x: jnp.linalg.svd(x, full_matrices=False))(gradient)
  return vt[:rank] if side == "right" else u[:, :rank]


def lazy_refresh(
  state: ProjectorState,
  grad: jax.Array,
  count: jax.typing.ArrayLike,
  *,
  side: str = "small",
  lazy: bool = True,
  cos_threshold: jax.typing.ArrayLike = 0.4,
  gamma_proj: jax.typing.ArrayLike = 2.0,
  abs_cosine: bool = True,
  proj_bits: int = 4,
  proj_group_size: int = 256,
  zero_in_range: bool = True,
  projector_fn: ProjectorFn | None = None,
) -> ProjectorState:
  r"""The basis for step ``count``: the old one, or a new one when it is due.

  A refresh is due when there is no basis yet or the gap divides ``count``. With
  ``lazy``, once ``queue_size`` cosines between successive leading vectors are known
  and their mean is at least ``cos_threshold``, every refresh also multiplies the gap
  by ``gamma_proj``. A gradient that is zero or not finite is never decomposed: the
  basis stays as it is. The decomposition stands in a ``lax.cond``, so that other
  steps don't pay for it (under ``jax.vmap`` they do).

  Args:
    state: of :func:`init_projector`.
    grad: (m, n), or a stack (L, m, n) with a gap for each matrix.
    count: int32 scalar, steps done; the first step is 0.
    side: "small" or "large" dimension, or "right" or "left".
    lazy: whether gaps grow.
    cos_threshold: mean cosine from which on they do, in [0, 1].
    gamma_proj: growth of the gap, > 1.
    abs_cosine: whether the sign of cosines is dropped, as singular vectors have none.
    proj_bits, proj_group_size, zero_in_range: of a quantised basis.
    projector_fn: ``projector_fn(gradient, rank, side)`` gives the basis instead of
      the singular value decomposition, with the leading vector first.

  Returns:
    The state with the shapes and dtypes of ``state``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import init_projector, lazy_refresh
    >>> g = jnp.array([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 1.0]])
    >>> state = lazy_refresh(init_projector(g, rank=1, proj_bits=None), g, count=0)
    >>> [f"{abs(x):.4f}" for x in state.projector[0]], int(state.num_svd)
    (['0.9571', '0.2898'], 1)
  """
  count = jnp.asarray(count, jnp.int32)
  one_side = side_of(grad.shape, side)
  decompose = singular_vectors if projector_fn is None else projector_fn

  def refreshed(state: ProjectorState, g: jax.Array) -> ProjectorState:
    dtype = state.lead.dtype
    r = state.projector.shape[-2 if one_side == "right" else -1]
    p: Any = jnp.asarray(decompose(g, r, one_side)).astype(dtype)
    lead = p[0] if one_side == "right" else p[:, 0]
    cosine = jnp.dot(state.lead, lead, precision="highest")
    cosine = jnp.abs(cosine) if abs_cosine else cosine
    seen = state.num_svd > 0
    queue = jnp.concatenate([state.cosines[1:], cosine[None]])
    queue = jnp.where(seen, queue, state.cosines)
    known = jnp.minimum(state.num_cosines + seen.astype(jnp.int32), len(queue))
    gap = state.gap
    if lazy:
      threshold = common.scalar(cos_threshold).astype(dtype)
      still = seen & (known == len(queue)) & (jnp.mean(queue) >= threshold)
      growth = common.scalar(gamma_proj)
      longer = jnp.minimum(gap.astype(growth.dtype) * growth, float(MAX_GAP))
      gap = jnp.where(still, longer.astype(jnp.int32), gap)
    if isinstance(state.projector, quantise.QTensor):
      p = quantise.affine_quantize(
        p, proj_bits, proj_group_size, zero_in_range=zero_in_range
      )
    return ProjectorState(p, lead, queue, known, gap, state.num_svd + 1)

  def one(state: ProjectorState, g: jax.Array) -> Any:
    def usable(state: ProjectorState) -> Any:
      wide = g.astype(state.lead.dtype)
      sound = jnp.all(jnp.isfinite(wide)) & jnp.any(wide != 0)
      return jax.lax.cond(sound, lambda s: refreshed(s, wide), lambda s: s, state)

    return jax.lax.cond(due(state), usable, lambda s: s, state)

  def due(state: ProjectorState) -> jax.Array:
    return (state.num_svd == 0) | (count % state.gap == 0)

  if grad.ndim == 2:
    out: Any = one(state, grad)
    return out
  out = jax.lax.cond(
    jnp.any(due(state)),
    lambda s: jax.lax.map(lambda pair: one(*pair), (s, grad)),
    lambda s: s,
    state,
  )
  return out


class Projection(NamedTuple):
  """The arguments of a projection, as :func:`low_rank_projection` documents them."""

  rank: int
  update_proj_gap: int
  quantize_projector: bool
  proj_bits: int
  proj_group_size: int
  lazy: bool
  cos_threshold: jax.typing.ArrayLike
  gamma_proj: jax.typing.ArrayLike
  queue_size: int
  side: str
  zero_in_range: bool
  abs_cosine: bool
  label_fn: Callable[[optax.Params], Any] | None
  dimension_numbers: Any
  projector_fn: ProjectorFn | None

  def check(self) -> None:
    """Raises ValueError for an argument out of its range."""
    for name in ("rank", "update_proj_gap", "queue_size", "proj_group_size"):
      check_range(name, getattr(self, name), 1)
    check_range("proj_bits", self.proj_bits, 2, 8)
    check_range("cos_threshold", self.cos_threshold, 0, 1)
    check_range("gamma_proj", self.gamma_proj, 1, open_low=True)
    if self.side not in SIDES:
      raise ValueError(f"side must be one of {', '.join(SIDES)}, got {self.side!r}.")

  def init(self, params: optax.Params, method: str) -> Any:
    """A ``ProjectorState`` for every projected leaf, a masked node for the others."""

    def leaf(p: Any, chosen: bool) -> Any:
      if not chosen:
        return optax.MaskedNode()
      return init_projector(
        _matrices.to_matrices(p, self.dimension_numbers),
        self.rank,
        side=self.side,
        update_proj_gap=self.update_proj_gap,
        queue_size=self.queue_size,
        proj_bits=self.proj_bits if self.quantize_projector else None,
        proj_group_size=self.proj_group_size,
        zero_in_range=self.zero_in_range,
      )

    chosen = _matrices.selected(self.label_fn, params, method)
    return jax.tree.map(leaf, params, chosen)

  def refresh(self, g: Any, state: Any, count: jax.Array) -> Any:
    """The state of one leaf for step ``count``."""
    if not isinstance(state, ProjectorState):
      return state
    return lazy_refresh(
      state,
      _matrices.to_matrices(g, self.dimension_numbers),
      count,
      side=self.side,
      lazy=self.lazy,
      cos_threshold=self.cos_threshold,
      gamma_proj=self.gamma_proj,
      abs_cosine=self.abs_cosine,
      proj_bits=self.proj_bits,
      proj_group_size=self.proj_group_size,
      zero_in_range=self.zero_in_range,
      projector_fn=self.projector_fn,
    )

  def down(self, x: Any, state: Any) -> Any:
    """R = G P^T or P^T G of a projected leaf; other leaves as they are."""
    if not isinstance(state, ProjectorState):
      return x
    x, p = _matrices.to_matrices(x, self.dimension_numbers), basis(state)
    right = side_of(x.shape, self.side) == "right"
    rule = "...mn,...rn->...mr" if right else "...mn,...mr->...rn"
    return jnp.einsum(rule, x.astype(p.dtype), p, precision="highest")

  def up(self, a: Any, like: Any, state: Any) -> Any:
    """A P or P A with the shape of the leaf ``like``; other leaves as they are."""
    if not isinstance(state, ProjectorState):
      return a
    shape = jnp.shape(like)
    view = jax.eval_shape(lambda: _matrices.to_matrices(like, self.dimension_numbers))
    right = side_of(view.shape, self.side) == "right"
    rule = "...mr,...rn->...mn" if right else "...rn,...mr->...mn"
    p = basis(state)
    out = jnp.einsum(rule, a.astype(p.dtype), p, precision="highest")
    return _matrices.from_matrices(out, shape, self.dimension_numbers)
