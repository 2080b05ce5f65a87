"""keep_mask, apply_mask and collapsed, against an explicit stable sort."""

from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab import transforms
from gradlab.transforms.scores import apply_mask, collapsed, keep_mask
from gradlab.transforms.scores.keep_mask import _num_dropped
from tests.oracles import magnitude as oracle

SHAPES = ((3, 4), (5,), (), (0, 2), (2, 1, 3))


def tree_of(leaves):
  return {str(i): jnp.asarray(leaf, jnp.float32) for i, leaf in enumerate(leaves)}


def assert_masks(masks, expected):
  for mask, want in zip(masks.values(), expected, strict=True):
    assert mask.dtype == jnp.bool_
    np.testing.assert_array_equal(mask, want)


def test_is_exported_by_the_package():
  assert transforms.keep_mask is keep_mask


@pytest.mark.parametrize(
  ("scope", "expected"),
  [
    ("global", [[True, True, False], [False, False]]),
    ("leaf", [[True, False, False], [False, True]]),
  ],
)
def test_worked_example(scope, expected):
  scores = (jnp.array([3.0, 1.0, 0.5]), jnp.array([0.2, 0.4]))
  assert [m.tolist() for m in keep_mask(scores, 0.6, scope)] == expected


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**31 - 1),
  sparsity=st.floats(0, 1, exclude_max=True),
  scope=st.sampled_from(["global", "leaf"]),
  ties=st.booleans(),
)
def test_equals_a_stable_sort(seed, sparsity, scope, ties):
  rng = np.random.default_rng(seed)
  leaves = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
  if ties:
    leaves = [np.round(leaf) for leaf in leaves]
  assert_masks(
    keep_mask(tree_of(leaves), sparsity, scope), oracle.masks(leaves, sparsity, scope)
  )


def test_extreme_values_keep_their_order():
  values = np.array(
    [np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, np.nan, 1.0, -np.nan, 0.0],
    np.float32,
  )
  for k in range(len(values)):
    mask = keep_mask(jnp.asarray(values), k / len(values))
    np.testing.assert_array_equal(mask, oracle.drop(values, k))


def test_ties_drop_the_lower_index_first():
  mask = keep_mask((jnp.ones((2, 2)), jnp.ones(3)), 3 / 7)
  assert mask[0].tolist() == [[False, False], [False, True]]
  assert mask[1].tolist() == [True, True, True]


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**31 - 1), scope=st.sampled_from(["global", "leaf"])
)
def test_masks_are_nested_and_count_exactly(seed, scope):
  rng = np.random.default_rng(seed)
  scores = tree_of([np.round(rng.standard_normal(shape), 1) for shape in SHAPES])
  previous = keep_mask(scores, 0.0, scope)
  assert all(bool(m.all()) for m in previous.values())
  for sparsity in np.sort(rng.random(5)):
    mask = keep_mask(scores, float(sparsity), scope)
    zeros = [int((~m).sum()) for m in mask.values()]
    sizes = [m.size for m in mask.values()]
    if scope == "global":
      assert sum(zeros) == round(float(sparsity) * sum(sizes))
    else:
      assert zeros == [round(float(sparsity) * size) for size in sizes]
    assert all(bool((previous[i] | ~mask[i]).all()) for i in mask)
    previous = mask


def test_order_preserving_maps_change_nothing():
  scores = jax.random.normal(jax.random.key(0), (7, 5))
  mask = keep_mask(scores, 0.4)
  np.testing.assert_array_equal(mask, keep_mask(8.0 * scores - 1.0, 0.4))


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_traced_sparsity_gives_the_same_masks(scope):
  traces = []

  @jax.jit
  def traced_keep_mask(scores, sparsity):
    traces.append(scope)
    return keep_mask(scores, sparsity, scope)

  scores = tree_of([np.random.default_rng(0).standard_normal(s) for s in SHAPES])
  for sparsity in (0.0, 0.05, 0.35, 0.5, 0.95):
    expected = keep_mask(scores, sparsity, scope)
    mask = traced_keep_mask(scores, sparsity)
    assert_masks(mask, expected.values())
    assert_masks(keep_mask(scores, jnp.float32(sparsity), scope), expected.values())
  assert traces == [scope]


def test_vmap_over_sparsity_and_scores():
  scores = jax.random.normal(jax.random.key(0), (3, 4, 5))
  sparsity = jnp.array([0.1, 0.5, 0.9])
  masks = jax.vmap(keep_mask)(scores, sparsity)
  for i in range(3):
    np.testing.assert_array_equal(masks[i], keep_mask(scores[i], float(sparsity[i])))


count = jax.jit(_num_dropped, static_argnums=1)


@pytest.mark.parametrize("size", [1, 2, 5, 10, 30, 1000, 1010, 100_010, 4_000_000])
def test_traced_count_rounds_like_python(size):
  grid = [i / 20 for i in range(20)] + [0.01, 0.123, 0.99, 0.999]
  assert [int(count(s, size)) for s in grid] == [round(s * size) for s in grid]


