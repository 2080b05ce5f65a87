"""The error-feedback recursion around any compression function, in float64."""

from collections.abc import Callable, Iterable

import numpy as np


def error_feedback(
  channel: Callable[[np.ndarray], np.ndarray], grads: Iterable[np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray]:
  """What the receiver sees at every step, and the last residual."""
  residual, received = np.float64(0), []
  for g in grads:
    wanted = np.asarray(g, np.float64) + residual
    received.append(channel(wanted))
    residual = wanted - received[-1]
  return received, residual
