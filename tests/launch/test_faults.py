"""Kills, signals, damage and other machines: a run ends as if nothing had happened."""

import json
import math
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab import data, metrics, pipeline
from tests.launch import programs, runs
from tests.launch.runs import CONFIG, ON_ONE, STEPS

DATA_8 = {"mesh": {"data": 8}}
PMAP_8 = {"mode": "pmap", "mesh": {"data": 8}}
MODES = {"jit": DATA_8, "pmap": PMAP_8}


@pytest.fixture(scope="module", params=MODES)
def whole(
  request: pytest.FixtureRequest,
  tmp_path_factory: pytest.TempPathFactory,
  server: programs.Server,
) -> Path:
  """The folder of an uninterrupted run on eight devices; its config stands beside."""
  folder = tmp_path_factory.mktemp(request.param)
  flags = runs.write(folder, {**CONFIG, "parallel": MODES[request.param]})
  done = server.run(*flags, devices=8)
  assert (done.code, done.err) == (0, ""), done
  return folder / "run"


def flags_beside(whole: Path, folder: Path) -> list[str]:
  """The flags of the same run in another folder."""
  return [f"--config={whole.with_suffix('.py')}", f"--workdir={folder}"]


def stopped(
  server: programs.Server, flags: list[str], folder: Path, step: int, devices: int = 8
) -> programs.Finished:
  """A run that is asked to stop once its metrics have reached ``step``."""
  running = server.start(*flags, devices=devices)
  while runs.step_of(folder) < step and not running.wait(0.01):
    pass
  running.signal(signal.SIGTERM)
  return running.finish()


