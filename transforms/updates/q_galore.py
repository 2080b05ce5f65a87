"""Q-GaLore: low-rank Adam with quantised projectors, moments and weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from gradlab.transforms._common import (
  as_key,
  check_float_leaves,
  check_range,
  leaf_keys,
)
from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates._alike import map_alike
from gradlab.transforms.updates._block_adam import BlockAdam
from gradlab.transforms.updates._grid_weights import (
  dequantize_params as dequantize_params,
)
from gradlab.transforms.updates._grid_weights import quantize_params as quantize_params
from gradlab.transforms.updates._grid_weights import store
from gradlab.transforms.updates._projection import (
  Projection,
  ProjectorFn,
  ProjectorState,
)
from gradlab.transforms.updates._quantise import affine_dequantize, affine_quantize
from gradlab.types import method


class QGaloreState(NamedTuple):
  """State of Q-GaLore; the trees have the structure of the parameters.

  Attributes:
    count: int32 scalar, the number of steps done.
    key: typed key of the stochastic rounding.
    projector: a ``ProjectorState`` for every projected leaf, else a masked node.
    mu: first moments, of the low-rank shape where the leaf is projected; floats, or
      codes of eight bits with a scale per block.
    nu: second moments, likewise.
  """

  count: jax.Array  # type: ignore[assignment]
  key: jax.Array
  projector: Any
  mu: Any
  nu: Any


@method(
  family="updates",
  paper="Zhang et al., Q-GaLore: Quantized GaLore with INT4 Projection and "
  "Layer-Adaptive Low-Rank Gradients, 2024",
  arxiv="2407.08296",
  seeds=("004:12",),
)
def q_galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: jax.typing.ArrayLike = 0.25,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  weight_decay: jax.typing.ArrayLike = 0.0,
  *,
  seed_key: int | jax.Array,
  quantize_projector: bool = True,
  proj_bits: int = 4,
  proj_group_size: int = 256,
  lazy: bool = True,
  cos_threshold: jax.typing.ArrayLike = 0.4,
  gamma_proj: jax.typing.ArrayLike = 2.0,
  queue_size: int = 5,
  quantize_moments: bool = True,
  moment_block_size: int = 256,
  min_8bit_size: int = 4096,
  quantize_weights: bool = True,
  weight_bits: int = 8,
  weight_group_size: int = 256,
  stochastic_rounding: bool = True,
  side: str = "small",
  zero_in_range: bool = True,
  abs_cosine: bool = True,
  label_fn: Callable[[optax.Params], Any] | None = None,
  dimension_numbers: MuonDimensionNumbers | None = None,
  projector_fn: ProjectorFn | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Q-GaLore: Adam in a lazily refreshed INT4 subspace, on INT8 weights.

  .. math::
    R &= G P^T \quad (m \ge n; P^T G \text{ else}) \\
    A &= \hat M / (\sqrt{\hat V} + \epsilon), \quad
      M = b_1 M + (1 - b_1) R, \; V = b_2 V + (1 - b_2) R^2 \\
    W &\leftarrow Q\left((W - \eta \alpha A P)(1 - \eta \lambda)\right)

  P holds the leading singular vectors of the gradient at the last refresh, in four
  bits; a matrix whose leading vector stays is refreshed at growing gaps. M and V are
  kept in eight bits. Q rounds the weights stochastically to a grid of eight bits per
  group; in this form they remain floats, on that grid (see :func:`quantize_params`
  and, for weights stored as codes, :func:`q_galore_apply`). With all four switches
  off this is GaLore. Leaves that aren't matrices get AdamW with float weights.

  Args:
    learning_rate: eta >= 0, a number or a schedule; 0.004 to 0.015 in the paper.
    rank: r >= 1, clipped to the smaller dimension of each matrix.
    update_proj_gap: first number of steps between refreshes, >= 1.
    scale: alpha > 0, of the projected matrices.
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added to the root, >= 0.
    weight_decay: lambda >= 0, decoupled.
    seed_key: seed of the stochastic rounding, a jax key or an int.
    quantize_projector: whether P is kept in ``proj_bits`` bits.
    proj_bits: 2 to 8.
    proj_group_size: entries of P that share a scale and a zero, >= 1.
    lazy: whether gaps grow; see :func:`lazy_refresh`.
    cos_threshold: mean cosine of successive leading vectors from which on they do, in
      [0, 1].
    gamma_proj: growth of a gap, > 1.
    queue_size: cosines that are averaged, >= 1.
    quantize_moments: whether moments are kept in eight bits.
    moment_block_size: entries that share a largest magnitude, >= 1.
    min_8bit_size: smaller moments stay floats, >= 0; in a stack each matrix counts.
    quantize_weights: whether the projected weights are rounded to a grid.
    weight_bits: 2 to 8.
    weight_group_size: entries of W that share a scale and a zero, >= 1.
    stochastic_rounding: whether that rounding is unbiased, or to nearest.
    side: which dimension is projected: "small", "large", or "right" or "left" for all.
    zero_in_range: whether every grid contains zero; False clips groups of one sign,
      as the authors' code does.
    abs_cosine: whether the sign of cosines is dropped, as singular vectors have none.
    label_fn: ``label_fn(params)`` is a tree with "matrix" or "other" (or a bool) per
      leaf. By default what has two or more axes is a matrix unless its path names an
      embedding, a head, a norm, a scale or a bias.
    dimension_numbers: as in :func:`low_rank_projection`: by default three axes are a
      stack of matrices, each with a basis, a gap and moments of its own.
    projector_fn: ``projector_fn(gradient, rank, side)`` gives P instead of the
      singular value decomposition.

  Returns:
    A transformation with a :class:`QGaloreState`.

  Raises:
    ValueError: an argument out of its range, an unknown label, a "matrix" with fewer
      than two axes, a leaf that is not floating point, a group size that does not
      divide a leaf without zero_in_range, or no params although weights are quantised
      or decay.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import q_galore
    >>> off = dict(quantize_projector=False, quantize_weights=False, lazy=False)
    >>> transform = q_galore(0.1, rank=1, seed_key=0, **off)
    >>> w = jnp.full((4, 2), 0.5)
    >>> g = jnp.array([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 1.0]])
    >>> u, state = transform.update(g, transform.init(w), w)
    >>> [[f"{x:.4f}" for x in row] for row in optax.apply_updates(w, u)[2:]]
    [['0.4761', '0.4928'], ['0.5239', '0.5072']]

  References:
    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
    Low-Rank Gradients <https://arxiv.org/abs/2407.08296>`_, 2024
  """
  check_range("learning_rate", learning_rate, 0)
  check_range("scale", scale, 0, open_low=True)
  check_range("b1", b1, 0, 1, open_high=True)
  check_range("b2", b2, 0, 1, open_high=True)
  check_range("eps", eps, 0)
  check_range("weight_decay", weight_decay, 0)
  check_range("moment_block_size", moment_block_size, 1)
  check_range("min_8bit_size", min_8bit_size, 0)
  check_range("weight_bits", weight_bits, 2, 8)
  check_range("weight_group_size", weight_group_size, 1)
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
  adam = BlockAdam(b1, b2, eps, quantize_moments, moment_block_size, min_8bit_size)
  decays = not common.is_off(weight_decay)

  def init(params: optax.Params) -> QGaloreState:
    check_float_leaves(params, "q_galore")
    states = projection.init(params, "q_galore")
    low = jax.eval_shape(lambda: jax.tree.map(projection.down, params, states))
    mu, nu = (adam.init(params, states, low, signed) for signed in (True, False))
    key = jax.random.clone(as_key(seed_key))
    return QGaloreState(jnp.zeros([], jnp.int32), key, states, mu, nu)

  def update(
    updates: optax.Updates,
    state: QGaloreState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, QGaloreState]:
    del extra
    check_float_leaves(updates, "q_galore")
    if quantize_weights:
      common.need_params(params, "q_galore", "quantize_weights")
    if decays:
      common.need_params(params, "q_galore", "weight_decay")
    count = optax.safe_increment(state.count)
    rate = common.rate_at(learning_rate, state.count)
    keys = leaf_keys(jax.random.fold_in(state.key, count), updates)

    def leaf(g: Any, w: Any, p: Any, mu: Any, nu: Any, key: Any) -> tuple[Any, ...]:
      wide = jnp.asarray(g).astype(common.accumulator(jnp.result_type(g)))
      eta, lam = (x.astype(wide.dtype) for x in (rate, common.scalar(weight_decay)))
      p = projection.refresh(wide, p, state.count)
      a, mu, nu = adam.step(projection.down(wide, p), mu, nu, count)
      u = -eta * projection.up(a, g, p)
      w = None if w is None else jnp.asarray(w).astype(wide.dtype)
      if isinstance(p, ProjectorState):
        u = common.scalar(scale).astype(u.dtype) * u
        if decays:
          u = u - eta * lam * (w + u)
        if quantize_weights:
          rounding = key if stochastic_rounding else None
          u = _on_grid(w + u, rounding) - w
      elif decays:
        u = u - eta * lam * w
      return u.astype(jnp.result_type(g)), p, mu, nu

    weights = jax.tree.map(lambda _: None, updates) if params is None else params
    u, p, mu, nu = map_alike(
      leaf, 4, updates, weights, state.projector, state.mu, state.nu, keys
    )
    return u, QGaloreState(count, state.key, p, mu, nu)

  def _on_grid(w: jax.Array, key: jax.Array | None) -> jax.Array:
    q = affine_quantize(
      w, weight_bits, weight_group_size, key=key, zero_in_range=zero_in_range
    )
    return affine_dequantize(q).astype(w.dtype)

  return optax.GradientTransformationExtraArgs(init, update)


