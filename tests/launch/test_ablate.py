"""The ablation program: its table, its picture, and that it repeats itself."""

import json
import pathlib
import subprocess
import sys

import pytest
from matplotlib import image

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = '''"""Two rules on the digits."""
from gradlab.experiments import digits_ablation as full

METHODS = ("adamw", "sinkgd")
sweep_learning_rate = full.sweep_learning_rate


def get_config(method):
  config = full.get_config(method)
  config.stages.train.steps = 60
  return config


def sweep_seed():
  return full.sweep_seed()[:2]
'''


def ablate(config, workdir):
  command = [sys.executable, "-m", "gradlab.launch.ablate"]
  return subprocess.run(
    [*command, f"--config={config}", f"--workdir={workdir}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ablation")
  (folder / "two.py").write_text(FILE)
  done = ablate(folder / "two.py", folder / "first")
  assert done.returncode == 0, done.stderr
  return folder, done.stdout


def rows(folder):
  return [
    [cell.strip() for cell in line.strip("|\n ").split("|")]
    for line in (folder / "table.md").read_text().splitlines()[2:]
  ]


def test_table_reports_the_rate_chosen_on_validation(ablation):
  folder, said = ablation
  assert "Two rules on the digits." in said
  assert f"run folder: {folder / 'first'}" in said.replace("\n", "")
  for method, rate, accuracy, _ in rows(folder / "first"):
    result = json.loads((folder / "first" / method / "result.json").read_text())
    path = f"stages.train.update.{method}.learning_rate"
    by_rate = {}
    for arm in result["arms"]:
      by_rate.setdefault(arm[path], []).append(arm)
    assert {len(members) for members in by_rate.values()} == {2}

    def validation(key, by_rate=by_rate):
      return sum(arm["validation_accuracy"] for arm in by_rate[key])

    best = max(by_rate, key=validation)
    assert float(rate) == best
    tests = [100 * arm["test_accuracy"] for arm in by_rate[best]]
    mean = sum(tests) / 2
    std = abs(tests[0] - tests[1]) / 2**0.5
    assert accuracy == f"{mean:.2f} ± {std:.2f}"
    assert accuracy in said


def test_picture_shows_curves(ablation):
  pixels = image.imread(ablation[0] / "first" / "curves.png")
  assert pixels.shape[0] > 400
  assert pixels.shape[1] > 1000
  assert len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3).tolist()}) > 20


def test_finished_ablation_repeats_its_table(ablation):
  folder, said = ablation
  again = ablate(folder / "two.py", folder / "first")
  assert again.returncode == 0, again.stderr
  assert "adamw (finished)" in again.stdout
  table = [line for line in said.splitlines() if "│" in line]
  assert [line for line in again.stdout.splitlines() if "│" in line] == table


def test_ablation_run_anew_gives_the_same_numbers(ablation):
  folder, _ = ablation
  done = ablate(folder / "two.py", folder / "second")
  assert done.returncode == 0, done.stderr
  for method in ("adamw", "sinkgd"):
    first, second = (
      json.loads((folder / name / method / "result.json").read_text())
      for name in ("first", "second")
    )
    for timed in ("seconds", "compile_seconds"):
      assert first.pop(timed) != second.pop(timed)
    assert first == second
  cells = [[row[:3] for row in rows(folder / name)] for name in ("first", "second")]
  assert cells[0] == cells[1]


def test_file_that_is_no_ablation(tmp_path):
  (tmp_path / "empty.py").write_text("METHODS = ()\n")
  for file, message in (("empty.py", "has no get_config"), ("no.py", "not a Python")):
    done = ablate(tmp_path / file, tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
