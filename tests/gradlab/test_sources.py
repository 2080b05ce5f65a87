import hashlib
import pathlib
import sysconfig

import jax
import numpy as np
import pytest
from sklearn import datasets

from gradlab.data import num_examples
from gradlab.models import mlp
from gradlab.sources import SOURCES

SPLITS = ("train", "validation", "test")


def assert_same(left, right):
  assert set(left) == set(right)
  for name in left:
    np.testing.assert_array_equal(left[name], right[name])


CLASSIFICATION = {
  "breast_cancer": (datasets.load_breast_cancer, 2, "2c003c82 5a2baf67 1f625130"),
  "digits": (datasets.load_digits, 10, "730f7d70 ae911b01 19eeedcf"),
  "wine": (datasets.load_wine, 3, "dbb6ae43 742f25e3 4c95effa"),
}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_sources_are_fixed_and_well_formed(name):
  first, again = SOURCES[name](), SOURCES[name]()
  for split in SPLITS:
    fields = getattr(first, split)
    assert set(fields) == {"inputs", "label"}
    assert num_examples(fields) > 0
    assert fields["inputs"].shape[1:] == first.info["input_shape"]
    assert {v.dtype.name for v in fields.values()} <= {"float32", "int32"}
    assert_same(fields, getattr(again, split))
  classes = first.info.get("num_classes")
  if classes is None:
    assert first.train["label"].dtype == np.float32
  else:
    labels = np.concatenate([getattr(first, split)["label"] for split in SPLITS])
    assert labels.min() >= 0
    assert labels.max() < classes


