"""magnitude against float64 NumPy, and the invariants of masks made from it."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.scores import apply_mask, keep_mask, magnitude
from tests.oracles import magnitude as oracle


def random_leaves(seed, shapes=((3, 4), (2, 5), (4, 2, 3))):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("unit_axis", [None, 0, 1, -1])
@pytest.mark.parametrize("p", [1, 2])
def test_equals_the_oracle(unit_axis, p):
  leaves = random_leaves(0)
  scores = magnitude([jnp.asarray(leaf) for leaf in leaves], unit_axis=unit_axis, p=p)
  for score, want in zip(scores, oracle.scores(leaves, unit_axis, p), strict=True):
    assert score.dtype == jnp.float32
    # Sums of at most a dozen float32 terms against float64.
    np.testing.assert_allclose(score, want, rtol=1e-6)


def test_worked_example():
  params = (jnp.array([3.0, -1.0, 0.5]), jnp.array([0.2, -0.4]))
  everything = {"prunable": lambda path, leaf: True}
  mask = keep_mask(magnitude(params, **everything), 0.6, "global")
  assert [m.tolist() for m in mask] == [[True, True, False], [False, False]]
  mask = keep_mask(magnitude(params, scope="leaf", **everything), 0.6, "leaf")
  assert [m.tolist() for m in mask] == [[True, False, False], [False, True]]


def test_only_matrices_are_scored_by_default():
  params = {
    "kernel": jnp.ones((2, 3)),
    "bias": jnp.ones(3),
    "scale": jnp.float32(2),
    "void": jnp.zeros((0, 3)),
    "none": None,
    "masked": optax.MaskedNode(),
  }
  scores = magnitude(params)
  assert scores["kernel"].shape == (2, 3)
  assert scores["void"].shape == (0, 3)
  assert scores["bias"] is None
  assert scores["scale"] is None
  assert scores["none"] is None
  assert scores["masked"] == optax.MaskedNode()
  assert magnitude({}) == {}


def test_prunable_sees_path_and_leaf():
  params = {"embed": jnp.ones((2, 2)), "head": jnp.ones((2, 2))}
  scores = magnitude(
    params, prunable=lambda path, leaf: path[-1].key == "head" and leaf.ndim == 2
  )
  assert scores["embed"] is None
  assert scores["head"].shape == (2, 2)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**31 - 1), sparsity=st.floats(0, 1, exclude_max=True)
)
def test_signs_and_scales(seed, sparsity):
  leaves = [jnp.asarray(leaf) for leaf in random_leaves(seed)]
  rng = np.random.default_rng(seed)
  signs = [jnp.asarray(rng.choice([-1.0, 1.0], x.shape), jnp.float32) for x in leaves]
  flipped = [4.0 * x * s for x, s in zip(leaves, signs, strict=True)]
  one_scaled = [leaves[0] * 4.0, *leaves[1:]]
  for scope in ("global", "leaf"):
    mask = keep_mask(magnitude(leaves), sparsity, scope)
    for a, b in zip(mask, keep_mask(magnitude(flipped), sparsity, scope), strict=True):
      np.testing.assert_array_equal(a, b)
  scaled = keep_mask(magnitude(one_scaled), sparsity, "leaf")
  for a, b in zip(mask, scaled, strict=True):
    np.testing.assert_array_equal(a, b)


def test_scaling_one_leaf_changes_the_global_mask():
  leaves = [jnp.asarray(leaf) for leaf in random_leaves(0)]
  before = keep_mask(magnitude(leaves), 0.5)
  after = keep_mask(magnitude([leaves[0] * 100.0, *leaves[1:]]), 0.5)
  assert bool(after[0].all())
  assert not bool(before[0].all())


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31 - 1), k=st.integers(0, 21))
def test_mask_loses_least_among_all_masks_with_k_zeros(seed, k):
  leaves = random_leaves(seed, ((3, 4), (2, 5)))
  params = [jnp.asarray(leaf) for leaf in leaves]
  kept = apply_mask(params, keep_mask(magnitude(params), k / 22))
  flat = np.concatenate([leaf.ravel() for leaf in leaves]).astype(np.float64)
  lost = sum(
    np.sum((a - np.asarray(b)) ** 2.0) for a, b in zip(leaves, kept, strict=True)
  )
  rng = np.random.default_rng(seed)
  for _ in range(20):
    other = rng.choice(22, k, replace=False)
    # Both are sums of float32 squares; equality up to their rounding is allowed.
    assert lost <= np.sum(flat[other] ** 2) * (1 + 1e-5)


def test_bfloat16_norms_are_float32():
  leaf = jnp.full((1000, 2), 1.0, jnp.bfloat16)
  scores = magnitude(leaf, unit_axis=1, p=1)
  assert scores.dtype == jnp.float32
  # bfloat16 would stop counting at 256.
  assert scores.tolist() == [1000.0, 1000.0]


def test_nan_weights_score_nan():
  scores = magnitude(jnp.array([[jnp.nan, -1.0]]))
  np.testing.assert_array_equal(scores, [[np.nan, 1.0]])


def test_jit_equals_eager():
  leaf = jax.random.normal(jax.random.key(0), (4, 3))
  np.testing.assert_array_equal(jax.jit(magnitude)(leaf), magnitude(leaf))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"scope": "layer"}, "'global' or 'leaf'"),
    ({"p": 3}, "p must be 1 or 2"),
    ({"unit_axis": 2}, r"unit_axis 2 does not exist in \['w'\]"),
    ({"unit_axis": -3}, "unit_axis -3 does not exist"),
  ],
)
def test_bad_arguments_raise(arguments, message):
  with pytest.raises(ValueError, match=message):
    magnitude({"w": jnp.ones((2, 2))}, **arguments)
