"""The benchmark of compile times, and of the parts of a low-rank rule."""

import jax
import pytest

from gradlab.launch._bench import deep, projection, tree
from gradlab.launch._bench import rules as bench_rules
from gradlab.launch._bench.tree import Sizes

TINY = Sizes(layers=1, width=4, vocabulary=8)


@pytest.fixture(autouse=True)
def _jaxs_own_promotion():
  """optax.adamw, the baseline, does not run under strict promotion."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def test_compile_times_are_measured(monkeypatch):
  known = bench_rules.rules()
  names = ("adan", "ignore_k", "mfac")
  monkeypatch.setattr(bench_rules, "rules", lambda: {n: known[n] for n in names})
  section = deep.measure(1, TINY)
  assert [record["kind"] for record in section.records] == [
    "element-wise",
    "other",
    "matrix",
  ]
  for record in section.records:
    assert record["compile"]["median"] > 0
    runs = record["compile"]["runs"][0] / record["optax.adamw"]["runs"][0]
    assert record["ratio"]["runs"] == [runs]
  ratio, none, seconds = section.checks
  assert (ratio.limit, none, seconds.limit) == (2.0, None, 20.0)
  assert seconds.value == section.records[2]["compile"]["median"]


def test_parts_are_measured_beside_the_baseline(monkeypatch):
  every = projection._rules

  def two(rank):
    return {n: r for n, r in every(rank).items() if "float" in n}

  monkeypatch.setattr(projection, "_rules", two)
  section = projection.measure(1, Sizes(layers=1, width=96, vocabulary=8), 4, steps=1)
  assert [record["name"] for record in section.records] == [
    "step, all in floats",
    "step with a refresh, in floats",
  ]
  for record in section.records:
    ratio = record["step"]["median"] / record["optax.adamw"]["median"]
    assert record["ratio"]["median"] == ratio > 0


def test_bases_are_refreshed_when_the_part_says_so():
  params, grads = (tree.parameters(TINY, seed) for seed in (0, 1))
  refreshes = {}
  for name, rule in projection._rules(2).items():
    state = rule.init(params)
    for _ in range(3):
      _, state = jax.jit(rule.update)(grads, state, params)
    svds = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)
      if "num_svd" in jax.tree_util.keystr(path)
    ]
    refreshes[name] = {int(n) for leaf in svds for n in leaf.reshape(-1)}
  assert refreshes == {
    name: {3} if "refresh" in name else {1} for name in projection._rules(2)
  }
