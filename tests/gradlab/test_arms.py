"""Arms in one program give what each gives alone, and leave the same folders."""

import json

import jax
import numpy as np
import pytest

from gradlab import arms, metrics, pipeline
from gradlab import config as configs
from gradlab._arm_program import fitting, make
from gradlab.arms import Arm
from gradlab.checkpoint import Checkpoints
from gradlab.experiment import build
from gradlab.runfolder import status
from gradlab.types import ConfigError, Interrupted

LOSS = {"name": "cross_entropy"}
RATE = "stages.train.update.adamw.learning_rate"


def config(seed=0, rate=1e-2, stages=None, **train):
  stage = {
    "steps": 30,
    "batch_size": 32,
    "eval_every": 10,
    "log_every": 5,
    "steps_per_dispatch": 10,
    "checkpoint_every": 10,
    "objective": LOSS,
    "update": {"adamw": {"learning_rate": rate}},
    **train,
  }
  return configs.resolve(
    {
      "seed": seed,
      "data": {"name": "digits"},
      "model": {"name": "mlp", "features": (16,), "dropout": 0.1},
      "stages": {
        "train": stage,
        **(stages or {"test": {"kind": "evaluate", "objective": LOSS}}),
      },
    }
  )


def make_arms(folder, settings):
  return [Arm(f"a{i}", folder / "arms" / f"a{i}", c) for i, c in enumerate(settings)]


def many(smoothing, rate, sparsity, seed):
  """A pipeline of every kind of stage."""
  stages = {
    "scores": {"kind": "score", "method": {"name": "snip"}, "objective": LOSS},
    "prune": {
      "kind": "edit",
      "method": {"name": "magnitude_prune", "sparsity": sparsity},
    },
    "tune": {
      "steps": 20,
      "batch_size": 32,
      "checkpoint_every": 10,
      "objective": LOSS,
      "update": {"adamw": {"learning_rate": rate / 2}},
    },
    "attack": {
      "kind": "search",
      "method": {"name": "fgsm", "eps": 0.1},
      "objective": LOSS,
      "num_examples": 20,
    },
    "robust": {"kind": "evaluate", "objective": LOSS, "inputs": "attack"},
    "test": {"kind": "evaluate", "objective": {**LOSS, "label_smoothing": smoothing}},
  }
  return config(seed, rate, stages)


def records(folder):
  return metrics.read(folder / "metrics.jsonl")


def final_state(folder, stage, config):
  program = build(config).programs[stage]
  target = jax.eval_shape(
    program.init, jax.random.key(0), np.zeros((1, 64), np.float32)
  )
  with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
    return checkpoints.restore(target)


def assert_close(a, b, rtol=2e-4):
  # batched matrix products round differently, a few ulp per step
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


def assert_same_folders(one, alone):
  assert records(one)[0].keys() == records(alone)[0].keys()
  assert_close(records_by_key(one), records_by_key(alone))
  results = [json.loads((f / "result.json").read_text()) for f in (one, alone)]
  assert_close(results[0]["metrics"], results[1]["metrics"], rtol=1e-3)
  assert (one / "config.json").read_text() == (alone / "config.json").read_text()
  names = {p.name for p in alone.iterdir() if "tfevents" not in p.name}
  assert {p.name for p in one.iterdir() if "tfevents" not in p.name} == names


def records_by_key(folder):
  return {
    f"{r['split']} {r['step']} {n}": v
    for r in records(folder)
    for n, v in r.items()
    if n not in ("split", "step")
  }


def test_arms_are_what_separate_runs_are(tmp_path):
  settings = [config(0, 1e-3), config(1, 1e-2), config(1, 3e-3)]
  found = make_arms(tmp_path, settings)
  arms.run(found, tmp_path / "batches")
  for arm in found:
    alone = tmp_path / "alone" / arm.name
    pipeline.run(arm.config, alone)
    assert_same_folders(arm.folder, alone)
    (step, state), (other_step, other) = (
      final_state(folder, "train", arm.config) for folder in (arm.folder, alone)
    )
    assert (step, int(state.step)) == (other_step, int(other.step)) == (30, 30)
    assert (jax.random.key_data(state.key) == jax.random.key_data(other.key)).all()
    for a, b in zip(
      jax.tree.leaves((state.params, state.update, state.hyperparams)),
      jax.tree.leaves((other.params, other.update, other.hyperparams)),
      strict=True,
    ):
      # adamw divides by the root of tiny second moments
      np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
  assert not list((tmp_path / "batches").iterdir())


def test_every_kind_of_stage_with_floats_of_its_own(tmp_path):
  settings = [many(0.0, 1e-2, 0.2, 0), many(0.3, 3e-3, 0.7, 1), many(0.1, 1e-2, 0.5, 1)]
  found = make_arms(tmp_path, settings)
  assert len({arms.program_key(c) for c in settings}) == 1
  arms.run(found, tmp_path / "batches")
  for arm in found:
    alone = tmp_path / "alone" / arm.name
    pipeline.run(arm.config, alone)
    assert_same_folders(arm.folder, alone)


