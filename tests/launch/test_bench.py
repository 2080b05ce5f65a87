"""The benchmark's numbers are what they say, and its files can be read."""

import io
import json
import time

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from gradlab import metrics
from gradlab.experiment import build
from gradlab.launch import _bench_loop, _bench_startup, _bench_updates, bench
from gradlab.launch import _bench_report as report
from gradlab.types import ConfigError


@pytest.fixture(autouse=True)
def _jaxs_own_promotion():
  """optax.adamw, the baseline, does not run under strict promotion."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def _section(value, limit, at_least=False):
  check = report.Check(value, limit, at_least)
  return report.Section(
    name="loop",
    says="What was measured.",
    columns=("name", "steps/s", "target"),
    rows=[("digits", report.show([2.0, 1.0, 4.0], ".1f"), str(check))],
    records=[{"name": "digits", "steps": report.numbers([2.0, 1.0, 4.0])}],
    checks=[check],
  )


def test_summary_is_median_and_range():
  assert report.summary([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 1.0, 5.0)
  assert report.show([5.0, 1.0, 4.0, 2.0, 3.0], ".1f") == "3.0 (1.0-5.0)"


def test_a_drift_of_the_machine_cancels_in_pairwise_ratios():
  baseline = [1.0, 2.0, 4.0, 8.0, 16.0]
  ratios = report.pairwise([1.5 * seconds for seconds in baseline], baseline)
  assert ratios == [1.5] * 5


def test_interleaved_calls_in_turn():
  calls = []
  found = report.interleaved(
    2, lambda: calls.append("a") or len(calls), lambda: calls.append("b") or len(calls)
  )
  assert calls == ["a", "b", "a", "b"]
  assert found == ([1, 3], [2, 4])


@pytest.mark.parametrize(
  ("value", "limit", "at_least", "met", "said"),
  [
    (0.95, 0.95, True, True, "≥ 0.95 met"),
    (0.94, 0.95, True, False, "≥ 0.95 missed"),
    (1.25, 1.25, False, True, "≤ 1.25 met"),
    (1.26, 1.25, False, False, "≤ 1.25 missed"),
  ],
)
def test_check(value, limit, at_least, met, said):
  check = report.Check(value, limit, at_least)
  assert check.met is met
  assert str(check) == said


def test_files_hold_the_machine_the_runs_and_the_targets(tmp_path):
  report.write(tmp_path, report.machine(), 5, [_section(0.9, 0.95, at_least=True)])
  found = json.loads((tmp_path / "bench.json").read_text())
  assert found["runs"] == 5
  assert found["machine"]["versions"]["jax"] == jax.__version__
  assert found["machine"]["cores"] >= 1
  assert found["machine"]["cpu"]
  [record] = found["sections"]["loop"]
  assert record["steps"] == {
    "median": 2.0,
    "low": 1.0,
    "high": 4.0,
    "runs": [2.0, 1.0, 4.0],
  }
  assert record["target"] == {
    "value": 0.9,
    "limit": 0.95,
    "at_least": True,
    "met": False,
  }
  page = (tmp_path / "bench.md").read_text()
  assert "| digits | 2.0 (1.0-4.0) | ≥ 0.95 missed |" in page.splitlines()
  assert f"jax {jax.__version__}" in page


def test_terminal_table_fits_eighty_columns():
  rule = _bench_updates.Measured("a_rule_of_length_20", [199.0], [99.0], 1.57, 16.0)
  console = Console(width=80, record=True, file=io.StringIO())
  console.print(report.table(_bench_updates.section([rule], 20_000_000)))
  text = console.export_text()
  assert "…" not in text
  assert "missed" in text


def test_the_bare_loop_takes_the_steps_of_gradlabs_loop(tmp_path):
  pipeline = build(_bench_loop.digits_config(120, 0))
  folder = _bench_loop.gradlab_loop(pipeline, tmp_path)()
  written = [
    record
    for record in metrics.read(folder / "metrics.jsonl")
    if record["split"] == "train"
  ]
  assert [record["step"] for record in written] == [50, 100, 120]
  assert [path.name for path in (folder / "checkpoints" / "train").iterdir()] == ["120"]
  dispatches = _bench_loop.bare_loop(pipeline.config, pipeline.dataset.train)()
  for name in ("loss", "accuracy"):
    values = np.concatenate([np.asarray(found[name]) for found in dispatches])
    means = [np.mean(part) for part in np.split(values, [50, 100])]
    # float32, summed in another order, carried through 120 steps
    np.testing.assert_allclose([record[name] for record in written], means, rtol=1e-4)


def test_loop_section():
  section = _bench_loop.measure(2, steps=4)
  assert [record["name"] for record in section.records] == [
    "at the end",
    "every 1000 steps",
  ]
  for record, check in zip(section.records, section.checks, strict=True):
    ours, bare = record["gradlab"]["runs"], record["bare"]["runs"]
    assert record["ratio"]["runs"] == [a / b for a, b in zip(ours, bare, strict=True)]
    assert len(ours) == 2
    assert check == (record["ratio"]["median"], 0.95, True)


def test_loop_target_is_held_to_the_median_of_the_pairs():
  rates = [([95.0, 190.0, 10.0], [100.0, 200.0, 100.0]), ([94.0], [100.0])]
  section = _bench_loop.section(rates, steps=10)
  assert [check.value for check in section.checks] == [0.95, 0.94]
  assert [check.met for check in section.checks] == [True, False]


ABLATION = """
from ml_collections import ConfigDict

