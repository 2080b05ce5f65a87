"""Files that grow by whole records."""

import os
from pathlib import Path

from gradlab._disk import naming


class File:
  """Appends records to a file: each is there as a whole, or not at all.

  One write per record, straight to the operating system: a kill between two writes
  leaves whole records, and another program can read them at once.
  """

  def __init__(self, path: Path) -> None:
    """Opens the file, which is made when it is missing."""
    self._path = path
    self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

  def write(self, record: bytes) -> None:
    """Appends one record.

    Raises:
      OSError: the disk did not take it; the file is as it was.
    """
    taken = 0
    try:
      while taken < len(record):
        # Where a disk is full, a second write says why the first was cut short.
        taken += os.write(self._file, record[taken:])
    except OSError as error:
      with naming(self._path):
        os.ftruncate(self._file, os.fstat(self._file).st_size - taken)
        raise error

  def close(self) -> None:
    """Closes the file; writing afterwards is an error."""
    # never again a number that another file may get
    closed, self._file = self._file, -1
    os.close(closed)
