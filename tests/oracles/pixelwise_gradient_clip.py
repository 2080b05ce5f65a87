"""Pixel-wise clipping in float64, one pixel at a time."""

import numpy as np


def clip(g, c, axes=(-1,), norm="inf", mode="hard"):
  g = np.asarray(g, np.float64)
  axes = [axis % g.ndim for axis in axes]
  pixels = np.moveaxis(g, axes, range(-len(axes), 0))
  flat = pixels.reshape(-1, int(np.prod(pixels.shape[pixels.ndim - len(axes) :])))
  out = np.array(flat)
  for row in range(len(flat)):
    channels = [float(x) for x in flat[row]]
    if norm == "inf":
      size = max((abs(x) for x in channels), default=0.0)
    else:
      size = sum(x * x for x in channels) ** 0.5
    if mode == "soft":
      out[row] = [x * c / (size + c) for x in channels]
    elif size > c:
      out[row] = [x * c / size for x in channels]
  return np.moveaxis(out.reshape(pixels.shape), range(-len(axes), 0), axes)
