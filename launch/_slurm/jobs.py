"""What a sweep has submitted to Slurm: ``slurm/jobs.json`` in its folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gradlab import runfolder
from gradlab.launch._slurm.queue import Row
from gradlab.types import ConfigError

_FILE = "jobs.json"


class Submission(NamedTuple):
  """One call of ``sbatch``.

  Attributes:
    name: of its jobs, unique; the queue knows them by it before the id is written.
    id: of the array, or of the one job; None when the program was killed in between.
    arms: names of the arms of each job.
  """

  name: str
  id: str | None
  arms: tuple[tuple[str, ...], ...]

  def jobs(self) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Id and arms of each job; none without an id."""
    if self.id is not None:
      for index, arms in enumerate(self.arms):
        yield (f"{self.id}_{index}" if len(self.arms) > 1 else self.id), arms


def read(folder: Path, rows: Mapping[str, Row]) -> list[Submission]:
  """The submissions of which a job still waits or runs.

  Raises:
    ConfigError: the file is damaged.
  """
  path = folder / _FILE
  try:
    stored = json.loads(path.read_text())["submissions"]
    known = [
      Submission(s["name"], s["id"], tuple(tuple(arms) for arms in s["arms"]))
      for s in stored
    ]
  except FileNotFoundError:
    return []
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f"{path} is damaged; cancel the sweep's jobs and remove it."
    ) from error
  ids = {row.name: job.split("_")[0] for job, row in rows.items()}
  found = [s._replace(id=ids.get(s.name)) for s in known]
  return [s for s in found if alive(s, rows)]


def write(folder: Path, submissions: Sequence[Submission]) -> None:
  """Replaces the file."""
  stored = [submission._asdict() for submission in submissions]
  runfolder.write_json(folder / _FILE, {"submissions": stored})


def alive(
  submission: Submission, rows: Mapping[str, Row]
) -> dict[str, tuple[str, ...]]:
  """The arms of the jobs that wait or run, by id."""
  return {
    job: arms for job, arms in submission.jobs() if job in rows and rows[job].alive
  }
