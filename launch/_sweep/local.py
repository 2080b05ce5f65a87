"""Jobs as processes of this machine, forked from one that has imported everything."""

import signal
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from gradlab.launch._sweep import server, worker
from gradlab.launch._sweep.executors import Job, State
from gradlab.sweeps import digest


class Local:
  """Runs a few jobs at a time; a job that crashes takes nothing else with it."""

  def __init__(self, folder: Path, *, max_parallel: int) -> None:
    """Prepares the process that the jobs are forked from.

    Args:
      folder: of the sweep; ``logs`` below it gets what the jobs print.
      max_parallel: jobs at a time; at least 1.
    """
    self._logs, self._slots = folder / "logs", max_parallel
    self._jobs: list[Job] = []
    self._processes: list[tuple[BaseProcess, int]] = []
    self._context = server.start()

  def submit(self, jobs: Sequence[Job]) -> None:
    """Takes all jobs and starts the first ones."""
    self._jobs = list(jobs)
    self._slots = min(self._slots, len(jobs))
    self._start()

  def poll(self) -> list[State]:
    """Where each job stands; starts the next ones."""
    self._start()
    begun = [self._state(job, process) for job, (process, _) in self._begun()]
    return begun + [State("waiting")] * (len(self._jobs) - len(begun))

  def stop(self) -> None:
    """Asks what runs to save its state and end, and waits for it."""
    self._jobs = self._jobs[: len(self._processes)]
    for process, _ in self._processes:
      if process.is_alive():
        process.terminate()
    for process, _ in self._processes:
      process.join()

  def _begun(self) -> list[tuple[Job, tuple[BaseProcess, int]]]:
    return list(zip(self._jobs, self._processes, strict=False))

  def _start(self) -> None:
    busy = {slot for process, slot in self._processes if process.is_alive()}
    free = [slot for slot in range(self._slots) if slot not in busy]
    for job in self._jobs[len(self._processes) :][: len(free)]:
      slot = free.pop(0)
      self._logs.mkdir(parents=True, exist_ok=True)
      self._log(job).touch()
      process = self._context.Process(
        target=worker.work, args=(job, self._log(job), slot, self._slots)
      )
      process.start()
      self._processes.append((process, slot))

  def _log(self, job: Job) -> Path:
    name = job.arms[0] if len(job.arms) == 1 else f"batch-{digest(job.arms)[:12]}"
    return self._logs / f"{name}.log"

  def _state(self, job: Job, process: BaseProcess) -> State:
    if process.is_alive():
      return State("running")
    code = process.exitcode
    if not code:
      return State("ended")
    log = self._log(job)
    if code < 0:
      name = signal.Signals(-code).name
      return State("ended", f"the process was ended by {name}; {log} has its output.")
    lines = log.read_text(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return State("ended", f"{said} ({log} has the whole output)")
