"""All that a report says, before it is a table or a picture."""

import difflib
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from gradlab.launch._report import curves, load, settings, statistics, style
from gradlab.types import ConfigError


class Row(NamedTuple):
  """A setting over its seeds.

  Attributes:
    setting: its values and its arms.
    estimates: metric -> mean over the finished arms.
    counts: status -> number of arms.
    best: whether the main metric is best here.
    chosen: whether validation chooses it.
  """

  setting: settings.Setting
  estimates: dict[str, statistics.Estimate]
  counts: dict[str, int]
  best: bool = False
  chosen: bool = False

  @property
  def label(self) -> str:
    return settings.label(self.setting.values)

  @property
  def finished(self) -> int:
    return self.counts["finished"]

  def lost(self, metric: str) -> int:
    """How many arms failed or ended with a metric that is not finite."""
    return self.counts["failed"] + self.estimates[metric].nonfinite

  def remark(self, metric: str) -> str:
    """What the number of seeds does not say."""
    said = [f"{n} {name}" for name, n in self.counts.items() if n and name != _DONE]
    if left := self.estimates[metric].nonfinite if metric else 0:
      said.append(f"{left} not finite")
    return ", ".join(said)


class Summary(NamedTuple):
  """What is shown.

  Attributes:
    title: of the report.
    sweep: the arms.
    columns: what is swept, the seed apart.
    seeds: of the arms.
    metrics: all final ones, "stage/name".
    main: the metric that ranks; "" while no arm is finished.
    validation: the train stage's metric of that name; "" where ``main`` is no test.
    rows: the settings.
    legend: what the groups' labels are values of.
    groups: the lines of the figures, and ``group`` which one each setting is in.
    panels: learning curves.
  """

  title: str
  sweep: load.Sweep
  columns: list[settings.Column]
  seeds: tuple[settings.Value, ...]
  metrics: list[str]
  main: str
  validation: str
  rows: list[Row]
  legend: str
  groups: list[style.Group]
  group: list[int]
  panels: list[curves.Panel]

  @property
  def higher(self) -> bool:
    return statistics.higher_is_better(self.main)


_DONE = "finished"


def summarise(folder: pathlib.Path, title: str | None, metric: str) -> Summary:
  """Reads a folder and works out its report.

  Args:
    folder: of a run or a sweep.
    title: the report's; None names the config file, or else the folder.
    metric: the main one, "stage/name"; "" takes the last stage's accuracy or loss.

  Raises:
    ConfigError: a folder without runs, or an unknown metric.
  """
  sweep = load.load(folder)
  columns, seeds = settings.swept(sweep.arms)
  metrics = _metrics(sweep.arms)
  main = _main_metric(metrics, metric)
  validation = _validation(sweep.arms, main, metrics)
  rows = [_row(sweep, s, metrics) for s in settings.settings(columns, len(sweep.arms))]
  rows = _mark(rows, columns, main, validation)
  legend, groups, group = style.groups(columns, [row.setting for row in rows])
  if sweep.single:
    groups, panels = curves.of_run(sweep.arms[0])
  else:
    panels = curves.of_sweep(sweep.arms, [row.setting for row in rows], group)
  named = title or pathlib.Path(sweep.config_file).stem or folder.absolute().name
  first = [name for name in (main, validation) if name]
  return Summary(
    named,
    sweep,
    columns,
    seeds,
    [*first, *(name for name in metrics if name not in first)],
    main,
    validation,
    rows,
    legend,
    groups,
    group,
    panels,
  )


def split_of(arms: Sequence[load.Arm], stage: str) -> str:
  """The split that a stage's final numbers are of; "" if no config says."""
  for arm in arms:
    try:
      found = (arm.config or {})["stages"][stage]
      return "validation" if found["kind"] == "train" else str(found.get("split", ""))
    except (AttributeError, KeyError, TypeError):
      continue
  return ""


def _metrics(arms: Sequence[load.Arm]) -> list[str]:
  """All final metrics, the last stage's first."""
  found = dict.fromkeys(name for arm in arms for name in arm.final)
  stages = list(dict.fromkeys(name.partition("/")[0] for name in found))
  return sorted(found, key=lambda name: -stages.index(name.partition("/")[0]))


def _main_metric(metrics: Sequence[str], asked: str) -> str:
  if asked and asked not in metrics:
    if not metrics:
      raise ConfigError(f"--metric: no {asked!r}: no finished run has a metric yet.")

    def distance(name: str) -> float:
      return -difflib.SequenceMatcher(None, asked, name).ratio()

    there = ", ".join(sorted(metrics, key=distance))
    raise ConfigError(f"--metric: there is no {asked!r}; there are: {there}.")
  if asked or not metrics:
    return asked
  last = [name for name in metrics if name.split("/")[0] == metrics[0].split("/")[0]]
  for ending in ("accuracy", "loss"):
    for name in last:
      if name.split("/")[-1] == ending:
        return name
  return last[0]


def _validation(arms: Sequence[load.Arm], main: str, metrics: Sequence[str]) -> str:
  stage, _, name = main.partition("/")
  if split_of(arms, stage) in ("validation", ""):
    return ""
  for other in metrics:
    before, _, same = other.partition("/")
    if same == name and split_of(arms, before) == "validation":
      return other
  return ""


def _row(sweep: load.Sweep, setting: settings.Setting, metrics: Sequence[str]) -> Row:
  arms = [sweep.arms[i] for i in setting.arms]
  done = [arm for arm in arms if arm.status == _DONE]
  counts = {name: sum(a.status == name for a in arms) for name in load.STATUSES}
  estimates = {
    name: statistics.estimate([a.final[name] for a in done if name in a.final])
    for name in metrics
  }
  return Row(setting, estimates, counts)


def _mark(
  rows: list[Row], columns: Sequence[settings.Column], main: str, validation: str
) -> list[Row]:
  """Marks the best setting, and what validation chooses per choice."""
  if not main or len(rows) < 2:
    return rows
  best = best_of(rows, range(len(rows)), main)
  chosen: set[int] = set()
  if validation and any(column.numeric for column in columns):
    kinds: dict[tuple[settings.Value, ...], list[int]] = {}
    for i, row in enumerate(rows):
      pairs = zip(columns, row.setting.values, strict=True)
      kinds.setdefault(tuple(v for c, v in pairs if not c.numeric), []).append(i)
    found = (best_of(rows, members, validation) for members in kinds.values())
    chosen = {i for i in found if i is not None}
  return [
    row._replace(best=i == best, chosen=i in chosen) for i, row in enumerate(rows)
  ]


def best_of(rows: Sequence[Row], members: Sequence[int], metric: str) -> int | None:
  """The member with the best mean; one that lost seeds only if all did."""
  sign = -1 if statistics.higher_is_better(metric) else 1
  able = [i for i in members if math.isfinite(rows[i].estimates[metric].mean)]
  keys = {
    i: (rows[i].lost(metric) > 0, sign * rows[i].estimates[metric].mean) for i in able
  }
  return min(able, key=keys.__getitem__) if able else None
