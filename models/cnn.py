"""A small convolutional network."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from gradlab.models import _common
from gradlab.models.mlp import Heads, check_heads, heads
from gradlab.transforms._common import check_range
from gradlab.types import Model


class CNN(nn.Module):
  """Convolution, activation and halving of the image, per entry of ``channels``."""

  channels: tuple[int, ...]
  outputs: Heads
  kernel_size: int
  image_shape: tuple[int, ...] | None
  batch_norm: bool
  activation: str
  dropout: ArrayLike
  dtype: str

  @nn.compact
  def __call__(
    self, inputs: jax.Array, train: bool = False
  ) -> jax.Array | dict[str, jax.Array]:
    x = as_images(inputs, self.image_shape).astype(self.dtype)
    for index, width in enumerate(self.channels):
      x = nn.Conv(
        width, (self.kernel_size,) * 2, dtype=self.dtype, name=f"conv_{index}"
      )(x)
      if self.batch_norm:
        # Statistics and normalisation in float32, whatever the dtype.
        norm = nn.BatchNorm(not train, dtype=jnp.float32, name=f"norm_{index}")
        x = norm(x.astype(jnp.float32)).astype(self.dtype)
      x = _common.ACTIVATIONS[self.activation](x)
      x = halve(x)
    x = _common.dropout(self, x.reshape(x.shape[0], -1), self.dropout, train)
    return heads(x, self.outputs, self.dtype)


def halve(x: jax.Array) -> jax.Array:
  """Means over 2 x 2 pixels: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]."""
  # Means, not maxima: they differentiate twice and in forward mode. A repeated last
  # row leaves the mean of an odd edge what it is without padding.
  batch, height, width, channels = x.shape
  x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
  cells = x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
  return cells.mean((2, 4))


def as_images(inputs: jax.Array, image_shape: tuple[int, ...] | None) -> jax.Array:
  """[B, H, W], [B, H, W, C] or, with ``image_shape``, flat inputs -> [B, H, W, C].

  Raises:
    ValueError: inputs that are neither images nor of the size of ``image_shape``.
  """
  if image_shape is not None:
    if inputs.ndim < 2 or math.prod(inputs.shape[1:]) != math.prod(image_shape):
      raise ValueError(
        f"inputs of shape {inputs.shape} hold no images of shape {image_shape}."
      )
    inputs = inputs.reshape(inputs.shape[0], *image_shape)
  if inputs.ndim not in (3, 4):
    raise ValueError(
      "inputs must be [B, H, W] or [B, H, W, C], or image_shape be given, got "
      f"{inputs.shape}."
    )
  return inputs if inputs.ndim == 4 else inputs[..., None]


def cnn(
  channels: tuple[int, ...] = (16, 32),
  outputs: Heads = 10,
  kernel_size: int = 3,
  image_shape: tuple[int, ...] | None = None,
  batch_norm: bool = False,
  activation: str = "relu",
  dropout: ArrayLike = 0.0,
  dtype: str = "float32",
) -> Model:
  """Convolutions that halve the image each, then a linear head.

  Parameters: ``conv_<k>/{kernel,bias}``, ``norm_<k>/{scale,bias}`` with
  ``batch_norm``, ``head/{kernel,bias}``.

  Args:
    channels: channels of the convolutions, at least one.
    outputs: size of the head, or (name, size) pairs, as in ``mlp``.
    kernel_size: width and height of every convolution.
    image_shape: (H, W) or (H, W, C) of flat inputs; ``None`` when inputs have it.
    batch_norm: normalise after each convolution; its running statistics, which
      evaluation uses, are the model state ``batch_stats``.
    activation: as in ``mlp``.
    dropout: share of the head's inputs dropped in training, in [0, 1); may be traced.
    dtype: dtype of the computation; parameters and outputs are float32.

  Returns:
    A ``Model``: inputs [B, H, W], [B, H, W, C] or flat [B, H * W * C], outputs
    float32 [B, outputs].

  Raises:
    ValueError: an unknown name, a size below 1, a dropout outside [0, 1), or (when
      called) inputs that are not images.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gradlab.models import cnn
    >>> model = cnn(channels=(4,), image_shape=(8, 8))
    >>> x = jnp.ones((3, 64))
    >>> model.apply(*model.init(jax.random.key(0), x), x)[0].shape
    (3, 10)
  """
  if not channels:
    raise ValueError("channels must name at least one convolution, got ().")
  if image_shape is not None and len(image_shape) not in (2, 3):
    raise ValueError(f"image_shape must be (H, W) or (H, W, C), got {image_shape!r}.")
  _common.check_sizes("channels", tuple(channels))
  _common.check_sizes("kernel_size", (kernel_size,))
  _common.check_sizes("image_shape", tuple(image_shape or ()))
  check_heads(outputs)
  _common.check_choice("activation", activation, _common.ACTIVATIONS)
  _common.check_choice("dtype", dtype, _common.DTYPES)
  check_range("dropout", dropout, 0.0, 1.0, open_high=True)
  shape = None if image_shape is None else tuple(image_shape)
  module = CNN(
    tuple(channels),
    outputs,
    kernel_size,
    shape,
    batch_norm,
    activation,
    dropout,
    dtype,
  )
  return _common.from_linen(module)
