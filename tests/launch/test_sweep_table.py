"""The live table of a sweep: what it says of each arm, and the time that is left."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gradlab.arms import Arm
from gradlab.launch._sweep.table import Board, Line, clock, read

STEPS = 400


def make(folder: Path, name: str) -> Arm:
  config = {"stages": {"train": {"steps": 300}, "tune": {"steps": 100}, "test": {}}}
  (folder / name).mkdir()
  return Arm(name, folder / name, config)


def log(arm: Arm, step: int, torn: str = "") -> None:
  record = {"step": step, "split": "train", "loss": 0.51234, "hyperparams/x": 1.0}
  with (arm.folder / "metrics.jsonl").open("a") as file:
    file.write(json.dumps(record) + "\n" + torn)


def write(arm: Arm, name: str, value: Any) -> None:
  (arm.folder / name).write_text(json.dumps(value))


def board(arms: list[Arm], height: int = 40, terminal: bool = True) -> Board:
  console = Console(
    file=io.StringIO(), width=100, height=height, force_terminal=terminal
  )
  return Board(arms, console)


def text(shown: Board, *, everything: bool = False) -> list[str]:
  console = Console(file=io.StringIO(), width=100, height=40)
  console.print(shown.shown(everything=everything))
  assert isinstance(console.file, io.StringIO)
  return [line.strip() for line in console.file.getvalue().splitlines()]


def test_what_a_folder_says(tmp_path: Path) -> None:
  arm = make(tmp_path, "a")
  assert read(arm, running=False) == Line("waiting", 0, "")
  log(arm, 100)
  log(arm, 150, torn='{"step": 20')
  assert read(arm, running=True) == Line("running", 150, "train: loss 0.5123")
  write(arm, "error.json", {"error": "loss is not finite", "type": "NonFiniteError"})
  assert read(arm, running=True) == Line("failed", 150, "loss is not finite")
  numbers = {"train": {"loss": 0.5}, "test": {"accuracy": "nan"}}
  write(arm, "result.json", {"metrics": numbers, "seconds": 1.0})
  assert read(arm, running=False) == Line("finished", STEPS, "test: accuracy nan")


def test_time_left_is_of_the_steps_seen(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  now = [1000.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  first, second = make(tmp_path, "a"), make(tmp_path, "b")
  log(first, 100)
  shown = board([first, second])
  shown.update({"a"})
  assert shown.summary() == "1 running, 1 waiting"
  now[0] += 10.0
  log(first, 200)
  shown.update({"a"})
  # 100 steps took 10 s; a has 200 left, and both together 600
  (line,) = [line for line in text(shown) if line.startswith("a ")]
  assert line.split()[:4] == ["a", "running", "200/400", "0:20"]
  assert shown.summary() == "1 running, 1 waiting; 1:00 left"


def test_what_goes_on_stands_first_and_the_rest_is_counted(tmp_path: Path) -> None:
  arms = [make(tmp_path, f"arm{i}") for i in range(20)]
  write(arms[3], "error.json", {"error": "lost", "type": "Lost"})
  shown = board(arms, height=12)
  shown.update({"arm7"})
  lines = text(shown)
  names = [line.split()[0] for line in lines if line.startswith("arm")]
  assert names[1:3] == ["arm7", "arm3"]
  assert len(names) == 1 + 5
  assert lines[-1] == "1 running, 1 failed, 18 waiting; 15 more not shown"
  assert sum("arm" in line for line in text(shown, everything=True)) == 1 + 20


def test_without_a_terminal_each_end_is_a_line(tmp_path: Path) -> None:
  arm = make(tmp_path, "a")
  shown = board([arm], terminal=False)
  with shown:
    shown.update(set())
    write(arm, "result.json", {"metrics": {"test": {"loss": 0.25}}, "seconds": 1.0})
    shown.update(set())
    shown.update(set())
  file = shown.console.file
  assert isinstance(file, io.StringIO)
  assert file.getvalue() == "finished a: test: loss 0.25\n"


@pytest.mark.parametrize(
  ("seconds", "said"), [(0.4, "0:00"), (59.6, "1:00"), (3725.0, "1:02:05")]
)
def test_clock(seconds: float, said: str) -> None:
  assert clock(seconds) == said
