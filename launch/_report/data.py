"""What the page's scripts draw: numbers as JSON; sizes and axes are the scripts'."""

import math
from collections.abc import Iterable
from typing import Any

from gradlab.launch._report import figures as shapes
from gradlab.launch._report import style
from gradlab.launch._report.curves import Line, Panel
from gradlab.launch._report.statistics import plus_minus
from gradlab.launch._report.summary import Summary

_DIGITS = 5


def figures(summary: Summary) -> dict[str, Any]:
  """The groups, the curves and the figures of the main metric, as plain JSON."""
  steps: dict[tuple[int, ...], int] = {}
  panels = [_panel(panel, steps) for panel in summary.panels]
  single = summary.sweep.single
  return {
    "groups": [group._asdict() for group in summary.groups],
    "alone": single or len(summary.groups) == len(summary.rows),
    "settings": [row.label for row in summary.rows],
    "arms": [_arm_label(summary, i) for i in range(len(summary.sweep.arms))],
    "colours": [summary.groups[g][1:3] for g in summary.group] if not single else [],
    "steps": list(steps),
    "panels": panels,
    "main": summary.main,
    "higher": summary.higher,
    "response": _response(summary),
    "heat": _heat(summary),
    "parallel": _parallel(summary),
  }


def _arm_label(summary: Summary, i: int) -> str:
  arm = summary.sweep.arms[i]
  return arm.name if arm.status == "finished" else f"{arm.name} ({arm.status})"


def _panel(panel: Panel, steps: dict[tuple[int, ...], int]) -> dict[str, Any]:
  return {
    "metric": panel.metric,
    "split": panel.split,
    "log": panel.log,
    "arms": [_line(line, steps) for line in panel.arms],
    "means": [_line(line, steps) for line in panel.means],
  }


def _line(line: Line, steps: dict[tuple[int, ...], int]) -> dict[str, Any]:
  own = tuple(line.steps.tolist())
  found = {
    "o": line.owner,
    "g": line.group,
    "s": steps.setdefault(own, len(steps)),
    "y": _numbers(line.values.tolist()),
  }
  if line.half is not None:
    found["h"] = _numbers(line.half.tolist())
  return found


def _numbers(values: Iterable[float]) -> list[float | None]:
  """Short numbers; JSON has no NaN."""
  return [
    float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values
  ]


def _response(summary: Summary) -> dict[str, Any] | None:
  found = shapes.response(summary)
  if found is None:
    return None
  series = []
  for line in found.series:
    said = [shapes.described(summary, summary.rows[i]) for i in line.rows]
    dots = list(zip(*line.dots, strict=True)) or [(), ()]
    series.append(
      {
        "label": line.label,
        "rows": line.rows,
        "x": line.x,
        "y": _numbers(line.mean),
        "h": _numbers(line.half),
        "t": said,
        "dots": [list(dots[0]), _numbers(dots[1])],
      }
    )
  return {
    "name": found.name,
    "log": found.log,
    "names": found.names,
    "dashes": [summary.groups[summary.group[s.rows[0]]].dash for s in found.series],
    "series": series,
  }


def _heat(summary: Summary) -> dict[str, Any] | None:
  found = shapes.heat(summary)
  if found is None:
    return None
  low, high, clipped = shapes.limits(summary)
  values: list[list[float | None]] = []
  cells: list[list[str]] = []
  said: list[list[str]] = []
  for line in found.rows:
    rows = [None if i is None else summary.rows[i] for i in line]
    means = [row.estimates[summary.main].mean if row else math.nan for row in rows]
    values.append(_numbers(means))
    cells.append([f"{mean:.3g}" if math.isfinite(mean) else "" for mean in means])
    said.append([shapes.described(summary, row) if row else "no arm" for row in rows])
  best = [
    [x, y]
    for y, line in enumerate(found.rows)
    for x, i in enumerate(line)
    if i is not None and summary.rows[i].best
  ]
  return {
    "x": found.x,
    "y": found.y,
    "names": [found.x_name, found.y_name],
    "z": values,
    "cells": cells,
    "t": said,
    "best": best,
    "limits": [low, high],
    "clipped": clipped,
  }


def _parallel(summary: Summary) -> dict[str, Any] | None:
  found = shapes.parallel(summary)
  if found is None:
    return None
  low, high, clipped = shapes.limits(summary)
  lines = []
  for i, places in zip(found.rows, found.places, strict=True):
    row = summary.rows[i]
    grade = style.grade(row.estimates[summary.main].mean, low, high, summary.higher)
    lines.append(
      {
        "p": _numbers(places),
        "c": round(grade, 3),
        "t": shapes.described(summary, row),
        "m": plus_minus(row.estimates[summary.main]),
      }
    )
  return {
    "axes": [axis._asdict() for axis in found.axes],
    "lines": lines,
    "ramp": [style.ramp(i / 20) for i in range(21)],
    "limits": [low, high],
    "clipped": clipped,
  }
