"""Square-root Sinkhorn and SWAN on one float64 matrix, by plain loops."""

import numpy as np


def sr_sinkhorn(g, num_iters=5, eps=1e-30):
  """Rows to norm sqrt(n), then columns to norm sqrt(m), num_iters times."""
  x = np.array(g, np.float64)
  m, n = x.shape
  for _ in range(num_iters):
    for i in range(m):
      x[i] *= np.sqrt(n) / max(np.sqrt((x[i] ** 2).sum()), eps)
    for j in range(n):
      x[:, j] *= np.sqrt(m) / max(np.sqrt((x[:, j] ** 2).sum()), eps)
  return x


def sinkhorn_knopp(p, num_iters, row_sum, column_sum):
  """Scales a positive matrix to given row sums, then column sums, num_iters times."""
  p = np.array(p, np.float64)
  for _ in range(num_iters):
    p *= row_sum / p.sum(1, keepdims=True)
    p *= column_sum / p.sum(0, keepdims=True)
  return p


def swan(g, center=False):
  """Rows to mean square one, then sqrt(max(m, n)) U V^T by eigenvectors of X X^T."""
  x = np.array(g, np.float64)
  m, n = x.shape
  if center:
    x -= x.mean(1, keepdims=True)
  x *= np.sqrt(n) / np.sqrt((x**2).sum(1, keepdims=True))
  short = x if m <= n else x.T
  values, vectors = np.linalg.eigh(short @ short.T)
  whitened = np.sqrt(max(m, n)) * (vectors / np.sqrt(values)) @ vectors.T @ short
  return whitened if m <= n else whitened.T
