"""Every method has a workload or is named, and its numbers are what they say."""

import jax
import pytest

from gradlab import catalog
from gradlab.launch._bench import cases as bench_cases
from gradlab.launch._bench import methods
from gradlab.launch._bench import work as bench_work
from gradlab.launch._bench.tree import Sizes

TINY = bench_work.Scale(
  tree=Sizes(layers=1, width=8, vocabulary=16),
  sources=3,
  features=(8,),
  batch=16,
  tokens=4,
  vocabulary=8,
  search_steps=3,
)


@pytest.fixture(autouse=True)
def _jaxs_own_promotion():
  """optax's losses, the baselines, do not run under strict promotion."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def work():
  return bench_work.workload(TINY)


def test_the_table_names_methods_of_the_catalogue():
  assert set(bench_cases.CASES) <= set(catalog.methods())


@pytest.mark.parametrize("name", ["backprop", "mean", "gradient_reversal"])
def test_a_method_and_its_baseline_return_as_much(work, name):
  case = bench_cases.CASES[name](work)
  ours, baseline = (
    jax.tree.leaves(jax.eval_shape(function, *case.arguments))
    for function in (case.ours, case.baseline)
  )
  assert sorted(x.shape for x in ours) == sorted(x.shape for x in baseline)


def test_a_compressor_says_what_it_sends(work):
  case = bench_cases.CASES["sketched_first_order"](work)
  grads = jax.tree.leaves(work.grads)
  sent = sum(max(1, round(0.1 * leaf.size)) for leaf in grads)
  assert case.message == sent / sum(leaf.size for leaf in grads)


def test_section_measures_what_has_a_line_and_names_the_rest(monkeypatch):
  names = ("mean", "top_k", "pgd", "squared_error")
  cases = {name: bench_cases.CASES[name] for name in names}
  monkeypatch.setattr(methods, "CASES", cases)
  monkeypatch.setattr(methods, "RUN_SECONDS", 0.0)
  section = methods.measure(2, TINY)
  assert [record["name"] for record in section.records] == list(names)
  assert section.checks == [None] * 4
  rest = [
    f"{m.name} ({m.family})"
    for members in catalog.families().values()
    for m in members
    if m.family != "updates" and m.name not in names
  ]
  assert section.notes == [f"not measured: {', '.join(rest)}."]
  pgd = section.records[2]
  assert pgd["against"] == "3 input gradients"
  single = zip(pgd["method"]["runs"], pgd["baseline"]["runs"], strict=True)
  assert pgd["ratio"]["runs"] == [a / b / 3 for a, b in single]
  for record in section.records:
    assert record["peak_bytes"] > 0
    assert record["memory_ratio"] > 0
    assert len(record["compile_ratio"]["runs"]) == 2


@pytest.mark.parametrize("name", list(bench_cases.CASES))
def test_every_case_can_be_compiled(work, name):
  case = bench_cases.CASES[name](work)
  for function in (case.ours, case.baseline):
    assert jax.tree.leaves(jax.eval_shape(function, *case.arguments))
