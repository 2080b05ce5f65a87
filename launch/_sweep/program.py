"""The sweep program: its flags, its lock, and the loop that follows the jobs."""

import contextlib
import fcntl
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags
from rich.console import Console

from gradlab import pipeline, runfolder, schema
from gradlab.arms import Arm
from gradlab.launch import _config_flag, _main, report
from gradlab.launch._sweep import plan
from gradlab.launch._sweep.executors import Executor, Job
from gradlab.launch._sweep.local import Local
from gradlab.launch._sweep.table import Board, Line
from gradlab.types import ConfigError, Interrupted

CONFIG = _config_flag.define_config()
WORKDIR = flags.DEFINE_string(
  "workdir", "", "The sweep's folder; default: runs/FILE_SWEEPS."
)
SWEEP = flags.DEFINE_list("sweep", [], "Sweeps of the config file; their product.")
EXECUTOR = flags.DEFINE_enum(
  "executor", "local", ["local", "slurm"], "What runs the jobs."
)
MAX_PARALLEL = flags.DEFINE_integer("max_parallel", 1, "Jobs at a time.", lower_bound=1)
VMAP = flags.DEFINE_enum(
  "vmap", "auto", ["never", "auto", "always"], "Whether arms become one program."
)
MEMORY = flags.DEFINE_float(
  "memory_gib", None, "What a vmapped batch may use of a device; default: what it has."
)
RETRY = flags.DEFINE_bool("retry_failed", False, "Run failed arms again.")
SLURM = flags.DEFINE_string(
  "slurm", "", "Slurm's settings, such as partition=gpu,time=60."
)
_POLL_SECONDS = 0.25


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Holds the sweep's folder; a second sweep on it says so and leaves."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "sweep.lock").open("a+")
  except OSError as error:
    raise ConfigError(f"--workdir: {folder}: {error.strerror}.") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise ConfigError(
        f"--workdir: another sweep ({file.read().strip() or 'starting'}) works on "
        f"{folder}; wait for it, or choose another folder."
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    yield


def _executor(folder: Path) -> Executor:
  if EXECUTOR.value == "local":
    return Local(folder, max_parallel=MAX_PARALLEL.value)
  from gradlab.launch._slurm.executor import Slurm
  from gradlab.launch._slurm.settings import parse_settings

  settings = parse_settings(SLURM.value)
  return Slurm(folder, max_parallel=MAX_PARALLEL.value, settings=settings)


def follow(
  jobs: Sequence[Job], arms: Sequence[Arm], executor: Executor, console: Console
) -> dict[str, Line]:
  """Runs the jobs to their end and shows the arms.

  Returns:
    Arm -> where it stands.

  Raises:
    Interrupted: SIGINT or SIGTERM; the jobs have saved their states.
  """
  asked: list[int] = []
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: asked.append(number))
  folders = {arm.name: arm.folder for arm in arms}
  with Board(arms, console) as board:
    board.update(set())
    try:
      if jobs:
        executor.submit(jobs)
      while True:
        states = executor.poll() if jobs else []
        running = {
          name
          for job, state in zip(jobs, states, strict=True)
          if state.phase == "running"
          for name in job.arms
        }
        for job, state in zip(jobs, states, strict=True):
          if state.phase == "ended" and not asked:
            _blame(job, state.error, folders)
        lines = board.update(running)
        if all(state.phase == "ended" for state in states):
          break
        if asked:
          raise Interrupted("stopped; the same command goes on.")
        time.sleep(_POLL_SECONDS)
    finally:
      executor.stop()
  if console.is_terminal:
    console.print(board.shown(everything=True))
  return lines


def _import_plots() -> None:
  for name in ("matplotlib.backends.backend_agg", "plotly.offline"):
    importlib.import_module(name)


def _blame(job: Job, error: str | None, folders: dict[str, Path]) -> None:
  """Marks the arms that a job was lost with."""
  for name in job.arms:
    if runfolder.status(folders[name]) == "open":
      runfolder.write_error(folders[name], error or "its job ended without a result")


def main(argv: Sequence[str]) -> None:
  """Runs the sweep, prints its arms and writes its report."""
  del argv
  # Devices are for the workers; what is checked here needs none.
  jax.config.update("jax_platforms", "cpu")
  console, path = Console(highlight=False), _config_flag.path()
  folder = Path(WORKDIR.value or plan.folder(path, SWEEP.value)).absolute()
  executor = _executor(folder)
  changes = plan.overrides(path, SWEEP.value)
  memory = None if MEMORY.value is None else int(MEMORY.value * 2**30)
  arms = plan.make_arms(CONFIG.value, changes, folder, _config_flag.overrides(sys.argv))
  groups = plan.make_groups(arms, VMAP.value)
  with schema.within(f"arm {arms[0].name}"):
    pipeline.build(arms[0].config)
  with locked(folder):
    if RETRY.value:
      for arm in arms:
        (arm.folder / "error.json").unlink(missing_ok=True)
    described = {
      "config": path,
      "sweeps": SWEEP.value,
      "arms": [
        {"name": arm.name, "overrides": change}
        for arm, change in zip(arms, changes, strict=True)
      ],
    }
    runfolder.write_json(folder / "sweep.json", described)
    jobs = plan.make_jobs(groups, path, folder, memory=memory)
    # while the workers work, this process has time to import what draws
    threading.Thread(target=_import_plots, daemon=True).start()
    lines = follow(jobs, arms, executor, console)
    written = report.write(folder, console=console)
  failed = [name for name, line in lines.items() if line.status == "failed"]
  console.print(f"report: {written[0]}", soft_wrap=True)
  console.print(f"sweep folder: {folder}", soft_wrap=True)
  if failed:
    console.print(
      f"{len(failed)} of {len(arms)} arms failed; --retry_failed runs them again."
    )
    sys.exit(1)


def run() -> None:
  """Reads the flags and runs ``main``."""
  _main.run(main, required=("config", "sweep"))
