"""The arms of a sweep while it runs: one line each, from what their folders say."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gradlab import runfolder
from gradlab.arms import Arm

STYLES = {"running": "cyan", "failed": "red", "waiting": "dim", "finished": "green"}
_TAIL = 4096


class Line(NamedTuple):
  """What the table says of an arm.

  Attributes:
    status: "running", "failed", "waiting" or "finished".
    step: the last step that its metrics have.
    said: its last or final numbers, or its error.
  """

  status: str
  step: int
  said: str


def steps_of(arm: Arm) -> int:
  """The steps of all train stages."""
  stages = arm.config["stages"].values()
  return sum(int(stage.get("steps", 0)) for stage in stages)


def read(arm: Arm, running: bool) -> Line:
  """What an arm's folder says now."""
  status = runfolder.status(arm.folder)
  if status == "finished":
    result = json.loads((arm.folder / "result.json").read_text())
    return Line(status, steps_of(arm), _numbers(result["metrics"]))
  record = _last_record(arm.folder / "metrics.jsonl")
  step = int(record.get("step", 0))
  if status == "failed":
    error = json.loads((arm.folder / "error.json").read_text())
    return Line(status, step, error["error"])
  shown = {n: v for n, v in record.items() if n not in ("step", "split")}
  said = _numbers({record["split"]: shown}) if record else ""
  return Line("running" if running else "waiting", step, said)


def _numbers(metrics: dict[str, dict[str, Any]]) -> str:
  """The last stage's numbers, short."""
  stage, values = next(reversed(metrics.items()), ("", {}))
  shown = {n: v for n, v in values.items() if "/" not in n}
  return f"{stage}: " + "  ".join(f"{n} {float(v):.4g}" for n, v in shown.items())


def _last_record(path: Path) -> dict[str, Any]:
  """The last whole line of a metrics file, read from its end."""
  try:
    with path.open("rb") as file:
      file.seek(0, 2)
      file.seek(max(0, file.tell() - _TAIL))
      lines = file.read().split(b"\n")[:-1]
  except FileNotFoundError:
    return {}
  for line in reversed(lines):
    try:
      return dict(json.loads(line))
    except ValueError:
      continue
  return {}


class Board:
  """Shows the arms while they run; in a file or a pipe, a line when one ends."""

  def __init__(self, arms: Sequence[Arm], console: Console) -> None:
    self._arms, self.console = arms, console
    self._begun = time.monotonic()
    self._first: dict[str, tuple[float, int]] = {}
    self._lines: dict[str, Line] = {}
    self._live = Live(console=console, auto_refresh=False, transient=True)

  def __enter__(self) -> "Board":
    if self.console.is_terminal:
      self._live.__enter__()
    return self

  def __exit__(self, *_: object) -> None:
    if self.console.is_terminal:
      self._live.__exit__(None, None, None)

  def update(self, running: set[str]) -> dict[str, Line]:
    """Reads the folders of the arms that are not over, and shows them."""
    for arm in self._arms:
      before = self._lines.get(arm.name)
      if before and before.status in ("finished", "failed"):
        continue
      line = self._lines[arm.name] = read(arm, arm.name in running)
      if line.status == "running":
        self._first.setdefault(arm.name, (time.monotonic(), line.step))
      over = line.status in ("finished", "failed")
      if over and before and not self.console.is_terminal:
        self.console.print(f"{line.status} {arm.name}: {line.said}", soft_wrap=True)
    if self.console.is_terminal:
      self._live.update(self.shown(), refresh=True)
    return self._lines

  def shown(self, *, everything: bool = False) -> RenderableType:
    """The table; while it runs, as many lines as the terminal has."""
    order = list(self._arms)
    if not everything:
      rank = {status: i for i, status in enumerate(STYLES)}
      order.sort(key=lambda arm: rank[self._lines[arm.name].status])
    room = len(order) if everything else max(self.console.height - 7, 1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=not everything)
    table.add_column("arm", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    table.add_column("last numbers", ratio=1)
    for arm in order[:room]:
      line = self._lines[arm.name]
      table.add_row(
        arm.name,
        Text(line.status, style=STYLES[line.status]),
        f"{line.step}/{steps_of(arm)}",
        self._left(arm, line),
        Text(line.said, overflow="ellipsis", no_wrap=not everything),
      )
    hidden = len(order) - room
    said = self.summary() + (f"; {hidden} more not shown" if hidden > 0 else "")
    table.caption, table.caption_justify = said, "left"
    return table

  def summary(self) -> str:
    """How many arms stand where, and the time that is left for all."""
    found = [line.status for line in self._lines.values()]
    counts = ", ".join(f"{found.count(s)} {s}" for s in STYLES if found.count(s))
    left = self._time_left()
    return f"{counts}; {clock(left)} left" if left is not None else counts

  def _left(self, arm: Arm, line: Line) -> str:
    if line.status != "running" or arm.name not in self._first:
      return ""
    since, at = self._first[arm.name]
    done = line.step - at
    seconds = time.monotonic() - since
    return clock(seconds * (steps_of(arm) - line.step) / done) if done > 0 else ""

  def _time_left(self) -> float | None:
    """From the steps that this program has seen done, of all arms together."""
    open_arms = [
      arm
      for arm in self._arms
      if self._lines[arm.name].status in ("running", "waiting")
    ]
    done = sum(
      self._lines[name].step - at
      for name, (_, at) in self._first.items()
      if self._lines[name].status != "failed"
    )
    if not open_arms or done <= 0:
      return None
    left = sum(steps_of(arm) - self._lines[arm.name].step for arm in open_arms)
    return (time.monotonic() - self._begun) * left / done


def clock(seconds: float) -> str:
  """Hours, minutes and seconds.

  Examples:
    >>> from gradlab.launch._sweep.table import clock
    >>> clock(59.6), clock(3725)
    ('1:00', '1:02:05')
  """
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
