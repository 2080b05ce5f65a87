"""Starts are timed from the command to the first metrics on disk."""

import time

import pytest

from gradlab.launch._bench import programs, startup

ABLATION = """
from ml_collections import ConfigDict

from gradlab.sweeps import choices, seeds


def get_config():
  return ConfigDict({
    "data": {"name": "digits"},
    "model": {"name": "mlp", "features": (2,)},
    "stages": {"train": {
      "steps": 2, "batch_size": 2, "eval_every": 1,
      "objective": {"name": "cross_entropy"},
      "update": {"adamw": {"learning_rate": 1e-3}},
    }},
  })


def sweep_rule():
  return choices("stages.train.batch_size", (2,))


def sweep_seed():
  return seeds(2)
"""


def test_startup_ends_at_the_first_metrics(tmp_path):
  config = tmp_path / "ablation.py"
  config.write_text(ABLATION)
  begun = time.monotonic()
  section = startup.measure(1, config)
  elapsed = time.monotonic() - begun
  cold, warm = section.records
  measured = [cold["first_step"], warm["first_step"], cold["imports"]]
  assert all(seconds["median"] > 0 for seconds in measured)
  assert sum(seconds["median"] for seconds in measured) < elapsed
  assert [check.limit for check in section.checks] == [10.0, 6.0]


def test_a_sweep_that_takes_no_step_is_reported(tmp_path):
  config = tmp_path / "ablation.py"
  config.write_text(ABLATION.replace("train.batch_size", "train.no_such"))
  with pytest.raises(RuntimeError, match="no_such"):
    startup.first_step(config, tmp_path / "cache")


def test_a_program_that_fails_is_reported(tmp_path):
  with pytest.raises(RuntimeError, match="No module named 'no_such'"):
    programs.seconds_until(["-c", "import no_such"], tmp_path)
