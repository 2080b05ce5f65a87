"""Data-parallel, FSDP and tensor placement train like one device, and stay placed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from gradlab import sharding
from gradlab.types import ConfigError

Tree = Any
STEPS = 5


class Placement(NamedTuple):
  mesh: Mapping[str, int]
  rules: tuple[sharding.Rule, ...]
  specs: Mapping[str, Mapping[str, P]]


REPLICATED = {
  "hidden": {"kernel": P(), "bias": P()},
  "out": {"kernel": P(), "bias": P()},
}
PLACEMENTS = {
  "data": Placement({"data": -1}, (), REPLICATED),
  "fsdp": Placement(
    {"data": 8},
    ((".*", "fsdp"),),
    {
      "hidden": {"kernel": P(None, "data"), "bias": P()},
      "out": {"kernel": P("data"), "bias": P()},
    },
  ),
  "tensor": Placement(
    {"data": -1, "model": 2},
    (
      ("hidden/kernel$", (None, "model")),
      ("hidden/bias$", ("model",)),
      ("out/kernel$", ("model", None)),
      (".*", ()),
    ),
    {
      "hidden": {"kernel": P(None, "model"), "bias": P("model")},
      "out": {"kernel": P("model"), "bias": P()},
    },
  ),
}


def parameters() -> Tree:
  rng = np.random.default_rng(0)

  def draw(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

  return {
    "hidden": {"kernel": draw(16, 128), "bias": draw(128)},
    "out": {"kernel": draw(128, 8), "bias": draw(8)},
  }


def batch(step: int) -> Tree:
  rng = np.random.default_rng(1 + step)
  return {
    "inputs": jnp.asarray(rng.normal(size=(32, 16)), jnp.float32),
    "label": jnp.asarray(rng.normal(size=(32, 8)), jnp.float32),
  }


def loss(params: Tree, data: Tree) -> jax.Array:
  x = data["inputs"]
  for name in ("hidden", "out"):
    x = jnp.tanh(x) @ params[name]["kernel"] + params[name]["bias"][None]
  return jnp.mean(jnp.square(x - data["label"]))


OPTIMIZER = optax.adamw(1e-2, weight_decay=1e-2)


def step(state: Tree, data: Tree) -> tuple[Tree, jax.Array]:
  params, optimizer_state = state
  value, grads = jax.value_and_grad(loss)(params, data)
  # optax itself promotes integer counters.
  with jax.numpy_dtype_promotion("standard"):
    updates, optimizer_state = OPTIMIZER.update(grads, optimizer_state, params)
  return (optax.apply_updates(params, updates), optimizer_state), value


def fresh() -> Tree:
  return parameters(), OPTIMIZER.init(parameters())


def train(state: Tree, compiled: Any, place: Any) -> tuple[Tree, list[float]]:
  losses = []
  for i in range(STEPS):
    state, value = compiled(state, place(batch(i)))
    losses.append(value)
  return state, losses


def placed(placement: Placement) -> tuple[Tree, Tree, Any]:
  mesh = sharding.make_mesh(placement.mesh)
  params, state = jax.eval_shape(fresh)
  specs = sharding.param_specs(params, placement.rules, mesh)
  named = sharding.named(mesh, (specs, sharding.state_specs(state, params, specs)))
  return specs, named, mesh


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placed_run_is_the_run_of_one_device(name: str) -> None:
  specs, named, mesh = placed(PLACEMENTS[name])
  assert specs == PLACEMENTS[name].specs
  data = jax.NamedSharding(mesh, sharding.batch_spec(mesh))
  compiled = jax.jit(step, donate_argnums=0, out_shardings=(named, None))
  state = sharding.shard(fresh(), named)
  state, losses = train(state, compiled, lambda b: sharding.shard(b, data))
  expected, expected_losses = train(fresh(), jax.jit(step), lambda b: b)
  # Sums over devices are taken in another order; Adam divides by their root.
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, expected
  )
  assert jax.tree.map(lambda leaf: leaf.sharding.spec, state) == jax.tree.map(
    lambda sharding: sharding.spec, named
  )


@pytest.mark.parametrize(
  ("name", "hidden", "out"),
  [
    ("data", (16, 128), (128, 8)),
    ("fsdp", (16, 16), (16, 8)),
    ("tensor", (16, 64), (64, 8)),
  ],
)
def test_each_device_holds_its_part_of_parameters_and_moments(
  name: str, hidden: tuple[int, int], out: tuple[int, int]
) -> None:
  _, named, mesh = placed(PLACEMENTS[name])
  # The compiler alone, told only where the inputs are, leaves the state there.
  data = jax.NamedSharding(mesh, sharding.batch_spec(mesh))
  state = sharding.shard(fresh(), named)
  (params, adam), _ = train(state, jax.jit(step), lambda b: sharding.shard(b, data))
  for tree in (params, adam[0].mu, adam[0].nu):
    for layer, part in (("hidden", hidden), ("out", out)):
      shards = tree[layer]["kernel"].addressable_shards
      assert [shard.data.shape for shard in shards] == [part] * 8


def test_make_mesh_on_eight_devices() -> None:
  assert dict(sharding.make_mesh({"data": -1, "model": 2}).shape) == {
    "data": 4,
    "model": 2,
  }
  with pytest.raises(ConfigError, match=r"multiple of 3 devices.* are 8"):
    sharding.make_mesh({"data": -1, "model": 3})
  with pytest.raises(ConfigError, match=r"needs 4 devices.* are 8"):
    sharding.make_mesh({"data": 2, "model": 2})


def test_typed_keys_are_placed() -> None:
  mesh = sharding.make_mesh({"data": 8})
  state = {"key": jax.random.key(3), "n": None}
  specs = sharding.state_specs(state, {}, {})
  moved = sharding.shard(state, sharding.named(mesh, specs))
  assert moved["key"].sharding.device_set == set(jax.devices())
  assert jnp.array_equal(
    jax.random.normal(moved["key"], (4,)), jax.random.normal(state["key"], (4,))
  )
