"""Checkpoints come back bit for bit, whatever was damaged, killed or resharded."""

import os
import random
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging

from gradlab import _leaves, _manifest
from gradlab.checkpoint import Checkpoints
from gradlab.types import ConfigError

ROOT = Path(__file__).parents[2]


class State(NamedTuple):
  step: jax.Array
  params: Any
  opt_state: Any
  key: jax.Array
  extra: Any


def make_state(seed: int = 0) -> State:
  key = jax.random.key(seed)
  params = {
    "linear/w": jax.random.normal(key, (4, 3)),
    "half": jax.random.normal(key, (5,)).astype(jnp.bfloat16),
    "scalar": jnp.float32(-0.0),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    "nested": ({"0": jnp.arange(3)}, [jnp.array([True, False])]),
  }
  trained = {name: not isinstance(value, tuple) for name, value in params.items()}
  update = optax.chain(
    optax.clip_by_global_norm(1.0), optax.masked(optax.adam(1e-3), trained)
  )
  return State(
    step=jnp.int32(seed),
    params=params,
    opt_state=update.init(params),
    key=jax.random.fold_in(key, 7),
    extra={
      "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
      "no keys": jax.random.split(key, 2)[:0],
      "odd": jnp.array([jnp.nan, -jnp.inf, 1e-45], jnp.float32),
      "int4": jnp.array([-8, 7], jnp.int4),
      "float8": jnp.array([0.5, -448.0], jnp.float8_e4m3fn),
      "complex": jnp.array([1 + 2j], jnp.complex64),
      "weak": jnp.asarray(0.1),
      "host": np.arange(3, dtype=np.float64),
    },
  )


def bits(tree: Any) -> Any:
  def leaf_bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return (
        str(leaf.dtype),
        leaf.shape,
        np.asarray(jax.random.key_data(leaf)).tobytes(),
      )
    weak = bool(getattr(leaf, "weak_type", False))
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes(), weak

  return jax.tree.map(leaf_bits, tree)


def abstract(tree: Any) -> Any:
  return jax.tree.map(
    lambda x: x if isinstance(x, np.ndarray) else jax.eval_shape(lambda: x), tree
  )


def small(step: int) -> dict[str, jax.Array]:
  return {"w": jnp.arange(8, dtype=jnp.float32) + step, "step": jnp.int32(step)}


@pytest.fixture
def warnings_logged(monkeypatch):
  lines: list[str] = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
  return lines


@pytest.fixture(params=[_leaves._LARGE, 0], ids=["one file", "orbax"])
def large(request, monkeypatch):
  """Bytes from which on a leaf is left to Orbax: none of a test's leaves, or all."""
  monkeypatch.setattr(_leaves, "_LARGE", request.param)
  return request.param


@pytest.mark.parametrize("as_target", [abstract, lambda tree: tree])
def test_whole_state_returns_bit_for_bit(tmp_path, as_target, large):
  state = make_state()
  with Checkpoints(tmp_path / "deep" / "checkpoints") as checkpoints:
    assert checkpoints.restore(state) is None
    checkpoints.save(3, state)
    step, restored = checkpoints.restore(as_target(state))
  assert step == 3
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert bits(restored) == bits(state)
  drawn = jax.random.normal(restored.key), jax.random.normal(state.key)
  assert drawn[0] == drawn[1]


def test_donating_right_after_save_does_not_reach_the_checkpoint(tmp_path):
  # Big enough (8 x 4 MB) that Orbax is still writing while the step overwrites.
  def make():
    return {
      str(i): jax.random.normal(jax.random.key(i), (1024, 1024)) for i in range(8)
    }

  def buffers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in tree.values()]

  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: 0 * x - 1, s), donate_argnums=0)
  state = make()
  before = buffers(state)
  # Without a save in progress the step does write over its donated input.
  assert buffers(overwrite(state)) == before
  state = make()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    for _ in range(3):
      state = overwrite(state)
    jax.block_until_ready(state)
    _, restored = checkpoints.restore(abstract(state))
  for name, value in make().items():
    np.testing.assert_array_equal(restored[name], value)


