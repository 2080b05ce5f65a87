"""Jobs of a sweep, and what runs them."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol


class Job(NamedTuple):
  """A part of a sweep that one process runs.

  Attributes:
    config: the config file as ``--config`` names it; a worker imports it, for the
      methods that it may define.
    folder: the sweep's folder, absolute.
    arms: names of the arms.
    configs: their resolved configs.
    vmapped: whether the arms are one program, or run one after the other.
    overrides: per arm, what the sweep and the command line changed.
    memory: bytes of a device that vmapped arms may use; None for what it has.
  """

  config: str
  folder: str
  arms: tuple[str, ...]
  configs: tuple[Any, ...]
  vmapped: bool
  overrides: tuple[tuple[str, ...], ...] = ()
  memory: int | None = None


class State(NamedTuple):
  """Where a job stands.

  Attributes:
    phase: of the job's process; "ended" says nothing of its arms.
    error: why a process ended before its arms did, in one sentence; else None.
  """

  phase: Literal["waiting", "running", "ended"]
  error: str | None = None


class Executor(Protocol):
  """Runs jobs somewhere else; what the arms came to is in their folders."""

  def submit(self, jobs: Sequence[Job]) -> None:
    """Takes all jobs; called once."""

  def poll(self) -> list[State]:
    """Where each job stands, in the order of ``submit``; cheap."""

  def stop(self) -> None:
    """Drops what waits, asks what runs to save its state and end, and waits for it."""
