"""What a Slurm job runs: its arms, and its way back into the queue."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from gradlab.launch._slurm import queue as slurm_queue
from gradlab.launch._sweep.executors import Job
from gradlab.types import Interrupted

Run = Callable[[Job, Callable[[], bool]], None]


class Work:
  """A callable of submitit's requeue protocol.

  Before a job's time is up Slurm sends it the signal of ``sbatch --signal``: the arms
  save their states, and the job goes back into the queue. SIGTERM has the arms saved
  too; the job then ends, unless Slurm took its node for another job.
  """

  def __init__(self, run: Run | None = None) -> None:
    """``run`` takes the place of ``sweep_job.run``."""
    self._run = run

  def __call__(self, job: Job) -> None:
    """Runs the job's arms; what they came to is in their folders."""
    import submitit

    environment = submitit.JobEnvironment()
    time_is_up = signal.Signals[f"SIG{environment.USR_SIG}"]
    requeue = signal.getsignal(time_is_up)
    assert callable(requeue)
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
      del frame
      asked.append(number)

    for number in (signal.SIGTERM, time_is_up):
      signal.signal(number, ask)
    # what an earlier life of the job said is no longer so
    environment.paths.result_pickle.unlink(missing_ok=True)
    for arm in job.arms:
      _link_logs(environment.paths, Path(job.folder) / "arms" / arm)
    try:
      (self._run or _work)(job, lambda: bool(asked))
    except Interrupted:
      if time_is_up in asked or slurm_queue.preempted(environment.raw_job_id):
        requeue(time_is_up, None)

  def checkpoint(self, job: Job) -> Any:
    """What the requeued job runs: the same, as the state is in the arms' folders."""
    import submitit

    return submitit.helpers.DelayedSubmission(self, job)


def _work(job: Job, should_stop: Callable[[], bool]) -> None:
  # the queue's side of this module works without jax
  from gradlab.launch._sweep import job as sweep_job

  sweep_job.run(job, should_stop, cores=int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))


def _link_logs(paths: Any, folder: Path) -> None:
  """``log.out`` and ``log.err`` in the arm's folder are the job's."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, target in (("log.out", paths.stdout), ("log.err", paths.stderr)):
    link = folder / f"{name}.{os.getpid()}.tmp"
    link.symlink_to(os.path.relpath(target, folder))
    link.replace(folder / name)
