"""The benchmark's numbers are what they say, and its files can be read."""

import io
import json
import types

import jax
import optax
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from gradlab.launch import bench
from gradlab.launch._bench import report
from gradlab.launch._bench import updates as bench_updates
from gradlab.launch._bench.rules import Rule
from gradlab.types import ConfigError


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


def _terminal(section):
  console = Console(width=report.WIDTH, record=True, file=io.StringIO())
  report.display(console, section)
  return console.export_text()


def test_terminal_table_of_the_rules_fits():
  rule = bench_updates.Measured(
    Rule("element-wise", optax.identity, "a_rule_of_length_20"),
    [199.0],
    [99.0],
    1.57,
    16.0,
    compilation=[11.11],
    baseline_compilation=[1.11],
    memory_ratio=1.25,
    peak_bytes=1,
  )
  text = _terminal(bench_updates.section([rule], 20_000_000))
  assert "…" not in text
  assert "a_rule_of_length_20 " in text
  assert "missed" in text


def test_a_row_without_a_target_and_a_note(tmp_path):
  section = _section(0.9, 0.95)._replace(
    rows=[("digits", "2.0", "")], checks=[None], notes=["not measured: this."]
  )
  report.write(tmp_path, report.machine(), 5, [section])
  found = json.loads((tmp_path / "bench.json").read_text())
  assert found["sections"]["loop"][0]["target"] is None
  assert found["notes"] == {"loop": ["not measured: this."]}
  assert (tmp_path / "bench.md").read_text().endswith("\nnot measured: this.\n")
  assert "loop: not measured: this." in _terminal(section)


@pytest.mark.parametrize(
  ("values", "shown"),
  [([1.234, 0.1], "0.67 (0.10-1.23)"), ([12.34], "12.3 (12.3-12.3)")],
)
def test_brief_keeps_three_digits(values, shown):
  assert report.brief(values) == shown


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
  with pytest.raises(ConfigError, match="at least one of loop, startup, updates, deep"):
    bench.main(["bench"])


def test_a_folder_that_cannot_be_made_is_told_before_measuring(
  tmp_path, monkeypatch, parsed
):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(bench, "SECTIONS", {"loop": lambda runs: pytest.fail("measured")})
  parsed.only, parsed.out = ["loop"], str(tmp_path / "file")
  with pytest.raises(ConfigError, match=r"--out: .*file: File exists"):
    bench.main(["bench"])


@pytest.mark.parametrize("names", [["updates"], ["sweep", "loop"]])
def test_fewer_than_five_runs_are_refused(parsed, names):
  parsed.only, parsed.runs = names, 4
  with pytest.raises(ConfigError, match="--runs: must be at least 5, got 4"):
    bench.main(["bench"])


def test_the_sweep_may_run_less_often(tmp_path, monkeypatch, parsed):
  asked = []
  sections = {"sweep": lambda runs: asked.append(runs) or _section(0.96, 0.95)}
  monkeypatch.setattr(bench, "SECTIONS", sections)
  parsed.only, parsed.runs, parsed.out = ["sweep"], 2, str(tmp_path)
  bench.main(["bench"])
  assert asked == [2]


def test_what_is_missing_is_left_out_unless_it_is_asked_for(monkeypatch):
  def peers(runs):
    raise ConfigError(f"peers: no PyTorch for {runs} runs.")

  monkeypatch.setattr(bench, "SECTIONS", {"peers": peers})
  monkeypatch.setattr(bench, "OPTIONAL", {"peers": lambda: "no PyTorch."})
  monkeypatch.setattr(bench, "RUNS", types.SimpleNamespace(value=5))
  section = bench.measure("peers", asked=False)
  assert section.notes == ["left out: no PyTorch."]
  assert section.checks == ()
  with pytest.raises(ConfigError, match="no PyTorch for 5 runs"):
    bench.measure("peers", asked=True)


def test_sections_that_were_measured_stay_when_a_later_one_fails(
  tmp_path, monkeypatch, parsed
):
  def fail(runs):
    raise ConfigError(f"failed before {runs} runs.")

  sections = {"loop": lambda runs: _section(0.96, 0.95), "startup": fail}
  monkeypatch.setattr(bench, "SECTIONS", sections)
  parsed.only, parsed.out = ["loop", "startup"], str(tmp_path)
  with pytest.raises(ConfigError, match="failed before"):
    bench.main(["bench"])
  found = json.loads((tmp_path / "bench.json").read_text())
  assert list(found["sections"]) == ["loop"]
