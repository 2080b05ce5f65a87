"""Pruning by magnitude, in float64 NumPy; leaves are lists."""

import numpy as np

from tests.oracles import magnitude


def prune(leaves, sparsity, scope="global", unit_axis=None, p=2):
  masks = magnitude.masks(magnitude.scores(leaves, unit_axis, p), sparsity, scope)
  out = []
  for leaf, mask in zip(leaves, masks, strict=True):
    leaf = np.array(leaf, np.float64)
    if unit_axis is None:
      leaf[~mask] = 0
    else:
      np.moveaxis(leaf, unit_axis, 0)[~mask] = 0
    out.append(leaf)
  return out
