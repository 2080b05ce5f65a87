"""Mean squared error, in float64 NumPy."""

import numpy as np


def loss(o, y, weights=None):
  return np.average((np.asarray(o, np.float64) - y) ** 2, weights=weights)


def mae(o, y, weights=None):
  return np.average(np.abs(np.asarray(o, np.float64) - y), weights=weights)


def gradient(o, y, weights=None):
  w = np.ones(np.shape(y)) if weights is None else np.asarray(weights, np.float64)
  return 2 * w * (np.asarray(o, np.float64) - y) / w.sum()
