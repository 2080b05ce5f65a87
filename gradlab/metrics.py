"""Metrics of a run: JSON lines, a table and TensorBoard events that survive a kill.

``metrics.jsonl`` holds one object per record, ``{"step": 20, "split": "train",
"loss": 0.31}``. JSON has no NaN, so a number that is not finite is written as the
string "nan", "inf" or "-inf"; ``read`` turns it back. ``metrics.csv`` has the same
records, one a row, for pandas and spreadsheets.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from absl import logging

from gradlab import _append, _windows
from gradlab._events import Events
from gradlab._table import Table
from gradlab.runfolder import jsonable, write_atomic

HostMetrics = dict[str, np.ndarray]
_NONFINITE = ("nan", "inf", "-inf")
_RESERVED = ("step", "split")


class Writer:
  """Appends records to a folder's ``metrics.jsonl``, ``metrics.csv`` and events.

  Opening drops what an interrupted run wrote after ``start_step``, and a torn last
  line; a ``metrics.csv`` that does not agree is made again. Windows of ``log_every``
  steps end at its multiples. A run that resumes at a multiple, or where ``keep`` was
  called, writes the records that it would have written without the break. Under
  ``jax.distributed`` only process 0 writes.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    *,
    start_step: int,
    log_every: int = 1,
    tensorboard: bool = True,
  ) -> None:
    """Opens the folder's metrics.

    Args:
      folder: an existing folder.
      start_step: number of steps done before; later records are dropped.
      log_every: steps whose mean makes one record of ``log``; at least 1.
      tensorboard: whether TensorBoard events are written too.

    Raises:
      ValueError: ``log_every`` below 1.
      OSError: the folder cannot be written.
    """
    if log_every < 1:
      raise ValueError(f"log_every must be at least 1, got {log_every}.")
    self._log_every = log_every
    self._window: _windows.Windows = {}
    self._open = contextlib.ExitStack()
    self._file: _append.File | None = None
    self._events: Events | None = None
    if jax.process_index() != 0:
      return
    path = Path(folder) / "metrics.jsonl"
    records = _truncate(path, start_step)
    self._folder = path.parent
    self._window = _windows.load(self._folder, start_step)
    with contextlib.ExitStack() as opened:
      self._file = opened.enter_context(contextlib.closing(_append.File(path)))
      table = Table(path.with_suffix(".csv"), records)
      self._table = opened.enter_context(contextlib.closing(table))
      if tensorboard:
        events = Events(self._folder, start_step)
        self._events = opened.enter_context(contextlib.closing(events))
      self._open = opened.pop_all()

  def write(self, step: int, values: Mapping[str, Any], split: str) -> None:
    """Writes one record now.

    Args:
      step: number of steps done.
      values: scalars by name: Python numbers, or arrays with one element.
      split: "train", "validation" and so on.

    Raises:
      ValueError: a name that is reserved, or a value that is not one number.
      OSError: the disk did not take it; the records before are whole.
    """
    record: dict[str, Any] = {"step": int(step), "split": split}
    for name, value in values.items():
      if name in _RESERVED:
        raise ValueError(f"a metric must not be called {name!r}; choose another name.")
      if np.size(value) != 1:
        raise ValueError(f"{name} must be one number, got shape {np.shape(value)}.")
      record[name] = np.asarray(value).item()
    if self._file is None:
      return
    line = json.dumps(jsonable(record), allow_nan=False)
    self._file.write(line.encode() + b"\n")
    self._table.write(record)
    if self._events is not None:
      self._events.write(int(step), split, {name: record[name] for name in values})

  def log(
    self, steps: Sequence[int], metrics: Mapping[str, Any], split: str = "train"
  ) -> None:
    """Takes the metrics of the steps of one dispatch and writes the windows they end.

    Args:
      steps: the n steps, counted after each is done: 1 is the first step's.
      metrics: arrays of shape [n] by name.
      split: "train", "validation" and so on.

    Raises:
      ValueError: an array that is not [n].
    """
    columns = _columns(steps, metrics)
    window = self._window.setdefault(split, [])
    ends = [row for row, step in enumerate(steps, 1) if step % self._log_every == 0]
    for start, end in itertools.pairwise(dict.fromkeys([0, *ends, len(steps)])):
      piece = {name: column[start:end] for name, column in columns.items()}
      window.append((int(steps[end - 1]), piece))
      if steps[end - 1] % self._log_every == 0:
        self._write_window(split)

  def keep(self, step: int) -> None:
    """Stores the windows that are open after ``step``, for a run that resumes there."""
    if self._file is not None:
      _windows.keep(self._folder, step, self._window)

  def flush(self) -> None:
    """Writes the last windows, which may be shorter."""
    for split in self._window:
      self._write_window(split)

  def close(self) -> None:
    """Writes the last windows and closes; writing afterwards is an error."""
    with self._open:
      self.flush()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: object, *_: object) -> None:
    if kind is not None:
      # A run that broke off resumes within its windows; they are not over.
      self._window.clear()
    self.close()

  def _write_window(self, split: str) -> None:
    window = self._window[split]
    if not window:
      return
    names = dict.fromkeys(name for _, piece in window for name in piece)
    means = {
      name: np.mean(np.concatenate([p[name] for _, p in window if name in p]))
      for name in names
    }
    self.write(window[-1][0], means, split)
    window.clear()


