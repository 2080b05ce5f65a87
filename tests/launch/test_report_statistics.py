"""Means over seeds and their intervals, against scipy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from gradlab.launch._report import curves as report_curves
from gradlab.launch._report import load, settings, statistics


def test_interval_is_students():
  values = [0.91, 0.94, 0.925, 0.95, 0.9]
  found = statistics.estimate(values)
  low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
  assert found.n == 5
  # two float64 ways to the same numbers
  assert found.mean == pytest.approx(np.mean(values), rel=1e-14)
  assert found.mean - found.half == pytest.approx(low, rel=1e-12)
  assert found.mean + found.half == pytest.approx(high, rel=1e-12)


def test_interval_of_two_by_hand():
  # t with one degree of freedom is tan(0.475 pi) at 97.5%; half = t |a - b| / 2
  found = statistics.estimate([1.0, 3.0])
  assert found.mean == 2.0
  assert found.half == pytest.approx(math.tan(0.475 * math.pi), rel=1e-10)


def test_one_number_has_no_interval_and_bad_ones_are_counted():
  assert math.isnan(statistics.estimate([0.5]).half)
  found = statistics.estimate([0.5, math.nan, math.inf, 0.7])
  assert (found.n, found.nonfinite) == (2, 2)
  assert found.mean == pytest.approx(0.6)
  assert statistics.plus_minus(found) == "0.6 ± 1.3"
  nothing = statistics.estimate([math.nan])
  assert statistics.plus_minus(nothing) == "none finite"


def test_band_is_the_interval_at_every_point():
  values = np.random.default_rng(0).normal(size=(4, 6))
  values[1, 2] = np.nan
  values[1:, 3] = np.nan
  values[:, 4] = np.inf
  mean, half, count = statistics.band(values)
  assert count.tolist() == [4, 4, 3, 1, 0, 4]
  for column, (m, h) in enumerate(zip(mean, half, strict=True)):
    found = statistics.estimate(values[:, column].tolist())
    np.testing.assert_allclose([m, h], [found.mean, found.half], rtol=1e-12)


def test_mean_of_curves_with_other_steps():
  curves = [{1: 1.0, 2: 2.0}, {2: 4.0, 3: 5.0}]
  empty = load.Arm("", "finished", None, None, {}, {}, None, {}, "", ())
  arms = [empty._replace(curves={("loss", "train"): curve}) for curve in curves]
  setting = settings.Setting((), (0, 1))
  (panel,) = report_curves.of_sweep(arms, [setting], [0])
  assert panel.means[0].steps.tolist() == [1, 2, 3]
  assert panel.means[0].values.tolist() == [1.0, 3.0, 5.0]
