"""The report's numbers, tables and pictures, and folders that are not whole."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from scipy import stats

from gradlab.launch import report
from gradlab.launch._report import figures
from gradlab.launch._report import summary as report_summary
from gradlab.types import ConfigError
from tests.launch import report_folders as folders

ROOT = Path(__file__).resolve().parents[2]
UPDATE = "stages.train.update"
RATE = f"{UPDATE}.adamw.learning_rate"


def summary(folder, metric=""):
  return report_summary.summarise(folder, None, metric)


def rows(path):
  with path.open() as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
  """Two rules, two rates, three seeds; the last rate of the second one is troubled."""
  skills = {("adan", 0.1): 0.9, ("adan", 0.2): 0.7, ("adamw", 0.1): 0.6}
  arms = [
    (
      {UPDATE: {rule: {}}, f"{UPDATE}.{rule}.learning_rate": rate, "seed": seed},
      skills.get((rule, rate), 0.95),
    )
    for rule in ("adan", "adamw")
    for rate in (0.1, 0.2)
    for seed in range(3)
  ]
  folder = folders.write_sweep(tmp_path_factory.mktemp("report") / "sweep", arms)
  failed, unfinished, waiting = sorted((folder / "arms").glob("update=adamw,*=0.2,*"))
  (failed / "result.json").unlink()
  (failed / "error.json").write_text('{"error": "loss is <b>not</b> finite."}')
  (unfinished / "result.json").unlink()
  for file in waiting.iterdir():
    file.unlink()
  waiting.rmdir()
  return folder


def test_settings_table_leaves_failed_arms_out_and_counts_them(sweep):
  written = report.write(sweep)
  assert written[0] == sweep / "report" / "report.html"
  assert all(path.exists() for path in written)
  table = rows(sweep / "report" / "settings.csv")
  assert [row["update"] for row in table] == ["adan", "adan", "adamw", "adamw"]
  assert [row["finished"] for row in table] == ["3", "3", "3", "0"]
  assert [(row["failed"], row["other"]) for row in table][-1] == ("1", "2")
  found = summary(sweep)
  first = [found.sweep.arms[i].final["test/accuracy"] for i in range(3)]
  assert float(table[0]["test/accuracy mean"]) == pytest.approx(np.mean(first))
  t = stats.t.ppf(0.975, 2)
  half = t * np.std(first, ddof=1) / 3**0.5
  assert float(table[0]["test/accuracy ci95"]) == pytest.approx(half)
  assert table[3]["test/accuracy mean"] == ""
  assert [row["best"] for row in table] == ["1", "0", "0", "0"]
  # the rate of each rule by validation
  assert [row["chosen"] for row in table] == ["1", "0", "1", "0"]


def test_arm_table_and_markdown(sweep):
  report.write(sweep)
  table = rows(sweep / "report" / "table.csv")
  assert len(table) == 12
  assert [row["status"] for row in table].count("finished") == 9
  assert [row["status"] for row in table[-3:]] == ["failed", "unfinished", "waiting"]
  assert table[-3]["error"] == "loss is <b>not</b> finite."
  assert float(table[0]["seconds"]) == 12.5
  text = (sweep / "report" / "table.md").read_text()
  lines = [line for line in text.splitlines() if line.startswith("| ad")]
  assert len(lines) == 4 + 2
  assert "Chosen on train/accuracy:" in text
  assert lines[3].endswith("1 failed, 1 unfinished, 1 waiting |")


def test_one_lost_seed_takes_a_setting_out_of_the_choice(tmp_path):
  arms = [
    ({RATE: r, "seed": s}, k) for r, k in ((0.1, 0.9), (0.2, 0.6)) for s in (0, 1)
  ]
  folder = folders.write_sweep(tmp_path / "s", arms)
  file = folder / "arms" / "learning_rate=0.1,seed=1" / "result.json"
  result = json.loads(file.read_text())
  result["metrics"]["test"] = {"accuracy": "nan", "loss": "inf"}
  file.write_text(json.dumps(result))
  found = summary(folder)
  better, worse = found.rows
  assert better.estimates["test/accuracy"].n == 1
  assert better.remark("test/accuracy") == "1 not finite"
  assert not better.best
  assert worse.best


def test_metric_is_chosen_or_asked_for(sweep):
  assert summary(sweep).main == "test/accuracy"
  assert summary(sweep).validation == "train/accuracy"
  by_loss = summary(sweep, "test/loss")
  assert not by_loss.higher
  assert by_loss.rows[0].best
  with pytest.raises(
    ConfigError, match=r"no 'test/acuracy'; there are: test/accuracy, "
  ):
    summary(sweep, "test/acuracy")


def test_mean_of_curves_leaves_failed_arms_out(sweep):
  found = summary(sweep)
  panel = next(p for p in found.panels if (p.metric, p.split) == ("loss", "validation"))
  assert len(panel.arms) == 11
  curves = [found.sweep.arms[i].curves["loss", "validation"] for i in range(3)]
  steps = sorted(curves[0])
  mean = np.mean([[curve[step] for step in steps] for curve in curves], axis=0)
  assert panel.means[0].steps.tolist() == steps
  np.testing.assert_allclose(panel.means[0].values, mean)
  # of the last setting one run goes on, one failed and one waits
  alone = found.sweep.arms[10].curves["loss", "validation"]
  np.testing.assert_array_equal(panel.means[3].values, [alone[step] for step in steps])
  assert np.isnan(panel.means[3].half).all()


def test_colours_follow_the_choice_and_dashes_the_rate(sweep):
  found = summary(sweep)
  first, second, third, _ = found.groups
  assert first.light == second.light != third.light
  assert [group.dash for group in found.groups] == ["solid", "dash"] * 2
  assert found.legend == "update, learning_rate"


def test_figures_depend_on_how_much_is_swept(sweep, tmp_path):
  found = summary(sweep)
  heat = figures.heat(found)
  assert heat is not None
  assert (heat.x, heat.y) == (["0.1", "0.2"], ["adan", "adamw"])
  assert heat.rows == [[0, 1], [2, 3]]
  assert figures.parallel(found) is None
  names = {path.name for path in report.write(sweep)}
  assert {"curves.png", "settings.png", "heatmap.png"} <= names
  arms = [
    ({RATE: r, "stages.train.batch_size": b, "model.width": w}, 0.9)
    for r in (0.1, 0.2)
    for b in (32, 64)
    for w in (8, 16)
  ]
  folder = folders.write_sweep(tmp_path / "three", arms, points=3)
  three = summary(folder)
  parallel = figures.parallel(three)
  assert parallel is not None
  assert [axis.name for axis in parallel.axes] == [
    "learning_rate",
    "batch_size",
    "width",
    "test/accuracy",
  ]
  assert parallel.places[-1][-1] == 1.0
  assert three.rows[parallel.rows[-1]].best
  assert {path.name for path in report.write(folder)} >= {"parallel.png"}


def test_stale_figures_go(sweep):
  stale = sweep / "report" / "parallel.png"
  report.write(sweep)
  stale.write_bytes(b"")
  report.write(sweep)
  assert not stale.exists()
  assert not list((sweep / "report").glob("*.tmp"))


def test_pictures_show_something(sweep):
  for path in report.write(sweep):
    if path.suffix == ".png":
      pixels = image.imread(path)
      assert min(pixels.shape[:2]) > 150
      thinned = pixels[::5, ::5, :3].reshape(-1, 3).tolist()
      assert len({tuple(pixel) for pixel in thinned}) > 20


def test_setting_that_a_method_lacks_has_its_place_in_the_grid(tmp_path):
  arms = [({UPDATE: {"adan": {}}, f"{UPDATE}.adan.b1": b}, 0.9) for b in (0.8, 0.9)]
  folder = folders.write_sweep(tmp_path / "s", [*arms, ({UPDATE: {"sgd": {}}}, 0.5)])
  found = summary(folder)
  heat = figures.heat(found)
  assert heat is not None
  assert heat.x == ["0.8", "0.9", "unset"]
  assert heat.rows == [[0, 1, None], [None, None, 2]]
  assert '<td class="number" data-value="">unset</td>' in report.write(folder)[
    0
  ].read_text("utf-8")
