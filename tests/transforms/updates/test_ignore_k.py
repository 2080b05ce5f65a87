import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gradlab.transforms.updates import (
  ignore_k,
  ignore_k_delta,
  ignore_k_mask,
  keep_topk,
)
from gradlab.transforms.updates._largest import num_dropped
from tests.oracles import ignore_k as oracle
from tests.transforms.updates.trajectories import follow, noise

EXAMPLE = (0.5, -3.0, 1.0, 2.0, -1.0)
KS = (0.0, 0.04, 0.08, 0.29, 0.4, 0.6, 1.0)
quick = hypothesis.settings(max_examples=20, deadline=None)
# Few distinct numbers, so that ties are common; halves, so that sums are exact.
tied = st.integers(-6, 6).map(lambda n: n / 2)
wild = st.floats(width=32) | tied
fractions = st.sampled_from(KS)


@jax.jit
def masks(tree, k):
  return {
    (scope, by): ignore_k_mask(tree, k, scope, by=by)
    for scope in ("leaf", "global")
    for by in ("abs", "signed")
  }


def pieces(values):
  """One tree for all property tests, so that everything compiles once."""
  return {"a": values[:7].reshape(7), "b": (values[7:19].reshape(3, 4), values[19])}


vectors = hnp.arrays(np.float32, 20, elements=wild)
finite = hnp.arrays(
  np.float32, 20, elements=tied | st.floats(-4, 4, width=32, allow_subnormal=False)
)


@jax.jit
def drop(tree, k):
  return ignore_k(k).update(tree, optax.EmptyState())[0]


@jax.jit
def keep(tree, k):
  return keep_topk(k).update(tree, optax.EmptyState())[0]


@pytest.mark.parametrize(
  ("k", "expected"), [(0.4, (0.5, 0, 1, 0, -1)), (0.6, (0.5, 0, 0, 0, -1))]
)
def test_worked_example(k, expected):
  u = jnp.array(EXAMPLE)
  out, state = ignore_k(k).update(u, ignore_k(k).init(u))
  np.testing.assert_array_equal(out, expected)
  assert not jax.tree.leaves(state)
  np.testing.assert_array_equal(drop(u, k), expected)
  np.testing.assert_array_equal(keep(u, k), u - jnp.array(expected))


def test_worked_example_across_leaves():
  tree = (jnp.array([0.5, -3.0]), jnp.array([1.0, 2.0, -1.0, 4.0, 0.1]))
  first, second = ignore_k_mask(tree, 0.4, "global")
  assert first.tolist() == [True, False]
  assert second.tolist() == [True, True, True, False, True]


def test_ranking_by_number_drops_positive_changes_only():
  mask = ignore_k_mask(jnp.array(EXAMPLE), 0.4, by="signed")
  assert mask.tolist() == [True, True, False, False, True]
  mask = ignore_k_mask(jnp.array([-3.0, -1.0, -2.0, -1.0]), 0.5, by="signed")
  assert mask.tolist() == [True, False, True, False]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(vectors, fractions)
