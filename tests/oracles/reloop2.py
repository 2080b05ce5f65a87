"""The error memory as a list and the sketch as dictionaries, in float64."""

import math

import numpy as np


def unit(row):
  row = np.asarray(row, np.float64)
  norm = math.sqrt(float(row @ row))
  return row / norm if norm else row


class Memory:
  """A ring of (unit key, error) pairs, written one row at a time."""

  def __init__(self, capacity):
    self.slots = [None] * capacity
    self.pointer = 0

  def write(self, features, errors):
    for row, error in zip(features, errors, strict=True):
      if np.isfinite(row).all() and np.isfinite(error):
        self.slots[self.pointer] = (unit(row), float(error))
        self.pointer = (self.pointer + 1) % len(self.slots)

  def read(self, queries, k, temperature):
    out = []
    filled = [slot for slot in self.slots if slot is not None]
    for query in queries:
      if not filled or not np.isfinite(query).all():
        out.append(0.0)
        continue
      scored = [(float(unit(query) @ key), error) for key, error in filled]
      nearest = sorted(scored, key=lambda pair: -pair[0])[:k]
      weights = [math.exp((s - nearest[0][0]) / temperature) for s, _ in nearest]
      total = sum(w * e for w, (_, e) in zip(weights, nearest, strict=True))
      out.append(total / sum(weights))
    return np.array(out)


class Sketch:
  """One dictionary of buckets per table."""

  def __init__(self, projections):
    self.projections = np.asarray(projections, np.float64)
    self.tables = [{} for _ in self.projections]

  def buckets(self, row):
    row = np.asarray(row, np.float64)
    return [
      sum(2**b for b, direction in enumerate(table) if direction @ row > 0)
      for table in self.projections
    ]

  def write(self, features, errors, decay=1.0):
    for table in self.tables:
      for bucket, (total, count) in table.items():
        table[bucket] = (decay * total, decay * count)
    for row, error in zip(features, errors, strict=True):
      if np.isfinite(row).all() and np.isfinite(error):
        for table, bucket in zip(self.tables, self.buckets(row), strict=True):
          total, count = table.get(bucket, (0.0, 0.0))
          table[bucket] = (total + float(error), count + 1.0)

  def read(self, queries):
    out = []
    for query in queries:
      found = [(0.0, 0.0)]
      if np.isfinite(query).all():
        pairs = zip(self.tables, self.buckets(query), strict=True)
        found = [table.get(bucket, (0.0, 0.0)) for table, bucket in pairs]
      total, count = (sum(column) for column in zip(*found, strict=True))
      out.append(total / count if count else 0.0)
    return np.array(out)


def kernel_regression(features, errors, queries, num_bits):
  """What the sketch reads in expectation over the projections."""
  out = []
  for query in queries:
    cosines = [float(np.clip(unit(query) @ unit(row), -1, 1)) for row in features]
    weights = [(1 - math.acos(c) / math.pi) ** num_bits for c in cosines]
    out.append(np.dot(weights, errors) / sum(weights))
  return np.array(out)
