"""Claims: each runs, what numbers decide, and the table says what the numbers say."""

import json
import math

import jax
import pytest

from gradlab.claims import Claim, Comparison
from gradlab.launch import claims
from gradlab.types import ConfigError
from tests.launch import programs

ASKED = Comparison("faster", "steps", "new", "old", "lower")
SEEDS = (0, 1)
NAMES = tuple(claims.find())


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_runs(name, tmp_path):
  """A few steps, which may leave out seeds and data; full numbers are in the table."""
  claim = claims.load(name)
  # experiments are written for jax's own promotion
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    found = claims.measure(name, SEEDS, tmp_path, smoke=True)
  arms = found["arms"]
  run = [c for c in claim.comparisons if c.metric in arms[c.method]]
  assert run
  for comparison in run:
    decided = claims.decide(comparison, arms)
    for estimate in (decided.method, decided.baseline):
      assert 1 <= estimate.n + estimate.nonfinite <= len(SEEDS)


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_was_measured_as_it_stands(name):
  found = claims.numbers(name)
  assert found is not None
  assert found["source"] == claims.source(name)
  assert len(set(found["seeds"])) >= claims.FEWEST_SEEDS


def test_the_table_says_what_the_numbers_say():
  written = (claims.EXPERIMENTS / "RESULTS.md").read_text()
  assert written == "\n".join(claims.lines(claims.find())) + "\n"


@pytest.mark.parametrize(
  ("new", "old", "margin", "verdict"),
  [
    ([5, 6, 4], [9, 9, 10], 0.0, "holds"),
    ([9, 9, 10], [5, 6, 4], 0.0, "does not hold"),
    ([7, 9, 8], [8, 8, 8], 0.0, "not decided at this size"),
    ([5, 6, 4], [9, 9, 10], 4.0, "not decided at this size"),
    ([5, 6, 4], [9, 9, 10], 9.0, "does not hold"),
    ([8.1, 8.2, 8.1], [8, 8, 8], -0.5, "holds"),
    ([8, 8, 8], [8, 8, 8], 0.0, "does not hold"),
    ([2, 2, 2], [8, 8, 8], 0.0, "holds"),
    ([5, 6, math.nan], [9, 9, 10], 0.0, "does not hold"),
    ([5, 6, 4], [9, 9.5, math.inf], 0.0, "holds"),
    ([5, 6, 4], [math.nan] * 3, 0.0, "holds"),
    ([5, 6, 4], [9, math.nan, math.nan], 0.0, "not decided at this size"),
  ],
)
def test_decide(new, old, margin, verdict):
  arms = {"new": {"steps": new}, "old": {"steps": old}}
  asked = ASKED._replace(margin=margin)
  assert claims.decide(asked, arms).verdict == verdict
  mirrored = {
    arm: {"steps": [-v for v in values["steps"]]} for arm, values in arms.items()
  }
  assert claims.decide(asked._replace(better="higher"), mirrored).verdict == verdict


def test_an_arm_without_any_finite_run_has_no_metrics():
  arms = {"new": {"steps": [1, 2, 3]}, "old": {}}
  assert claims.decide(ASKED, arms).verdict == "holds"
  swapped = ASKED._replace(method="old", baseline="new")
  assert claims.decide(swapped, arms).verdict == "does not hold"


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"method": "nw"}, r"unknown arm 'nw'\. Did you mean 'new'\?$"),
    ({"metric": "step"}, r"new: unknown metric 'step'\. Did you mean 'steps'\?$"),
  ],
)
def test_a_comparison_of_what_was_not_measured(change, says):
  arms = {"new": {"steps": [1]}, "old": {"steps": [2]}}
  with pytest.raises(ConfigError, match=says):
    claims.decide(ASKED._replace(**change), arms)


def test_lines_of_a_claim(monkeypatch):
  claim = Claim(("adan",), "fast", "A sum.", lambda *_: {}, (ASKED,))
  monkeypatch.setattr(claims, "numbers", lambda name: None)
  written = list(claims.lines({"sums": claim}))
  assert "| [adan](#sums) | fast |  |  |  |" in written
  assert written[-2:] == ["[sums.py](sums.py): A sum.", "Not measured."]
  found = {
    "arms": {"new": {"steps": [5, 6, 4]}, "old": {"steps": [9, 9, 10]}},
    "seeds": [0, 1, 2],
    "cpu_seconds": 7.2,
    "backend": "cpu",
    "jax": "0.10",
    "chosen": {"new": {"stages.train.rate": 0.5}, "old": {}},
  }
  monkeypatch.setattr(claims, "numbers", lambda name: found)
  written = list(claims.lines({"sums": claim}))
  assert "| [adan](#sums) | fast | 1 | 0 | 0 |" in written
  assert "3 seeds, 7 CPU-seconds, jax 0.10." in written
  assert "Chosen: new rate 0.5." in written
  assert written[-1] == (
    "| faster | steps, lower is better | new: 5.0 ± 2.5 | old: 9.3 ± 1.4 | 4.3 ± 3.8 | "
    "**holds** |"
  )


def test_bad_seeds_and_names():
  for given, says in (
    (["0", "1", "2", "3"], "takes 5 different seeds or more, got 0,1,2,3"),
    (["0", "1", "2", "3", "x"], "0,1,2,3,x are not integers"),
  ):
    with pytest.raises(ConfigError, match=rf"^--seeds: .*{says}"):
      claims.parse_seeds(given)
  with pytest.raises(ConfigError, match=r"^--only: unknown claim 'adan_needs_half'"):
    claims.find(["adan_needs_half"])


def test_the_program_says_in_one_line_what_is_wrong():
  done = programs.run("--seeds=1,2", program="gradlab.launch.claims")
  assert (done.code, done.out) == (2, "")
  assert done.err.startswith("error: --seeds: a claim takes 5 different seeds")
  assert len(done.err.splitlines()) == 1


def test_numbers_are_strict_json():
  for name in NAMES:
    text = (claims.EXPERIMENTS / "results" / f"{name}.json").read_text()
    json.loads(text, parse_constant=pytest.fail)
