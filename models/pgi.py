"""A convolutional network with the auxiliary branch of PGI, which only trains."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradlab.models import _common
from gradlab.models.cnn import as_images
from gradlab.transforms.objectives.programmable_gradient_information import (
  fuse,
  resize_nearest,
  route,
)
from gradlab.types import Model, Params, State

Levels = int | tuple[int, ...]


class Stage(nn.Module):
  """A convolution that halves the image, a sum with routed maps, more convolutions."""

  width: int
  depth: int
  kernel_size: int
  batch_norm: bool
  activation: str
  dtype: str
  train: bool

  @nn.compact
  def __call__(self, x: jax.Array, routed: Sequence[jax.Array] = ()) -> jax.Array:
    for index in range(self.depth):
      size, stride = (self.kernel_size,) * 2, 1 if index else 2
      conv = nn.Conv(self.width, size, stride, dtype=self.dtype, name=f"conv_{index}")
      x = conv(x)
      if self.batch_norm:
        # Statistics and normalisation in float32, whatever the dtype.
        norm = nn.BatchNorm(not self.train, dtype=jnp.float32, name=f"norm_{index}")
        x = norm(x.astype(jnp.float32)).astype(self.dtype)
      x = _common.ACTIVATIONS[self.activation](x)
      x = x if index else fuse(routed, x)
    return x


class Route(nn.Module):
  """The parameters of a ``route``."""

  sizes: tuple[int, ...]

  @nn.compact
  def __call__(self, h: jax.Array) -> tuple[jax.Array, ...]:
    shape = (1, 1, h.shape[-1], sum(self.sizes))
    params = {
      "kernel": self.param("kernel", nn.initializers.lecun_normal(), shape),
      "bias": self.param("bias", nn.initializers.zeros, shape[-1:]),
    }
    return route(params, h, self.sizes)


class PGINet(nn.Module):
  """Stages that halve the image and, in training, an auxiliary branch beside them.

  In evaluation ``__call__(x)`` is the main output, and nothing else is traced. With
  ``train=True`` it is ``(main, [auxiliary outputs])``, one per auxiliary level, the
  shallow ones first: level j of the auxiliary branch starts from the raw inputs and
  adds what the main levels k >= j route to it. Initialise with ``train=True``.

  Attributes:
    stages: channels of the stages, level 1 first.
    num_outputs: size of every head.
    aux_levels: levels with an auxiliary output, counted from 1, or how many of the
      deepest; ``()`` or 0 for none.
    aux_branch: whether there is an auxiliary branch; without it the auxiliary heads
      read the main stages, which is deep supervision.
    depth: convolutions per stage.
    kernel_size: width and height of every convolution.
    image_shape: (H, W) or (H, W, C) of flat inputs.
    resize: (H, W) that images are brought to first, by nearest index.
    batch_norm: normalise after each convolution.
    activation: as in ``mlp``.
    dtype: dtype of the computation; parameters and outputs are float32.
  """

  stages: tuple[int, ...]
  num_outputs: int
  aux_levels: Levels = 3
  aux_branch: bool = True
  depth: int = 1
  kernel_size: int = 3
  image_shape: tuple[int, ...] | None = None
  resize: tuple[int, int] | None = None
  batch_norm: bool = False
  activation: str = "relu"
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, inputs: jax.Array, train: bool = False
  ) -> jax.Array | tuple[jax.Array, list[jax.Array]]:
    x = as_images(inputs, self.image_shape).astype(self.dtype)
    x = x if self.resize is None else resize_nearest(x, self.resize)

    def stage(level: int, name: str) -> Stage:
      return Stage(
        self.stages[level - 1],
        self.depth,
        self.kernel_size,
        self.batch_norm,
        self.activation,
        self.dtype,
        train,
        name=f"{name}_{level}",
      )

    def head(h: jax.Array, name: str) -> jax.Array:
      dense = nn.Dense(self.num_outputs, dtype=self.dtype, name=name)
      return dense(h.reshape(len(h), math.prod(h.shape[1:]))).astype(jnp.float32)

    main, h = {}, x
    for level in range(1, len(self.stages) + 1):
      main[level] = h = stage(level, "stage")(h)
    out = head(h, "head")
    if not train:
      return out
    levels = chosen(self.aux_levels, len(self.stages))
    maps = main
    if self.aux_branch:
      routed: dict[int, list[jax.Array]] = {level: [] for level in levels}
      for k in levels:
        fed = [j for j in levels if j <= k]
        sizes = tuple(self.stages[j - 1] for j in fed)
        pieces = Route(sizes, name=f"aux_route_{k}")(main[k])
        for j, piece in zip(fed, pieces, strict=True):
          routed[j].append(piece)
      maps, g = {}, x
      for j in range(1, max(levels, default=0) + 1):
        maps[j] = g = stage(j, "aux_stage")(g, routed.get(j, ()))
    return out, [head(maps[j], f"aux_head_{j}") for j in levels]


def chosen(aux_levels: Levels, num_stages: int) -> tuple[int, ...]:
  """The auxiliary levels, ascending.

  Raises:
    ValueError: a level that is not there or comes twice, or a negative number.
  """
  if isinstance(aux_levels, int):
    if aux_levels < 0:
      raise ValueError(f"aux_levels must be at least 0, got {aux_levels}.")
    return tuple(range(max(1, num_stages - aux_levels + 1), num_stages + 1))
  levels = tuple(sorted(aux_levels))
  if len(set(levels)) < len(levels) or not set(levels) <= set(range(1, num_stages + 1)):
    raise ValueError(
      f"aux_levels must be distinct levels in 1..{num_stages}, got {aux_levels!r}."
    )
  return levels


def pgi(
  stages: tuple[int, ...] = (16, 32, 64),
  outputs: int = 10,
  aux_levels: int | tuple[int, ...] = 3,
  aux_branch: bool = True,
  depth: int = 1,
  kernel_size: int = 3,
  image_shape: tuple[int, ...] | None = None,
  resize: tuple[int, int] | None = None,
  batch_norm: bool = False,
  activation: str = "relu",
  dtype: str = "float32",
) -> Model:
  """Stages that halve the image, a linear head, and an auxiliary branch to train with.

  Train it with ``programmable_gradient_information``, which weighs the losses.
  Parameters: ``stage_<k>/conv_<i>/{kernel,bias}``, ``head/{kernel,bias}``, and those
  of the branch, ``aux_route_<k>``, ``aux_stage_<j>`` and ``aux_head_<j>``, which
  ``strip_auxiliary`` removes. The main ones are drawn as without the branch.

  Args:
    stages: channels of the stages, at least one.
    outputs: size of every head.
    aux_levels: levels with an auxiliary output, counted from 1, or how many of the
      deepest; ``()`` or 0 trains the main head alone.
    aux_branch: ``False`` for deep supervision: the auxiliary heads read the main
      stages.
    depth: convolutions per stage.
    kernel_size: width and height of every convolution.
    image_shape: (H, W) or (H, W, C) of flat inputs; ``None`` when inputs have it.
    resize: (H, W) that images are brought to first, by nearest index.
    batch_norm: normalise after each convolution; running statistics are the model
      state.
    activation: as in ``mlp``.
    dtype: dtype of the computation; parameters and outputs are float32.

  Returns:
    A ``Model``: outputs float32 [B, outputs], in training a pair of these and a list
    with those of the auxiliary heads.

  Raises:
    ValueError: an unknown name, a size below 1, a level that is not there, or (when
      called) inputs that are not images.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gradlab.models import pgi
    >>> model = pgi(stages=(4, 8), image_shape=(8, 8))
    >>> x = jnp.ones((3, 64))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> model.apply(params, state, x)[0].shape
    (3, 10)
    >>> main, auxiliary = model.apply(params, state, x, train=True)[0]
    >>> len(auxiliary)
    2

  References:
    Wang, Yeh and Liao, YOLOv9: Learning What You Want to Learn Using Programmable
    Gradient Information, ECCV 2024, arXiv:2402.13616
  """
  if not stages:
    raise ValueError("stages must name at least one stage, got ().")
  if image_shape is not None and len(image_shape) not in (2, 3):
    raise ValueError(f"image_shape must be (H, W) or (H, W, C), got {image_shape!r}.")
  if resize is not None and len(resize) != 2:
    raise ValueError(f"resize must be (H, W), got {resize!r}.")
  _common.check_sizes("image_shape", tuple(image_shape or ()))
  _common.check_sizes("resize", tuple(resize or ()))
  _common.check_sizes("stages", tuple(stages))
  _common.check_sizes("outputs, depth and kernel_size", (outputs, depth, kernel_size))
  chosen(aux_levels, len(stages))
  _common.check_choice("activation", activation, _common.ACTIVATIONS)
  _common.check_choice("dtype", dtype, _common.DTYPES)
  module = PGINet(
    tuple(stages),
    outputs,
    aux_levels if isinstance(aux_levels, int) else tuple(aux_levels),
    aux_branch,
    depth,
    kernel_size,
    None if image_shape is None else tuple(image_shape),
    None if resize is None else (resize[0], resize[1]),
    batch_norm,
    activation,
    dtype,
  )

  def init(key: jax.Array, inputs: jax.Array) -> tuple[Params, State]:
    # In training mode: otherwise the branch would have no parameters.
    variables = dict(nn.meta.unbox(module.init(key, inputs, train=True)))
    return variables.pop("params"), variables

  return Model(init, _common.from_linen(module).apply)
