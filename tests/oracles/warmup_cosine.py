"""Linear warmup and cosine decay, step by step in float64."""

import math


def value(t, peak, warmup, decay, init=0.0, end=0.0):
  if t < warmup:
    return init + (peak - init) * t / warmup
  if t >= decay:
    return end
  return end + 0.5 * (peak - end) * (
    1 + math.cos(math.pi * (t - warmup) / (decay - warmup))
  )
