"""Learning curves: a panel per metric and split, a line per arm and per setting."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gradlab.launch._report import statistics, style
from gradlab.launch._report.load import Arm, Curves
from gradlab.launch._report.settings import Setting

MOST_POINTS = 300
_FIRST = ("loss", "accuracy")
_SPLITS = ("train", "validation")


class Line(NamedTuple):
  """A curve.

  Attributes:
    owner: index of the arm, or of the setting whose mean it is.
    group: index of the group that gives it its colour.
    steps: [points].
    values: [points].
    half: half the width of the 95% interval, [points]; None of an arm.
  """

  owner: int
  group: int
  steps: np.ndarray
  values: np.ndarray
  half: np.ndarray | None = None


class Panel(NamedTuple):
  """The curves of one metric; the means are empty if no setting has two arms."""

  metric: str
  split: str
  arms: list[Line]
  means: list[Line]

  @property
  def log(self) -> bool:
    """Whether the values are positive and more than two decades apart."""
    found = np.concatenate([line.values for line in self.means or self.arms])
    found = found[np.isfinite(found)]
    return bool(found.size and found.min() > 0 and found.max() > 100 * found.min())


def of_run(arm: Arm) -> tuple[list[style.Group], list[Panel]]:
  """A panel per metric, with a line for each split."""
  splits = _ordered({split for _, split in arm.curves}, _SPLITS)
  panels = []
  for metric in _ordered({metric for metric, _ in arm.curves}, _FIRST):
    lines = [
      Line(0, number, *_points(arm.curves[metric, split]))
      for number, split in enumerate(splits)
      if (metric, split) in arm.curves
    ]
    panels.append(Panel(metric, "", lines, []))
  return style.plain(splits), panels


def of_sweep(
  arms: Sequence[Arm], settings: Sequence[Setting], group: Sequence[int]
) -> list[Panel]:
  """A panel per metric and split; a mean is of the arms that have not failed."""
  repeated = any(len(setting.arms) > 1 for setting in settings)
  panels = []
  for metric, split in _panels([arm.curves for arm in arms]):
    lines: list[Line] = []
    means: list[Line] = []
    for number, setting in enumerate(settings):
      own = {
        i: Line(i, group[number], *_points(arms[i].curves[metric, split]))
        for i in setting.arms
        if (metric, split) in arms[i].curves
      }
      lines += own.values()
      counted = [line for i, line in own.items() if arms[i].status != "failed"]
      if repeated and counted:
        means.append(_mean(number, counted))
    panels.append(Panel(metric, split, lines, means))
  return panels


def _panels(found: Sequence[Curves]) -> list[tuple[str, str]]:
  names = {key for curves in found for key in curves}
  metrics = _ordered({metric for metric, _ in names}, _FIRST)
  splits = _ordered({split for _, split in names}, _SPLITS)
  return [(m, s) for m in metrics for s in splits if (m, s) in names]


def _ordered(names: set[str], first: Sequence[str]) -> list[str]:
  """The well-known names, then the others; hyperparameters come last."""

  def rank(name: str) -> tuple[bool, int, str]:
    known = [name.split("/")[-1] == f for f in first]
    place = known.index(True) if True in known else len(first)
    return name.startswith("hyperparams/"), place, name

  return sorted(names, key=rank)


def _points(curve: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values, at most ``MOST_POINTS`` of them, the last included."""
  steps = np.asarray(sorted(curve))
  if len(steps) > MOST_POINTS:
    steps = steps[np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int)]
  return steps, np.asarray([curve[step] for step in steps.tolist()], np.float64)


def _mean(owner: int, lines: Sequence[Line]) -> Line:
  steps = lines[0].steps
  if any(not np.array_equal(line.steps, steps) for line in lines):
    steps = np.unique(np.concatenate([line.steps for line in lines]))
  values = np.full((len(lines), len(steps)), np.nan)
  for row, line in zip(values, lines, strict=True):
    row[np.searchsorted(steps, line.steps)] = line.values
  mean, half, _ = statistics.band(values)
  return Line(owner, lines[0].group, steps, mean, half)
