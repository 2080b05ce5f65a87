"""Slurm's commands: what is queued, and how to end it or queue it again.

Only ``squeue`` is asked for states: ``sacct`` needs a database that a cluster may lack.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from typing import NamedTuple

from gradlab.types import ConfigError

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
RUNNING = frozenset(
  {
    "COMPLETING",
    "RESIZING",
    "RUNNING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
  }
)
_ENDED = frozenset(
  {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
  }
)
_TIMEOUT = 60.0
_ASK_AGAIN = 1.0


class Row(NamedTuple):
  """A job in the queue, or one that Slurm has not forgotten yet.

  Attributes:
    name: of the job.
    state: Slurm's word for it, such as ``PENDING``.
  """

  name: str
  state: str

  @property
  def alive(self) -> bool:
    """Whether it waits or runs; what is between two lives waits."""
    return self.state not in _ENDED


def check_installed() -> None:
  """Raises ConfigError unless Slurm's commands are there."""
  for name in PROGRAMS:
    if shutil.which(name) is None:
      raise ConfigError(
        f"executor: Slurm's {name} is not on PATH; start the sweep on a machine that "
        "submits to a cluster (on Debian, apt-get install slurm-client)."
      )


def rows() -> dict[str, Row] | None:
  """All jobs of this user by id, "12" or "12_3" in an array; None without answer."""
  done = _run(
    "squeue",
    f"--user={os.getuid()}",
    "--array",
    "--noheader",
    "--states=all",
    "--format=%i|%T|%j",
  )
  if done is None:
    return None
  parts = (line.strip().split("|", 2) for line in done.splitlines())
  return {job: Row(name, state) for job, state, name in parts}


def requeue(job: str) -> bool:
  """Puts a job, running or ended, back into the queue; False if Slurm refuses."""
  return _run("scontrol", "requeue", job) is not None


def preempted(job: str) -> bool:
  """Whether Slurm has chosen the running job to make room for another."""
  shown = _run("scontrol", "show", "job", "--oneliner", job) or ""
  times = [word for word in shown.split() if word.startswith("PreemptTime=")]
  return bool(times) and times[0] != "PreemptTime=None"


def end(jobs: Iterable[str], patience: float) -> None:
  """Cancels the jobs that wait; asks those that run to save and end, and waits.

  Args:
    jobs: their ids.
    patience: seconds after which what still runs is cancelled; a minute later this
      returns in any case.
  """
  wanted, deadline = set(jobs), time.monotonic() + patience
  while wanted and time.monotonic() < deadline + _TIMEOUT:
    queue = rows()
    if queue is not None:
      wanted = {job for job in wanted if job in queue and queue[job].alive}
      patient = time.monotonic() < deadline
      running = {job for job in wanted if patient and queue[job].state in RUNNING}
      # first what waits, or it would get the place of what ends
      if dropped := wanted - running:
        _run("scancel", *sorted(dropped))
      # Again each time: a job that was about to start did not hear it. Its one step is
      # named, for a signal to a job of an array has scancel try for minutes.
      if running:
        _run("scancel", "--signal=TERM", *(f"{job}.0" for job in sorted(running)))
    if wanted:
      time.sleep(_ASK_AGAIN)


def _run(*command: str) -> str | None:
  """What a command prints; None if it fails."""
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=_TIMEOUT, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout
