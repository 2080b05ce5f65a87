"""Pipelines of several stages, and the folder that a run leaves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab import metrics, pipeline
from gradlab.checkpoint import Checkpoints
from gradlab.transforms import keep_mask
from gradlab.types import ConfigError, Interrupted


def train_stage(**fields):
  stage = {
    "steps": 40,
    "batch_size": 32,
    "steps_per_dispatch": 10,
    "log_every": 10,
    "eval_every": 20,
    "checkpoint_every": 20,
    "objective": {"name": "cross_entropy"},
    "update": {"adamw": {"learning_rate": 3e-3}},
  }
  return {**stage, **fields}


def config(**stages):
  return {
    "seed": 3,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "features": (16,)},
    "stages": stages,
  }


EVALUATE = {"kind": "evaluate", "objective": {"name": "cross_entropy"}}


def saved_params(folder, name, built):
  """The parameters of a stage's final checkpoint."""
  program = built.programs[name]
  inputs = jnp.asarray(built.dataset.train["inputs"][:1])
  masks = None
  if name == "tune":
    shapes = jax.eval_shape(program.init, jax.random.key(0), inputs).params
    masks = jax.tree.map(lambda s: jnp.ones(s.shape, bool), shapes)
  target = jax.eval_shape(
    lambda key: program.init(key, inputs, masks=masks), jax.random.key(0)
  )
  with Checkpoints(folder / "checkpoints" / name) as checkpoints:
    return checkpoints.restore(target)


