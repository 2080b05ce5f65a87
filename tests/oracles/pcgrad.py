"""PCGrad as the paper writes it: a loop over explicit vectors in float64."""

import numpy as np


def project(grads: np.ndarray, orders: np.ndarray) -> np.ndarray:
  """[K, n]: every source's gradient after its visits."""
  grads = np.asarray(grads, np.float64)
  projected = []
  for i, order in enumerate(orders):
    v = grads[i].copy()
    for j in order:
      inner = v @ grads[j]
      if j != i and inner < 0 and grads[j] @ grads[j] > 0:
        v -= inner / (grads[j] @ grads[j]) * grads[j]
    projected.append(v)
  return np.stack(projected)


def pcgrad(grads: np.ndarray, orders: np.ndarray, reduction: str = "sum") -> np.ndarray:
  total = project(grads, orders).sum(axis=0)
  return total / len(grads) if reduction == "mean" else total
