"""The large leaves of a checkpoint, written by Orbax while the run goes on."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradlab._disk import naming


class Arrays:
  """Saves and restores dicts of arrays, each in a folder of its own.

  Under ``jax.distributed`` every process makes the same calls.
  """

  def __init__(self) -> None:
    # imported late: a small state needs none of it
    import orbax.checkpoint as ocp

    _silence()
    self._args = ocp.args
    self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

  def save(self, folder: Path, arrays: Mapping[str, Any]) -> None:
    """Starts saving; the arrays may be donated, and host arrays changed, right away."""
    # Orbax copies device memory before it returns. On CPU it reads the buffer itself,
    # which XLA keeps as it is, donated or not, for as long as Orbax refers to it.
    kept = {n: a.copy() if isinstance(a, np.ndarray) else a for n, a in arrays.items()}
    with _disk_errors(folder):
      self._checkpointer.save(folder, args=self._args.StandardSave(kept))

  def wait(self, folder: Path) -> None:
    """Waits until the save into ``folder`` is done.

    Raises:
      OSError: the disk could not be written; a part may be there.
    """
    with _disk_errors(folder):
      self._checkpointer.wait_until_finished()

  def restore(self, folder: Path, forms: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the arrays of the given shapes, dtypes and shardings."""
    args = self._args.StandardRestore(dict(forms))
    arrays: dict[str, Any] = self._checkpointer.restore(folder, args=args)
    return arrays

  def close(self) -> None:
    self._checkpointer.close()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
  """Raises TensorStore's word for an error of the disk as the ``OSError`` it is."""
  with naming(folder):
    try:
      yield
    except ValueError as error:
      code = re.search(r"os_error_code='(\d+)'", str(error))
      if code is None:
        raise
      raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _silence() -> None:
  """Keeps failed saves, which ``wait`` raises, from being printed by threads too."""
  logger = logging.getLogger("absl")
  if _is_news not in logger.filters:
    logger.addFilter(_is_news)
    sys.unraisablehook = _without_closed_loops(sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
  return f"{os.sep}orbax{os.sep}" not in record.pathname


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """A hook that passes over what TensorStore cannot tell to a save that is over."""

  def passed(found: Any) -> None:
    if str(found.exc_value) != "Event loop is closed":
      hook(found)

  return passed