def test_traced_count_is_right_where_float32_has_no_integers():
  rng = np.random.default_rng(0)
  for size in (33_333_333, 50_000_000, 2**31 - 1):
    for s in [*rng.random(12).astype(np.float32), np.float32(0.5), np.float32(2**-20)]:
      exact = Fraction(float(s)) * size
      # 1/2 from rounding, 1/4 because a sparsity near a half is taken as that half.
      assert abs(int(count(s, size)) - exact) <= Fraction(76, 100)


def test_traced_count_follows_python_in_float64():
  with jax.enable_x64(True):
    fraction = jnp.asarray(0.6, jnp.float64)
    assert int(count(fraction, 50_000_000)) == 30_000_000
    scores = jnp.asarray([1.0, 1.0 + 1e-12, 1.0 - 1e-12], jnp.float64)
    assert keep_mask(scores, 0.6).tolist() == [False, True, False]


def test_none_nodes_and_empty_trees():
  mask = keep_mask({"a": None, "b": jnp.array([1.0, 2.0])}, 0.5)
  assert mask["a"] is None
  assert mask["b"].tolist() == [False, True]
  assert keep_mask({}, 0.5) == {}
  assert keep_mask((), 0.5, "leaf") == ()
  assert keep_mask({"a": jnp.zeros((0, 3))}, 0.5)["a"].shape == (0, 3)


def test_bfloat16_and_integer_scores():
  values = [3, 1, 2, 0]
  for dtype in (jnp.bfloat16, jnp.int32):
    mask = keep_mask(jnp.array(values, dtype), 0.5)
    assert mask.tolist() == [True, False, True, False]


def test_nan_is_kept_and_the_checked_variant_raises():
  scores = {"w": jnp.array([jnp.nan, 1.0, 2.0])}
  assert keep_mask(scores, 0.6)["w"].tolist() == [True, False, False]
  with pytest.raises(ValueError, match=r"\['w'\] contain NaN"):
    keep_mask(scores, 0.6, checked=True)
  with pytest.raises(ValueError, match="concrete scores"):
    jax.jit(lambda s: keep_mask(s, 0.6, checked=True))(scores)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range_raises(sparsity):
  with pytest.raises(ValueError, match="sparsity must lie in"):
    keep_mask(jnp.ones(3), sparsity)


def test_unknown_scope_raises():
  with pytest.raises(ValueError, match="'global' or 'leaf'"):
    keep_mask(jnp.ones(3), 0.5, "layer")


def test_too_many_scores_to_count_raise():
  huge = jax.ShapeDtypeStruct((2**31,), jnp.float32)
  with pytest.raises(ValueError, match="at most"):
    jax.eval_shape(lambda s: keep_mask(s, 0.5), huge)


def test_apply_mask_zeroes_units_and_drops_nan():
  params = {"a": jnp.array([[jnp.nan, 2.0], [3.0, 4.0]]), "b": {"c": jnp.ones(2)}}
  mask = {"a": jnp.array([[False, True], [True, True]]), "b": None}
  out = apply_mask(params, mask)
  assert out["a"].tolist() == [[0.0, 2.0], [3.0, 4.0]]
  assert out["b"]["c"] is params["b"]["c"]
  units = apply_mask(params["a"], jnp.array([False, True]), unit_axis=-2)
  assert units.tolist() == [[0.0, 0.0], [3.0, 4.0]]


def test_masked_updates_keep_pruned_weights_at_zero():
  params = {"w": jnp.array([[0.1, -2.0], [3.0, 0.2]], jnp.bfloat16)}
  mask = keep_mask(jax.tree.map(jnp.abs, params), 0.5)
  params = apply_mask(params, mask)
  optimizer = optax.chain(
    optax.sgd(0.1, momentum=0.9),
    optax.stateless(lambda updates, _: apply_mask(updates, mask)),
  )
  state = optimizer.init(params)
  updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
  moved = optax.apply_updates(params, updates)["w"]
  np.testing.assert_array_equal(moved == 0, [[True, False], [False, True]])
  assert moved.dtype == jnp.bfloat16


@pytest.mark.parametrize("unit_axis", [None, 1, 2])
def test_a_mask_that_does_not_fit_raises(unit_axis):
  with pytest.raises(ValueError, match=r"the mask of \['w'\]"):
    apply_mask({"w": jnp.ones((2, 3))}, {"w": jnp.ones(2, bool)}, unit_axis=unit_axis)


def test_collapsed_names_emptied_leaves_only():
  mask = {
    "full": jnp.array([True, False]),
    "gone": {"kernel": jnp.zeros((2, 2), bool)},
    "none": None,
    "void": jnp.zeros((0,), bool),
  }
  assert collapsed(mask) == ("['gone']['kernel']",)