def test_a_run_that_is_killed_ten_times(
  whole: Path, tmp_path: Path, server: programs.Server
) -> None:
  folder, random = tmp_path / "run", np.random.default_rng(0)
  flags = flags_beside(whole, folder)
  # Two at any moment from the start on; one in every ninth of the steps but the last,
  # which leaves the time to kill.
  steps = [0, 0, *(STEPS // 9 * np.arange(8) + random.integers(1, STEPS // 9, 8))]
  landed = 0
  for step in steps:
    running = server.start(*flags, devices=8, keep=False)
    while runs.step_of(folder) < step and not running.wait(0.01):
      pass
    running.wait(random.uniform(0.0, 0.05 if step else 1.0))
    running.signal(signal.SIGKILL)
    assert running.finish().code == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    landed += 0 < runs.step_of(folder) < STEPS
  assert landed >= 8
  done = server.run(*flags, devices=8)
  assert (done.code, done.out.splitlines()[-1]) == (0, f"run folder: {folder}"), done
  assert runs.outcome(folder) == runs.outcome(whole)


@pytest.mark.parametrize("whole", ["jit"], indirect=True)
def test_sigterm_and_a_truncated_checkpoint(
  whole: Path, tmp_path: Path, server: programs.Server
) -> None:
  folder = tmp_path / "run"
  flags = flags_beside(whole, folder)
  done = stopped(server, flags, folder, 300)
  assert (done.code, done.err) == (0, ""), done
  said = done.out.splitlines()[-1]
  newest = max(int(path.name) for path in (folder / "checkpoints/tune").iterdir())
  assert said == (
    f"stopped at step {newest} of 120 of stage 'tune'; the same command resumes from "
    f"{folder}."
  )
  damaged = runs.copy(folder, tmp_path / "damaged")

  done = server.run(*flags, devices=8)
  assert (done.code, done.err) == (0, ""), done
  assert runs.outcome(folder) == runs.outcome(whole)

  checkpoint = damaged / "checkpoints" / "tune" / str(newest)
  largest = runs.largest_file(checkpoint)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  done = server.run(*flags_beside(whole, damaged), devices=8)
  (warning,) = done.err.splitlines()
  name = largest.relative_to(checkpoint)
  assert done.code == 0
  assert warning.endswith(
    f"checkpoint {checkpoint} is damaged and passed over: {name} was altered."
  )
  assert runs.outcome(damaged) == runs.outcome(whole)


@pytest.mark.parametrize("whole", ["jit"], indirect=True)
def test_a_finished_run_trains_nothing(
  whole: Path, tmp_path: Path, server: programs.Server
) -> None:
  folder = runs.copy(whole, tmp_path / "run")
  kept = [folder / "metrics.jsonl", *(folder / "checkpoints").rglob("*")]
  before = {path: path.stat().st_mtime_ns for path in kept}
  done = server.run(*flags_beside(whole, folder), devices=8)
  assert (done.code, done.err) == (0, ""), done
  kept = [folder / "metrics.jsonl", *(folder / "checkpoints").rglob("*")]
  assert {path: path.stat().st_mtime_ns for path in kept} == before
  assert runs.outcome(folder) == runs.outcome(whole)


@pytest.mark.parametrize("whole", ["jit"], indirect=True)
def test_two_processes_give_the_same_bits(whole: Path, tmp_path: Path) -> None:
  folder = tmp_path / "run"
  done = programs.run(*flags_beside(whole, folder), devices=8)
  assert (done.code, done.err) == (0, ""), done
  assert runs.outcome(folder) == runs.outcome(whole)


def test_other_machines(tmp_path: Path, server: programs.Server) -> None:
  rules = (
    ("hidden.*kernel", (None, "model")),
    ("head/kernel", ("model",)),
    (".*", ()),
  )
  eight = {"mesh": {"data": 4, "model": 2}, "rules": rules}
  four = {"mesh": {"data": 2, "model": 2}, "rules": rules}
  flags = runs.write(tmp_path, {**CONFIG, "parallel": eight}, "eight")
  stopped(server, flags, tmp_path / "eight", 100)
  starts = {"one": (1, ON_ONE), "four": (4, four), "eight": (8, eight)}
  ended = {}
  for name, (devices, parallel) in reversed(starts.items()):
    folder = tmp_path / name
    if name != "eight":
      runs.copy(tmp_path / "stopped", folder)
    else:
      runs.copy(folder, tmp_path / "stopped")
    flags = runs.write(tmp_path, {**CONFIG, "parallel": parallel}, name)
    done = server.run(*flags, devices=devices)
    assert (done.code, done.err) == (0, ""), done
    here = json.loads((folder / "environment.json").read_text())
    assert here["devices"] == {"cpu": devices}
    assert here["parallel"]["mesh"] == parallel["mesh"]
    assert here["earlier"][0]["parallel"]["mesh"] == eight["mesh"]
    stored = json.loads((folder / "config.json").read_text())
    assert stored["parallel"]["mesh"] == eight["mesh"]
    ended[name] = runs.outcome(folder)["metrics"], runs.states(folder)["tune"][1].params
  # sums over the batch in another order, in float32
  for name in ("one", "four"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      ended[name],
      ended["eight"],
    )


def regression(
  source: Mapping[str, Any], rate: float = 1e-2, **parallel: Any
) -> dict[str, Any]:
  """40 steps of SGD with a checkpoint at every fourth."""
  train = {
    **runs.TRAIN,
    "steps": 40,
    "checkpoint_every": 4,
    "update": {"sgd": {"name": "optax.sgd", "learning_rate": rate}},
  }
  return {
    "data": source,
    "model": {"name": "mlp", "features": (16,), "outputs": 1},
    "parallel": parallel,
    "stages": {"train": train},
  }


def bad(step: int) -> dict[str, Any]:
  return {"name": "tests.launch.sources:linear", "bad_step": step}


def finite(tree: Any) -> bool:
  return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("config", "step"),
  [
    pytest.param(regression({"name": "diabetes"}, 1e6), None, id="rate"),
    pytest.param(regression(bad(1)), 1, id="first batch"),
    pytest.param(regression(bad(5)), 5, id="batch after a checkpoint"),
    pytest.param(regression(bad(7)), 7, id="batch within a dispatch"),
    pytest.param(regression(bad(7), **PMAP_8), 7, id="replica's batch"),
  ],
)
def test_a_loss_that_is_not_finite(
  config: dict[str, Any], step: int | None, tmp_path: Path, server: programs.Server
) -> None:
  folder, flags = tmp_path / "run", runs.write(tmp_path, config)
  done = server.run(*flags, devices=8)
  said = re.fullmatch(
    r"error: loss is not finite at step (\d+) of stage 'train'; the last finite state, "
    r"of step (\d+), is saved in (.*)\.\n",
    done.err,
  )
  assert done.code == 2
  assert said, done.err
  lost, kept = int(said[1]), int(said[2])
  assert lost == step or step is None
  assert said[3] == str(folder / "checkpoints" / "train")
  assert not (folder / "result.json").exists()

  found, state = runs.states(folder)["train"]
  assert found == kept == int(state.step)
  assert finite(state.params)
  built = pipeline.build({**config, "parallel": ON_ONE})
  train = built.dataset.train
  rows = data.indices(0, kept, data.num_examples(train), 8)
  after, numbers = jax.jit(built.programs["train"].step)(state, data.take(train, rows))
  assert not finite(after.params)
  assert math.isfinite(numbers["loss"]) == (kept == lost - 2)

  again = server.run(*flags, devices=8)
  assert (again.code, again.err) == (2, done.err)


def test_a_run_that_goes_on_without_a_finite_loss(
  tmp_path: Path, server: programs.Server
) -> None:
  config = regression(bad(7))
  config["stages"]["train"]["on_nonfinite"] = "continue"
  folder, flags = tmp_path / "run", runs.write(tmp_path, config)
  done = server.run(*flags)
  assert (done.code, done.err) == (0, ""), done
  losses = {
    record["step"]: record["loss"]
    for record in metrics.read(folder / "metrics.jsonl")
    if record["split"] == "train"
  }
  assert list(losses) == [7, 14, 21, 28, 35, 40]
  assert all(map(math.isnan, losses.values()))
  step, state = runs.states(folder)["train"]
  assert (step, finite(state.params)) == (40, False)
  result = json.loads((folder / "result.json").read_text())["metrics"]
  assert result == {"train": {"loss": "nan", "mae": "nan"}}
