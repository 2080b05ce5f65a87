"""The arms of a sweep as jobs of a Slurm cluster, through submitit."""

import contextlib
import io
import os
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradlab import runfolder
from gradlab.launch._slurm import jobs as slurm_jobs
from gradlab.launch._slurm import queue as slurm_queue
from gradlab.launch._slurm import settings as slurm_settings
from gradlab.launch._slurm.jobs import Submission
from gradlab.launch._slurm.worker import Run, Work
from gradlab.launch._sweep.executors import Job, State
from gradlab.types import ConfigError

TRIES = 3
# A run may take this many time limits, and one more.
_TIMEOUTS = 10
_PATIENCE = 300.0
_WAITING = State("waiting")


@dataclass
class _Entry:
  """A job, its id in the queue, where it stands and how often it was lost."""

  job: Job
  id: str
  state: State = _WAITING
  lost: int = 0


def _say(sentence: str) -> None:
  print(sentence, file=sys.stderr)


class Slurm:
  """An ``Executor``: a job array, of which ``max_parallel`` jobs run at a time.

  A job whose time is up or whose node Slurm takes saves its arms, goes back into the
  queue by itself and goes on from its checkpoints; so does one whose node fails. A
  job that ends in another way before its arms did (a plain ``scancel``, a signal, too
  little memory) is lost: it is queued again, at most ``TRIES`` times per start of the
  sweep. To be rid of a job, end the sweep first. A job that raised is not repeated.

  The jobs outlive the program. Started again on the same folder, it finds in
  ``slurm/jobs.json`` and the queue what still waits or runs, and submits only the
  rest. The folder must be one that all nodes see. The output of a job is in
  ``slurm/<id>_0_log.out`` and ``.err``; ``log.out`` and ``log.err`` in the folder of
  an arm are links to it.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    *,
    max_parallel: int,
    settings: Mapping[str, str | int | bool],
    run: Run | None = None,
    seconds: float = 5.0,
    say: Callable[[str], None] = _say,
  ) -> None:
    """Checks that Slurm and submitit are there.

    Args:
      folder: of the sweep.
      max_parallel: jobs of an array that may run at a time, at least 1; a job that
        was submitted anew, because Slurm had forgotten it, is beside the array.
      settings: what ``slurm_settings.parse_settings`` returns; ``DEFAULTS`` there has
        what it leaves open.
      run: what a job calls, importable on the nodes; by default ``_job.run``.
      seconds: between two looks at the queue.
      say: called with a sentence when a lost job is queued again.

    Raises:
      ConfigError: no Slurm, no submitit, or a bad argument.
    """
    if max_parallel < 1:
      raise ConfigError(f"max_parallel must be at least 1, got {max_parallel}.")
    slurm_queue.check_installed()
    self._settings = slurm_settings.complete(settings)
    self._folder = Path(folder).absolute() / "slurm"
    self._max_parallel = max_parallel
    self._work = Work(run)
    self._seconds, self._say = seconds, say
    self._submissions: list[Submission] = []
    self._entries: list[_Entry] = []
    self._looked = float("-inf")

  def submit(self, jobs: Sequence[Job]) -> None:
    """Takes over what is queued already and submits the rest as one array.

    Raises:
      ConfigError: Slurm does not answer, or refuses the jobs.
    """
    self._folder.mkdir(parents=True, exist_ok=True)
    rows = slurm_queue.rows()
    if rows is None:
      raise ConfigError("executor: Slurm does not answer; does squeue work here?")
    self._record(slurm_jobs.read(self._folder, rows))
    queued: dict[str, tuple[str, ...]] = {}
    for submission in self._submissions:
      queued |= slurm_jobs.alive(submission, rows)
    ids: dict[tuple[str, ...], str] = {}
    for job in jobs:
      same = [id for id, arms in queued.items() if set(job.arms) <= set(arms)]
      if same:
        ids[job.arms] = same[0]
        del queued[same[0]]
    # Grouped otherwise now: no two processes may run an arm.
    wanted = {arm for job in jobs for arm in job.arms}
    slurm_queue.end(
      [id for id, arms in queued.items() if wanted & set(arms)], _PATIENCE
    )
    fresh = [job for job in jobs if job.arms not in ids]
    ids |= {job.arms: id for job, id in zip(fresh, self._send(fresh), strict=True)}
    self._entries = [_Entry(job, ids[job.arms]) for job in jobs]

  def poll(self) -> list[State]:
    """Where each job stands, as of the last look at the queue."""
    open_entries = [entry for entry in self._entries if entry.state.phase != "ended"]
    if open_entries and time.monotonic() - self._looked >= self._seconds:
      rows = slurm_queue.rows()
      if rows is not None:
        for entry in open_entries:
          entry.state = self._look(entry, rows.get(entry.id))
      self._looked = time.monotonic()
    return [entry.state for entry in self._entries]

  def stop(self) -> None:
    """Cancels the jobs that wait, has the others save their arms, and waits."""
    slurm_queue.end(
      [entry.id for entry in self._entries if entry.state.phase != "ended"], _PATIENCE
    )

  def _send(self, jobs: Sequence[Job]) -> list[str]:
    """Submits the jobs as one array; returns their ids."""
    if not jobs:
      return []
    submitit = slurm_settings.submitit()
    name = f"gradlab-{uuid.uuid4().hex[:12]}"
    known = self._submissions
    # Written first: the queue knows the name, should this program be killed here.
    self._record([*known, Submission(name, None, tuple(job.arms for job in jobs))])
    executor = submitit.SlurmExecutor(self._folder, max_num_timeout=_TIMEOUTS)
    cores = self._settings.get("cpus_per_task")
    executor.update_parameters(
      **self._settings,
      job_name=name,
      array_parallelism=self._max_parallel,
      additional_parameters={"requeue": True},
      # srun does not take this over from sbatch since Slurm 22.05
      srun_args=[] if cores is None else [f"--cpus-per-task={cores}"],
    )
    said = io.StringIO()
    try:
      with _from_outside(), contextlib.redirect_stderr(said):
        sent = executor.map_array(self._work, jobs)
    except (
      submitit.core.utils.FailedJobError,
      submitit.core.utils.FailedSubmissionError,
    ) as error:
      self._record(known)
      why = (str(error).strip().splitlines() or ["no reason given"])[-1].strip(".")
      raise ConfigError(
        f"flags: --slurm: {why.removeprefix('sbatch: error: ')}."
      ) from error
    ids: list[str] = [job.job_id for job in sent]
    last = self._submissions[-1]._replace(id=ids[0].split("_")[0])
    self._record([*known, last])
    return ids

  def _record(self, submissions: list[Submission]) -> None:
    slurm_jobs.write(self._folder, submissions)
    self._submissions = submissions

  def _look(self, entry: _Entry, row: slurm_queue.Row | None) -> State:
    """Where the job stands; one that was lost is queued again."""
    if row is not None and row.alive:
      return State("running") if row.state in slurm_queue.RUNNING else _WAITING
    arms = [Path(entry.job.folder) / "arms" / arm for arm in entry.job.arms]
    if all(runfolder.status(arm) != "open" for arm in arms):
      return State("ended")
    logs = self._folder / f"{entry.id}_0_log.err"
    if raised := self._raised(entry.id):
      return State("ended", f"Slurm job {entry.id} raised {raised} (see {logs}).")
    word = "vanished" if row is None else f"ended as {row.state}"
    if entry.lost == TRIES:
      return State("ended", f"Slurm job {entry.id} {word} once too often (see {logs}).")
    entry.lost += 1
    before = entry.id
    try:
      entry.id = self._again(entry)
    except ConfigError as error:
      return State("ended", f"Slurm job {before} {word}, and then: {error}")
    self._say(
      f"Slurm job {before} ({', '.join(entry.job.arms)}) {word} before its arms did; "
      f"queued again as {entry.id} ({entry.lost} of {TRIES})."
    )
    return _WAITING

  def _again(self, entry: _Entry) -> str:
    """Queues a lost job again, in its array if Slurm still has it; returns its id."""
    submission = self._folder / f"{entry.id}_submitted.pkl"
    if submission.exists() and slurm_queue.requeue(entry.id):
      return entry.id
    return self._send([entry.job])[0]

  def _raised(self, id: str) -> str | None:
    """The error that ended the job's Python, in one line."""
    try:
      outcome, trace = pickle.loads((self._folder / f"{id}_0_result.pkl").read_bytes())
    except FileNotFoundError:
      return None
    return str(trace).strip().splitlines()[-1] if outcome == "error" else None


@contextlib.contextmanager
def _from_outside() -> Iterator[None]:
  """Hides that this program is itself a job, whose settings sbatch would take over."""
  if "SLURM_JOB_ID" not in os.environ:
    yield
    return
  cluster = os.environ.get("SLURM_CONF")
  with slurm_settings.submitit().helpers.clean_env():
    if cluster is not None:
      os.environ["SLURM_CONF"] = cluster
    yield
