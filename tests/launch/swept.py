"""A config file with sweeps, and what a sweep's folder came to."""

import json
import os
import time
from pathlib import Path
from typing import Any

from gradlab import metrics
from gradlab.runfolder import status
from tests.launch import programs

PROGRAM = "gradlab.launch.sweep"
CONFIG = """
from ml_collections import ConfigDict
from gradlab.sweeps import chain, choices, log_uniform, product, seeds

RATE = "stages.train.update.adamw.learning_rate"


def get_config():
  loss = {"name": "squared_error"}
  return ConfigDict({
    "seed": 0,
    "data": {"name": "tests.launch.sources:linear"},
    "model": {"name": "mlp", "features": (16,), "outputs": 1},
    "stages": {
      "train": {
        "steps": STEPS, "batch_size": 8, "objective": loss, "steps_per_dispatch": 8,
        "log_every": 7, "checkpoint_every": 24,
        "update": {"adamw": {"learning_rate": 1e-2}},
      },
      "test": {"kind": "evaluate", "objective": loss},
    },
  })


def sweep_rate():
  return choices(RATE, (1e-3, 1e-2))


def sweep_seed():
  return seeds(2)


def sweep_width():
  return choices("model.features", ((8,), (16,)))


def sweep_diverging():
  return choices(RATE, (1e-2, 1e38))


def sweep_nothing():
  return []


def sweep_twice():
  return chain(seeds(2), seeds(1))


def sweep_same():
  return [{}, {"seed": 0}]


def sweep_lost():
  return choices("stages.trian.steps", (1,))


def sweep_misspelt():
  return choices("stages.train.update.adamw.lerning_rate", (1e-3,))


def sweep_bad_value():
  return choices(RATE, (-1.0,))


def sweep_no_list():
  return {"seed": 0}


def sweep_replicas():
  parallel = {"mode": "pmap", "mesh": {"data": 1}}
  return [{"parallel": parallel, "seed": seed} for seed in (0, 1)]
"""


def write(folder: Path, steps: int = 48) -> Path:
  """The config file, in ``folder``."""
  path = folder / "swept.py"
  path.write_text(CONFIG.replace("STEPS", str(steps)))
  return path


def flags(file: Path, folder: Path, sweep: str, *more: str) -> list[str]:
  return [f"--config={file}", f"--workdir={folder}", f"--sweep={sweep}", *more]


def statuses(folder: Path) -> dict[str, str]:
  """Arm -> its status; in the order of ``sweep.json``."""
  names = [arm["name"] for arm in read(folder / "sweep.json")["arms"]]
  return {name: status(folder / "arms" / name) for name in names}


def read(path: Path) -> Any:
  return json.loads(path.read_text())


def outcome(folder: Path) -> dict[str, Any]:
  """Arm -> its records and its numbers, bit for bit."""
  return {
    name: (
      (folder / "arms" / name / "metrics.jsonl").read_text(),
      (folder / "arms" / name / "metrics.csv").read_text(),
      read(folder / "arms" / name / "result.json")["metrics"],
    )
    for name in statuses(folder)
  }


def step(folder: Path) -> int:
  """The last step of any arm's metrics."""
  files = folder.glob("arms/*/metrics.jsonl")
  return max((r["step"] for file in files for r in metrics.read(file)), default=0)


def wait_for(folder: Path, wanted: int, running: programs.Running) -> None:
  """Waits until some arm's metrics have reached a step."""
  while step(folder) < wanted and not running.wait(0.02):
    pass


def descendants(pid: int) -> list[int]:
  """The processes below one, the nearest first."""
  parents: dict[int, list[int]] = {}
  for path in Path("/proc").glob("[0-9]*/stat"):
    try:
      after_name = path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
      continue
    parents.setdefault(int(after_name[1]), []).append(int(path.parent.name))
  found = [pid]
  for each in found:
    found += parents.get(each, [])
  return found[1:]


def gone(pids: list[int], seconds: float = 30.0) -> bool:
  """Whether the processes end within ``seconds``."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if not any(_alive(pid) for pid in pids):
      return True
    time.sleep(0.02)
  return False


def _alive(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


def worker_of(pid: int, marker: Path) -> int:
  """The process below ``pid`` that has the sweep's log open for its output."""
  for each in descendants(pid):
    try:
      if Path(os.readlink(f"/proc/{each}/fd/1")).is_relative_to(marker):
        return each
    except (FileNotFoundError, ProcessLookupError):
      continue
  raise AssertionError(f"no worker below {pid} writes to {marker}")
