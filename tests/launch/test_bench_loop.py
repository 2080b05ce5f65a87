"""The two loops that the benchmark compares take the same steps."""

import jax
import numpy as np
import pytest

from gradlab import metrics
from gradlab.experiment import build
from gradlab.launch._bench import loop, loops


@pytest.fixture(autouse=True)
def _jaxs_own_promotion():
  """optax.adamw, the baseline, does not run under strict promotion."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def test_the_bare_loop_takes_the_steps_of_gradlabs_loop(tmp_path):
  pipeline = build(loop.digits_config(120, 0))
  folder = loops.gradlab_loop(pipeline, tmp_path)()
  written = [
    record
    for record in metrics.read(folder / "metrics.jsonl")
    if record["split"] == "train"
  ]
  assert [record["step"] for record in written] == [50, 100, 120]
  assert [path.name for path in (folder / "checkpoints" / "train").iterdir()] == ["120"]
  dispatches = loops.bare_loop(pipeline)()
  for name in ("loss", "accuracy"):
    values = np.concatenate([np.asarray(found[name]) for found in dispatches])
    means = [np.mean(part) for part in np.split(values, [50, 100])]
    # float32, summed in another order, carried through 120 steps
    np.testing.assert_allclose([record[name] for record in written], means, rtol=1e-4)


def test_loop_section(monkeypatch):
  wide = loop.wide_config(32, steps=4, batch_size=8)
  monkeypatch.setattr(loop, "step_config", lambda steps: (wide, 9.87))
  section = loop.measure(2, steps=4)
  assert [record["name"] for record in section.records] == [
    "digits: at the end",
    "digits: every 1000 steps",
    "9.9 ms steps: every 100 steps",
  ]
  targets = [0.95, 0.95, 0.97]
  for record, check, target in zip(
    section.records, section.checks, targets, strict=True
  ):
    ours, bare = record["gradlab"]["runs"], record["bare"]["runs"]
    assert record["ratio"]["runs"] == [a / b for a, b in zip(ours, bare, strict=True)]
    assert len(ours) == 2
    assert check == (record["ratio"]["median"], target, True)
  assert "2 x 32 units on batches of 8" in section.notes[0]


def test_loop_target_is_held_to_the_median_of_the_pairs():
  rows = [
    loop.Row("a", loop.digits_config(10, 0), 0.95),
    loop.Row("b", loop.digits_config(10, 0), 0.97),
  ]
  rates = [([95.0, 190.0, 10.0], [100.0, 200.0, 100.0]), ([96.0], [100.0])]
  section = loop.section(rows, rates, "")
  assert [check.value for check in section.checks] == [0.95, 0.96]
  assert [check.met for check in section.checks] == [True, False]


def test_the_width_of_a_long_step_keeps_to_its_limit():
  config, milliseconds = loop.step_config(7, milliseconds=1e3, batch_size=8, widest=96)
  assert config.model.features == (96, 96)
  assert config.stages.train.steps == 7
  assert config.stages.train.checkpoint_every == 100
  assert 0 < milliseconds < 1e3
