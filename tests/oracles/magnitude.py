"""Magnitude scores and masks by sorting, in float64 NumPy; leaves are lists."""

import numpy as np


def scores(leaves, unit_axis=None, p=2):
  out = []
  for leaf in leaves:
    size = np.abs(np.asarray(leaf, np.float64))
    if unit_axis is None:
      out.append(size)
    else:
      rows = np.moveaxis(size, unit_axis, 0).reshape(size.shape[unit_axis], -1)
      out.append(np.array([sum(x**p for x in row) ** (1.0 / p) for row in rows]))
  return out


def drop(flat, k):
  """The k lowest, of equals the first, NaN last: by an explicit stable sort."""
  keyed = [(bool(np.isnan(x)), 0.0 if np.isnan(x) else float(x)) for x in flat]
  order = sorted(range(len(flat)), key=keyed.__getitem__)
  mask = np.ones(len(flat), bool)
  mask[order[:k]] = False
  return mask


def masks(leaves, sparsity, scope):
  leaves = [np.asarray(leaf) for leaf in leaves]
  if scope == "leaf":
    return [masks([leaf], sparsity, "global")[0] for leaf in leaves]
  flat = np.concatenate([leaf.ravel() for leaf in leaves])
  kept = drop(flat, round(sparsity * flat.size))
  ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
  parts = np.split(kept, ends)
  return [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
