"""Leaves of a train state in the form in which they are stored, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.types import PyTree


def named(tree: PyTree) -> dict[str, Any]:
  """The leaves by their paths; raises ValueError for one that is not an array."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path)
    if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
      raise ValueError(f"{name} must be an array, got {type(leaf).__name__}.")
    leaves[name] = leaf
  return leaves


def describe(leaf: Any) -> str:
  """Dtype and shape, such as "bfloat16[3,4]" or "key<fry>[]"."""
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def stored(leaf: Any) -> Any:
  """The array that stands for the leaf in a file: a key's data, a copy of NumPy's."""
  if isinstance(leaf, np.ndarray):
    return leaf.copy()
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def stored_form(leaf: Any) -> Any:
  """What to restore for a target's leaf: ``stored`` without values, with a sharding."""
  if isinstance(leaf, np.ndarray):
    return leaf
  return jax.eval_shape(stored, leaf).update(sharding=_sharding(leaf))


def restored(leaf: Any, array: Any) -> Any:
  """The stored array, or None for one of no size, as the target's leaf wants it."""
  if isinstance(leaf, np.ndarray):
    return np.zeros_like(leaf) if array is None else np.asarray(array)
  if array is None:
    form = stored_form(leaf)
    array = jax.device_put(np.zeros(form.shape, form.dtype), form.sharding)
  if _is_key(leaf):
    return jax.random.wrap_key_data(array, impl=_key_impl(leaf))
  if leaf.weak_type and not leaf.shape:
    return jax.device_put(np.asarray(array).item(), _sharding(leaf))
  return array


def _is_key(leaf: Any) -> bool:
  return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _key_impl(leaf: Any) -> Any:
  found = []
  # Only an array or a tracer says what made it; an abstract target is neither.
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
  return found[0]


def _sharding(leaf: Any) -> jax.sharding.Sharding:
  return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