def test_masks_are_those_of_a_stable_sort(values, k):
  """NaN, infinities, subnormal numbers, both zeros and ties included."""
  tree = pieces(values)
  leaves = jax.tree.leaves(tree)
  for (scope, by), mask in masks(tree, jnp.float32(k)).items():
    expected = oracle.keep(leaves, k, scope, by)
    for ours, theirs in zip(jax.tree.leaves(mask), expected, strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_large_leaves_and_all_fractions():
  leaves = [noise(40, 50), np.round(4 * noise(3, 500, seed=1)) / 4, noise(11, seed=2)]
  for scope in ("leaf", "global"):
    for k in (0.08, 0.29):
      expected = oracle.keep(leaves, k, scope)
      for mask in (ignore_k_mask(leaves, k, scope), _traced(leaves, k, scope)):
        for ours, theirs in zip(mask, expected, strict=True):
          np.testing.assert_array_equal(ours, theirs)


@jax.jit
def _by_scope(leaves, k):
  return {scope: ignore_k_mask(leaves, k, scope) for scope in ("leaf", "global")}


def _traced(leaves, k, scope):
  return _by_scope(leaves, k)[scope]


def test_a_traced_fraction_gives_the_count_of_a_number():
  sizes = (1, 3, 12, 13, 99, 100, 1000, 4096, 65_537, 10**6, 10**7, 2**24 + 1)
  fractions = (*(n / 100 for n in range(101)), 1 / 3, 0.123456, 1e-5)
  count = jax.jit(num_dropped, static_argnums=1)
  for size in sizes:
    ours = jax.vmap(lambda k, size=size: count(k, size))(jnp.float32(fractions))
    theirs = np.array([oracle.num_dropped(k, size) for k in fractions])
    product = np.array(fractions) * size
    # The float32 k cannot tell these from the next integer: the documented guard.
    near = np.ceil(product) - product <= product * 2.0**-23
    wrong = (ours != theirs) & ~(near & (ours == theirs + 1))
    assert not wrong.any(), (size, np.array(fractions)[wrong])
    assert size >= 2**23 or (ours == theirs).all(), size
  assert num_dropped(0.29, 100) == 29
  assert num_dropped(0.08, 12) == 0
  assert num_dropped(1, 2**31 - 1) == num_dropped(jnp.float32(1), 2**31 - 1)
  assert num_dropped(jnp.float32(0.5), 2**31 - 1) == 2**30 - 1


def test_double_precision():
  with jax.enable_x64():
    u = np.random.default_rng(0).normal(size=1000)
    u[100:110] = u[3]
    u = jnp.asarray(1.0 + 1e-9 * u)  # all equal in float32
    for k in (0.29, jnp.float64(0.29)):
      np.testing.assert_array_equal(ignore_k_mask(u, k), oracle.keep([u], 0.29)[0])
    out, _ = ignore_k(0.29).update({"u": u}, optax.EmptyState())
    assert out["u"].dtype == jnp.float64
    # Counts and places stay int32 beside 64-bit defaults.
    transform = ignore_k(0.29, window=2)
    _, state = transform.update(u, transform.init(u), u)
    assert state.count.dtype == jnp.int32
    assert state.anchor.dtype == jnp.float64


@quick
@hypothesis.given(finite, fractions)
def test_splits_the_update_in_two(values, k):
  tree = pieces(values)
  kept, dropped = drop(tree, jnp.float32(k)), keep(tree, jnp.float32(k))
  rows = zip(*map(jax.tree.leaves, (tree, kept, dropped)), strict=True)
  for u, left, right in rows:
    u, left, right = (np.asarray(x) for x in (u, left, right))
    np.testing.assert_array_equal(left + right, u)
    assert not ((left != 0) & (right != 0)).any()
    n = oracle.num_dropped(k, u.size)
    assert np.sum((u != 0) & (left == 0)) == min(n, np.sum(u != 0))
    if n < u.size:
      assert np.abs(left).max() == np.sort(np.abs(u), axis=None)[::-1][n]
      if n:
        assert np.abs(left).max() <= np.sort(np.abs(right), axis=None)[::-1][n - 1]
    # Each is a sum of squares of the same numbers.
    assert np.vdot(u, left) == np.vdot(left, left)
    for p in (1, 2, 3):
      assert np.sum(np.abs(left) ** p) <= np.sum(np.abs(u) ** p)


@quick
@hypothesis.given(finite, st.sampled_from((-2.0, 0.25, -1.0, 8.0)), fractions)
def test_scale_equivariant(values, scale, k):
  tree, k = pieces(values), jnp.float32(k)
  scaled = drop(jax.tree.map(lambda u: u * np.float32(scale), tree), k)
  expected = jax.tree.map(lambda u: u * np.float32(scale), drop(tree, k))
  jax.tree.map(np.testing.assert_array_equal, scaled, expected)


@quick
@hypothesis.given(st.permutations(range(20)), fractions)
def test_permutation_equivariant_without_ties(order, k):
  u = noise(20)
  expected = drop(u, jnp.float32(k))[np.array(order)]
  np.testing.assert_array_equal(drop(u[np.array(order)], jnp.float32(k)), expected)


@quick
@hypothesis.given(finite)
def test_masks_are_nested_and_scopes_agree_on_one_leaf(values):
  by_k = [_by_scope([values], jnp.float32(k)) for k in KS]
  for less, more in itertools.pairwise(by_k):
    assert not (more["leaf"][0] & ~less["leaf"][0]).any()
  for both in by_k:
    np.testing.assert_array_equal(both["leaf"][0], both["global"][0])


@quick
@hypothesis.given(vectors)
def test_nothing_and_everything(values):
  tree = pieces(values)
  by_number, _ = ignore_k(0.0).update(tree, optax.EmptyState())
  for same in (by_number, drop(tree, jnp.float32(0))):
    for ours, u in zip(jax.tree.leaves(same), jax.tree.leaves(tree), strict=True):
      assert np.asarray(ours).tobytes() == np.asarray(u).tobytes()
  for leaf in jax.tree.leaves(drop(tree, jnp.float32(1))):
    np.testing.assert_array_equal(leaf, 0)


def test_not_idempotent():
  u = jnp.array(EXAMPLE)
  assert drop(drop(u, 0.2), 0.2).tolist() == [0.5, 0, 1, 0, -1]


@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_window_follows_the_oracle(window, scope):
  theta = [noise(6, 5), noise(13, seed=1), noise(seed=2)]
  updates = [
    [noise(6, 5, seed=s), noise(13, seed=s + 1), noise(seed=s + 2)]
    for s in range(10, 80, 10)
  ]
  thetas, state = follow(
    ignore_k(0.29, scope, window), [jnp.asarray(leaf) for leaf in theta], updates
  )
  expected = oracle.trajectory(theta, updates, 0.29, window, scope)
  for ours, theirs in zip(thetas, expected, strict=True):
    for x, y in zip(ours, theirs, strict=True):
      # float32 sums of a few numbers near one.
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)
  if window > 1:
    assert state.count == 7
    last = expected[7 // window * window - 1]
    for x, y in zip(state.anchor, last, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_whole_run_in_one_window_prunes_the_task_vector():
  theta, updates = jnp.asarray(noise(50)), noise(4, 50, seed=1)
  thetas, state = follow(ignore_k(0.2, window=4), theta, updates)
  plain, _ = follow(optax.identity(), theta, updates)
  for ours, free in zip(thetas[:3], plain[:3], strict=True):
    np.testing.assert_array_equal(ours, free)
  once = ignore_k_delta(theta, plain[-1], 0.2)
  np.testing.assert_array_equal(state.anchor, once)
  returned = np.asarray(once == theta)
  assert returned.sum() == 10
  np.testing.assert_array_equal(once[~returned], plain[-1][~returned])
  # The parameters return by adding a float32 difference: its rounding.
  np.testing.assert_allclose(thetas[-1], once, rtol=1e-6, atol=1e-6)
  stepwise, _ = follow(ignore_k(0.2), theta, updates)
  assert (stepwise[-1] != thetas[-1]).any()


def test_bfloat16_ranks_the_same_numbers():
  u = jnp.asarray(noise(3, 200), jnp.bfloat16)
  out, _ = ignore_k(0.29).update(u, optax.EmptyState())
  mask = oracle.keep([np.asarray(u, np.float32)], 0.29)[0]
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out != 0, mask)
  # Beside a float32 leaf, where both are ranked together.
  tree = [u, jnp.asarray(noise(100, seed=1))]
  found = ignore_k_mask(tree, 0.29, "global")
  expected = oracle.keep([np.asarray(x, np.float32) for x in tree], 0.29, "global")
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_bfloat16_window_keeps_a_float32_anchor():
  theta = jnp.asarray(noise(40), jnp.bfloat16)
  transform = ignore_k(0.25, window=2)
  updates = jnp.asarray(noise(2, 40, seed=1), jnp.bfloat16)
  thetas, state = follow(transform, theta, updates)
  assert state.anchor.dtype == jnp.float32
  assert thetas[-1].dtype == jnp.bfloat16
  free = theta + updates[0] + updates[1]
  delta = free.astype(jnp.float32) - theta.astype(jnp.float32)
  mask = oracle.keep([np.asarray(delta)], 0.25)[0]
  np.testing.assert_array_equal(state.anchor, jnp.where(mask, free, theta))


def test_small_leaves_lose_nothing():
  tree = {"scalar": jnp.float32(9), "bias": jnp.arange(12.0), "empty": jnp.ones((0, 3))}
  for k in (0.08, jnp.float32(0.08)):
    out, _ = ignore_k(k).update(tree, optax.EmptyState())
    jax.tree.map(np.testing.assert_array_equal, out, tree)
  out, _ = ignore_k(0.08, "global").update(tree, optax.EmptyState())
  assert out["bias"].tolist() == [*range(11), 0]
  for scope in ("leaf", "global"):
    for k in (0.5, jnp.float32(0.5)):
      for nothing in ({}, {"none": None}, [jnp.ones((0, 2))]):
        found = ignore_k_mask(nothing, k, scope)
        assert jax.tree.structure(found) == jax.tree.structure(nothing)


def test_nan_goes_first_and_zero_is_no_nan():
  u = jnp.array([np.inf, 1.0, -np.nan, 3.0, -np.inf])
  assert drop(u, 0.2).tolist() == [np.inf, 1.0, 0.0, 3.0, -np.inf]
  assert drop(u, 0.4).tolist() == [0.0, 1.0, 0.0, 3.0, -np.inf]
  np.testing.assert_array_equal(drop(jnp.zeros(5), 0.4), 0)


def test_fractions_vmap():
  u = jnp.asarray(noise(30))
  swept = jax.vmap(lambda k: drop(u, k))(jnp.float32(KS))
  for ours, k in zip(swept, KS, strict=True):
    np.testing.assert_array_equal(ours, drop(u, jnp.float32(k)))


def test_no_sort_and_no_flat_copy():
  """What runs on a matrix is counts: nothing that a sharded leaf would be moved for."""
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  u = jax.device_put(noise(8, 4), NamedSharding(mesh, PartitionSpec("data")))
  traced = str(jax.make_jaxpr(lambda u: drop(u, jnp.float32(0.4)))(u))
  for word in ("sort", "top_k", "cumsum", "reshape", "gather", "concatenate"):
    named = [line for line in traced.splitlines() if f"= {word}[" in line]
    # The counts of the groups are stacked; the leaf has 32 entries.
    assert not [line for line in named if "[32]" in line or "8,4" in line], word


@pytest.mark.parametrize(
  ("arguments", "match"),
  [
    ({"k": 1.1}, "k must lie in"),
    ({"k": -0.1}, "k must lie in"),
    ({"scope": "tensor"}, "'leaf' or 'global'"),
    ({"by": "size"}, "'abs' or 'signed'"),
    ({"window": 0}, "at least 1"),
  ],
)
def test_bad_arguments(arguments, match):
  with pytest.raises(ValueError, match=match):
    ignore_k(**arguments)
  if "window" not in arguments:
    arguments = {"k": 0.1, **arguments}
    with pytest.raises(ValueError, match=match):
      keep_topk(**arguments)
    with pytest.raises(ValueError, match=match):
      ignore_k_mask(jnp.ones(3), **arguments)


def test_bad_trees():
  with pytest.raises(ValueError, match="needs params in update when window"):
    ignore_k(window=2).update(jnp.ones(2), ignore_k(window=2).init(jnp.ones(2)))
  for transform in (ignore_k(0.5), ignore_k(0.5, window=2)):
    with pytest.raises(ValueError, match="needs floating-point"):
      transform.init({"step": jnp.ones(2, jnp.int32)})
  huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)
  with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 entries"):
    jax.eval_shape(lambda u: ignore_k_mask(u, 0.1), huge)
