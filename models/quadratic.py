"""Layers of quadratic neurons, and a perceptron of them."""

import jax
from flax import linen as nn

from gradlab.models import _common
from gradlab.models.mlp import Heads, check_heads, heads
from gradlab.transforms.updates.relinear import quadratic_apply, relinear_init
from gradlab.types import Model

INITS = ("relinear", "random")


def _params(
  module: nn.Module, shape: tuple[int, ...], compact: bool, init: str
) -> dict[str, dict[str, jax.Array]]:
  """The layer's branches; "random" draws every kernel as that of r is drawn."""

  def branch(key: jax.Array, name: str) -> dict[str, jax.Array]:
    drawn = relinear_init(key, shape)
    return drawn["r" if init == "random" else name]

  names = ("r", "b") if compact else ("r", "g", "b")
  return {name: module.param(name, branch, name) for name in names}


class QuadraticDense(nn.Module):
  """A dense layer of quadratic neurons on the last axis.

  Parameters: ``{r,g,b}/{kernel,bias}`` with kernels [inputs, features].

  Attributes:
    features: number of neurons.
    compact: whether the branch g is left out.
    kernel_init: "relinear", a linear layer at first, or "random", Kaiming normal
      kernels and zero biases in every branch.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gradlab.models import QuadraticDense
    >>> x = jnp.ones((2, 3))
    >>> outputs, _ = QuadraticDense(4).init_with_output(jax.random.key(0), x)
    >>> outputs.shape
    (2, 4)
  """

  features: int
  compact: bool = False
  kernel_init: str = "relinear"

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    shape = (inputs.shape[-1], self.features)
    return quadratic_apply(_params(self, shape, self.compact, self.kernel_init), inputs)


class QuadraticConv(nn.Module):
  """A convolution of quadratic neurons: [B, *space, C] -> [B, *space, features].

  Parameters: ``{r,g,b}/{kernel,bias}`` with kernels [*kernel_size, C, features].

  Attributes:
    features: number of output channels.
    kernel_size: one size per axis of space.
    strides: one stride per axis of space, or None for ones.
    padding: "SAME" or "VALID".
    compact: whether the branch g is left out.
    kernel_init: as in ``QuadraticDense``.
  """

  features: int
  kernel_size: tuple[int, ...] = (3, 3)
  strides: tuple[int, ...] | None = None
  padding: str = "SAME"
  compact: bool = False
  kernel_init: str = "relinear"

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    rank = len(self.kernel_size)
    if inputs.ndim != rank + 2:
      raise ValueError(
        f"inputs of a kernel with {rank} axes must be [B, *space, C] with {rank + 2} "
        f"axes, got {inputs.shape}."
      )
    shape = (*self.kernel_size, inputs.shape[-1], self.features)
    numbers = jax.lax.ConvDimensionNumbers(
      (0, rank + 1, *range(1, rank + 1)),
      (rank + 1, rank, *range(rank)),
      (0, rank + 1, *range(1, rank + 1)),
    )

    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
      strides = self.strides or (1,) * rank
      return jax.lax.conv_general_dilated(
        x, kernel, strides, self.padding, dimension_numbers=numbers
      )

    params = _params(self, shape, self.compact, self.kernel_init)
    return quadratic_apply(params, inputs, convolution)


class QuadraticMLP(nn.Module):
  """Quadratic layers with an activation, then a linear head."""

  features: tuple[int, ...]
  outputs: Heads
  activation: str
  compact: bool
  kernel_init: str
  dtype: str

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array | dict[str, jax.Array]:
    x = inputs.astype(self.dtype)
    for index, width in enumerate(self.features):
      layer = QuadraticDense(
        width, self.compact, self.kernel_init, name=f"hidden_{index}"
      )
      x = _common.ACTIVATIONS[self.activation](layer(x))
    return heads(x, self.outputs, self.dtype)


def quadratic_mlp(
  features: tuple[int, ...] = (64, 64),
  outputs: Heads = 10,
  activation: str = "relu",
  init: str = "relinear",
  compact: bool = False,
  dtype: str = "float32",
) -> Model:
  r"""Layers of quadratic neurons with an activation, then a linear head.

  .. math::
    h_{k+1} = \phi\left((h_k W_r + b_r) \circ (h_k W_g + b_g)
      + (h_k \circ h_k) W_b + c\right), \qquad z = h_K W + b

  Parameters: ``hidden_<k>/{r,g,b}/{kernel,bias}``, ``head/{kernel,bias}``; the update
  ``relinear`` knows the quadratic ones by these names.

  Args:
    features: neurons of the hidden layers; ``()`` is a linear model.
    outputs: size of the head, or (name, size) pairs, as in ``mlp``.
    activation: as in ``mlp``.
    init: "relinear", where every layer is a linear one at first, or "random", with
      Kaiming normal kernels and zero biases in every branch.
    compact: leave out the branch g: ``h W_r + b_r + (h * h) W_b + c``.
    dtype: dtype of what goes from layer to layer; neurons are computed in float32,
      parameters and outputs are float32.

  Returns:
    A ``Model``: inputs [..., features], outputs float32 [..., outputs].

  Raises:
    ValueError: an unknown name or a size below 1.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gradlab.models import quadratic_mlp
    >>> model = quadratic_mlp(features=(8,), outputs=3)
    >>> x = jnp.ones((4, 5))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> sorted(params["hidden_0"]), model.apply(params, state, x)[0].shape
    (['b', 'g', 'r'], (4, 3))
  """
  _common.check_sizes("features", tuple(features))
  check_heads(outputs)
  _common.check_choice("activation", activation, _common.ACTIVATIONS)
  _common.check_choice("init", init, INITS)
  _common.check_choice("dtype", dtype, _common.DTYPES)
  module = QuadraticMLP(tuple(features), outputs, activation, compact, init, dtype)
  return _common.from_linen(module)
