"""The cubic sparsity schedule, in float64."""


def value(t, final, num_updates, interval, initial=0.0, start=0):
  if t < start:
    return initial
  if t > start + num_updates * interval:
    return final
  return final + (initial - final) * (1 - (t - start) / (num_updates * interval)) ** 3
