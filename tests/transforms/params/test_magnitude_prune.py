"""magnitude_prune against float64 NumPy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.controllers import cubic_sparsity
from gradlab.transforms.params import magnitude_prune
from tests.oracles import magnitude_prune as oracle

pytestmark = pytest.mark.filterwarnings("ignore:layer collapse:UserWarning")


def random_leaves(seed):
  rng = np.random.default_rng(seed)
  return [
    rng.standard_normal(s).astype(np.float32) for s in ((4, 5), (3, 6), (2, 2, 3))
  ]


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**31 - 1),
  sparsity=st.floats(0, 1, exclude_max=True),
  scope=st.sampled_from(["global", "leaf"]),
  unit_axis=st.sampled_from([None, 0, -1]),
  p=st.sampled_from([1, 2]),
)
def test_equals_the_oracle(seed, sparsity, scope, unit_axis, p):
  leaves = random_leaves(seed)
  options = {"scope": scope, "unit_axis": unit_axis, "p": p}
  params = [jnp.asarray(leaf) for leaf in leaves]
  pruned = magnitude_prune(params, sparsity=sparsity, **options)
  for got, want in zip(pruned, oracle.prune(leaves, sparsity, **options), strict=True):
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_worked_example():
  params = (jnp.array([3.0, -1.0, 0.5]), jnp.array([0.2, -0.4]))
  options = {"sparsity": 0.6, "prunable": lambda path, leaf: True}
  with pytest.warns(UserWarning, match=r"leaves nothing of \[1\]"):
    pruned = magnitude_prune(params, **options)
  assert [leaf.tolist() for leaf in pruned] == [[3.0, -1.0, 0.0], [0.0, 0.0]]
  pruned = magnitude_prune(params, scope="leaf", **options)
  # Negative zero of the dropped -1 would be a different bit pattern.
  assert pruned[0].tolist() == [3.0, 0.0, 0.0]
  assert not np.signbit(pruned[0][1])
  np.testing.assert_array_equal(pruned[1], np.float32([0, -0.4]))


def test_other_leaves_nodes_and_dtypes_survive():
  params = {
    "kernel": jnp.array([[1.0, 2.0]], jnp.bfloat16),
    "bias": jnp.ones(3, jnp.float16),
    "scalar": jnp.float32(1),
    "void": jnp.zeros((0, 2)),
    "none": None,
    "masked": optax.MaskedNode(),
    "pair": (jnp.arange(2), jnp.full((1, 2), 9.0)),
  }
  pruned = magnitude_prune(params, sparsity=0.25)
  assert jax.tree.structure(pruned) == jax.tree.structure(params)
  same = jax.tree.map(
    lambda a, b: a.dtype == b.dtype and a.shape == b.shape, pruned, params
  )
  assert all(jax.tree.leaves(same))
  assert pruned["kernel"].tolist() == [[0.0, 2.0]]
  assert pruned["bias"].tolist() == [1.0, 1.0, 1.0]
  assert pruned["pair"][1].tolist() == [[9.0, 9.0]]
  assert magnitude_prune({}, sparsity=0.5) == {}


def test_given_scores_decide_and_prunable_still_selects():
  params = {
    "w": jnp.array([[1.0, 2.0, 3.0, 4.0]]),
    "b": jnp.ones(2),
    "v": jnp.ones((1, 2)),
  }
  scores = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]]), "b": jnp.zeros(2), "v": None}
  pruned = magnitude_prune(params, sparsity=0.5, scores=scores)
  assert pruned["w"].tolist() == [[1.0, 2.0, 0.0, 0.0]]
  assert pruned["b"].tolist() == [1.0, 1.0]
  assert pruned["v"].tolist() == [[1.0, 1.0]]
  units = magnitude_prune(
    params, sparsity=0.5, unit_axis=1, scores={**scores, "w": scores["w"][0]}
  )
  assert units["w"].tolist() == [[1.0, 2.0, 0.0, 0.0]]


def test_scores_that_do_not_fit_raise():
  with pytest.raises(ValueError, match="does not fit"):
    magnitude_prune(jnp.ones((2, 3)), sparsity=0.5, scores=jnp.ones((3, 2)))


@pytest.mark.parametrize("sparsity", [-0.5, 1.0])
def test_sparsity_outside_its_range_raises(sparsity):
  with pytest.raises(ValueError, match="sparsity must lie in"):
    magnitude_prune(jnp.ones((2, 2)), sparsity=sparsity)


def test_traced_sparsity_compiles_once_and_equals_eager():
  leaves = [jnp.asarray(leaf) for leaf in random_leaves(0)]
  traces = []

  @jax.jit
  def jitted(params, sparsity):
    traces.append(sparsity)
    return magnitude_prune(params, sparsity=sparsity)

  for sparsity in (0.0, 0.35, 0.5, 0.97):
    want = magnitude_prune(leaves, sparsity=sparsity)
    for got, expected in zip(jitted(leaves, sparsity), want, strict=True):
      np.testing.assert_array_equal(got, expected)
  assert len(traces) == 1


def test_a_schedule_drives_it_inside_one_scan():
  controller = cubic_sparsity(0.9, num_updates=5, interval=2)
  params = jnp.asarray(random_leaves(1)[0])

  def step(carry, i):
    params, value, state = carry
    params = magnitude_prune(params, sparsity=value)
    value, state = controller.update({"step": i + 1}, state)
    return (params, value, state), jnp.sum(params == 0)

  carry, zeros = jax.lax.scan(step, (params, *controller.init()), jnp.arange(12))
  schedule = [round(20 * 0.9 * (1 - (1 - min(t, 10) / 10) ** 3)) for t in range(12)]
  assert zeros.tolist() == schedule
  np.testing.assert_array_equal(carry[0], magnitude_prune(params, sparsity=0.9))


def test_vmap_over_sparsity():
  params = jnp.asarray(random_leaves(2)[0])
  sparsity = jnp.array([0.1, 0.5, 0.9])
  pruned = jax.vmap(lambda s: magnitude_prune(params, sparsity=s))(sparsity)
  assert jnp.sum(pruned == 0, axis=(1, 2)).tolist() == [2, 10, 18]


def test_layer_collapse_is_reported():
  params = {"small": jnp.full((2, 2), 1e-3), "large": jnp.ones((2, 2))}
  with pytest.warns(UserWarning, match=r"sparsity 0.5 leaves nothing of \['small'\]"):
    magnitude_prune(params, sparsity=0.5)


@pytest.mark.filterwarnings("error")
def test_no_report_without_collapse():
  params = {"small": jnp.full((2, 2), 1e-3), "large": jnp.ones((2, 2))}
  pruned = magnitude_prune(params, sparsity=0.5, scope="leaf")
  assert int(jnp.sum(pruned["small"] == 0)) == 2
