"""The report's program and loader: real runs, damaged folders, bad input."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradlab import pipeline
from gradlab.launch import report
from gradlab.launch._report import summary as report_summary
from gradlab.types import ConfigError
from tests.launch import report_folders as folders

ROOT = Path(__file__).resolve().parents[2]
RATE = "stages.train.update.adamw.learning_rate"


def summary(folder, metric=""):
  return report_summary.summarise(folder, None, metric)


def rows(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def program(*flags):
  return subprocess.run(
    [sys.executable, "-m", "gradlab.launch.report", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff\xfe\n\x00"])
def test_damage_stays_in_its_arm(tmp_path, name, damage):
  arms = [({RATE: r, "seed": 0}, 0.9) for r in (0.1, 0.2, 0.3)]
  folder = folders.write_sweep(tmp_path / "s", arms, points=3)
  (folder / "arms" / "learning_rate=0.2,seed=0" / name).write_bytes(damage + b"\n")
  report.write(folder)
  table = rows(folder / "report" / "table.csv")
  assert name in table[1]["notes"]
  assert [row["notes"] for row in table[::2]] == ["", ""]
  assert [row["learning_rate"] for row in table] == ["0.1", "0.2", "0.3"]
  assert all(row["test/accuracy"] for row in table[::2])


def test_damaged_plan_leaves_the_runs(tmp_path):
  folder = folders.write_sweep(tmp_path / "s", [({RATE: r}, 0.9) for r in (0.1, 0.2)])
  (folder / "sweep.json").write_text("{")
  found = summary(folder)
  assert found.sweep.notes == ("sweep.json cannot be read.",)
  assert [column.name for column in found.columns] == ["learning_rate"]


def test_folder_of_runs_needs_no_plan(tmp_path):
  for rate in (0.1, 0.2):
    folders.write_run(
      tmp_path / "runs" / str(rate),
      folders.config({RATE: rate}),
      **folders.measured(0.9, 0, 4),
    )
  found = summary(tmp_path / "runs")
  assert [arm.name for arm in found.sweep.arms] == ["0.1", "0.2"]
  assert found.columns[0].values == (0.1, 0.2)
  assert found.sweep.config_file == "experiments/digits.py"


def test_sweep_that_has_not_begun(tmp_path):
  folders.write_plan(tmp_path / "s", [{RATE: r, "seed": 0} for r in (0.1, 0.2)])
  report.write(tmp_path / "s")
  table = rows(tmp_path / "s" / "report" / "table.csv")
  assert [row["status"] for row in table] == ["waiting", "waiting"]


def test_bad_input_is_one_sentence(tmp_path):
  sweep = folders.write_sweep(tmp_path / "sweep", [({RATE: 0.1, "seed": 0}, 0.9)])
  (tmp_path / "empty").mkdir()
  (tmp_path / "file").write_text("")
  for flags, said in (
    ((f"--workdir={tmp_path / 'none'}",), "there is no folder"),
    ((f"--workdir={tmp_path / 'file'}",), "there is no folder"),
    ((f"--workdir={tmp_path / 'empty'}",), "holds no run"),
    ((f"--workdir={sweep}", "--metric=train/los"), "there are: train/loss, "),
    ((), "--workdir is missing"),
  ):
    done = program(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / "empty" / "report").exists()


def test_folder_that_cannot_be_written(tmp_path):
  folder = folders.write_run(tmp_path / "run", folders.config({}), result={})
  (folder / "report").write_text("in the way")
  with pytest.raises(ConfigError, match="cannot write"):
    report.write(folder)
  assert (folder / "report").read_text() == "in the way"


def test_real_runs_through_the_program(tmp_path):
  for seed in (0, 1):
    config = {
      "seed": seed,
      "data": {"name": "digits"},
      "model": {"name": "mlp", "features": (8,)},
      "stages": {
        "train": {
          "steps": 20,
          "batch_size": 32,
          "log_every": 5,
          "eval_every": 10,
          "objective": {"name": "cross_entropy"},
          "update": {"adamw": {"learning_rate": 1e-2}},
        },
        "test": {"kind": "evaluate", "objective": {"name": "cross_entropy"}},
      },
    }
    pipeline.run(config, tmp_path / "runs" / str(seed))
  done = program(f"--workdir={tmp_path / 'runs'}", "--title=Two runs")
  assert done.returncode == 0, done.stderr
  assert "test/accuracy" in done.stdout
  assert str(tmp_path / "runs" / "report" / "report.html") in done.stdout
  table = rows(tmp_path / "runs" / "report" / "table.csv")
  assert [row["seed"] for row in table] == ["0", "1"]
  for seed, row in enumerate(table):
    file = tmp_path / "runs" / str(seed) / "result.json"
    result = json.loads(file.read_text())["metrics"]
    assert float(row["test/accuracy"]) == result["test"]["accuracy"]
  page = (tmp_path / "runs" / "report" / "report.html").read_text()
  assert "<h1>Two runs</h1>" in page
