"""TensorBoard events, written record by record and without a thread.

tensorboardX encodes them. Its writer is not used: its thread would die of a full disk
with a traceback and then block the run, and would lose two minutes in a kill.
"""

import functools
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradlab import _append


class Events:
  """One new file of events in a folder."""

  def __init__(self, folder: Path, start_step: int) -> None:
    """Makes the file; TensorBoard hides what earlier ones have after ``start_step``."""
    # imported late: a writer without events, or on another process, needs none of it
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    self._event, self._crc = event_pb2.Event, masked_crc32c
    # with the characters that TensorBoard takes
    self._tag = functools.cache(lambda name: summary.scalar(name, 0.0).value[0].tag)
    # Whole seconds alone would let a quick restart write to the same file.
    name = f"{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
    self._file = _append.File(folder / f"events.out.tfevents.{name}")
    self._write(self._event(file_version="brain.Event:2"))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(self._event(step=start_step + 1, session_log=start))

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Appends one event with all scalars of a record.

    Raises:
      OSError: the disk did not take it.
    """
    event = self._event(step=step)
    for name, value in values.items():
      tag = self._tag(f"{split}/{name}")
      event.summary.value.add(tag=tag, simple_value=float(value))
    self._write(event)

  def close(self) -> None:
    self._file.close()

  def _write(self, event: Any) -> None:
    event.wall_time = time.time()
    data = event.SerializeToString()
    size = struct.pack("<Q", len(data))
    parts = (size, self._checksum(size), data, self._checksum(data))
    self._file.write(b"".join(parts))

  def _checksum(self, data: bytes) -> bytes:
    return struct.pack("<I", self._crc(data))