def test_prune_and_fine_tune(tmp_path):
  experiment = config(
    train=train_stage(),
    saliency={
      "kind": "score",
      "method": {"name": "snip"},
      "objective": {"name": "cross_entropy"},
    },
    prune={
      "kind": "edit",
      "method": {"name": "magnitude_prune", "sparsity": 0.8},
      "scores": "saliency",
    },
    pruned=EVALUATE,
    tune=train_stage(steps=20),
    test=EVALUATE,
  )
  result = pipeline.run(experiment, tmp_path)
  built = pipeline.build(experiment)
  step, dense = saved_params(tmp_path, "train", built)
  assert step == 40
  _, tuned = saved_params(tmp_path, "tune", built)

  def loss(params, batch):
    outputs, _ = built.model.apply(params, {}, batch["inputs"])
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(outputs), batch["label"][:, None], 1
    )
    return -jnp.mean(picked)

  batch = {n: jnp.asarray(a[:256]) for n, a in built.dataset.train.items()}
  grads = jax.grad(loss)(dense.params, batch)
  scores = jax.tree.map(
    lambda w, g: jnp.abs(w * g) if w.ndim > 1 else None, dense.params, grads
  )
  expected = keep_mask(scores, 0.8, "global")
  masks = [m for m in jax.tree.leaves(tuned.masks) if m.ndim > 1]
  for mask, want in zip(masks, jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(mask, want)
  for mask, weight in zip(
    jax.tree.leaves(tuned.masks), jax.tree.leaves(tuned.params), strict=True
  ):
    assert not bool(jnp.any(weight[~mask]))
  found = result["metrics"]
  assert list(found) == ["train", "prune", "pruned", "tune", "test"]
  kernels = sum(w.size for w in jax.tree.leaves(dense.params) if w.ndim > 1)
  assert found["prune"]["zeros"] >= round(0.8 * kernels)
  assert found["tune"]["loss"] < found["pruned"]["loss"]


def test_attack_is_searched_and_evaluated(tmp_path):
  attack = {
    "kind": "search",
    "method": {"name": "fgsm", "eps": 0.3, "bounds": (-10.0, 10.0)},
    "objective": {"name": "cross_entropy"},
    "num_examples": 64,
  }
  experiment = config(
    train=train_stage(), attack=attack, robust={**EVALUATE, "inputs": "attack"}
  )
  found = pipeline.run(experiment, tmp_path)["metrics"]
  assert found["attack"]["loss_after"] > found["attack"]["loss_before"]
  assert found["attack"]["max_change"] == pytest.approx(0.3, rel=1e-5)
  assert found["robust"]["loss"] == pytest.approx(found["attack"]["loss_after"])


def test_every_head_is_trained_and_evaluated(tmp_path):
  tasks = {"digit": {"name": "cross_entropy"}, "value": {"name": "squared_error"}}
  experiment = config(
    train=train_stage(objective=None, tasks=tasks),
    again={"kind": "evaluate", "tasks": tasks, "split": "validation"},
  )
  experiment["model"] = {"name": "mlp", "features": (16,)}
  experiment["model"]["outputs"] = (("digit", 10), ("value", 1))
  experiment["data"] = {"name": f"{__name__}:digits_with_values"}
  tasks["value"]["label"] = "value"
  found = pipeline.run(experiment, tmp_path)["metrics"]
  names = {"digit/loss", "digit/accuracy", "value/loss", "value/mae"}
  assert set(found["train"]) == names
  assert found["again"] == found["train"]
  # predicting 0 for every digit costs the mean square of 0 to 9
  assert found["train"]["value/loss"] < 28.5


def digits_with_values():
  """The digits with their values as a second label."""
  from gradlab.sources import digits

  held = digits()
  splits = (
    {**split, "value": split["label"].astype(np.float32)}
    for split in (held.train, held.validation, held.test)
  )
  return type(held)(*splits, held.info)


def test_run_folder(tmp_path):
  said = []
  result = pipeline.run(
    config(train=train_stage(), test=EVALUATE),
    tmp_path,
    overrides=("--config.seed=3",),
    progress=lambda *args: said.append(args[:3]),
  )
  stored = json.loads((tmp_path / "config.json").read_text())
  assert stored["stages"]["train"]["on_nonfinite"] == "stop"
  assert list(stored["stages"]) == ["train", "test"]
  assert (tmp_path / "overrides.txt").read_text() == "--config.seed=3\n"
  assert json.loads((tmp_path / "environment.json").read_text())["versions"]["jax"]
  assert json.loads((tmp_path / "result.json").read_text()) == result
  records = metrics.read(tmp_path / "metrics.jsonl")
  assert [(r["step"], r["split"]) for r in records] == [
    (10, "train"),
    (20, "train"),
    (20, "validation"),
    (30, "train"),
    (40, "train"),
    (40, "validation"),
  ]
  assert records[-1]["loss"] == result["metrics"]["train"]["loss"]
  assert list(tmp_path.glob("events.out.tfevents.*"))
  assert said == [("train", n, 40) for n in (10, 20, 30, 40)]


def test_steps_of_a_second_stage_count_on(tmp_path):
  pipeline.run(config(a=train_stage(steps=20), b=train_stage(steps=20)), tmp_path)
  records = metrics.read(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in records if r["split"] == "validation"] == [20, 40]


def test_interrupted_run_goes_on_with_the_same_bits(tmp_path):
  experiment = config(train=train_stage(), test=EVALUATE)
  whole = pipeline.run(experiment, tmp_path / "whole")
  asked = iter([False, True])
  with pytest.raises(Interrupted, match=r"stopped at step 20 of 40 of stage 'train'"):
    pipeline.run(experiment, tmp_path / "cut", should_stop=lambda: next(asked))
  assert not (tmp_path / "cut" / "result.json").exists()
  resumed = pipeline.run(experiment, tmp_path / "cut")
  assert resumed["metrics"] == whole["metrics"]
  first, second = (
    sorted(
      metrics.read(tmp_path / name / "metrics.jsonl"),
      key=lambda r: (r["step"], r["split"]),
    )
    for name in ("whole", "cut")
  )
  assert first == second


def test_finished_run_is_not_trained_again(tmp_path):
  experiment = config(train=train_stage(), test=EVALUATE)
  first = pipeline.run(experiment, tmp_path)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  said = []
  again = pipeline.run(experiment, tmp_path, progress=lambda *args: said.append(args))
  assert again["metrics"] == first["metrics"]
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
  assert not said


def test_folder_of_another_run_is_refused_and_left_alone(tmp_path):
  pipeline.run(config(train=train_stage(steps=10)), tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  with pytest.raises(
    ConfigError, match=r"stages\.train\.steps is 10 there and 20 here"
  ):
    pipeline.run(config(train=train_stage(steps=20)), tmp_path)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def records_source(count: int = 64):
  """Random-access records on the host instead of arrays in memory."""
  from gradlab.data import Dataset
  from gradlab.sources import digits

  held = digits()

  class Records:
    def __len__(self):
      return count

    def __getitem__(self, index):
      return {name: values[index] for name, values in held.train.items()}

  return Dataset(Records(), held.validation, held.test, held.info)


def first_records(count: int = 64):
  """The same examples as ``records_source``, as arrays."""
  from gradlab.data import Dataset
  from gradlab.sources import digits

  held = digits()
  train = {name: values[:count] for name, values in held.train.items()}
  return Dataset(train, held.validation, held.test, held.info)


def test_streamed_records_train_like_arrays(tmp_path):
  results = []
  for name in ("records_source", "first_records"):
    experiment = config(train=train_stage())
    experiment["data"] = {"name": f"{__name__}:{name}"}
    results.append(pipeline.run(experiment, tmp_path / name)["metrics"]["train"])
  assert results[0]["accuracy"] == results[1]["accuracy"]
  # the same float32 steps; the gather is fused differently
  assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