METHODS = ("adamw", "no such method")


def get_config(method):
  return ConfigDict({
    "data": {"name": "digits"},
    "model": {"name": "mlp", "features": (2,)},
    "stages": {"train": {
      "steps": 2, "batch_size": 2, "eval_every": 1,
      "objective": {"name": "cross_entropy"},
      "update": {method: {"learning_rate": 1e-3}},
    }},
  })


def sweep_learning_rate(method):
  return [{}]


def sweep_seed():
  return [{}]
"""


def test_startup_ends_at_the_first_step_of_the_first_method(tmp_path):
  config = tmp_path / "ablation.py"
  config.write_text(ABLATION)
  begun = time.monotonic()
  section = _bench_startup.measure(1, config)
  elapsed = time.monotonic() - begun
  cold, warm = section.records
  measured = [cold["first_step"], warm["first_step"], cold["imports"]]
  assert all(seconds["median"] > 0 for seconds in measured)
  assert sum(seconds["median"] for seconds in measured) < elapsed
  assert [check.limit for check in section.checks] == [10.0, 6.0]


def test_a_program_that_fails_is_reported(tmp_path):
  with pytest.raises(RuntimeError, match="No module named 'no_such'"):
    _bench_startup.seconds_until(["-c", "import no_such"], tmp_path)


@pytest.fixture
def parsed():
  """absl's flags as a started program has them, restored afterwards."""
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver():
    yield flags.FLAGS


def test_main_runs_the_sections_and_counts_targets(
  tmp_path, monkeypatch, capsys, parsed
):
  asked = []
  sections = {
    "loop": lambda runs: asked.append(runs) or _section(0.96, 0.95, at_least=True),
    "startup": lambda runs: pytest.fail("not asked for"),
  }
  monkeypatch.setattr(bench, "SECTIONS", sections)
  parsed.only, parsed.runs, parsed.out = ["loop"], 7, str(tmp_path / "new")
  bench.main(["bench"])
  assert asked == [7]
  assert "1 of 1 targets met" in capsys.readouterr().out
  assert json.loads((tmp_path / "new" / "bench.json").read_text())["runs"] == 7


def test_a_section_that_does_not_exist(parsed):
  parsed.only = ["updates", "lop"]
  with pytest.raises(ConfigError, match=r"'lop'\. Did you mean 'loop'\?"):
    bench.main(["bench"])


def test_no_section(parsed):
  parsed.only = []
  with pytest.raises(ConfigError, match="at least one of loop, startup, updates"):
    bench.main(["bench"])


def test_a_folder_that_cannot_be_made_is_told_before_measuring(
  tmp_path, monkeypatch, parsed
):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(bench, "SECTIONS", {"loop": lambda runs: pytest.fail("measured")})
  parsed.only, parsed.out = ["loop"], str(tmp_path / "file")
  with pytest.raises(ConfigError, match=r"--out: .*file: File exists"):
    bench.main(["bench"])


def test_fewer_than_five_runs_are_refused(parsed):
  with pytest.raises(flags.IllegalFlagValueError, match="5"):
    parsed.runs = 4