def test_small_memory_makes_batches_that_give_the_same(tmp_path):
  settings = [config(seed, 1e-2) for seed in range(5)]
  whole, parts = (
    make_arms(tmp_path / "w", settings),
    make_arms(tmp_path / "p", settings),
  )
  arms.run(whole, tmp_path / "w" / "batches")
  built = build(settings[0])
  needed = {size: make(built, "train", size).step_bytes(10) for size in (2, 5)}
  assert needed[2] < needed[5]
  assert fitting(built, 5, needed[5])[0] == 5
  assert fitting(built, 5, needed[2])[0] == 2
  assert fitting(built, 5, 1)[0] == 1
  arms.run(parts, tmp_path / "p" / "batches", memory=needed[2])
  for one, other in zip(whole, parts, strict=True):
    assert_same_folders(one.folder, other.folder)


class Stop:
  """Asks to stop after some dispatches."""

  def __init__(self, after):
    self.left = after

  def __call__(self):
    self.left -= 1
    return self.left < 0


@pytest.mark.parametrize("after", [1, 3])
def test_a_batch_that_was_stopped_goes_on(tmp_path, after):
  settings = [many(0.0, 1e-2, 0.2, 0), many(0.3, 3e-3, 0.7, 1)]
  whole, broken = (
    make_arms(tmp_path / "w", settings),
    make_arms(tmp_path / "b", settings),
  )
  arms.run(whole, tmp_path / "w" / "batches")
  batches = tmp_path / "b" / "batches"
  with pytest.raises(Interrupted):
    arms.run(broken, batches, should_stop=Stop(after))
  assert arms.begun(batches) == [("a0", "a1")]
  assert {status(arm.folder) for arm in broken} == {"open"}
  arms.run(broken, batches)
  assert not arms.begun(batches)
  for one, other in zip(whole, broken, strict=True):
    assert records(one.folder) == records(other.folder)
    results = [json.loads((a.folder / "result.json").read_text()) for a in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_an_arm_that_diverges_fails_alone(tmp_path):
  settings = [config(0, 1e-2), config(0, 1e38), config(1, 1e-2)]
  found = make_arms(tmp_path, settings)
  arms.run(found, tmp_path / "batches")
  assert [status(arm.folder) for arm in found] == ["finished", "failed", "finished"]
  error = json.loads((found[1].folder / "error.json").read_text())
  assert error["type"] == "NonFiniteError"
  assert "of stage 'train'" in error["error"]
  assert not (found[1].folder / "checkpoints").exists()
  alone = tmp_path / "alone"
  pipeline.run(settings[0], alone)
  assert_same_folders(found[0].folder, alone)


def test_arms_that_go_on_in_spite_of_it(tmp_path):
  found = make_arms(
    tmp_path, [config(0, r, on_nonfinite="continue") for r in (1e-2, 1e38)]
  )
  arms.run(found, tmp_path / "batches")
  assert [status(arm.folder) for arm in found] == ["finished", "finished"]
  result = json.loads((found[1].folder / "result.json").read_text())
  assert result["metrics"]["train"]["loss"] == "nan"


def test_finished_arms_are_left_alone(tmp_path):
  found = make_arms(tmp_path, [config(0), config(1)])
  arms.run(found[:1], tmp_path / "batches")
  before = (found[0].folder / "result.json").stat().st_mtime_ns
  arms.run(found, tmp_path / "batches")
  assert (found[0].folder / "result.json").stat().st_mtime_ns == before
  assert status(found[1].folder) == "finished"


def test_edits_stay_branches_under_the_arms(tmp_path):
  prune = {"name": "magnitude_prune", "every": 30}
  settings = [
    config(edits={"prune": {**prune, "sparsity": sparsity}}) for sparsity in (0.1, 0.9)
  ]
  found = make_arms(tmp_path, settings)
  arms.run(found, tmp_path / "batches")
  light, heavy = (
    json.loads((arm.folder / "result.json").read_text())["metrics"]["test"]["accuracy"]
    for arm in found
  )
  assert light > heavy


def test_what_cannot_be_one_program(tmp_path):
  wide = config(batch_size=64)
  with pytest.raises(ConfigError, match="differ in seeds and floats only"):
    arms.run(make_arms(tmp_path, [config(), wide]), tmp_path / "batches")
  placed = {**config(), "parallel": {"mode": "pmap", "mesh": {"data": 1}, "rules": ()}}
  assert arms.obstacle(placed).startswith("parallel.mode: ")
  placed["parallel"] = {"mode": "jit", "mesh": {"data": 2}, "rules": ()}
  assert arms.obstacle(placed).startswith("parallel.mesh: ")
  with pytest.raises(ConfigError, match=r"^parallel.mesh: "):
    arms.run(make_arms(tmp_path, [placed]), tmp_path / "batches")
  assert arms.obstacle(config()) is None
