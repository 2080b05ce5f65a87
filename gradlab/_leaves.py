"""Leaves of a train state in the form in which they are stored, and back.

Small leaves go into one file, which costs a millisecond; the large ones, and those
that no process has as a whole, are left to Orbax, which costs tens of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from gradlab.types import PyTree

# Bytes from which on a leaf is large.
_LARGE = 1 << 20


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
  """The array that stands for the leaf in a file: a key's data."""
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def split(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """The small arrays, which every process has as a whole, and the others."""
  small = {name: array for name, array in arrays.items() if _is_small(array)}
  return small, {name: array for name, array in arrays.items() if name not in small}


def pack(arrays: Mapping[str, Any]) -> bytes:
  """Copies arrays to the host, into the bytes of one file."""
  for array in arrays.values():
    if isinstance(array, jax.Array):
      array.copy_to_host_async()
  packed: bytes = serialization.msgpack_serialize(
    {name: np.asarray(array) for name, array in arrays.items()}
  )
  return packed


def unpack(packed: bytes) -> dict[str, np.ndarray]:
  """The arrays of ``pack``, which cannot be written to."""
  arrays: dict[str, np.ndarray] = serialization.msgpack_restore(packed)
  return arrays


def stored_form(leaf: Any) -> Any:
  """What to restore for a target's leaf: ``stored`` without values, with a sharding."""
  if isinstance(leaf, np.ndarray):
    return leaf
  return jax.eval_shape(stored, leaf).update(sharding=_sharding(leaf))


def restored(leaf: Any, array: Any) -> Any:
  """The stored array, or None for one of no size, as the target's leaf wants it."""
  if isinstance(leaf, np.ndarray):
    return np.zeros_like(leaf) if array is None else np.array(array)
  if not isinstance(array, jax.Array):
    form = stored_form(leaf)
    array = _placed(np.zeros(form.shape, form.dtype) if array is None else array, form)
  if _is_key(leaf):
    return jax.random.wrap_key_data(array, impl=_key_impl(leaf))
  if leaf.weak_type and not leaf.shape:
    return jax.device_put(np.asarray(array).item(), _sharding(leaf))
  return array


def _placed(array: np.ndarray, form: jax.ShapeDtypeStruct) -> jax.Array:
  if form.sharding.is_fully_addressable:
    placed: jax.Array = jax.device_put(array, form.sharding, may_alias=False)
    return placed
  return jax.make_array_from_callback(form.shape, form.sharding, lambda i: array[i])


def _is_small(array: Any) -> bool:
  whole = isinstance(array, np.ndarray) or (
    array.is_fully_addressable or array.is_fully_replicated
  )
  return bool(whole and array.nbytes < _LARGE)


def _is_key(leaf: Any) -> bool:
  return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _key_impl(leaf: Any) -> Any:
  found = []
  # Only an array or a tracer says what made it; an abstract target is neither.
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
  return found[0]


def _sharding(leaf: Any) -> jax.sharding.Sharding:
  return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