@pytest.mark.parametrize("name", sorted(CLASSIFICATION))
def test_splits_partition_the_data_and_are_pinned(name):
  load, classes, digests = CLASSIFICATION[name]
  dataset = SOURCES[name]()
  parts = [getattr(dataset, split) for split in SPLITS]
  raw, label = load(return_X_y=True)
  n = len(label)
  assert [num_examples(part) for part in parts] == [
    n * 6 // 10,
    n * 8 // 10 - n * 6 // 10,
    n - n * 8 // 10,
  ]
  order = np.argsort(np.random.Philox(key=0).random_raw(n))
  np.testing.assert_array_equal(
    np.concatenate([part["label"] for part in parts]), label[order]
  )
  if name == "digits":
    expected = raw[order] / 16
  else:
    seen = raw[order][: n * 6 // 10]
    expected = (raw[order] - seen.mean(0)) / seen.std(0)
  inputs = np.concatenate([part["inputs"] for part in parts])
  # raw numbers rounded to float32, up to 30 standard deviations from 0
  np.testing.assert_allclose(inputs, expected, rtol=1e-5, atol=1e-5)
  hashes = [
    hashlib.sha256(part["label"].astype("<i4").tobytes()).hexdigest()[:8]
    for part in parts
  ]
  assert " ".join(hashes) == digests
  assert dataset.info["num_classes"] == classes == len(np.unique(label))


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("breast_cancer", ["inputs"]),
    ("wine", ["inputs"]),
    ("diabetes", ["inputs", "label"]),
  ],
)
def test_scaling_has_seen_the_train_split_alone(name, fields):
  dataset = SOURCES[name]()
  for field in fields:
    values = dataset.train[field].astype(np.float64)
    # float32 rounding of numbers of order one to thirty
    np.testing.assert_allclose(values.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(values.std(0), 1.0, atol=1e-5)
    assert np.abs(dataset.test[field].mean(0)).max() > 0.01


def test_digits_lie_in_the_unit_interval():
  inputs = SOURCES["digits"]().train["inputs"]
  assert (inputs.min(), inputs.max()) == (0.0, 1.0)


def test_stdlib_windows_tile_the_text():
  dataset = SOURCES["stdlib_bytes"](context=32, max_bytes=50_000)
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  found = [*root.glob("*.py"), *root.glob("__*__/*.py"), *root.glob("asyncio/*.py")]
  early = [path for path in sorted(map(str, found)) if path < f"{root}/asyncio/b"]
  text = b"".join(pathlib.Path(path).read_bytes() for path in early)
  text = np.frombuffer(text[:40_000], np.uint8)
  inputs, label = dataset.train["inputs"], dataset.train["label"]
  assert len(text) == 40_000
  np.testing.assert_array_equal(inputs.ravel(), text[: inputs.size])
  np.testing.assert_array_equal(label.ravel()[:-1], inputs.ravel()[1:])
  assert inputs.dtype == label.dtype == np.int32
  # 80 / 10 / 10 % of 50000 bytes, less the one that labels the last input
  counts = [num_examples(getattr(dataset, split)) for split in SPLITS]
  assert counts == [39_999 // 32, 4_999 // 32, 4_999 // 32]


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("condition_number", [1.0, 1e4])
def test_quadratic_has_the_stated_optimum_and_condition(noise, condition_number):
  dataset = SOURCES["quadratic"](
    dimension=8, condition_number=condition_number, num_examples=200, noise=noise
  )
  x, y = (dataset.train[k].astype(np.float64) for k in ("inputs", "label"))
  optimum, minimal_loss = dataset.info["optimum"], dataset.info["minimal_loss"]
  hessian = x.T @ x / len(x)
  # float64 lstsq against float64 normal equations, worse by the condition number
  np.testing.assert_allclose(
    np.linalg.solve(hessian, x.T @ y / len(x)), optimum, rtol=1e-7, atol=1e-9
  )
  np.testing.assert_allclose(np.mean((x @ optimum - y) ** 2), minimal_loss, rtol=1e-9)
  # inputs are rounded to float32
  np.testing.assert_allclose(np.linalg.cond(hessian), condition_number, rtol=1e-4)
  np.testing.assert_allclose(np.linalg.eigvalsh(hessian)[-1], 1.0, rtol=1e-5)
  if noise:
    # 192 degrees of freedom of 200, relative deviation sqrt(2 / 192)
    assert abs(minimal_loss / (noise**2 * 192 / 200) - 1) < 0.4
  else:
    # labels rounded to float32
    assert minimal_loss < 1e-12


@pytest.mark.parametrize("outputs", [1, 3])
def test_teacher_is_its_own_optimum(outputs):
  dataset = SOURCES["teacher"](dimension=5, hidden=7, outputs=outputs, seed=3)
  student = mlp(features=(7,), outputs=outputs, activation="tanh")
  params, _ = jax.eval_shape(student.init, jax.random.key(0), dataset.train["inputs"])
  optimum = dataset.info["optimum"]
  assert jax.tree.map(np.shape, optimum) == jax.tree.map(lambda p: p.shape, params)
  for split in SPLITS:
    fields = getattr(dataset, split)
    predicted, _ = jax.jit(student.apply)(optimum, {}, fields["inputs"])
    assert predicted.shape == fields["label"].shape
    # float32 against labels that were computed in float64
    assert np.mean((predicted - fields["label"]) ** 2) < 1e-12
  assert dataset.info["minimal_loss"] == 0.0
  assert dataset.train["label"].std() > 0.3


def test_teacher_of_classes():
  dataset = SOURCES["teacher"](outputs=4, task="classification")
  student = mlp(features=(32,), outputs=4, activation="tanh")
  apply = jax.jit(student.apply)
  predicted, _ = apply(dataset.info["optimum"], {}, dataset.test["inputs"])
  assert (np.asarray(predicted).argmax(-1) == dataset.test["label"]).mean() > 0.995
  assert dataset.info["num_classes"] == len(np.unique(dataset.train["label"])) == 4
  assert "minimal_loss" not in dataset.info


def test_seeds_make_other_problems():
  for name in ("quadratic", "teacher"):
    first, other = SOURCES[name](seed=0), SOURCES[name](seed=1)
    assert not np.allclose(first.train["inputs"], other.train["inputs"])


@pytest.mark.parametrize(
  ("name", "kwargs", "message"),
  [
    ("stdlib_bytes", {"context": 0}, "context must be at least 1, got 0"),
    ("stdlib_bytes", {"max_bytes": 100}, "max_bytes must be at least 1300, got 100"),
    ("quadratic", {"dimension": 0}, "dimension must be at least 1"),
    ("quadratic", {"condition_number": 0.5}, "condition_number must be at least 1"),
    ("quadratic", {"num_examples": 19}, "num_examples must be at least 20, got 19"),
    ("quadratic", {"noise": float("nan")}, "noise must be at least 0, got nan"),
    ("teacher", {"task": "ranking"}, "'regression' or 'classification', got 'rank"),
    ("teacher", {"task": "classification"}, "outputs must be at least 2, got 1"),
    ("teacher", {"seed": -1}, "seed must be at least 0"),
  ],
)
def test_bad_sources(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    SOURCES[name](**kwargs)
