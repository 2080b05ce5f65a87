r"""Replicas: parameters that ``jax.pmap`` sees once on every device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradlab.types import Params, PyTree

REPLICA_AXIS = "replica"
PROCESS_AXIS = "process"


def replicate(tree: PyTree, n: int) -> PyTree:
  """A copy of every leaf on each of the first ``n`` local devices, for ``jax.pmap``.

  Args:
    tree: arrays, typed keys included; ones that all processes share are taken from
      this process's copy.
    n: number of devices, at most ``jax.local_device_count()``.

  Returns:
    The tree with a leading axis of size ``n``, one slice per device.

  Raises:
    ValueError: ``n`` is below 1 or above the number of local devices.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.sharding import replicate
    >>> replicate({"w": jnp.ones((3,))}, 1)["w"].shape
    (1, 3)
  """
  devices = jax.local_devices()
  if not 1 <= n <= len(devices):
    raise ValueError(f"n must lie in [1, {len(devices)}] (local devices), got {n}.")
  mesh = Mesh(np.asarray(devices[:n]), (REPLICA_AXIS,))
  placement = NamedSharding(mesh, P(REPLICA_AXIS))

  def copies(leaf: jax.typing.ArrayLike) -> jax.Array:
    # One transfer per device: n copies need never fit on one of them.
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      leaf = leaf.addressable_data(0)
    one = jnp.asarray(leaf)[None]
    return jax.make_array_from_single_device_arrays(
      (n, *one.shape[1:]), placement, [jax.device_put(one, d) for d in devices[:n]]
    )

  return jax.tree.map(copies, tree)


def unreplicate(tree: PyTree) -> PyTree:
  """The first replica of every leaf: the inverse of :func:`replicate`."""
  return jax.tree.map(lambda leaf: leaf[0], tree)


def shared_sharding() -> NamedSharding:
  """Replicated over the first device of each process: what all processes hold."""
  processes = range(jax.process_count())
  devices = [jax.local_devices(process_index=i)[0] for i in processes]
  return NamedSharding(Mesh(np.asarray(devices), (PROCESS_AXIS,)), P())


def share(tree: PyTree) -> PyTree:
  """``unreplicate`` to :func:`shared_sharding`: arrays that a checkpoint can hold.

  Args:
    tree: of :func:`replicate` or ``jax.pmap``; every replica of all processes equal.

  Returns:
    The tree without its leading axis; nothing is communicated.
  """
  shared = shared_sharding()

  def one(leaf: jax.Array) -> jax.Array:
    first = leaf.addressable_data(0)[0]
    return jax.make_array_from_single_device_arrays(first.shape, shared, [first])

  return jax.tree.map(one, tree)


def sync(params: Params, axis_name: str) -> Params:
  r"""The parameters unchanged; their gradient becomes the mean over the replicas.

  .. math::
    \mathrm{sync}(\theta) = \theta, \qquad
    \mathrm{sync}'(\theta)^\top \bar g = \frac{1}{n} \sum_{i=1}^{n} \bar g_i

  Inside ``jax.pmap``, ``lax.pmean(loss(sync(params, axis), batch), axis)`` is the
  loss of the whole batch, and so are its gradient, its forward-mode derivative (which
  costs no communication of parameters) and its Hessian products: an estimator needs
  to know nothing of the replicas.

  Args:
    params: replicated parameters; any tree and dtypes.
    axis_name: the mapped axis.

  Returns:
    ``params``.
  """
  return jax.tree.map(lambda leaf: _sync_p.bind(leaf, axis_name=axis_name), params)


# ``custom_derivatives.linear_call`` would say the same, but cannot be vmapped;
# ``custom_vjp`` cannot be differentiated forward.
_sync_p = Primitive("gradlab_sync")
_sync_p.def_impl(lambda leaf, *, axis_name: leaf)
_sync_p.def_abstract_eval(lambda leaf, *, axis_name: leaf)
ad.deflinear2(_sync_p, lambda ct, _, *, axis_name: [lax.pmean(ct, axis_name)])
batching.defvectorized(_sync_p)
mlir.register_lowering(_sync_p, lambda ctx, leaf, *, axis_name: [leaf])
