"""PGI: a main loss and those of auxiliary heads that are gone at inference."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradlab.transforms._common import check_range
from gradlab.transforms.objectives.cross_entropy import cross_entropy
from gradlab.transforms.objectives.squared_error import squared_error
from gradlab.types import Batch, Params, PyTree, method

AUXILIARY = "aux_"
_OBJECTIVES = {"cross_entropy": cross_entropy, "squared_error": squared_error}


@method(
  family="objectives",
  paper="Wang et al., YOLOv9: Learning What You Want to Learn Using Programmable "
  "Gradient Information, 2024",
  arxiv="2402.13616",
  seeds=("004:0",),
)
def programmable_gradient_information(
  outputs: PyTree,
  batch: Batch,
  *,
  aux_weight: ArrayLike = 0.25,
  objective: str = "cross_entropy",
  label: str = "label",
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""The loss of the main head plus that of every auxiliary head, for one target.

  .. math::
    L = L(y, t) + w \sum_j L(o_j, t)

  The auxiliary heads of :class:`gradlab.models.pgi.PGINet` end a second branch that
  starts from the raw inputs and is fed by the main stages through routes, so that
  their gradients reach the main stages with nothing lost on the way. The method is
  this loss and that branch; every cotangent is exact.

  Args:
    outputs: ``(main, auxiliary)`` in training, where ``auxiliary`` is a sequence of
      arrays, each predicting the whole target as ``main`` does; or ``main`` alone,
      as in evaluation, whose loss is then all.
    batch: what the inner objective reads: the labels, and a ``mask`` where it has one.
    aux_weight: w >= 0, for all auxiliary losses alike.
    objective: "cross_entropy" or "squared_error".
    label: the name of the labels' field.

  Returns:
    The loss and ``{"main_loss", "aux_loss"}`` (the sum over the auxiliary heads,
    before the weight) with the inner objective's own metrics of the main head, all
    float32 scalars. An auxiliary loss that is not finite spoils L, not ``main_loss``.

  Raises:
    ValueError: a negative aux_weight, an unknown objective, or what the inner
      objective refuses.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import programmable_gradient_information
    >>> main, aux = jnp.zeros((1, 2)), jnp.zeros((1, 4))
    >>> batch = {"label": jnp.array([0])}
    >>> loss, found = programmable_gradient_information((main, [aux, aux]), batch)
    >>> f"{loss:.4f} {found['main_loss']:.4f} {found['aux_loss']:.4f}"
    '1.3863 0.6931 2.7726'

  References:
    Wang, Yeh and Liao, YOLOv9: Learning What You Want to Learn Using Programmable
    Gradient Information, ECCV 2024, arXiv:2402.13616
  """
  if objective not in _OBJECTIVES:
    raise ValueError(
      f"objective must be one of {', '.join(_OBJECTIVES)}; got {objective!r}."
    )
  main, auxiliary = outputs if isinstance(outputs, tuple | list) else (outputs, ())
  inner = _OBJECTIVES[objective]

  def loss_fn(output: jax.Array, batch: Batch) -> jax.Array:
    return inner(output, batch, label=label)[0]

  loss, found = pgi_loss(main, auxiliary, batch, loss_fn, aux_weight)
  # The same call as in the loss: compiled once.
  return loss, {**found, **inner(main, batch, label=label)[1]}


