"""The two forward passes and the keyed noise of zeroth-order methods."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradlab.transforms._common import check_range, leaf_keys
from gradlab.types import LossFn, Params, PyTree


def central_difference(
  loss_fn: LossFn, params: Params, key: jax.Array, eps: ArrayLike
) -> tuple[jax.Array, tuple[jax.Array, Any], jax.Array]:
  """``(g, (loss, aux) of the + pass, whether the estimate had to be skipped)``."""
  check_range("eps", eps, 0.0, open_low=True)
  check_params(params)
  keys = leaf_keys(key, params)

  def loss_at(sign: int) -> tuple[jax.Array, Any]:
    def shift(leaf: Any, leaf_key: jax.Array) -> Any:
      if not trainable(leaf):
        return leaf
      step = jnp.asarray(eps, wide(leaf)) * leaf_noise(leaf, leaf_key)
      moved = jnp.asarray(leaf, wide(leaf)) + sign * step
      return moved.astype(jnp.result_type(leaf))

    loss, aux = loss_fn(jax.tree.map(shift, params, keys))
    if jnp.ndim(loss):
      raise ValueError(f"loss_fn must return a scalar loss, got {jnp.shape(loss)}.")
    return jnp.asarray(loss), aux

  (plus, aux), (minus, _) = loss_at(1), loss_at(-1)
  dtype = wide(plus)
  difference = plus.astype(dtype) - minus.astype(dtype)
  g = difference / (2 * jnp.asarray(eps, dtype))
  # Opposite infinities and overflow leave g infinite, equal ones leave it NaN.
  finite = jnp.isfinite(plus) & jnp.isfinite(minus) & jnp.isfinite(g)
  return jnp.where(finite, g, jnp.zeros_like(g)), (plus, aux), ~finite


def along_noise(g: jax.Array, params: Params, key: jax.Array) -> PyTree:
  """The tree ``g * z`` in the dtypes of ``params``."""

  def scale(leaf: Any, leaf_key: jax.Array) -> jax.Array:
    noise = leaf_noise(leaf, leaf_key)
    return (g.astype(noise.dtype) * noise).astype(jnp.result_type(leaf))

  return jax.tree.map(scale, params, leaf_keys(key, params))


def leaf_noise(leaf: Any, key: jax.Array) -> jax.Array:
  """Standard normal noise of a leaf's shape, zeros for one that is not float."""
  if not trainable(leaf):
    return jnp.zeros_like(leaf)
  return jax.random.normal(key, jnp.shape(leaf), wide(leaf))


def with_aux(loss_fn: Callable[[Params], Any]) -> LossFn:
  """Gives a loss function that returns the bare loss an aux of None."""

  def paired(params: Params) -> tuple[jax.Array, Any]:
    value = loss_fn(params)
    return value if isinstance(value, tuple) else (value, None)

  return paired


def trainable(leaf: Any) -> bool:
  """Whether a leaf is floating point; all others pass through untouched."""
  return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def wide(leaf: Any) -> Any:
  """The dtype to compute in: float32, or float64 for a float64 leaf."""
  return jnp.float64 if jnp.result_type(leaf) == jnp.float64 else jnp.float32


def check_params(params: Params) -> None:
  """Raises ValueError for parameters that cannot be perturbed leaf by leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  if not any(trainable(leaf) for _, leaf in leaves):
    raise ValueError("mezo needs parameters with at least one floating-point leaf.")
  seen: dict[int, str] = {}
  for path, leaf in leaves:
    where = jax.tree_util.keystr(path)
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
      raise ValueError(f"mezo needs real parameters, but {where} is complex.")
    if not trainable(leaf) or not isinstance(leaf, jax.Array | np.ndarray):
      continue
    if id(leaf) in seen:
      raise ValueError(
        f"tied parameters must be a single leaf: {seen[id(leaf)]} and {where} are "
        "the same array."
      )
    seen[id(leaf)] = where
