"""The benchmark of the update rules counts their bytes and times their steps."""

import jax
import numpy as np
import optax
import pytest

from gradlab import catalog
from gradlab.launch._bench import rules as bench_rules
from gradlab.launch._bench import tree
from gradlab.launch._bench import updates as bench_updates

TINY = tree.Sizes(layers=1, width=4, vocabulary=8)


@pytest.fixture(autouse=True)
def _jaxs_own_promotion():
  """optax.adamw, the baseline, does not run under strict promotion."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def test_default_tree_has_twenty_million_parameters():
  params = tree.parameters(tree.Sizes())
  assert abs(tree.count(params) - 20e6) < 0.1e6
  assert tree.tree_bytes(params) == 4 * tree.count(params)


@pytest.mark.parametrize(
  ("name", "arrays"), [("adamw", 2), ("diffgrad", 3), ("adan", 4)]
)
def test_bytes_are_counted_from_the_arrays(name, arrays):
  params = tree.parameters(TINY)
  rule = bench_rules.rules()[name].build(params)
  stepper = bench_updates.Stepper(rule, params)
  counters = sum(
    4 for leaf in jax.tree.leaves(rule.init(params)) if leaf.dtype == np.int32
  )
  state = 4 * arrays * tree.count(params) + counters
  assert stepper.state_bytes == state
  assert stepper.moved_bytes == 3 * 4 * tree.count(params) + 2 * state


def test_the_timed_steps_are_the_rules_steps():
  params, grads = (tree.parameters(TINY, seed) for seed in (0, 1))
  rule = optax.adamw(1e-3)
  found = bench_updates.Stepper(rule, params).run(grads, 3)
  expected, state = params, rule.init(params)
  for _ in range(3):
    updates, state = rule.update(grads, state, expected)
    expected = optax.apply_updates(expected, updates)
  # float32, compiled as one program or not
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected
  )


def test_every_rule_steps_or_is_named():
  """On shapes: the benchmark's tree, and updates like it."""
  params = jax.eval_shape(lambda: tree.parameters(TINY))
  known = bench_rules.rules()
  updates = {n for n, m in catalog.methods().items() if m.family == "updates"}
  assert updates == {*known, *bench_rules.INSIDE}
  assert len(bench_rules.left_out()) == 1
  for rule in known.values():
    built = rule.build(params)
    state = jax.eval_shape(built.init, params)
    found, _ = jax.eval_shape(built.update, params, state, params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
      lambda leaf: (leaf.shape, leaf.dtype), params
    )


def test_updates_section_measures_the_rules(monkeypatch):
  known = bench_rules.rules()
  names = ("adamw", "adan", "mfac")
  monkeypatch.setattr(bench_rules, "rules", lambda: {n: known[n] for n in names})
  section = bench_updates.measure(1, TINY, steps=1)
  kinds = [record["kind"] for record in section.records]
  assert kinds == ["element-wise", "element-wise", "matrix"]
  for record, check in zip(section.records, section.checks, strict=True):
    over_bytes = record["ratio"]["median"] / record["byte_ratio"]
    assert record["time_over_bytes"] == over_bytes
    held = record["kind"] == "element-wise"
    assert check == ((over_bytes, 1.25, False) if held else None)
    compiled = zip(
      record["compile_seconds"]["runs"],
      record["optax.adamw_compile_seconds"]["runs"],
      strict=True,
    )
    assert record["compile_ratio"]["runs"] == [a / b for a, b in compiled]
  adamw = section.records[0]
  assert adamw["byte_ratio"] == 1.0
  count = tree.count(tree.parameters(TINY))
  assert adamw["state_bytes_per_parameter"] == 8 + 4 / count
  assert section.notes[-1].startswith("not stepped, since they need arguments: ")


def test_peak_memory_counts_donated_arrays_once():
  params = tree.parameters(TINY)
  stepper = bench_updates.Stepper(optax.sgd(1e-3), params)
  least = 2 * tree.tree_bytes(params)
  # The table of the results' addresses and scratch space, not a copy of the tree.
  assert least <= stepper.peak_bytes < least + tree.tree_bytes(params)


def test_time_is_divided_by_bytes():
  rule = bench_updates.Measured(
    bench_rules.rules()["adan"],
    [30.0, 9.0, 40.0],
    [10.0, 5.0, 20.0],
    1.6,
    16,
    compilation=[1.0],
    baseline_compilation=[2.0],
    memory_ratio=1.5,
    peak_bytes=1,
  )
  section = bench_updates.section([rule], 100)
  assert section.records[0]["ratio"]["runs"] == [3.0, 1.8, 2.0]
  assert section.records[0]["compile_ratio"]["median"] == 0.5
  assert section.checks == [(1.25, 1.25, False)]
