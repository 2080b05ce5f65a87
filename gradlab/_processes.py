"""What one process does for all processes of a ``jax.distributed`` run."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gradlab.types import ConfigError

_MOST_BYTES = 2**12

T = TypeVar("T")


def by_the_first(action: Callable[[], T]) -> T | None:
  """Process 0 calls ``action`` while the others wait; what it returns, None elsewhere.

  Raises:
    ConfigError, OSError: ``action`` raised it; the others raise its message as a
      ``ConfigError``, so that none of them waits for a process that has ended.
  """
  if jax.process_count() == 1:
    return action()
  result, raised = None, None
  if jax.process_index() == 0:
    try:
      result = action()
    except (ConfigError, OSError) as error:
      raised = error
  said = (str(raised) or "process 0 failed") if raised is not None else ""
  message = np.frombuffer(said.encode()[:_MOST_BYTES].ljust(_MOST_BYTES), np.uint8)
  told = multihost_utils.broadcast_one_to_all(message)
  if raised is not None:
    raise raised
  if failed := np.asarray(told).tobytes().decode(errors="replace").strip():
    raise ConfigError(failed)
  return result
