"""A worker's process: set up, given one job, and gone with who started it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

from absl import logging

from gradlab.launch._sweep import job as sweep_job
from gradlab.launch._sweep.executors import Job
from gradlab.types import Interrupted


def work(job: Job, log: Path, slot: int, slots: int) -> None:
  """Runs a job in this process.

  Args:
    job: the job.
    log: the file that its output is appended to.
    slot: which of the places for jobs this process has.
    slots: how many there are.
  """
  with log.open("ab", buffering=0) as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  asked: list[int] = []
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: asked.append(number))
  threading.Thread(target=_follow, daemon=True).start()
  logging.set_verbosity(logging.WARNING)
  os.environ |= share(os.environ, gpus(), slot, slots)
  with contextlib.suppress(Interrupted):
    sweep_job.run(job, lambda: bool(asked), cores=_cores() // slots)


def _cores() -> int:
  # macOS has no affinity
  limited = hasattr(os, "sched_getaffinity")
  return len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1


def _follow() -> None:
  """Ends this process when the one that started it has ended, in whatever way."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def gpus() -> list[str]:
  """The NVIDIA devices that this process may use."""
  given = os.environ.get("CUDA_VISIBLE_DEVICES")
  if given is not None:
    return [name for name in given.split(",") if name]
  nodes = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")]
  return sorted((name for name in nodes if name.isdigit()), key=int)


def share(
  environment: Mapping[str, str], devices: list[str], slot: int, slots: int
) -> dict[str, str]:
  """The variables that give a slot its part of the GPUs.

  Jobs beside each other get GPUs of their own where there are enough, and else share
  the memory of theirs.

  Examples:
    >>> from gradlab.launch._sweep.worker import share
    >>> share({}, ["0", "1", "2", "3"], slot=1, slots=2)
    {'CUDA_VISIBLE_DEVICES': '2,3'}
    >>> share({}, ["0"], slot=1, slots=2)
    {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.45'}
  """
  if not devices or slots == 1:
    return {}
  if len(devices) >= slots:
    each = len(devices) // slots
    mine = devices[slot * each : (slot + 1) * each]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
  if "XLA_PYTHON_CLIENT_MEM_FRACTION" in environment:
    return {}
  return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / slots:.2f}"}
