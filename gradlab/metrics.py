"""Metrics of a run: JSON lines and TensorBoard events that survive a kill.

``metrics.jsonl`` holds one object per record, ``{"step": 20, "split": "train",
"loss": 0.31}``. JSON has no NaN, so a number that is not finite is written as the
string "nan", "inf" or "-inf"; ``read`` turns it back.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from absl import logging

from gradlab import _windows
from gradlab.runfolder import jsonable, write_atomic

HostMetrics = dict[str, np.ndarray]
_NONFINITE = ("nan", "inf", "-inf")
_RESERVED = ("step", "split")


class Writer:
  """Appends records to ``metrics.jsonl`` and to TensorBoard events of a folder.

  Opening drops what an interrupted run wrote after ``start_step``, and a torn last
  line. Windows of ``log_every`` steps end at its multiples. A run that resumes at a
  multiple, or where ``keep`` was called, writes the records that it would have
  written without the break. Under ``jax.distributed`` only process 0 writes.
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
    """
    if log_every < 1:
      raise ValueError(f"log_every must be at least 1, got {log_every}.")
    self._log_every = log_every
    self._window: _windows.Windows = {}
    self._file: int | None = None
    self._events: Any = None
    if jax.process_index() != 0:
      return
    path = Path(folder) / "metrics.jsonl"
    _truncate(path, start_step)
    self._folder = path.parent
    self._window = _windows.load(self._folder, start_step)
    self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    if tensorboard:
      self._events = _event_writer(folder, start_step)

  def write(self, step: int, values: Mapping[str, Any], split: str) -> None:
    """Writes one record now.

    Args:
      step: number of steps done.
      values: scalars by name: Python numbers, or arrays with one element.
      split: "train", "validation" and so on.

    Raises:
      ValueError: a name that is reserved, or a value that is not one number.
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
    line = json.dumps(jsonable(record), allow_nan=False).encode() + b"\n"
    # One write per line: a kill between writes leaves whole lines only.
    if os.write(self._file, line) != len(line):
      raise OSError(f"metrics.jsonl took only a part of the record of step {step}.")
    if self._events is not None:
      for name in values:
        self._events.add_scalar(f"{split}/{name}", float(record[name]), int(step))

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
    # Python's floats: every step of a small model passes here.
    columns = {n: c.tolist() for n, c in _columns(steps, metrics).items()}
    window = self._window.setdefault(split, [])
    for row, step in enumerate(steps):
      window.append((int(step), {name: c[row] for name, c in columns.items()}))
      if step % self._log_every == 0:
        self._write_window(split)

  def keep(self, step: int) -> None:
    """Stores the windows that are open after ``step``, for a run that resumes there."""
    if self._file is not None:
      _windows.keep(self._folder, step, self._window)

  def flush(self) -> None:
    """Writes the last windows, which may be shorter, and flushes the events."""
    for split in self._window:
      self._write_window(split)
    if self._events is not None:
      self._events.flush()

  def close(self) -> None:
    """Flushes and closes; writing afterwards is an error."""
    self.flush()
    if self._events is not None:
      self._events.close()
      self._events = None
    if self._file is not None:
      os.close(self._file)
      self._file = None

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
    names = list(dict.fromkeys(name for _, row in window for name in row))
    means = {n: np.mean([row[n] for _, row in window if n in row]) for n in names}
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


def _truncate(path: Path, start_step: int) -> None:
  if not path.exists():
    return
  data = path.read_bytes()
  kept = b"".join(
    line + b"\n" for line, record in _records(data) if record["step"] <= start_step
  )
  if kept != data:
    write_atomic(path, kept)


def _columns(steps: Sequence[int], metrics: Mapping[str, Any]) -> HostMetrics:
  columns = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
  for name, column in columns.items():
    if column.shape != (len(steps),):
      raise ValueError(
        f"{name} must have one number for each of the {len(steps)} steps, "
        f"got shape {column.shape}."
      )
  return columns


def _event_writer(folder: str | os.PathLike[str], start_step: int) -> Any:
  from tensorboardX import SummaryWriter, x2num

  # It would warn of every number that is not finite; the loop says so once.
  x2num.logger.disabled = True
  # The default name has whole seconds only; a quick restart would overwrite the file.
  return SummaryWriter(
    os.fspath(folder),
    purge_step=start_step + 1,
    filename_suffix=f".{time.time_ns()}",
  )
