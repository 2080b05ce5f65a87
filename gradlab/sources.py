"""Data sets without a download: name -> ``Dataset``, split in one fixed way."""

import functools
import os
import pathlib
import sysconfig
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Fields = dict[str, Array]


class Dataset(NamedTuple):
  """Three disjoint splits and what is known about them.

  Attributes:
    train: field -> array with one leading length, or any random-access source:
      ``__len__`` and ``__getitem__(int) -> {field: array}``.
    validation: the same, for choices made between runs.
    test: the same, for the number that is reported.
    info: facts by name. ``input_shape`` is always there; ``num_classes`` for
      classification; ``optimum`` (parameters) and ``minimal_loss`` (mean squared
      error on ``train``) where they are known.
  """

  train: Any
  validation: Any
  test: Any
  info: Mapping[str, Any]


def digits() -> Dataset:
  """1797 handwritten digits: float32 inputs [64] in [0, 1], int32 label in 0..9.

  Examples:
    >>> from gradlab.sources import digits
    >>> digits().train["inputs"].shape
    (1078, 64)
  """
  inputs, label = _sklearn("load_digits")
  return _dataset(*_split(inputs / 16.0, label), num_classes=10)


def breast_cancer() -> Dataset:
  """569 tumours: inputs [30] standardised by the train split, label 0 or 1."""
  return _standardised_classification("load_breast_cancer", num_classes=2)


def wine() -> Dataset:
  """178 wines: inputs [13] standardised by the train split, label in 0..2."""
  return _standardised_classification("load_wine", num_classes=3)


def diabetes() -> Dataset:
  """442 patients, regression: inputs [10] and label [], standardised by train."""
  # The raw numbers: scikit-learn scales with the statistics of every row.
  inputs, label = _sklearn("load_diabetes", scaled=False)
  return _dataset(*_standardise(_split(inputs, label), ("inputs", "label")))


def stdlib_bytes(*, context: int = 64, max_bytes: int = 2**21) -> Dataset:
  """The source text of the running Python's standard library, byte by byte.

  Files are read in the order of their names, tests left out. The first 80 % of the
  bytes are ``train``, the next 10 % ``validation``, the last 10 % ``test``; each is
  cut into windows that do not overlap. A label is the byte that follows its input.

  Args:
    context: bytes per window, at least 1.
    max_bytes: how much of the text is used, at least ``20 * (context + 1)``.

  Returns:
    int32 ``inputs`` and ``label`` [context], values 0..255.

  Raises:
    ValueError: an argument is too small.
  """
  _at_least("context", context, 1)
  _at_least("max_bytes", max_bytes, 20 * (context + 1))
  text = np.frombuffer(_stdlib_text(max_bytes), np.uint8)
  cuts = len(text) * 8 // 10, len(text) * 9 // 10
  train, validation, test = (_windows(part, context) for part in np.split(text, cuts))
  return _dataset(train, validation, test, num_classes=256)