def test_host_arrays_may_change_right_after_save(tmp_path):
  host = {"small": np.zeros(100), "large": np.zeros(1 << 20)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, host)
    for value in host.values():
      value[:] = 1
    _, restored = checkpoints.restore(host)
  for value in restored.values():
    assert not value.any()
    # a state that was restored is one like any other
    value += 1


def test_restored_leaves_can_be_donated(tmp_path, large):
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, small(1))
    _, state = checkpoints.restore(small(0))
    for _ in range(2):
      state = step(state)
    checkpoints.save(2, state)
    for number, wanted in ((1, small(1)), (2, step(step(small(1))))):
      _, restored = checkpoints.restore(small(0), step=number)
      assert bits(restored) == bits(wanted)


def test_save_returns_before_the_checkpoint_is_complete(tmp_path, monkeypatch):
  go_on, write = threading.Event(), _manifest.write

  def held(folder, leaves):
    assert go_on.wait(60)
    write(folder, leaves)

  monkeypatch.setattr(_manifest, "write", held)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, small(1))
    assert checkpoints.steps() == []
    go_on.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_failed_save_is_raised_by_the_next_call_and_leaves_the_one_before(
  tmp_path, monkeypatch
):
  def full(folder, leaves):
    raise OSError("no space left")

  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, small(1))
    checkpoints.wait()
    with monkeypatch.context() as patch:
      patch.setattr(_manifest, "write", full)
      checkpoints.save(2, small(2))
      with pytest.raises(OSError, match="no space left"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    checkpoints.save(3, small(3))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
    assert not (tmp_path / "2").exists()


def test_keeps_the_newest(tmp_path):
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    for step in (1, 2, 10, 9):
      checkpoints.save(step, small(step))
    checkpoints.wait()
    # 9 was saved last: 10 lies on a time line that was left and counts for nothing.
    assert checkpoints.steps() == [2, 9, 10]
    checkpoints.delete_after(9)
    assert checkpoints.steps() == [2, 9]
    step, restored = checkpoints.restore(small(0), step=2)
    assert (step, bits(restored)) == (2, bits(small(2)))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "9"]


def test_same_step_is_replaced_and_the_old_one_stays_until_then(tmp_path, monkeypatch):
  def full(folder, leaves):
    raise OSError("no space left")

  with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
    checkpoints.save(5, small(5))
    checkpoints.wait()
    with monkeypatch.context() as patch:
      patch.setattr(_manifest, "write", full)
      checkpoints.save(5, small(6))
      with pytest.raises(OSError, match="no space left"):
        checkpoints.wait()
    step, restored = checkpoints.restore(small(0))
    assert (step, bits(restored)) == (5, bits(small(5)))
    checkpoints.save(5, small(7))
    step, restored = checkpoints.restore(small(0))
    assert (step, bits(restored)) == (5, bits(small(7)))
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


def data_files(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def two_steps(tmp_path, large):
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, small(step))
  return tmp_path


