"""Arms in one program give what each gives alone."""

import numpy as np
import pytest

from gradlab import arms, metrics, pipeline
from gradlab.types import ConfigError

RATE = "stages.train.update.adamw.learning_rate"


def config(seed=0, rate=1e-2, **train):
  stage = {
    "steps": 30,
    "batch_size": 32,
    "eval_every": 10,
    "log_every": 10,
    "objective": {"name": "cross_entropy"},
    "update": {"adamw": {"learning_rate": rate}},
    **train,
  }
  return {
    "seed": seed,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "features": (16,)},
    "stages": {
      "train": stage,
      "test": {"kind": "evaluate", "objective": {"name": "cross_entropy"}},
    },
  }


def test_arms_are_what_separate_runs_are(tmp_path):
  runs = [{"seed": 0, RATE: 1e-3}, {"seed": 1, RATE: 1e-2}, {"seed": 1, RATE: 3e-3}]
  found = arms.run_arms(config(), runs)
  assert found.steps.tolist() == [10, 20, 30]
  for i, run in enumerate(runs):
    folder = tmp_path / str(i)
    alone = pipeline.run(config(run["seed"], run[RATE]), folder)["metrics"]
    # batched matrix products round differently, a few ulp per step
    for split, stage in (("validation", "train"), ("test", "test")):
      loss = found.final[split]["loss"][i]
      np.testing.assert_allclose(loss, alone[stage]["loss"], rtol=1e-4)
    for split in ("train", "validation"):
      records = metrics.read(folder / "metrics.jsonl")
      curve = [r["loss"] for r in records if r["split"] == split]
      np.testing.assert_allclose(found.curves[split]["loss"][i], curve, rtol=1e-4)


def test_edits_stay_branches_under_the_arms():
  sparsity = "stages.train.edits.prune.sparsity"
  prune = {"name": "magnitude_prune", "sparsity": 0.5, "every": 30}
  found = arms.run_arms(
    config(edits={"prune": prune}), [{sparsity: 0.1}, {sparsity: 0.9}]
  )
  light, heavy = found.final["test"]["accuracy"]
  assert light > heavy


def test_paths_that_cannot_differ_are_named():
  with pytest.raises(ConfigError, match=r"train\.batch_size: arms of one program"):
    arms.run_arms(config(), [{"stages.train.batch_size": 16}])
  with pytest.raises(ConfigError, match="at least one arm"):
    arms.run_arms(config(), [])
