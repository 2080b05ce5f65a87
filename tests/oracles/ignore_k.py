"""Ignore-k by a stable sort in float64."""

import math

import numpy as np


def num_dropped(k, size):
  return min(size, math.floor(k * size + 1e-6))


def keep(leaves, k, scope="leaf", by="abs"):
  """True = keep, for a list of arrays."""
  if scope == "global":
    flat = np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])
    mask, out, start = _keep(flat, k, by), [], 0
    for leaf in leaves:
      out.append(mask[start : start + np.size(leaf)].reshape(np.shape(leaf)))
      start += np.size(leaf)
    return out
  return [
    _keep(np.ravel(leaf).astype(np.float64), k, by).reshape(np.shape(leaf))
    for leaf in leaves
  ]


def _keep(flat, k, by):
  size = np.abs(flat) if by == "abs" else flat
  # Python's sort is stable; NaN comes before everything, then the largest.
  order = sorted(range(flat.size), key=lambda i: (not np.isnan(size[i]), -size[i]))
  mask = np.ones(flat.size, bool)
  mask[order[: num_dropped(k, flat.size)]] = False
  return mask


def trajectory(theta, updates, k, window, scope="leaf"):
  """theta_1, theta_2, ... (lists of arrays) under given updates."""
  theta = [np.asarray(leaf, np.float64) for leaf in theta]
  anchor, out = theta, []
  for step, update in enumerate(updates, start=1):
    theta = [
      leaf + np.asarray(u, np.float64) for leaf, u in zip(theta, update, strict=True)
    ]
    if step % window == 0:
      delta = [leaf - a for leaf, a in zip(theta, anchor, strict=True)]
      mask = keep(delta, k, scope)
      theta = [a + d * m for a, d, m in zip(anchor, delta, mask, strict=True)]
      anchor = theta
    out.append(theta)
  return out
