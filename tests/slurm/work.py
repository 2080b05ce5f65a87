"""What the jobs of the tests run, and the launcher of theirs that is killed."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gradlab import runfolder
from gradlab.launch._slurm.executor import Slurm
from gradlab.launch._sweep.executors import Job
from gradlab.types import Interrupted

SETTINGS = {"time": 20, "cpus_per_task": 1, "mem": "1GB"}


def play(job: Job, should_stop: Callable[[], bool]) -> None:
  """Does what the arm's config says, and notes each start in ``starts``."""
  folder = Path(job.folder) / "arms" / job.arms[0]
  with (folder / "starts").open("a") as file:
    file.write("start\n")
  match job.configs[0]:
    case "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    case "raise":
      raise ValueError("no such thing")
    case "wait":
      while not (Path(job.folder) / "go").exists():
        if should_stop():
          (folder / "saved").touch()
          raise Interrupted("stopped")
        time.sleep(0.05)
  runfolder.write_json(folder / "result.json", {"metrics": {}, "seconds": 0.0})


def jobs(folder: Path, config: str = "", **arms: object) -> list[Job]:
  """One job for each arm, name -> resolved config, of a config file."""
  return [
    Job(config, str(folder), (name,), (resolved,), vmapped=False)
    for name, resolved in arms.items()
  ]


def waiting(folder: Path) -> list[Job]:
  """Four jobs that run until there is a file ``go``."""
  return jobs(folder, **dict.fromkeys("abcd", "wait"))


def main(folder: Path) -> None:
  """Submits ``waiting`` and polls for ever."""
  slurm = Slurm(folder, max_parallel=2, settings=SETTINGS, run=play, seconds=0.5)
  slurm.submit(waiting(folder))
  while True:
    slurm.poll()
    time.sleep(0.1)


if __name__ == "__main__":
  main(Path(sys.argv[1]))
