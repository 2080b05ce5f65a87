"""The report's tables: CSV for programs, Markdown for papers, rich for the terminal."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from gradlab.launch._report import statistics
from gradlab.launch._report.settings import show
from gradlab.launch._report.summary import Row, Summary

_SHOWN = 12


def arms_csv(summary: Summary) -> str:
  """A row per arm: settings, seed, status, final metrics, seconds, error, notes."""
  names = [column.name for column in summary.columns]
  head = ["arm", *names, "seed", "status", *summary.metrics, "seconds", "error"]
  rows = []
  for i, arm in enumerate(summary.sweep.arms):
    given = [column.values[i] for column in summary.columns]
    final = [arm.final.get(name) for name in summary.metrics]
    said = [arm.error, " ".join(arm.notes)]
    rows.append(
      [arm.name, *given, summary.seeds[i], arm.status, *final, arm.seconds, *said]
    )
  return _csv([*head, "notes"], rows)


def settings_csv(summary: Summary) -> str:
  """A row per setting: arms by status, and n, mean and interval of each metric."""
  head = [column.name for column in summary.columns]
  head += ["finished", "failed", "other", "best", "chosen"]
  for name in summary.metrics:
    head += [f"{name} n", f"{name} mean", f"{name} ci95"]
  rows = []
  for row in summary.rows:
    other = row.counts["unfinished"] + row.counts["waiting"]
    cells: list[Any] = [*row.setting.values, row.finished, row.counts["failed"], other]
    cells += [int(row.best), int(row.chosen)]
    for name in summary.metrics:
      found = row.estimates[name]
      cells += [found.n, *map(_finite, (found.mean, found.half))]
    rows.append(cells)
  return _csv(head, rows)


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(head)
  writer.writerows(rows)
  return text.getvalue()


def markdown(summary: Summary) -> str:
  """The settings over their seeds, and what validation chooses."""
  lines = [f"# {_cell(summary.title)}", "", *_table(summary, summary.rows)]
  if chosen := choice(summary):
    lines += ["", f"Chosen on {summary.validation}:", "", *_table(summary, chosen)]
  lines += ["", explanation(summary)]
  return "\n".join(lines) + "\n"


def choice(summary: Summary) -> list[Row]:
  """The chosen settings, where there is a comparison to make and a value to choose."""
  kinds = {column.numeric for column in summary.columns}
  return [row for row in summary.rows if row.chosen] if len(kinds) == 2 else []


def explanation(summary: Summary) -> str:
  """What the numbers are."""
  said = []
  if any(row.finished > 1 for row in summary.rows):
    said.append("Mean ± 95% interval (Student t) over the finished seeds.")
  if summary.main:
    better = "higher" if summary.higher else "lower"
    said.append(f"Best by {summary.main} ({better} is better).")
  if any(row.chosen for row in summary.rows):
    said.append(f"Chosen by {summary.validation} alone.")
  return " ".join(said)


def _table(summary: Summary, rows: Sequence[Row]) -> list[str]:
  head = [*(column.name for column in summary.columns), "n", *summary.metrics, ""]
  lines = [head, ["---"] * len(head)]
  for row in rows:
    values = [statistics.plus_minus(row.estimates[name]) for name in summary.metrics]
    marks = ", ".join([*marks_of(row), *filter(None, [row.remark(summary.main)])])
    lines.append([*map(show, row.setting.values), str(row.finished), *values, marks])
  return [f"| {' | '.join(map(_cell, line))} |" for line in lines]


def _cell(text: str) -> str:
  return " ".join(text.split()).replace("|", r"\|")


def marks_of(row: Row) -> list[str]:
  """What a setting is said to be: best, chosen, both or neither."""
  marks = (("best", row.best), ("chosen", row.chosen))
  return [name for name, marked in marks if marked]


def ranked(summary: Summary, rows: Sequence[Row]) -> list[Row]:
  """Best first; then those that lost seeds, then those without a number."""

  def rank(row: Row) -> tuple[bool, bool, float]:
    mean = row.estimates[summary.main].mean if summary.main else math.nan
    lost = bool(summary.main) and row.lost(summary.main) > 0
    value = -mean if summary.higher else mean
    return not math.isfinite(mean), lost, value if math.isfinite(mean) else 0.0

  return sorted(rows, key=rank)


def terminal(summary: Summary) -> Table:
  """The first settings, best first."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for column in summary.columns:
    table.add_column(column.name, justify="right" if column.numeric else "left")
  table.add_column("n", justify="right")
  names = list(filter(None, (summary.main, summary.validation)))
  for name in names:
    table.add_column(name, justify="right", no_wrap=True)
  table.add_column("")
  rows = ranked(summary, summary.rows)
  for row in rows[:_SHOWN]:
    values = [statistics.plus_minus(row.estimates[name]) for name in names]
    marks = [*marks_of(row), *filter(None, [row.remark(summary.main)])]
    cells = [*map(show, row.setting.values), str(row.finished), *values]
    style = "bold" if row.best else ""
    table.add_row(*map(Text, cells), Text(", ".join(marks)), style=style)
  if len(rows) > _SHOWN:
    table.caption = f"{len(rows) - _SHOWN} more in table.md"
  return table
