"""Data sets with something wrong in them."""

import numpy as np

from gradlab import data


def linear(num_examples: int = 64, bad_step: int | None = None) -> data.Dataset:
  """A linear regression in four inputs, in float32.

  Args:
    num_examples: of the training split.
    bad_step: the step of a run with seed 0 and batches of 8 that is the first to meet
      an input that is NaN.
  """
  random = np.random.default_rng(0)
  inputs = random.normal(size=(num_examples + 32, 4)).astype(np.float32)
  label = inputs @ np.array([1.0, -2.0, 0.5, 0.0], np.float32)
  if bad_step is not None:
    batches = data.index_block(0, 0, bad_step, num_examples, 8)
    new = set(batches[-1].tolist()) - set(batches[:-1].ravel().tolist())
    inputs[min(new)] = np.nan
  cuts = num_examples, num_examples + 16
  train, validation, test = (
    {"inputs": x, "label": y}
    for x, y in zip(np.split(inputs, cuts), np.split(label, cuts), strict=True)
  )
  return data.Dataset(train, validation, test, {"input_shape": (4,)})


def unlabelled() -> data.Dataset:
  """A data set whose splits have no inputs."""
  split = {"label": np.zeros(8, np.float32)}
  return data.Dataset(split, split, split, {})


def missing() -> data.Dataset:
  """A data set whose file is not there."""
  return np.load("/nowhere/train.npz")


def not_data() -> int:
  return 3