def truncate(path: Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damage_to_any_file_is_reported_and_passed_over(
  two_steps, warnings_logged, damage
):
  with Checkpoints(two_steps) as checkpoints:
    for path in data_files(two_steps / "2"):
      whole = path.read_bytes()
      if damage is truncate and path.name == "manifest.json":
        path.write_bytes(whole[: len(whole) // 2])
      elif whole:
        damage(path)
      warnings_logged.clear()
      step, restored = checkpoints.restore(small(0))
      assert (step, bits(restored)) == (1, bits(small(1))), path
      assert len(warnings_logged) == 1
      assert str(two_steps / "2") in warnings_logged[0]
      path.write_bytes(whole)
    step, restored = checkpoints.restore(small(0))
    assert (step, bits(restored)) == (2, bits(small(2)))


def test_only_damaged_checkpoints_are_an_error(tmp_path, warnings_logged):
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, small(step))
    checkpoints.wait()
    flip(tmp_path / "2" / "small.msgpack")
    with pytest.raises(ConfigError, match=r"^every checkpoint of step 2 in .*damaged"):
      checkpoints.restore(small(0), step=2)
    (tmp_path / "1" / "small.msgpack").unlink()
    with pytest.raises(ConfigError, match=r"^every checkpoint in .* is damaged"):
      checkpoints.restore(small(0))
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7, only \[1, 2\]"):
      checkpoints.restore(small(0), step=7)
  assert len(warnings_logged) == 3


def test_unfinished_saves_are_passed_over_and_cleaned_up(tmp_path, warnings_logged):
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, small(step))
    checkpoints.wait()
    (tmp_path / "2" / "manifest.json").unlink()
    (tmp_path / "3" / "large.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(small(0))[0] == 1
    assert len(warnings_logged) == 2
    checkpoints.save(3, small(3))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3", "mine"]


def test_another_state_is_one_clear_sentence(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, small(1))
    for target, said in (
      (
        {**small(0), "w": jnp.zeros(9)},
        r"\['w'\], float32\[8\] there and float32\[9\]",
      ),
      ({**small(0), "v": jnp.zeros(1)}, r"\['v'\], absent there and float32\[1\] here"),
      ({"w": jnp.zeros(8)}, r"1 leaves differ.*int32\[\] there and absent here"),
      ({**small(0), "step": jax.random.key(0)}, r"int32\[\] there and key<fry>\[\]"),
    ):
      with pytest.raises(ConfigError, match=said):
        checkpoints.restore(target)


def test_bad_arguments(tmp_path):
  with pytest.raises(ValueError, match="max_to_keep must be at least 1, got 0"):
    Checkpoints(tmp_path, max_to_keep=0)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(ValueError, match=r"\['rate'\] must be an array, got float"),
  ):
    checkpoints.save(1, {"rate": 0.1})
  assert list(tmp_path.iterdir()) == []


def child(code: str, *arguments: str) -> list[str]:
  return [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]


def environment(devices: int = 1) -> dict[str, str]:
  flags = f"--xla_force_host_platform_device_count={devices}"
  return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


RESHARD = """
  import sys
  import jax, jax.numpy as jnp, numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from gradlab import _leaves
  from gradlab.checkpoint import Checkpoints

  _leaves._LARGE = int(sys.argv[2])

  def mesh(*shape):
    count = int(np.prod(shape))
    return jax.make_mesh(
      shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2,
      devices=jax.devices()[:count],
    )

  specs = {"w": P("data", "model"), "rep": P(), "keys": P("data"), "empty": P("model")}
  def place(mesh, swap=False):
    specs_ = {**specs, "w": P("model", "data")} if swap else specs
    return {name: NamedSharding(mesh, spec) for name, spec in specs_.items()}

  values = {
    "w": np.arange(64, dtype=np.float32).reshape(8, 8),
    "rep": np.arange(6, dtype=jnp.bfloat16),
    "keys": jax.random.split(jax.random.key(0), 8),
    "empty": np.zeros((0, 4), np.float32),
  }
  state = jax.device_put(values, place(mesh(4, 2)))
  overwrite = jax.jit(
    lambda s: {**s, "w": 0 * s["w"], "rep": 0 * s["rep"]}, donate_argnums=0
  )
  with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, state)
    jax.block_until_ready(overwrite(state))
    for shardings in (
      place(mesh(4, 2)), place(mesh(2, 4), swap=True), place(mesh(1, 2), swap=True),
    ):
      target = {
        n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[n])
        for n, v in values.items()
      }
      _, restored = checkpoints.restore(target)
      for name, value in values.items():
        got = restored[name]
        assert got.sharding == shardings[name], (name, got.sharding)
        assert got.dtype == value.dtype
        if name == "keys":
          got, value = jax.random.key_data(got), jax.random.key_data(value)
        assert np.asarray(got).tobytes() == np.asarray(value).tobytes(), name
"""


def test_restores_onto_other_meshes_and_another_number_of_devices(tmp_path, large):
  subprocess.run(
    child(RESHARD, str(tmp_path), str(large)),
    env=environment(8),
    cwd=ROOT,
    check=True,
    timeout=120,
  )
  target = {
    "w": jax.ShapeDtypeStruct((8, 8), jnp.float32),
    "rep": jax.ShapeDtypeStruct((6,), jnp.bfloat16),
    "keys": jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8)),
    "empty": jax.ShapeDtypeStruct((0, 4), jnp.float32),
  }
  with Checkpoints(tmp_path) as checkpoints:
    _, restored = checkpoints.restore(target)
  assert all(len(leaf.devices()) == 1 for leaf in restored.values())
  np.testing.assert_array_equal(restored["w"], np.arange(64.0).reshape(8, 8))
  np.testing.assert_array_equal(
    jax.random.key_data(restored["keys"]),
    jax.random.key_data(jax.random.split(jax.random.key(0), 8)),
  )


