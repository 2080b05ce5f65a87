"""``metrics.csv``: the records of ``metrics.jsonl`` as one wide table (RFC 4180).

A row has a field for every metric that a record had so far, empty where its own
record lacks it. What is not finite reads ``nan``, ``inf`` or ``-inf``.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradlab import _append
from gradlab._disk import write_atomic

_FIRST = ("step", "split")


class Table:
  """Appends rows; a record with a new metric makes the table wider, once."""

  def __init__(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Opens the table that holds ``records``; what else the file held is replaced."""
    self._path = path
    self._columns = list(dict.fromkeys([*_FIRST, *(n for r in records for n in r)]))
    text = _text([self._columns, *(self._row(record) for record in records)])
    if not path.exists() or path.read_bytes() != text:
      write_atomic(path, text)
    self._file = _append.File(path)

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends one record: "step", "split" and metrics.

    Raises:
      OSError: the disk did not take it; the table is as it was.
    """
    if not record.keys() <= set(self._columns):
      self._widen([name for name in record if name not in self._columns])
    self._file.write(_text([self._row(record)]))

  def close(self) -> None:
    self._file.close()

  def _row(self, record: Mapping[str, Any]) -> list[Any]:
    return [record.get(name, "") for name in self._columns]

  def _widen(self, names: Sequence[str]) -> None:
    with self._path.open(newline="") as file:
      head, *rows = csv.reader(file)
    empty = [""] * len(names)
    write_atomic(self._path, _text([[*head, *names], *(row + empty for row in rows)]))
    self._columns += names
    self._file.close()
    self._file = _append.File(self._path)


def _text(rows: Iterable[Sequence[Any]]) -> bytes:
  text = io.StringIO(newline="")
  csv.writer(text).writerows(rows)
  return text.getvalue().encode()
