"""snip against backpropagation by hand, and its invariants."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.scores import keep_mask, snip, snip_mask
from tests.oracles import snip as oracle

SIZES = (6, 8, 7, 4)
PAIRS = list(itertools.pairwise(SIZES))


def network(seed, bias=0.1):
  rng = np.random.default_rng(seed)
  layers = [
    (rng.normal(0, a**-0.5, (a, b)), bias * rng.standard_normal(b)) for a, b in PAIRS
  ]
  x = rng.standard_normal((12, SIZES[0]))
  y = rng.integers(0, SIZES[-1], 12)
  params = [
    {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.asarray(b, jnp.float32)}
    for w, b in layers
  ]
  return layers, params, x, y, (jnp.asarray(x, jnp.float32), jnp.asarray(y))


def loss_fn(params, batch):
  h, y = batch
  for i, layer in enumerate(params):
    h = h @ layer["kernel"] + layer["bias"][None]
    if i < len(params) - 1:
      h = jax.nn.relu(h)
  return optax.losses.softmax_cross_entropy_with_integer_labels(h, y).mean()


@functools.partial(jax.jit, static_argnames="normalize")
def scores_of(params, batch, scale=1.0, normalize=True):
  return snip(lambda p, b: scale * loss_fn(p, b), params, batch, normalize=normalize)


gradient = jax.jit(jax.grad(loss_fn))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_oracle(seed, normalize):
  layers, params, x, y, batch = network(seed)
  scores = scores_of(params, batch, normalize=normalize)
  for score, want in zip(scores, oracle.scores(layers, x, y, normalize), strict=True):
    assert score["bias"] is None
    # float32 backpropagation through three layers against float64; entries near 0
    # are differences of larger terms, hence the absolute part.
    np.testing.assert_allclose(score["kernel"], want, rtol=2e-5, atol=1e-7)


def test_worked_example():
  hessian = jnp.array([[2.0, 1.0], [1.0, 4.0]])
  weights = jnp.array([1.0, -0.5])

  def quadratic(w, h):
    return 0.5 * jnp.vdot(w, h @ w)

  everything = {"prunable": lambda path, leaf: True}
  raw = snip(quadratic, weights, hessian, normalize=False, **everything)
  assert raw.tolist() == [1.5, 0.5]
  assert snip(quadratic, weights, hessian, **everything).tolist() == [0.75, 0.25]


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([0.25, 2.0, 8.0])
)
def test_non_negative_sum_one_and_blind_to_the_scale_of_the_loss(seed, scale):
  _, params, _, _, batch = network(seed)
  scores = scores_of(params, batch)
  scaled = scores_of(params, batch, scale)
  leaves = jax.tree.leaves(scores)
  assert all(bool((leaf >= 0).all()) for leaf in leaves)
  # A sum of about 130 float32 shares.
  assert sum(float(leaf.sum()) for leaf in leaves) == pytest.approx(1.0, abs=1e-5)
  for a, b in zip(leaves, jax.tree.leaves(scaled), strict=True):
    # Powers of two scale exactly; XLA may order the sums of two programs differently.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def test_signed_scores_are_conserved_in_hidden_units():
  layers, params, x, y, batch = network(3, bias=0.0)
  grads = oracle.mlp_gradient(layers, x, y)
  signed = [w * g for (w, _), (g, _) in zip(layers, grads, strict=True)]
  scores = scores_of(params, batch, normalize=False)
  for score, exact in zip(scores, signed, strict=True):
    np.testing.assert_allclose(score["kernel"], np.abs(exact), rtol=2e-5, atol=1e-7)
  grad = gradient(params, batch)
  flow = [p["kernel"] * g["kernel"] for p, g in zip(params, grad, strict=True)]
  for into, out in itertools.pairwise(flow):
    # Sums of up to 8 signed float32 products of size about 0.01.
    np.testing.assert_allclose(into.sum(0), out.sum(1), atol=1e-7)


def test_zero_weights_and_zero_gradients_score_zero():
  _, params, _, _, batch = network(0)
  params[0]["kernel"] = params[0]["kernel"].at[2, 3].set(0.0)
  params[1]["bias"] = params[1]["bias"].at[5].set(-1e6)  # that unit never fires
  scores = scores_of(params, batch)
  assert scores[0]["kernel"][2, 3] == 0
  assert not scores[1]["kernel"][:, 5].any()
  assert not scores[2]["kernel"][5].any()


def test_uses_the_gradient_of_the_batch_mean():
  layers, params, x, y, batch = network(0)
  single = [oracle.scores(layers, x[[i]], y[[i]], normalize=False) for i in range(12)]
  mean_of_abs = sum(scores[0] for scores in single) / 12
  score = scores_of(params, batch, normalize=False)[0]["kernel"]
  # Float32 rounding of terms below 1; the gap is far larger.
  assert bool((score <= mean_of_abs + 1e-6).all())
  assert float(np.max(mean_of_abs - score)) > 1e-2


def test_all_zero_scores_stay_zero():
  scores = snip(lambda p, b: 0.0 * p.sum(), jnp.ones((2, 2)), None)
  assert scores.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_non_finite_gradients_propagate():
  scores = snip(lambda p, b: jnp.sum(jnp.sqrt(p)), jnp.array([[-1.0, 4.0]]), None)
  assert bool(jnp.isnan(scores).all())
  raw = snip(
    lambda p, b: jnp.sum(jnp.sqrt(p)), jnp.array([[-1.0, 4.0]]), None, normalize=False
  )
  np.testing.assert_array_equal(raw, [[np.nan, 1.0]])


def test_bfloat16_products_are_float32():
  weight = jnp.array([[1.0078125, 3.0]], jnp.bfloat16)
  scores = snip(lambda p, b: jnp.vdot(p, p) / 2, weight, None, normalize=False)
  assert scores.dtype == jnp.float32
  # 1.0078125 squared needs more bits than bfloat16 has.
  assert float(scores[0, 0]) == 1.0078125**2


def test_leaves_that_are_not_prunable_need_no_gradient():
  params = {"w": jnp.ones((2, 2)), "table": jnp.arange(3), "none": None, "t": (1.0,)}

  def loss(p, batch):
    return jnp.sum(p["w"]) * p["t"][0] + p["table"][1].astype(jnp.float32)

  scores = snip(loss, params, None)
  assert scores["w"].tolist() == [[0.25, 0.25], [0.25, 0.25]]
  assert scores["table"] is None
  assert scores["none"] is None
  assert scores["t"] == (None,)
  assert snip(lambda p, b: jnp.float32(0), {}, None) == {}


def test_jit_equals_eager():
  _, params, _, _, batch = network(0)
  jitted = scores_of(params, batch)
  for a, b in zip(
    jax.tree.leaves(jitted), jax.tree.leaves(snip(loss_fn, params, batch)), strict=True
  ):
    # One fused program against many: the order of float32 sums differs.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**31 - 1),
  keep_ratio=st.floats(0.1, 1.0),
  ties=st.booleans(),
)
def test_snip_mask_equals_the_oracle(seed, keep_ratio, ties):
  rng = np.random.default_rng(seed)
  leaves = [rng.random((3, 4)).astype(np.float32), rng.random(7).astype(np.float32)]
  if ties:
    leaves = [np.round(leaf, 1) for leaf in leaves]
  mask = snip_mask([jnp.asarray(leaf) for leaf in leaves], keep_ratio)
  want = oracle.mask(np.concatenate([leaf.ravel() for leaf in leaves]), keep_ratio)
  np.testing.assert_array_equal(np.concatenate([m.ravel() for m in mask]), want)


def test_snip_mask_agrees_with_keep_mask_on_distinct_scores():
  scores = {"a": jax.random.uniform(jax.random.key(0), (4, 5)), "b": None}
  mask, other = snip_mask(scores, 0.25), keep_mask(scores, 0.75)
  np.testing.assert_array_equal(mask["a"], other["a"])
  assert mask["b"] is None
  assert snip_mask({}, 0.5) == {}


def test_snip_mask_keeps_nan():
  scores = jnp.array([jnp.nan, 1.0, 2.0, 3.0])
  assert snip_mask(scores, 0.5).tolist() == [True, False, False, True]


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.1])
def test_keep_ratio_outside_its_range_raises(keep_ratio):
  with pytest.raises(ValueError, match="keep_ratio must lie in"):
    snip_mask(jnp.ones(5), keep_ratio)


def test_a_keep_ratio_that_keeps_nothing_raises():
  with pytest.raises(ValueError, match="keeps none of 5 weights"):
    snip_mask(jnp.ones(5), 0.1)
