"""Meshes, rules and the placement of states; what needs devices runs on eight."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from gradlab import sharding
from gradlab.types import ConfigError
from tests.devices import run_on_devices

MESH = AbstractMesh((4, 2), ("data", "model"))
MULTIDEVICE = Path(__file__).resolve().parents[1] / "multidevice"


def shapes(**named: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in named.items()
  }


@pytest.mark.parametrize(
  "file", sorted(path.name for path in MULTIDEVICE.glob("test_*.py"))
)
def test_on_eight_devices(file: str) -> None:
  output = run_on_devices(
    "-m", "pytest", "-p", "no:cacheprovider", f"tests/multidevice/{file}"
  )
  assert " passed" in output
  assert "skipped" not in output


def test_a_failing_process_shows_its_output() -> None:
  with pytest.raises(
    pytest.fail.Exception, match=r"3 devices exited with 1(.|\n)*cube"
  ):
    run_on_devices("-c", "raise SystemExit('no cube')", devices=3)


def test_run_on_devices_sets_the_device_count() -> None:
  code = "import jax; print(jax.default_backend(), jax.device_count())"
  assert run_on_devices("-c", code, devices=3).split() == ["cpu", "3"]


# One device makes every kind of mesh error that eight do.
def test_make_mesh_keeps_order_and_makes_auto_axes() -> None:
  mesh = sharding.make_mesh({"model": 1, "data": -1}, jax.devices()[:1])
  assert list(mesh.shape.items()) == [("model", 1), ("data", 1)]
  assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ({"data": 3}, r"needs 3 devices, but there are 1\."),
    ({"data": -1, "model": 2}, r"multiple of 2 devices, but there are 1\."),
    ({"data": -1, "model": -1}, r"2 sizes of -1; only one may be"),
    ({"data": 0}, r"positive size or -1"),
    ({}, r"at least one axis"),
  ],
)
def test_make_mesh_errors(shape: dict[str, int], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    sharding.make_mesh(shape, jax.devices()[:1])


def test_first_matching_rule_wins_on_the_joined_path() -> None:
  params = {
    "blocks": ({"query": shapes(kernel=(8, 6), bias=(6,))}, None),
    "head": shapes(kernel=(8, 6)),
  }
  rules = (
    (r"blocks/0/query/kernel$", (("data", "model"), None)),
    (r"kernel$", ["model", None]),
    (r".*", ()),
  )
  specs = sharding.param_specs(params, rules, MESH)
  assert specs["blocks"][0]["query"] == {"kernel": P(("data", "model")), "bias": P()}
  assert specs["blocks"][1] is None
  assert specs["head"]["kernel"] == P("model")


def test_no_rules_replicate_everything() -> None:
  params = shapes(kernel=(3, 5), bias=(5,))
  specs = sharding.param_specs(params, (), MESH)
  assert specs == {"kernel": P(), "bias": P()}


def test_fsdp_takes_the_largest_divisible_dimension() -> None:
  params = shapes(
    wide=(6, 512), tall=(512, 6), equal=(64, 64), small=(4, 8), odd=(1025,), none=(0, 4)
  )
  specs = sharding.param_specs(params, ((".*", "fsdp"),), MESH)
  assert specs == {
    "wide": P(None, "data"),
    "tall": P("data"),
    "equal": P("data"),
    "small": P(),
    "odd": P(),
    "none": P(),
  }


@pytest.mark.parametrize(
  ("rule", "message"),
  [
    (("bias", ()), r"no sharding rule covers parameter 'layer/kernel' .*\(8, 6\)"),
    (("kernel", ("expert",)), r"'layer/kernel'.*\(8, 6\).*axis 'expert', but.*'model'"),
    (("kernel", (None, None, "data")), r"3 entries.*'layer/kernel'.*\(8, 6\)"),
    (("kernel", (None, "data")), r"'layer/kernel'.*\(8, 6\).*'data'.*6.*multiple of 4"),
    (("kernel", (None, ("model", "data"))), r"'model\+data'.*6.*multiple of 8"),
    (("kernel", ("data", "data")), r"'layer/kernel'.*'data' twice"),
    (("kernel", "data"), r"'data'; allowed: 'fsdp' or a tuple"),
    (("kernel", (3,)), r"not a pair"),
    (("kernel", None), r"not a pair"),
    (("(", ()), r"not a pair"),
    ("kernel", r"not a pair"),
  ],
)
def test_rule_errors(rule: Any, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    sharding.param_specs({"layer": shapes(kernel=(8, 6))}, (rule,), MESH)


def test_fsdp_needs_a_data_axis() -> None:
  mesh = AbstractMesh((2,), ("model",))
  with pytest.raises(ConfigError, match="'data', but the mesh has 'model'"):
    sharding.param_specs(shapes(w=(64, 64)), ((".*", "fsdp"),), mesh)


PARAMS = {
  "dense": shapes(kernel=(128, 256), bias=(256,)),
  "pair": (jax.ShapeDtypeStruct((16, 8), jnp.bfloat16), None),
  "scale": jax.ShapeDtypeStruct((), jnp.float32),
}
SPECS = {
  "dense": {"kernel": P("data", "model"), "bias": P("model")},
  "pair": (P(None, "model"), None),
  "scale": P(),
}


def test_chained_adam_inherits() -> None:
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  state = jax.eval_shape(optimizer.init, PARAMS)
  specs = sharding.state_specs(state, PARAMS, SPECS)
  assert jax.tree.structure(specs) == jax.tree.structure(state)
  assert specs[1][0].mu == SPECS
  assert specs[1][0].nu == SPECS
  assert specs[1][0].count == P()
  assert specs[0] == optax.EmptyState()


def test_factored_statistics_replicate_and_full_ones_inherit() -> None:
  state = jax.eval_shape(optax.scale_by_factored_rms().init, PARAMS)
  specs = sharding.state_specs(state, PARAMS, SPECS)
  assert state.v_row["dense"]["kernel"].shape == (128,)
  assert specs.v_row["dense"]["kernel"] == P()
  assert specs.v_col["dense"]["kernel"] == P()
  # Too small to factor: a full second moment, next to placeholders of shape (1,).
  assert specs.v["pair"] == (P(None, "model"), None)
  assert specs.v_row["pair"] == (P(), None)
  assert specs.v["dense"]["bias"] == P("model")


class LowRank(NamedTuple):
  left: Any
  right: Any
  codes: Any
  history: Any


def test_low_rank_packed_and_stacked_states_keep_what_agrees() -> None:
  state = LowRank(
    left={"dense": shapes(kernel=(128, 4))},
    right={"dense": shapes(kernel=(4, 256))},
    codes={"dense": shapes(kernel=(128, 32), bias=(32,))},
    history={"dense": shapes(kernel=(3, 128, 256), bias=(2, 3, 256))},
  )
  specs = sharding.state_specs(state, PARAMS, SPECS)
  assert specs.left["dense"]["kernel"] == P("data")
  assert specs.right["dense"]["kernel"] == P(None, "model")
  assert specs.codes["dense"] == {"kernel": P("data"), "bias": P()}
  assert specs.history["dense"]["kernel"] == P(None, "data", "model")
  assert specs.history["dense"]["bias"] == P(None, None, "model")


def test_records_kept_per_parameter_inherit() -> None:
  record = LowRank(*(jax.ShapeDtypeStruct(s, jnp.int8) for s in _RECORD_SHAPES))
  specs = sharding.state_specs(({"dense": {"kernel": record}},), PARAMS, SPECS)
  assert specs[0]["dense"]["kernel"] == LowRank(
    P("data"), P(None, "model"), P("data", "model"), P()
  )


_RECORD_SHAPES = ((128, 4), (4, 256), (128, 256), (7,))


def test_longest_suffix_owns_the_leaf() -> None:
  params = {"w": shapes(w=(8, 4)), "v": {"w": shapes(w=(8, 4))}}
  placed = {"w": {"w": P("data")}, "v": {"w": {"w": P(None, "model")}}}
  state = jax.eval_shape(optax.scale_by_adam().init, params)
  assert sharding.state_specs(state, params, placed).mu == placed


def test_key_entries_are_compared_not_their_names() -> None:
  params = {"0": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
  state = (jax.ShapeDtypeStruct((8, 4), jnp.float32),)
  assert sharding.state_specs(state, params, {"0": P("data")}) == (P(),)


def test_positions_in_a_chain_are_not_parameters() -> None:
  params = (shapes(w=(8, 4))["w"], shapes(w=(4, 2))["w"])
  state = jax.eval_shape(optax.adam(1e-3).init, params)
  specs = sharding.state_specs(state, params, (P("data"), P(None, "model")))
  assert specs[0].nu == (P("data"), P(None, "model"))
  assert specs[0].count == P()


def test_a_whole_train_state_is_placed_at_once() -> None:
  state = {"params": PARAMS, "optimizer": jax.eval_shape(optax.trace(0.9).init, PARAMS)}
  specs = sharding.state_specs(state, PARAMS, SPECS)
  assert specs["params"] == SPECS
  assert specs["optimizer"].trace == SPECS


def test_a_bare_array_owns_by_shape() -> None:
  params = jax.ShapeDtypeStruct((8, 4), jnp.float32)
  optimizer = optax.chain(optax.adam(1e-3), optax.add_noise(0.1, 0.1, key=0))
  state = jax.eval_shape(optimizer.init, params)
  specs = sharding.state_specs(state, params, P("data", "model"))
  assert specs[0][0].mu == P("data", "model")
  assert specs[0][0].count == P()
  assert set(jax.tree.leaves(specs[1])) == {P()}


def test_odd_nodes_survive() -> None:
  params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32), "n": None, **shapes(z=(0,))}
  placed = {"w": P("data"), "n": None, "z": P()}
  masked = optax.masked(optax.trace(0.9), {"w": True, "n": None, "z": False})
  state = (
    jax.eval_shape(masked.init, params),
    jax.eval_shape(lambda: {"w": jax.random.split(jax.random.key(0), (8, 4))}),
    optax.EmptyState(),
    None,
  )
  specs = sharding.state_specs(state, params, placed)
  assert jax.tree.structure(specs) == jax.tree.structure(state)
  assert specs[0].inner_state.trace["w"] == P("data")
  assert specs[0].inner_state.trace["z"] == optax.MaskedNode()
  assert specs[1] == {"w": P()}


def test_batch_spec_divides_the_examples() -> None:
  assert sharding.batch_spec(MESH) == P("data")
  assert sharding.batch_spec(MESH, leading=1) == P(None, "data")
  assert sharding.batch_spec(AbstractMesh((2,), ("model",))) == P()


def test_replicate_counts_devices() -> None:
  with pytest.raises(ValueError, match=r"n must lie in \[1, \d+\] \(local devices\)"):
    sharding.replicate({"w": jnp.ones(3)}, jax.local_device_count() + 1)


def test_sync_is_the_identity_outside_of_gradients() -> None:
  tree = {"w": jnp.arange(3.0), "n": None, "i": jnp.int32(4), "b": jnp.bfloat16(2)}
  assert_same(sharding.sync(tree, "replica"), tree)
  assert_same(jax.jit(lambda t: sharding.sync(t, "replica"))(tree), tree)


def assert_same(left: Any, right: Any) -> None:
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype
    assert jnp.array_equal(a, b)