def q_galore_apply(
  qparams: optax.Params,
  grads: optax.Updates,
  state: QGaloreState,
  key: int | jax.Array | None = None,
  *,
  learning_rate: optax.ScalarOrSchedule,
  zero_in_range: bool = True,
  **hyperparameters: Any,
) -> tuple[optax.Params, QGaloreState]:
  """One step of :func:`q_galore` on weights that are stored as codes.

  With ``key = fold_in(seed_key, step)``, steps counted from 1, the codes are those of
  the weights that the float form would reach.

  Args:
    qparams: parameters with ``QTensor`` nodes, of :func:`quantize_params` with
      ``storage``; each keeps its own bits and group size.
    grads: gradients with respect to :func:`dequantize_params` of ``qparams``.
    state: that of :func:`q_galore` on :func:`dequantize_params` of ``qparams``.
    key: of this step's stochastic rounding; None rounds to nearest.
    learning_rate, zero_in_range, **hyperparameters: as in :func:`q_galore`.

  Returns:
    (qparams, state), of the structure, shapes and dtypes that came in.

  Raises:
    ValueError: as :func:`q_galore`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import dequantize_params, q_galore
    >>> from gradlab.transforms.updates import q_galore_apply, quantize_params
    >>> qparams = quantize_params(jnp.eye(4), storage=True)
    >>> state = q_galore(0.1, seed_key=0).init(dequantize_params(qparams))
    >>> qparams, state = q_galore_apply(
    ...   qparams, jnp.eye(4), state, 0, learning_rate=0.1)
    >>> qparams.codes.dtype, dequantize_params(qparams).shape
    (dtype('uint8'), (4, 4))
  """
  fixed = {"seed_key": 0, "quantize_weights": False, "zero_in_range": zero_in_range}
  transform = q_galore(learning_rate, **{**hyperparameters, **fixed})
  params = dequantize_params(qparams)
  updates, state = transform.update(common.widen(grads), state, params)
  return store(qparams, params, updates, key, zero_in_range), state