class Delayed:
  """Holds back the newest dispatch's metrics, so that the host never waits for it.

  ``push`` starts the copy of the new metrics to the host and hands out the ones
  pushed before, whose dispatch has ended by then or is about to.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.metrics import Delayed
    >>> delayed = Delayed()
    >>> delayed.push([1, 2], {"loss": jnp.array([0.5, 0.25])})
    []
    >>> delayed.push([3, 4], {"loss": jnp.array([0.125, 0.0])})
    [([1, 2], {'loss': array([0.5 , 0.25], dtype=float32)})]
    >>> [steps for steps, _ in delayed.flush()]
    [[3, 4]]
  """

  def __init__(self) -> None:
    self._pending: list[tuple[Sequence[int], Mapping[str, Any]]] = []

  def push(
    self, steps: Sequence[int], metrics: Mapping[str, Any]
  ) -> list[tuple[Sequence[int], HostMetrics]]:
    """Keeps ``metrics`` and returns those pushed before, as host arrays."""
    for value in metrics.values():
      if isinstance(value, jax.Array):
        value.copy_to_host_async()
    ready = self.flush()
    self._pending.append((steps, metrics))
    return ready

  def flush(self) -> list[tuple[Sequence[int], HostMetrics]]:
    """Returns all that is held back; waits for it."""
    pending, self._pending = self._pending, []
    return [(steps, {n: np.asarray(v) for n, v in m.items()}) for steps, m in pending]


def first_nonfinite(
  steps: Sequence[int], metrics: Mapping[str, Any]
) -> tuple[int, str] | None:
  """The first step with a NaN or an infinity, and the metric that has it.

  Args:
    steps: the n steps of a dispatch.
    metrics: host arrays of shape [n] by name.

  Returns:
    (step, name), the first name in the mapping's order; None if all are finite.

  Examples:
    >>> from gradlab.metrics import first_nonfinite
    >>> first_nonfinite([8, 9], {"loss": [0.5, float("nan")], "norm": [1.0, 2.0]})
    (9, 'loss')
  """
  finite = {name: np.isfinite(c) for name, c in _columns(steps, metrics).items()}
  bad = [(int(np.argmin(f)), name) for name, f in finite.items() if not f.all()]
  if not bad:
    return None
  row, name = min(bad, key=lambda found: found[0])
  return int(steps[row]), name


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The records of a ``metrics.jsonl``, with NaN and infinities as floats.

  Args:
    path: the file; one that is still being written is read up to its last whole line.

  Returns:
    The records in the order in which they were written.
  """
  records = []
  for _, record in _records(Path(path).read_bytes()):
    for name, value in record.items():
      if name not in _RESERVED and value in _NONFINITE:
        record[name] = float(value)
    records.append(record)
  return records


def _records(data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
  lines = data.splitlines()
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      record["step"] + 0
    except (ValueError, KeyError, TypeError):
      if number < len(lines):
        logging.warning("line %d of the metrics is damaged and left out.", number)
      continue
    records.append((line, record))
  return records


def _truncate(path: Path, start_step: int) -> list[dict[str, Any]]:
  """Drops the records after ``start_step``; returns the others."""
  if not path.exists():
    return []
  data = path.read_bytes()
  kept = [item for item in _records(data) if item[1]["step"] <= start_step]
  text = b"".join(line + b"\n" for line, _ in kept)
  if text != data:
    write_atomic(path, text)
  return [record for _, record in kept]


def _columns(steps: Sequence[int], metrics: Mapping[str, Any]) -> HostMetrics:
  columns = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
  for name, column in columns.items():
    if column.shape != (len(steps),):
      raise ValueError(
        f"{name} must have one number for each of the {len(steps)} steps, "
        f"got shape {column.shape}."
      )
  return columns
