"""Float64 projected gradient attack, one example and one step at a time."""

import numpy as np


def pgd(
  x, grad_fn, eps, step_size, num_steps, norm, targeted=False, bounds=(0, 1), start=None
):
  """``grad_fn(x [B, ...]) -> gradient``; ``start`` replaces the start point ``x``."""
  sign = -1.0 if targeted else 1.0
  point = np.array(x if start is None else start, np.float64)
  for _ in range(num_steps):
    grad = grad_fn(point)
    for i in range(len(x)):
      if norm == "linf":
        moved = point[i] + sign * step_size * np.sign(grad[i])
        delta = np.maximum(np.minimum(moved - x[i], eps), -eps)
      else:
        length = np.sqrt(np.sum(grad[i] ** 2))
        moved = point[i] + sign * step_size * grad[i] / (length + 1e-10)
        delta = moved - x[i]
        distance = np.sqrt(np.sum(delta**2))
        if distance > 0.0:
          delta = delta * min(1.0, eps / distance)
      point[i] = np.clip(x[i] + delta, *bounds)
  return point
