"""The algebra of sweeps: pure lists of overrides."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, FieldReference

from gradlab import sweeps
from gradlab.sweeps import chain, choices, log_uniform, name, product, seeds, zipped
from gradlab.types import ConfigError

sizes = st.lists(st.integers(0, 4), min_size=1, max_size=3)


@given(sizes)
@settings(deadline=None)
def test_product_has_every_combination_once(counts):
  parts = [choices(f"p{i}", range(n)) for i, n in enumerate(counts)]
  found = product(*parts)
  assert len(found) == math.prod(counts)
  assert len({tuple(arm.values()) for arm in found}) == len(found)
  assert found == sorted(found, key=lambda arm: tuple(arm.values()))


@given(sizes)
@settings(deadline=None)
def test_chain_keeps_order_and_copies(counts):
  parts = [choices(f"p{i}", range(n)) for i, n in enumerate(counts)]
  found = chain(*parts)
  assert found == [arm for part in parts for arm in part]
  for arm in found:
    arm["changed"] = True
  assert not any("changed" in arm for part in parts for arm in part)


def test_zipped():
  found = zipped(choices("a", (1, 2)), seeds(2, start=5))
  assert found == [{"a": 1, "seed": 5}, {"a": 2, "seed": 6}]
  with pytest.raises(ConfigError, match=r"zipped: the sweeps have \[2, 3\] arms"):
    zipped(choices("a", (1, 2)), seeds(3))


@pytest.mark.parametrize("function", [product, zipped])
def test_a_field_that_two_sweeps_set(function):
  with pytest.raises(ConfigError, match=r"two of the sweeps set 'seed'"):
    function(seeds(2), seeds(2))


def test_nothing_times_something_is_nothing():
  assert product(seeds(3), choices("a", ())) == []
  assert product() == [{}]


def test_log_uniform_spaces_evenly_or_draws():
  values = [arm["r"] for arm in log_uniform("r", 1e-4, 1e-1, 7)]
  np.testing.assert_allclose(np.diff(np.log(values)), math.log(10) / 2, rtol=1e-12)
  assert all(type(value) is float for value in values)
  assert values[0] == pytest.approx(1e-4)
  drawn = [arm["r"] for arm in log_uniform("r", 1e-4, 1e-1, 2000, seed=3)]
  assert drawn == [arm["r"] for arm in log_uniform("r", 1e-4, 1e-1, 2000, seed=3)]
  assert 1e-4 <= min(drawn) < max(drawn) <= 1e-1
  # the mean of 2000 uniform draws: 5 standard errors
  middle = np.mean(np.log10(drawn))
  assert abs(middle + 2.5) < 5 * 3 / math.sqrt(12 * 2000)
  assert log_uniform("r", 0.5, 2.0, 1) == [{"r": 0.5}]


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ((0.0, 1.0, 3), r"0 < low <= high, got 0.0 and 1.0"),
    ((2.0, 1.0, 3), r"0 < low <= high"),
    ((1.0, math.inf, 3), r"0 < low <= high"),
    ((1.0, 2.0, 0), r"a count of 1 or more, got 0"),
  ],
)
def test_log_uniform_refuses(arguments, says):
  with pytest.raises(ConfigError, match=says):
    log_uniform("r", *arguments)


def config():
  steps = FieldReference(10)
  return ConfigDict(
    {
      "seed": 0,
      "data": {"name": "digits"},
      "stages": {
        "train": {
          "steps": steps,
          "update": {"adamw": {"learning_rate": 0.1, "decay": steps * 2}},
        }
      },
    }
  )


def test_override_leaves_the_config_and_follows_references():
  base = config()
  out = sweeps.override(base, {"stages.train.steps": 30, "stages.train.log_every": 5})
  assert base.stages.train.steps == 10
  assert "log_every" not in base.stages.train
  train = out.stages.train
  assert (train.steps, train["update"].adamw.decay, train.log_every) == (30, 60, 5)


def test_overrides_are_made_in_order():
  out = sweeps.override(
    config(),
    {
      "stages.train.update": {"adan": {}},
      "stages.train.update.adan.learning_rate": 1.0,
    },
  )
  assert out.stages.train["update"].to_dict() == {"adan": {"learning_rate": 1.0}}


@pytest.mark.parametrize(
  ("path", "value", "says"),
  [
    ("stages.trian.steps", 3, r"stages has no field 'trian'. Did you mean 'train'\?"),
    ("optimizer.rate", 3, r"the config has no field 'optimizer'. Fields: data, "),
    ("seed.x", 3, r"seed.x: seed is a value and has no fields"),
    ("stages.train.steps.x.y", 3, r"stages.train.steps is a value"),
    ("data.name", 3, r"data.name: 3 is of another type than the config's 'digits'"),
  ],
)
def test_override_refuses(path, value, says):
  with pytest.raises(ConfigError, match=says):
    sweeps.override(config(), {path: value})


def test_names_are_the_arm_s_own_and_fit_for_folders():
  assert name({}) == "base"
  assert name({"a.steps": 3, "b.steps": 4}) == "a.steps=3,b.steps=4"
  assert name({"x": 0.1 + 0.2}) == "x=0.30000000000000004"
  assert name({"model.features": (64, 32)}) == "features=64-32"
  for arm in ({"u": {"adan": {"b1": 0.9}}}, {"p": "a/b c"}, {"p": "x" * 500}):
    found = name(arm)
    assert "~" in found
    assert "/" not in found
    assert len(found) < 130
  assert name({"u": {"adan": {"b1": 0.9}}}) != name({"u": {"adan": {"b1": 0.8}}})