def quadratic(
  *,
  dimension: int = 20,
  condition_number: float = 100.0,
  num_examples: int = 1000,
  noise: float = 0.0,
  seed: int = 0,
) -> Dataset:
  r"""Linear regression with a Hessian of given condition number and a known optimum.

  .. math::
    y = X w + \sigma \epsilon, \qquad
    \tfrac{1}{n} X^\top X = V \operatorname{diag}(s) V^\top

  On ``train`` (n rows) s is log-spaced from 1 down to 1 / condition_number, exactly;
  ``validation`` and ``test`` (n / 5 rows each) have this covariance on average.

  Args:
    dimension: number of inputs d.
    condition_number: ratio of the largest and smallest eigenvalue, at least 1.
    num_examples: rows n of ``train``, at least ``dimension`` and 5.
    noise: standard deviation :math:`\sigma` of the labels' noise, at least 0.
    seed: fixes V, w and the rows.

  Returns:
    float32 ``inputs`` [dimension] and ``label`` []. ``info["optimum"]`` is the float64
    minimiser [dimension] of the mean squared error on ``train`` as stored,
    ``info["minimal_loss"]`` that error.

  Raises:
    ValueError: an argument out of range.

  Examples:
    >>> from gradlab.sources import quadratic
    >>> data = quadratic(dimension=3, noise=0.0)
    >>> data.info["optimum"].shape, data.info["minimal_loss"] < 1e-12
    ((3,), True)
  """
  _at_least("dimension", dimension, 1)
  _at_least("condition_number", condition_number, 1.0)
  _at_least("num_examples", num_examples, max(dimension, 5))
  _at_least("noise", noise, 0.0)
  _at_least("seed", seed, 0)
  random = np.random.default_rng(seed)
  basis = np.linalg.qr(random.normal(size=(dimension, dimension)))[0]
  root = (
    np.sqrt(np.geomspace(1.0, 1.0 / condition_number, dimension))[:, None] * basis.T
  )
  weights = random.normal(size=dimension)
  rows = np.linalg.qr(random.normal(size=(num_examples, dimension)))[0]
  splits = [rows * np.sqrt(num_examples)]
  splits += [random.normal(size=(num_examples // 5, dimension)) for _ in range(2)]

  inputs = [rows @ root for rows in splits]
  train, validation, test = (
    _fields(x, x @ weights + noise * random.normal(size=len(x))) for x in inputs
  )
  # From the stored float32 numbers, so that it is their optimum to the last digit.
  x, y = (train[name].astype(np.float64) for name in ("inputs", "label"))
  optimum = np.linalg.lstsq(x, y)[0]
  known = {"optimum": optimum, "minimal_loss": float(np.mean((x @ optimum - y) ** 2))}
  return _dataset(train, validation, test, **known)


def teacher(
  *,
  dimension: int = 16,
  hidden: int = 32,
  outputs: int = 1,
  num_examples: int = 2048,
  task: str = "regression",
  seed: int = 0,
) -> Dataset:
  """Gaussian inputs labelled by a random tanh network with one hidden layer.

  A student at least as wide can be exact: in regression the least loss is 0.

  Args:
    dimension: number of inputs.
    hidden: hidden units of the teacher.
    outputs: outputs of the teacher, or classes; at least 2 for classification.
    num_examples: rows of all splits together (60/20/20), at least 5.
    task: "regression" (float32 label [outputs]) or "classification" (the index of the
      largest output).
    seed: fixes the teacher and the inputs.

  Returns:
    float32 ``inputs`` [dimension] and the label. ``info["optimum"]`` holds the
    teacher's parameters, named as in ``mlp(features=(hidden,), activation="tanh")``;
    ``info["minimal_loss"]`` is 0.0 in regression.

  Raises:
    ValueError: an argument out of range, or another task.
  """
  if task not in ("regression", "classification"):
    raise ValueError(f"task must be 'regression' or 'classification', got {task!r}.")
  _at_least("dimension", dimension, 1)
  _at_least("hidden", hidden, 1)
  _at_least("outputs", outputs, 1 if task == "regression" else 2)
  _at_least("num_examples", num_examples, 5)
  _at_least("seed", seed, 0)
  random = np.random.default_rng(seed)

  def layer(fan_in: int, fan_out: int) -> Fields:
    kernel = random.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)
    bias = 0.1 * random.normal(size=fan_out)
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

  first, head = layer(dimension, hidden), layer(hidden, outputs)
  inputs = random.normal(size=(num_examples, dimension)).astype(np.float32)
  # float64 arithmetic on the float32 numbers that a student can represent.
  units = np.tanh(inputs.astype(np.float64) @ first["kernel"] + first["bias"])
  label = units @ head["kernel"] + head["bias"]
  known: dict[str, Any] = {"optimum": {"hidden_0": first, "head": head}}
  if task == "regression":
    return _dataset(*_split(inputs, label), **known, minimal_loss=0.0)
  return _dataset(*_split(inputs, label.argmax(-1)), **known, num_classes=outputs)


SOURCES: dict[str, Callable[..., Dataset]] = {
  "breast_cancer": breast_cancer,
  "diabetes": diabetes,
  "digits": digits,
  "quadratic": quadratic,
  "stdlib_bytes": stdlib_bytes,
  "teacher": teacher,
  "wine": wine,
}


def _sklearn(loader: str, **kwargs: Any) -> tuple[Array, Array]:
  # Imported here: scikit-learn takes longer to import than everything above to run.
  from sklearn import datasets

  inputs, label = getattr(datasets, loader)(return_X_y=True, **kwargs)
  return inputs, label


def _fields(inputs: Array, label: Array) -> Fields:
  integer = np.issubdtype(label.dtype, np.integer)
  return {
    "inputs": inputs.astype(np.float32),
    "label": label.astype(np.int32 if integer else np.float32),
  }


def _split(inputs: Array, label: Array) -> tuple[Fields, Fields, Fields]:
  # Raw bits, whose stream NumPy keeps for good: the splits outlive its versions.
  order = np.random.Philox(key=0).random_raw(len(label)).argsort(kind="stable")
  cuts = len(order) * 6 // 10, len(order) * 8 // 10
  train, validation, test = (
    _fields(inputs[rows], label[rows]) for rows in np.split(order, cuts)
  )
  return train, validation, test


def _standardise(
  splits: tuple[Fields, Fields, Fields], names: tuple[str, ...]
) -> tuple[Fields, Fields, Fields]:
  # Statistics of the first split only: nothing of the others may leak into it.
  for name in names:
    seen = splits[0][name].astype(np.float64)
    mean, scale = seen.mean(0), seen.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    for fields in splits:
      fields[name] = ((fields[name] - mean) / scale).astype(np.float32)
  return splits


def _standardised_classification(loader: str, num_classes: int) -> Dataset:
  inputs, label = _sklearn(loader)
  splits = _standardise(_split(inputs, label), ("inputs",))
  return _dataset(*splits, num_classes=num_classes)


def _dataset(train: Fields, validation: Fields, test: Fields, **info: Any) -> Dataset:
  shape = {"input_shape": train["inputs"].shape[1:]}
  return Dataset(train, validation, test, {**shape, **info})


@functools.lru_cache(maxsize=1)
def _stdlib_text(max_bytes: int) -> bytes:
  root = sysconfig.get_paths()["stdlib"]
  skipped = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}
  names: list[str] = []
  for folder, inner, files in os.walk(root):
    inner[:] = set(inner) - skipped
    names += (os.path.join(folder, name) for name in files if name.endswith(".py"))
  text = bytearray()
  for name in sorted(names):
    text += pathlib.Path(name).read_bytes()
    if len(text) >= max_bytes:
      break
  return bytes(text[:max_bytes])


def _windows(text: Array, context: int) -> Fields:
  count = (len(text) - 1) // context
  inputs, label = (
    text[shift : shift + count * context].reshape(count, context).astype(np.int32)
    for shift in (0, 1)
  )
  return {"inputs": inputs, "label": label}


def _at_least(name: str, value: float, low: float) -> None:
  if not value >= low:
    raise ValueError(f"{name} must be at least {low:g}, got {value!r}.")
