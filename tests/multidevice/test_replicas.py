"""Replicated training under pmap, and what ``sync`` does to derivatives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from gradlab import sharding

Tree = Any
DEVICES = 8


def parameters() -> Tree:
  rng = np.random.default_rng(0)
  return {
    "full": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
    "none": None,
    "half": (jnp.asarray(rng.normal(size=(2,)), jnp.bfloat16),),
  }


INPUTS = np.random.default_rng(1).normal(size=(DEVICES, 4, 3)).astype(np.float32)


def local_loss(params: Tree, inputs: jax.Array) -> jax.Array:
  outputs = jnp.sin(inputs @ params["full"])
  half = params["half"][0].astype(jnp.float32)
  return jnp.mean(jnp.square(outputs * half[None]))


def whole_loss(params: Tree) -> jax.Array:
  return local_loss(params, jnp.asarray(INPUTS.reshape(-1, 3)))


def synced_loss(params: Tree, inputs: jax.Array) -> jax.Array:
  return lax.pmean(local_loss(sharding.sync(params, "r"), inputs), "r")


def along(params: Tree) -> Tree:
  return jax.tree.map(
    lambda leaf: jnp.cos(leaf.astype(jnp.float32)).astype(leaf.dtype), params
  )


def stacked(params: Tree) -> Tree:
  return jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf / 2, leaf * 2]), params)


def gradient(loss: Callable[..., jax.Array]) -> Callable[[Tree], Tree]:
  return jax.value_and_grad(loss)


def forward(loss: Callable[..., jax.Array]) -> Callable[[Tree], Tree]:
  return lambda params: jax.jvp(loss, (params,), (along(params),))


def swept(loss: Callable[..., jax.Array]) -> Callable[[Tree], Tree]:
  return lambda params: jax.vmap(jax.value_and_grad(loss))(stacked(params))


def swept_forward(loss: Callable[..., jax.Array]) -> Callable[[Tree], Tree]:
  def directions(params: Tree) -> Tree:
    many = stacked(along(params))
    return jax.vmap(lambda v: jax.jvp(loss, (params,), (v,)))(many)

  return directions


def curvature(loss: Callable[..., jax.Array]) -> Callable[[Tree], Tree]:
  return lambda params: jax.jvp(jax.grad(loss), (params,), (along(params),))


def reverse_curvature(loss: Callable[..., jax.Array]) -> Callable[[Tree], Tree]:
  def product(params: Tree) -> jax.Array:
    pairs = zip(
      jax.tree.leaves(jax.grad(loss)(params)),
      jax.tree.leaves(along(params)),
      strict=True,
    )
    return sum(
      (jnp.vdot(a.astype(jnp.float32), lax.stop_gradient(b.astype(jnp.float32))))
      for a, b in pairs
    )

  return jax.grad(product)


def checkpointed(loss: Callable[..., jax.Array]) -> Callable[[Tree], Tree]:
  return jax.value_and_grad(jax.checkpoint(loss))


@pytest.mark.parametrize(
  "derivative",
  [
    gradient,
    forward,
    swept,
    swept_forward,
    curvature,
    reverse_curvature,
    checkpointed,
  ],
)
def test_derivatives_are_those_of_the_whole_batch(derivative: Any) -> None:
  params = parameters()
  actual = jax.pmap(
    lambda p, inputs: derivative(lambda q: synced_loss(q, inputs))(p),
    axis_name="r",
    in_axes=(None, 0),
  )(params, jnp.asarray(INPUTS))
  expected = derivative(whole_loss)(params)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for many, one in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert many.dtype == one.dtype
    # bfloat16 keeps 8 bits, and its gradients are averaged in bfloat16.
    rtol, atol = (2e-2, 1e-2) if one.dtype == jnp.bfloat16 else (1e-5, 1e-6)
    for replica in np.asarray(many.astype(jnp.float32)):
      np.testing.assert_allclose(replica, one.astype(jnp.float32), rtol=rtol, atol=atol)


def test_without_sync_the_gradient_is_only_local() -> None:
  params = parameters()
  grads = jax.pmap(
    jax.grad(lambda p, inputs: lax.pmean(local_loss(p, inputs), "r")),
    axis_name="r",
    in_axes=(None, 0),
  )(params, jnp.asarray(INPUTS))
  assert jnp.max(jnp.std(grads["full"], axis=0)) > 0.1


def test_sync_keeps_values_and_passes_integers() -> None:
  tree = {"i": jnp.arange(3), "b": jnp.bfloat16(1.1), "n": None, "z": jnp.ones((0, 2))}
  actual = jax.pmap(
    lambda _: sharding.sync(tree, "r"), axis_name="r", axis_size=DEVICES
  )(jnp.arange(DEVICES))
  for many, one in zip(jax.tree.leaves(actual), jax.tree.leaves(tree), strict=True):
    assert many.dtype == one.dtype
    np.testing.assert_array_equal(many[3], one)


def test_pmap_training_is_the_run_of_one_device() -> None:
  optimizer = optax.adamw(1e-2)

  def advance(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
    # optax itself promotes integer counters.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def step(params: Tree, state: Tree, inputs: jax.Array) -> tuple[Tree, Tree]:
    return advance(params, state, jax.grad(synced_loss)(params, inputs))

  params = {**parameters(), "half": (jnp.asarray([0.5, -1.5]),)}
  one = params, optimizer.init(params)
  many = sharding.replicate(one, DEVICES)
  parallel = jax.pmap(step, axis_name="r", donate_argnums=(0, 1))
  for _ in range(5):
    many = parallel(*many, jnp.asarray(INPUTS))
    one = jax.jit(lambda p, s: advance(p, s, jax.grad(whole_loss)(p)))(*one)
  for leaf in jax.tree.leaves(many):
    np.testing.assert_array_equal(leaf, np.stack([np.asarray(leaf)[0]] * DEVICES))
  jax.tree.map(
    # Means over devices are taken in another order than over the batch.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    sharding.unreplicate(many),
    one,
  )


def test_replicate_puts_one_copy_on_each_device_and_back() -> None:
  tree = {
    "k": jax.random.key(7),
    "h": jnp.bfloat16(2),
    "n": None,
    "z": jnp.ones((0, 2)),
  }
  many = sharding.replicate(tree, DEVICES)
  assert jax.random.key_data(many["k"]).shape == (DEVICES, 2)
  assert many["h"].dtype == jnp.bfloat16
  assert many["z"].shape == (DEVICES, 0, 2)
  shards = many["h"].addressable_shards
  assert [shard.device for shard in shards] == jax.local_devices()
  assert all(shard.data.shape == (1,) for shard in shards)
  back = sharding.unreplicate(many)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  assert jnp.array_equal(jax.random.key_data(back["k"]), jax.random.key_data(tree["k"]))
  assert back["h"] == tree["h"]
  draws = jax.pmap(lambda key: jax.random.normal(key, (2,)))(many["k"])
  np.testing.assert_array_equal(draws[5], jax.random.normal(tree["k"], (2,)))
