"""Top-k sparsification by a stable sort in float64."""

import numpy as np


def kept(g: np.ndarray, k: int) -> np.ndarray:
  """Positions of the k largest magnitudes; the earlier one first among equals."""
  flat = np.abs(np.asarray(g, np.float64).ravel())
  return np.argsort(-flat, kind="stable")[:k]


def top_k(g: np.ndarray, k: int) -> np.ndarray:
  flat = np.asarray(g, np.float64).ravel()
  out = np.zeros_like(flat)
  for j in kept(g, k):
    out[j] = flat[j]
  return out.reshape(np.shape(g))
