"""Optimiser states of eight or four bits: any rule, with its moments kept as codes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.transforms._common import as_key, leaf_keys
from gradlab.transforms.updates import _quantise as quantise
from gradlab.transforms.updates._chain import Around
from gradlab.transforms.updates._chain import chain as chain
from gradlab.transforms.updates._maps import check_int
from gradlab.types import method

# Fields of states that hold averages or sums of squares: of optax and of this package.
SECOND_MOMENTS = ("nu", "nu_max", "n", "sum_of_squares", "e_g", "e_x")
BLOCK_SIZES = {8: 256, 4: 128}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("codes", "absmax"),
  meta_fields=("shape", "dtype", "bits", "block_size", "signed"),
)
@dataclasses.dataclass(frozen=True)
class QuantisedMoment:
  """An array of a state between two steps.

  Attributes:
    codes: uint8; of the array's shape, or packed by ``pack_int4`` at four bits.
    absmax: float32 [blocks], the largest magnitude of each block.
    shape, dtype: of the array (static).
    bits: 8 or 4 (static).
    block_size: consecutive entries of the flattened array per block (static).
    signed: whether the map has negative entries (static).
  """

  codes: jax.Array
  absmax: jax.Array
  shape: tuple[int, ...]
  dtype: Any
  bits: int
  block_size: int
  signed: bool

  def dequantise(self) -> jax.Array:
    """The array, up to the rounding to its map."""
    codes = self.codes
    if self.bits == 4:
      codes = quantise.unpack_int4(codes, self.shape)
    entries = moment_map(self.signed, self.bits)
    x = quantise.blockwise_dequantize(codes, self.absmax, entries, self.block_size)
    return x.astype(self.dtype)

  def quantise(self, x: jax.Array, key: jax.Array | None = None) -> "QuantisedMoment":
    """``x`` kept in the same way."""
    codes, absmax = quantise.blockwise_quantize(
      x, moment_map(self.signed, self.bits), self.block_size, key=key
    )
    codes = quantise.pack_int4(codes) if self.bits == 4 else codes
    return dataclasses.replace(self, codes=codes, absmax=absmax)


class QuantisedMomentsState(NamedTuple):
  """State of quantised moments.

  Attributes:
    key: typed key of the stochastic rounding; None without it.
    inner: the wrapped state, with a ``QuantisedMoment`` for each array that is kept
      quantised.
  """

  key: jax.Array | None
  inner: optax.OptState


@functools.cache
def moment_map(signed: bool, bits: int) -> np.ndarray:
  """The map of first moments (signed) or second ones (not), ascending.

  Signed: the dynamic map. Unsigned: the dynamic map at 8 bits and the linear one,
  1/16 to 1, at 4, in both cases without zero: a second moment that were rounded to
  zero would divide its first moment by eps.
  """
  if signed:
    return quantise.dynamic_map(True, bits)
  if bits == 8:
    return quantise.dynamic_map(False, bits)[1:]
  return (np.arange(1, 17) / 16).astype(np.float32)


def _is_moment(node: Any) -> bool:
  return isinstance(node, QuantisedMoment)


def _field(path: tuple[Any, ...], shape: Any, owners: dict[Any, Any]) -> str | None:
  """The field of a state that an array shaped like its parameter stands in."""
  for end in range(len(path), -1, -1):
    for start in range(end + 1):
      if owners.get(path[start:end]) == shape:
        key: Any = path[end:][-1:] or path[:start][-1:]
        return jax.tree_util.keystr(key, simple=True)
  return None


@method(
  family="updates",
  paper="Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021",
  arxiv="2110.02861",
)
def quantised_moments(
  bits: int = 8,
  inner: optax.GradientTransformation | None = None,
  *,
  block_size: int | None = None,
  min_size: int = 4096,
  second_moments: tuple[str, ...] = SECOND_MOMENTS,
  skip: tuple[str, ...] = ("acc_grads",),
  stochastic_rounding: bool = False,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the moments of ``inner`` in 8 or 4 bits between steps.

  .. math::
    u_t, m_t = \mathrm{inner}(g_t, \mathrm{deq}(c_{t-1}, a_{t-1})), \qquad
    a_t = \max_{block} |m_t|, \quad c_t = \arg\min_c |map_c - m_t / a_t|

  The update itself is made of moments that are not rounded. Quantised is every
  floating-point array of the state of ``inner`` that stands at a parameter's path with
  the parameter's shape: moments and previous gradients. A state that holds copies of
  parameters loses digits that it needs: name its field in ``skip``. Two 8-bit moments
  take 2.03 bytes per parameter instead of 8, two 4-bit ones 1.06. At 4 bits a previous
  gradient is rough, and so are the differences that adan and diffgrad take with it.
  This is what is kept between steps: within one, XLA may hold the float32 moments of
  several parameters at a time, on the CPU of all.

  Codes are shaped and placed like their parameter (at 4 bits with half of the last
  axis); blocks run along the flattened array, so a parameter that is divided along any
  axis but its first needs communication. A gradient that is not finite spoils the
  whole block of its entry.

  ``optax.chain`` can't show this transformation the state of the next one. Without
  ``inner`` it is for :func:`gradlab.transforms.updates.chain`, which puts it around all
  transformations that follow: ``chain(quantised_moments(8), scale_by_diffgrad())``.

  Args:
    bits: 8 or 4. First moments have the signed dynamic map; second ones the unsigned
      dynamic map (8) or the linear one (4), both without zero.
    inner: the transformation; None only in a chain as above.
    block_size: entries that share a scale, >= 1; None is 256 at 8 bits, 128 at 4.
    min_size: smaller arrays stay as they are, >= 0.
    second_moments: names of the fields whose arrays are never negative; a negative
      entry in one would become positive. All others have the signed map: a second
      moment in it loses one bit, no more.
    skip: names of the fields that are not quantised.
    stochastic_rounding: whether an entry becomes the upper or lower one of the map at
      random, so that its mean is right, rather than the nearest.
    key: of the stochastic rounding.

  Returns:
    A transformation with a :class:`QuantisedMomentsState`; the updates are those of
    ``inner``.

  Raises:
    ValueError: an argument out of its range, or ``init`` without ``inner``.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gradlab.transforms.updates import adamw, quantised_moments
    >>> params = jnp.ones((64, 64))
    >>> state = quantised_moments(8, adamw(1e-3)).init(params)
    >>> bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    >>> bytes_of(adamw(1e-3).init(params)), bytes_of(state)
    (32772, 8324)

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021; Li et al., `Memory Efficient Optimizers
    with 4-bit States <https://arxiv.org/abs/2309.01507>`_, 2023
  """
  if bits not in BLOCK_SIZES:
    raise ValueError(f"bits must be 8 or 4, got {bits!r}.")
  block = BLOCK_SIZES[bits] if block_size is None else block_size
  check_int("block_size", block, 1)
  check_int("min_size", min_size, 0)

  def around(
    inner: optax.GradientTransformation,
  ) -> optax.GradientTransformationExtraArgs:
    within = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> QuantisedMomentsState:
      owners = {
        tuple(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      }

      def leaf(path: Any, x: Any) -> Any:
        shape, dtype = jnp.shape(x), jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating) or np.prod(shape) < max(min_size, 1):
          return x
        field = _field(tuple(path), shape, owners)
        if field is None or field in skip:
          return x
        signed = field not in second_moments
        none = jnp.zeros(0)
        form = QuantisedMoment(none, none, shape, dtype, bits, block, signed)
        # Else XLA works out the codes of these zeros while it compiles, slowly.
        return form.quantise(jax.lax.optimization_barrier(jnp.asarray(x)))

      state = jax.tree_util.tree_map_with_path(leaf, within.init(params))
      return QuantisedMomentsState(as_key(key) if stochastic_rounding else None, state)

    def update(
      updates: optax.Updates,
      state: QuantisedMomentsState,
      params: optax.Params | None = None,
      **extra: Any,
    ) -> tuple[optax.Updates, QuantisedMomentsState]:
      wide = jax.tree.map(
        lambda x: x.dequantise() if _is_moment(x) else x,
        state.inner,
        is_leaf=_is_moment,
      )
      updates, wide = within.update(updates, wide, params, **extra)
      new_key, keys = None, jax.tree.map(lambda _: None, wide)
      if state.key is not None:
        new_key, now = jax.random.split(state.key)
        keys = leaf_keys(now, wide)
      kept = jax.tree.map(
        lambda old, x, own: old.quantise(x, own) if _is_moment(old) else x,
        state.inner,
        wide,
        keys,
        is_leaf=_is_moment,
      )
      return updates, QuantisedMomentsState(new_key, kept)

    return optax.GradientTransformationExtraArgs(init, update)

  return _unfinished(around) if inner is None else around(inner)


def _unfinished(around: Callable[..., Any]) -> Around:
  def init(params: optax.Params) -> QuantisedMomentsState:
    raise ValueError(
      "quantised_moments needs inner, or transformations behind it in "
      "gradlab.transforms.updates.chain (optax.chain can't hand them over)."
    )

  def update(*args: Any, **extra: Any) -> Any:
    return init(args)

  transform = Around(init, update)
  transform.around = around
  return transform