def pgi_loss(
  main_out: PyTree,
  aux_outs: Sequence[PyTree],
  targets: PyTree,
  loss_fn: Callable[[PyTree, PyTree], jax.Array],
  aux_weight: ArrayLike = 0.25,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""Main loss plus weighted auxiliary losses, of any loss function.

  .. math::
    L = L(y, t) + w \sum_j L(o_j, t)

  Args:
    main_out: output of the main head.
    aux_outs: outputs of the auxiliary heads; none leaves the main loss alone.
    targets: what every head predicts.
    loss_fn: ``loss_fn(output, targets) -> scalar``. It sees outputs in float32 at
      least.
    aux_weight: w >= 0; may be traced.

  Returns:
    The loss and ``{"main_loss", "aux_loss"}``, the latter the sum before the weight;
    scalars, float32 (float64 for a float64 main loss).

  Raises:
    ValueError: a negative aux_weight.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.objectives import pgi_loss
    >>> loss, _ = pgi_loss(
    ...   jnp.float32(1.2), [jnp.float32(1.5), jnp.float32(1.7)], None, lambda o, _: o
    ... )
    >>> f"{loss:.4f}"
    '2.0000'

  References:
    Wang, Yeh and Liao, YOLOv9, ECCV 2024, arXiv:2402.13616
  """
  check_range("aux_weight", aux_weight, 0.0)

  def of(output: PyTree) -> jax.Array:
    return jnp.asarray(loss_fn(jax.tree.map(_widen, output), targets))

  main = _widen(of(main_out))
  total = jnp.zeros((), main.dtype)
  for output in aux_outs:
    total = total + of(output).astype(main.dtype)
  loss = main
  if len(aux_outs):
    loss = main + jnp.asarray(aux_weight, main.dtype) * total
  return loss, {"main_loss": main, "aux_loss": total}


def _widen(leaf: ArrayLike) -> jax.Array:
  array = jnp.asarray(leaf)
  low = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
  return array.astype(jnp.float32) if low else array


def route(params: Params, h: jax.Array, sizes: Sequence[int]) -> tuple[jax.Array, ...]:
  r"""A 1 x 1 convolution of a feature map, split into one map per auxiliary level.

  .. math::
    (c_1, \ldots, c_J) = \operatorname{split}(h W + b)

  Args:
    params: ``{"kernel", "bias"}``: kernel of shape [C, sum(sizes)] or
      [1, 1, C, sum(sizes)], bias [sum(sizes)].
    h: feature map [..., H, W, C].
    sizes: channels of the maps, in their order.

  Returns:
    Maps [..., H, W, size], one per size, in the dtype of ``h``.

  Raises:
    ValueError: a kernel that does not have C inputs and sum(sizes) outputs.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.objectives import route
    >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}
    >>> [c.shape for c in route(params, jnp.ones((2, 3, 3, 4)), (2, 3))]
    [(2, 3, 3, 2), (2, 3, 3, 3)]
  """
  kernel, bias = params["kernel"], params["bias"]
  shape = (h.shape[-1], sum(sizes))
  if kernel.shape not in (shape, (1, 1, *shape)) or bias.shape != shape[1:]:
    raise ValueError(
      f"a route of {shape[0]} channels into {tuple(sizes)} needs a kernel {shape} and "
      f"a bias {shape[1:]}, got {kernel.shape} and {bias.shape}."
    )
  mixed = jnp.matmul(h, kernel.reshape(shape).astype(h.dtype))
  mixed = mixed + jnp.broadcast_to(bias.astype(h.dtype), mixed.shape)
  starts = itertools.accumulate(sizes[:-1])
  return tuple(jnp.split(mixed, list(starts), axis=-1)) if len(sizes) else ()


def resize_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  r"""A map of another size by nearest index: row i is row floor(i H / H') of ``x``.

  Args:
    x: map [..., H, W, C].
    size: (H', W').

  Returns:
    Map [..., H', W', C]. ``jax.image.resize`` takes the pixel at the centre instead,
    which is another one unless the factors are integers that enlarge.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.objectives import resize_nearest
    >>> resize_nearest(jnp.arange(3).reshape(3, 1, 1), (5, 1)).ravel().tolist()
    [0, 0, 1, 1, 2]
  """
  for axis, new in zip((-3, -2), size, strict=True):
    old = x.shape[axis]
    if old == new:
      continue
    if old and new % old == 0:
      # Whole factors need no gather, whose derivative is a scatter.
      x = jnp.repeat(x, new // old, axis=axis)
    else:
      x = jnp.take(x, np.arange(new) * old // new, axis=axis)
  return x


def fuse(routed: Sequence[jax.Array], target: jax.Array) -> jax.Array:
  r"""The sum of a map and of routed maps resized to it.

  .. math::
    g = u + \sum_k \operatorname{nearest}(c_k, \operatorname{size}(u))

  Args:
    routed: maps [..., H_k, W_k, C] of any size; none returns ``target``.
    target: map u [..., H, W, C].

  Returns:
    Map of the shape and dtype of ``target``.

  Raises:
    ValueError: a routed map with another number of channels.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.objectives import fuse
    >>> fuse([jnp.full((1, 1, 1), 3.0)], jnp.ones((2, 2, 1)))[..., 0].tolist()
    [[4.0, 4.0], [4.0, 4.0]]
  """
  for piece in routed:
    if piece.shape[-1] != target.shape[-1]:
      raise ValueError(
        f"a routed map with {piece.shape[-1]} channels cannot be added to one with "
        f"{target.shape[-1]}; they must be as many."
      )
  for piece in routed:
    size = target.shape[-3], target.shape[-2]
    target = target + resize_nearest(piece, size).astype(target.dtype)
  return target


def strip_auxiliary(params: Params) -> Params:
  """The params (or the batch statistics) without routes, auxiliary stages and heads.

  Args:
    params: nested mappings; what is named ``aux_...`` at any depth is left out.

  Returns:
    The same arrays in new dicts. The main outputs are the same bit for bit.

  Examples:
    >>> from gradlab.transforms.objectives import strip_auxiliary
    >>> strip_auxiliary({"params": {"head": 1, "aux_head_2": 2, "aux_route_2": 3}})
    {'params': {'head': 1}}
  """
  if not isinstance(params, Mapping):
    return params
  return {
    name: strip_auxiliary(value)
    for name, value in params.items()
    if not (isinstance(name, str) and name.startswith(AUXILIARY))
  }
