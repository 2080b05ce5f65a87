"""The average over the leading axis, summed one source at a time in float64."""

import numpy as np


def mean(stacked: np.ndarray) -> np.ndarray:
  total = np.zeros(stacked.shape[1:], np.float64)
  for source in stacked:
    total = total + np.asarray(source, np.float64)
  return total / len(stacked)
