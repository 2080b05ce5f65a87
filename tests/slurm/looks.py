"""What the tests see of a sweep's folder and of its jobs."""

import json
from pathlib import Path

from gradlab.launch._slurm import queue


def ids(folder: Path) -> list[str]:
  """The jobs that ``jobs.json`` knows, in order."""
  stored = json.loads((folder / "slurm/jobs.json").read_text())["submissions"]
  return [
    f"{s['id']}_{index}" if len(s["arms"]) > 1 else s["id"]
    for s in stored
    for index in range(len(s["arms"]))
  ]


def alive(folder: Path) -> list[str]:
  """Those that wait or run."""
  rows = queue.rows()
  assert rows is not None
  return [job for job in ids(folder) if job in rows and rows[job].alive]


def read(folder: Path, name: str) -> list[str]:
  """The file ``name`` of each arm that has one."""
  return [path.read_text() for path in sorted(folder.glob(f"arms/*/{name}"))]


def starts(arm: Path) -> int:
  """The starts in the log that the arm's folder leads to."""
  assert (arm / "log.out").is_symlink()
  assert (arm / "log.err").is_symlink()
  return (arm / "log.out").read_text().count("Starting with")
