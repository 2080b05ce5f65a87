"""Sketches as explicit matrices, and the federated round with them, in float64."""

from collections.abc import Callable

import numpy as np
import scipy.linalg


def srht_matrix(signs: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """sqrt(d'/s) P H D without the columns that only meet padding."""
  d, s = len(signs), len(rows)
  padded = 1
  while padded < d:
    padded *= 2
  orthonormal = scipy.linalg.hadamard(padded) / np.sqrt(padded)
  return np.sqrt(padded / s) * orthonormal[rows, :d] * np.asarray(signs, np.float64)


def countsketch_matrix(signs: np.ndarray, buckets: np.ndarray, s: int) -> np.ndarray:
  matrix = np.zeros((s, len(signs)))
  for j, (sign, bucket) in enumerate(zip(signs, buckets, strict=True)):
    matrix[bucket, j] = sign
  return matrix


def second_moment(kind: str, d: int, s: int) -> float:
  """E |R^T R g|^2 / |g|^2, for d a power of two where it is the SRHT."""
  return {
    "gaussian": 1 + (d + 1) / s,
    "ams": 1 + (d - 1) / s,
    "countsketch": 1 + (d - 1) / s,
    "srht": d / s,
  }[kind]


def fl_round(
  w: np.ndarray,
  gradients: list[Callable[[np.ndarray], np.ndarray]],
  matrix: np.ndarray,
  local_steps: int,
  lr_local: float,
  lr_global: float,
) -> np.ndarray:
  """The parameters after a round in which client c descends along gradients[c]."""
  messages = []
  for gradient in gradients:
    u = np.asarray(w, np.float64)
    for _ in range(local_steps):
      u = u - lr_local * gradient(u)
    messages.append(matrix @ (u - w))
  return w + lr_global * matrix.T @ np.mean(messages, axis=0)


def clipped_mean(per_example: np.ndarray, clip_norm: float) -> np.ndarray:
  """Mean of the rows, each shortened to the clip norm if it is longer."""
  total = np.zeros(per_example.shape[1])
  for g in per_example:
    total += g * min(1.0, clip_norm / np.linalg.norm(g))
  return total / len(per_example)
