"""The sweep's benchmark runs the arms that it says, both ways."""

import json

import pytest

from gradlab.launch._bench import sweep as bench_sweep

TINY = bench_sweep.Sizes(rates=1, seeds=2, steps=3)


def test_a_sweep_and_a_separate_run_finish_the_same_arms(tmp_path):
  bench = bench_sweep.Bench(tmp_path, TINY)
  assert bench.sweep() > 0
  described = json.loads((tmp_path / "run_1" / "sweep.json").read_text())
  arms = [arm["overrides"] for arm in described["arms"]]
  assert arms == TINY.arms()
  assert len(arms) == 2
  assert bench.separate(arms[1:]) > 0
  [folder] = [
    path
    for path in (tmp_path / "run_1" / "arms").iterdir()
    if json.loads((path / "config.json").read_text())["seed"] == 1
  ]
  separate = tmp_path / "run_2" / "config.json"
  assert json.loads(separate.read_text()) == json.loads(
    (folder / "config.json").read_text()
  )


def test_an_arm_that_does_not_finish_is_an_error(tmp_path):
  bench = bench_sweep.Bench(tmp_path, TINY)
  with pytest.raises(RuntimeError, match="0 of 2 arms finished"):
    bench._check(iter([tmp_path]), 2)


def test_the_first_sweep_is_cold_and_the_first_separate_run_does_not_count(
  monkeypatch,
):
  calls = []

  def sweep(self):
    calls.append("sweep")
    return 30.0 if len(calls) == 1 else 20.0

  def separate(self, arms):
    calls.append(len(arms))
    return 300.0

  monkeypatch.setattr(bench_sweep.Bench, "sweep", sweep)
  monkeypatch.setattr(bench_sweep.Bench, "separate", separate)
  section = bench_sweep.measure(2)
  assert calls == ["sweep", "sweep", "sweep", 1, 64]
  warm, cold = section.records
  assert warm["ratio"]["runs"] == [15.0, 15.0]
  assert cold["ratio"]["runs"] == [10.0]
  assert section.checks == [(15.0, 12.0, True), None]
  assert [row[2] for row in section.rows] == ["2", "1"]