LOOP = """
  import sys
  import jax, jax.numpy as jnp, numpy as np
  from gradlab.checkpoint import Checkpoints

  step = jax.jit(
    lambda s: {"w": s["w"] + 1, "step": s["step"] + 1,
               "key": jax.random.fold_in(s["key"], s["step"])},
    donate_argnums=0,
  )
  checkpoints = Checkpoints(sys.argv[1], max_to_keep=1)
  state = {"w": jnp.arange(8.0), "step": jnp.int32(0), "key": jax.random.key(0)}
  found = checkpoints.restore(state)
  print(found[0] if found else 0, flush=True)
  state = found[1] if found else state
  while True:
    state = step(state)
    checkpoints.save(int(state["step"]), state)
    print(int(state["step"]), flush=True)
"""


def test_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path):
  chance = random.Random(0)
  start = {"w": jnp.arange(8.0), "step": jnp.int32(0), "key": jax.random.key(0)}
  known = 0
  for _ in range(5):
    process = subprocess.Popen(
      child(LOOP, str(tmp_path)),
      env=environment(),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      assert int(process.stdout.readline()) >= known
      for _ in range(chance.randint(2, 6)):
        begun = int(process.stdout.readline())
      with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=chance.uniform(0, 0.15))
    finally:
      process.kill()
      process.communicate()
    with Checkpoints(tmp_path) as checkpoints:
      known, restored = checkpoints.restore(start)
    # A save begins only when the one before is complete.
    assert known >= begun - 1
    assert int(restored["step"]) == known
    np.testing.assert_array_equal(restored["w"], np.arange(8.0) + known)
    key = start["key"]
    for step in range(known):
      key = jax.random.fold_in(key, step)
    np.testing.assert_array_equal(
      jax.random.key_data(restored["key"]), jax.random.key_data(key)
    )


DISTRIBUTED = """
  import sys
  import jax, numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from gradlab.checkpoint import Checkpoints

  jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

  def place(value, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])

  data = np.asarray(jax.random.key_data(jax.random.key(3)))
  state = {
    "w": place(np.arange(16, dtype=np.float32), P("data")),
    "key": jax.random.wrap_key_data(place(data, P())),
    "empty": place(np.zeros((0, 4), np.float32), P()),
  }
  with Checkpoints(sys.argv[1], max_to_keep=2) as checkpoints:
    assert checkpoints.restore(state) is None
    for step in (1, 2, 3):
      checkpoints.save(step, state)
    checkpoints.wait()
    if jax.process_index() == 0:
      (checkpoints._folder / "3" / "small.msgpack").unlink()
    step, restored = checkpoints.restore(state)
    assert step == 2
    for name, value in state.items():
      assert restored[name].sharding == value.sharding
    for got, wanted in zip(
      restored["w"].addressable_shards, state["w"].addressable_shards
    ):
      assert np.array_equal(got.data, wanted.data)
    checkpoints.delete_after(2)
    checkpoints.save(4, state)
"""


def test_processes_of_one_run_share_a_folder_and_agree_on_the_step(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  processes = [
    subprocess.Popen(
      child(DISTRIBUTED, str(tmp_path), port, str(index)),
      env=environment(2),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in (0, 1)
  ]
  try:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [2, 4]
