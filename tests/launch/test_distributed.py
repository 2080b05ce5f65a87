"""Several processes on this machine train like one, and end together."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from gradlab.launch import _distributed
from tests.launch import hosts, programs, runs

TRAIN = {
  "batch_size": 16,
  "objective": runs.LOSS,
  "steps_per_dispatch": 4,
  "log_every": 4,
  "checkpoint_every": 8,
}
ONE_STAGE = {
  "train": {**TRAIN, "steps": 24, "update": {"adamw": {"learning_rate": 1e-2}}}
}
STAGES = {
  **ONE_STAGE,
  "prune": {"kind": "edit", "method": {"name": "magnitude_prune", "sparsity": 0.1}},
  "tune": {**TRAIN, "steps": 8, "update": {"adamw": {"learning_rate": 1e-3}}},
  "test": {"kind": "evaluate", "objective": runs.LOSS},
}
HELD, STREAMED = "tests.launch.sources:linear", "tests.launch.hosts:records"
DATA = {"mode": "jit", "mesh": {"data": -1}}
PMAP = {"mode": "pmap", "mesh": {"data": -1}}
# two processes of two devices each for every part of the batch
DIVIDED = {
  "mode": "jit",
  "mesh": {"data": 2, "model": 4},
  "rules": (("hidden.*kernel", "fsdp"), ("head/kernel", ("model",)), (".*", ())),
}


class Whole(NamedTuple):
  """An uninterrupted run on several processes, and that of one with their devices."""

  flags: list[str]
  many: Path
  one: Path


def config(
  data: str, parallel: dict[str, Any], stages: Any = ONE_STAGE
) -> dict[str, Any]:
  return {
    "seed": 1,
    "data": {"name": data},
    # wide enough for FSDP to divide a kernel
    "model": {"name": "mlp", "features": (256,), "outputs": 1, "dropout": 0.1},
    "parallel": parallel,
    "stages": stages,
  }


def whole(
  folder: Path, server: programs.Server, count: int, written: dict[str, Any]
) -> Whole:
  flags = runs.write(folder, written, "many")
  hosts.run(server, flags, count)
  one = folder / "one"
  done = server.run(flags[0], f"--workdir={one}", devices=2 * count)
  assert (done.code, done.err) == (0, ""), done
  return Whole(flags, folder / "many", one)


@pytest.fixture(scope="module", params=["jit", "pmap"])
def four(
  request: pytest.FixtureRequest,
  tmp_path_factory: pytest.TempPathFactory,
  server: programs.Server,
) -> Whole:
  """Four processes whose records are streamed."""
  parallel = DIVIDED if request.param == "jit" else PMAP
  folder = tmp_path_factory.mktemp(request.param)
  return whole(folder, server, 4, config(STREAMED, parallel))


def numbers(folder: Path) -> Any:
  """Final parameters and all metrics of a run."""
  params = {stage: state.params for stage, (_, state) in runs.states(folder).items()}
  records = (folder / "metrics.jsonl").read_text().splitlines()
  metrics = json.loads((folder / "result.json").read_text())["metrics"]
  return params, [json.loads(line) for line in records], metrics


def assert_same(folder: Path, expected: Path) -> None:
  found, wanted = numbers(folder), numbers(expected)
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    if isinstance(a, str):
      assert a == b
    else:
      # sums over processes are taken in another order, in float32
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_four_processes_are_one(four: Whole) -> None:
  assert_same(four.many, four.one)
  here = json.loads((four.many / "environment.json").read_text())
  assert (here["processes"], here["devices"]) == (4, {"cpu": 8})


@pytest.mark.parametrize("parallel", [DATA, PMAP], ids=["jit", "pmap"])
def test_two_processes_are_one(
  parallel: dict[str, Any], tmp_path: Path, server: programs.Server
) -> None:
  two = whole(tmp_path, server, 2, config(HELD, parallel, STAGES))
  assert_same(two.many, two.one)


@pytest.mark.parametrize("count", [2, 1])
def test_a_checkpoint_of_four_processes_resumes_on_fewer(
  four: Whole, count: int, tmp_path: Path, server: programs.Server
) -> None:
  folder = runs.copy(four.many, tmp_path / "run")
  (folder / "result.json").unlink()
  for step in (16, 24):
    shutil.rmtree(folder / "checkpoints" / "train" / str(step))
  flags = [four.flags[0], f"--workdir={folder}"]
  if count > 1:
    hosts.run(server, flags, count, devices=8 // count)
  else:
    done = server.run(*flags, devices=8)
    assert (done.code, done.err) == (0, ""), done
  here = json.loads((folder / "environment.json").read_text())
  assert (here["processes"], here["earlier"][0]["processes"]) == (count, 4)
  assert_same(folder, four.many)


def test_a_killed_process_ends_the_others(
  tmp_path: Path, server: programs.Server
) -> None:
  stages = {"train": {**ONE_STAGE["train"], "steps": 400, "log_every": 40}}
  flags = runs.write(tmp_path, config(HELD, DATA, stages))
  folder = tmp_path / "run"
  running = hosts.start(server, flags, 2, keep=False)
  while runs.step_of(folder) < 80 and not running[1].wait(0.01):
    pass
  running[1].signal(signal.SIGKILL)
  assert running[1].finish().code == -signal.SIGKILL
  assert running[0].wait(60.0)
  left = running[0].finish()
  assert left.code != 0
  # what notices first: a broken connection, or JAX's heartbeat
  said = ("another process of this run ended first", "another task died")
  assert any(each in left.err for each in said), left
  assert 0 < runs.step_of(folder) < 400
  again = hosts.finish(hosts.start(server, flags, 2))
  assert [done.code for done in again] == [0, 0], again
  # the kill may have met a checkpoint
  warned = [line for done in again for line in done.err.splitlines()]
  assert all("is unfinished and passed over" in line for line in warned), again
  one = tmp_path / "one"
  done = server.run(flags[0], f"--workdir={one}", devices=4)
  assert (done.code, done.err) == (0, ""), done
  assert_same(folder, one)


def test_sigterm_to_one_process_stops_all(
  tmp_path: Path, server: programs.Server
) -> None:
  stages = {"train": {**ONE_STAGE["train"], "steps": 10**6, "checkpoint_every": 10**6}}
  flags = runs.write(tmp_path, config(HELD, PMAP, stages))
  folder = tmp_path / "run"
  running = hosts.start(server, flags, 2)
  while runs.step_of(folder) < 8 and not running[1].wait(0.01):
    pass
  running[1].signal(signal.SIGTERM)
  first, second = hosts.finish(running)
  assert (first.code, first.err, second.code) == (0, "", 0)
  assert "SIGTERM caught" in second.err  # by JAX, which tells the others
  assert len(second.err.splitlines()) == 1
  (step,) = (int(path.name) for path in (folder / "checkpoints" / "train").iterdir())
  assert hosts.said(first)[-1] == (
    f"stopped at step {step} of 1000000 of stage 'train'; the same command resumes "
    f"from {folder}."
  )
  assert not hosts.said(second)
  assert runs.states(folder)["train"][0] == step > 8


def test_missing_processes_are_named(tmp_path: Path, server: programs.Server) -> None:
  flags, port = runs.write(tmp_path, config(HELD, DATA)), hosts.free_port()
  running = [
    server.start(*flags, *hosts.flags(4, index, port, timeout=5)) for index in (0, 2)
  ]
  first, other = hosts.finish(running)
  assert (first.code, other.code) == (2, 2)
  said = f"processes 1, 3 of 4 did not come to localhost:{port} within 5 seconds"
  for done in (first, other):
    assert done.err.startswith(f"error: --distributed: {said}"), done
    assert len(done.err.splitlines()) == 1
  assert "there were 0 on " in first.err
  assert not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there(
  tmp_path: Path, server: programs.Server
) -> None:
  flags, port = runs.write(tmp_path, config(HELD, DATA)), hosts.free_port()
  done = server.run(*flags, *hosts.flags(2, 1, port, timeout=2))
  assert (done.code, done.err) == (
    2,
    f"error: --coordinator: process 1 did not reach localhost:{port} within 2 seconds "
    "(Connection refused); process 0 must run there, and the port be open.\n",
  )


def test_processes_that_were_told_different_things(
  tmp_path: Path, server: programs.Server
) -> None:
  flags, port = runs.write(tmp_path, config(HELD, DATA)), hosts.free_port()
  running = [
    server.start(*flags, *hosts.flags(2, 0, port)),
    server.start(*flags, *hosts.flags(3, 1, port)),
  ]
  for done in hosts.finish(running):
    assert done.code == 2
    assert done.err.startswith("error: --num_processes: process 1 on ")
    assert done.err.endswith(" was given 3, process 0 2.\n")


@pytest.mark.parametrize(
  ("given", "said"),
  [
    ("--coordinator=a:1", "flags: --coordinator needs --distributed."),
    (
      "--distributed --process_id=0",
      "flags: --process_id needs --coordinator and --num_processes too.",
    ),
    (
      "--distributed --coordinator=a --num_processes=1 --process_id=0",
      "--coordinator: must be HOST:PORT, got 'a'.",
    ),
    (
      "--distributed --coordinator=a:1 --num_processes=2 --process_id=2",
      "--process_id: must lie in [0, --num_processes = 2), got 2.",
    ),
    ("--distributed --distributed_timeout=5", "--distributed: this is no cluster"),
  ],
)
def test_flags_that_do_not_fit(
  given: str, said: str, tmp_path: Path, server: programs.Server
) -> None:
  flags = runs.write(tmp_path, config(HELD, DATA))
  done = server.run(*flags, *given.split())
  assert (done.code, len(done.err.splitlines())) == (2, 1)
  assert done.err.startswith(f"error: {said}")
  assert not (tmp_path / "run").exists()


def test_a_mesh_that_leaves_a_process_out(
  tmp_path: Path, server: programs.Server
) -> None:
  parallel = {"mode": "jit", "mesh": {"data": 1}}
  flags = runs.write(tmp_path, config(HELD, parallel))
  for done in hosts.finish(hosts.start(server, flags, 2)):
    assert (done.code, done.err) == (
      2,
      "error: parallel.mesh: mesh {'data': 1} takes no equal number of devices of each "
      "of the 2 processes.\n",
    )


def test_slurm_says_where_the_processes_are(monkeypatch: pytest.MonkeyPatch) -> None:
  job = {
    "JOB_ID": "7",
    "STEP_NODELIST": "node[003-004]",
    "NTASKS": "4",
    "PROCID": "3",
    "LOCALID": "1",
    "STEP_NUM_NODES": "2",
  }
  for name, value in job.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  found = _distributed._detected(1)
  host, port = found.place.address.split(":")
  assert (host, int(port) > 0) == ("node003", True)
  assert (found.place.process, found.place.processes) == (3, 4)
  assert found.local_devices == [1]
