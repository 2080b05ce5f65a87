"""Writing so that a kill or a full disk leaves what was there before."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# What a disk answers when it cannot be written, whoever is to blame.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def write_atomic(path: str | os.PathLike[str], text: str | bytes) -> None:
  """Replaces the file's content in one step that survives a kill at any moment."""
  data = text.encode() if isinstance(text, str) else text
  temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
  with naming(path):
    try:
      with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      temporary.replace(path)
    finally:
      temporary.unlink(missing_ok=True)


def check_room(folder: Path, needed: int) -> None:
  """Raises the ``OSError`` of a full disk when it lacks the bytes for ``folder``."""
  if shutil.disk_usage(folder).free < needed:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder))


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Makes an ``OSError`` from within say that it is about ``path``."""
  try:
    yield
  except OSError as error:
    if error.errno is not None:
      error.filename = os.fspath(path)
    raise


def disk_error(error: OSError) -> str | None:
  """The sentence for a disk that could not be written; None for any other error."""
  if error.errno not in _OF_THE_DISK:
    return None
  return (
    f"cannot write {error.filename or 'to the disk'}: {error.strerror}; what was "
    "written before is kept, and the same command goes on from there when the disk "
    "can be written."
  )
