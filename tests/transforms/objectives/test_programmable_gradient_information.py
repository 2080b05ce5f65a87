"""The loss of PGI and the pieces of its branch: routes, fusion, stripping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlab.transforms.objectives import (
  cross_entropy,
  fuse,
  pgi_loss,
  programmable_gradient_information,
  resize_nearest,
  route,
  squared_error,
  strip_auxiliary,
)
from tests.oracles import programmable_gradient_information as oracle

SIDES = st.integers(1, 5)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_worked_example():
  target, routed = jnp.ones((1, 2, 2, 1)), jnp.full((1, 1, 1, 1), 3.0)
  fused, pull = jax.vjp(lambda c: fuse([c], target), routed)
  np.testing.assert_array_equal(fused, jnp.full((1, 2, 2, 1), 4.0))
  assert float(pull(jnp.ones_like(fused))[0][0, 0, 0, 0]) == 4.0
  loss, found = pgi_loss(1.2, [1.5, 1.7], None, lambda output, _: output)
  # float32 of three decimals
  np.testing.assert_allclose(loss, 2.0, rtol=1e-6)
  np.testing.assert_allclose(found["main_loss"], 1.2, rtol=1e-6)
  np.testing.assert_allclose(found["aux_loss"], 3.2, rtol=1e-6)


@settings(max_examples=12, deadline=None)
@given(old=st.tuples(SIDES, SIDES), new=st.tuples(SIDES, SIDES), seed=st.integers(0, 9))
def test_nearest_is_by_integer_index(old, new, seed):
  x = normal(seed, 2, *old, 2)
  np.testing.assert_array_equal(resize_nearest(x, new), oracle.nearest(x, *new))
  constant = jnp.full_like(x, 0.3)
  np.testing.assert_array_equal(
    resize_nearest(constant, new), jnp.full((2, *new, 2), 0.3)
  )
  # Its transpose counts how often each index is read.
  (counts,) = jax.vjp(lambda x: resize_nearest(x, new), x)[1](jnp.ones((2, *new, 2)))
  rows, columns = (
    np.bincount(np.arange(n) * o // n, minlength=o)
    for o, n in zip(old, new, strict=True)
  )
  expected = np.outer(rows, columns)[None, :, :, None] * np.ones_like(x)
  np.testing.assert_array_equal(counts, expected)


def test_nearest_differs_from_the_pixel_at_the_centre():
  x = jnp.arange(5.0).reshape(1, 5, 1, 1)
  ours = resize_nearest(x, (3, 1))
  assert ours.ravel().tolist() == [0.0, 1.0, 3.0]
  centres = jax.image.resize(x, (1, 3, 1, 1), "nearest")
  assert centres.ravel().tolist() != ours.ravel().tolist()
  enlarged = jax.image.resize(x, (1, 15, 2, 1), "nearest")
  np.testing.assert_array_equal(resize_nearest(x, (15, 2)), enlarged)


@settings(max_examples=8, deadline=None)
@given(
  sizes=st.lists(st.tuples(SIDES, SIDES), max_size=3),
  side=st.tuples(SIDES, SIDES),
  factor=st.floats(-3.0, 3.0, width=32),
)
def test_fuse_is_a_linear_sum_in_any_order(sizes, side, factor):
  routed = [normal(k, 2, *size, 3) for k, size in enumerate(sizes)]
  target = normal(9, 2, *side, 3)
  fused = fuse(routed, target)
  # float32 sums of four numbers against float64
  np.testing.assert_allclose(fused, oracle.fuse(routed, target), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(fuse(routed[::-1], target), fused, rtol=1e-5, atol=1e-6)
  scaled = fuse([factor * c for c in routed], factor * target)
  np.testing.assert_allclose(scaled, factor * fused, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(fuse((), target), target)
  same = [normal(k, *target.shape) for k in range(2)]
  np.testing.assert_array_equal(fuse(same, target), target + same[0] + same[1])


def test_fuse_keeps_the_dtype_of_its_target():
  assert fuse([jnp.ones((1, 1, 1, 2))], jnp.ones((1, 2, 2, 2), jnp.bfloat16)).dtype == (
    jnp.bfloat16
  )
  with pytest.raises(ValueError, match="3 channels cannot be added to one with 2"):
    fuse([jnp.ones((1, 1, 1, 3))], jnp.ones((1, 2, 2, 2)))


@pytest.mark.parametrize("sizes", [(2,), (1, 3), (2, 1, 4)])
def test_route_splits_a_convolution(sizes):
  h, kernel, bias = (
    normal(0, 2, 3, 4, 5),
    normal(1, 5, sum(sizes)),
    normal(2, sum(sizes)),
  )
  pieces = route({"kernel": kernel, "bias": bias}, h, sizes)
  for piece, expected in zip(pieces, oracle.route(kernel, bias, h, sizes), strict=True):
    # float32 sums of five products
    np.testing.assert_allclose(piece, expected, rtol=1e-5, atol=1e-5)
  spatial = route({"kernel": kernel[None, None], "bias": bias}, h, sizes)
  jax.tree.map(np.testing.assert_array_equal, spatial, pieces)


def test_route_with_an_identity_kernel_returns_its_input():
  h = jnp.asarray(normal(0, 1, 2, 2, 3), jnp.bfloat16)
  (same,) = route({"kernel": jnp.eye(3), "bias": jnp.zeros(3)}, h, (3,))
  assert same.dtype == jnp.bfloat16
  np.testing.assert_array_equal(same, h)


@pytest.mark.parametrize(
  ("kernel", "bias"), [((3, 5), (5,)), ((4, 4), (4,)), ((4, 5), (4,))]
)
def test_route_of_other_widths(kernel, bias):
  params = {"kernel": jnp.ones(kernel), "bias": jnp.ones(bias)}
  with pytest.raises(ValueError, match=r"a route of 4 channels into \(2, 3\) needs"):
    route(params, jnp.ones((1, 2, 2, 4)), (2, 3))


def test_strip_auxiliary_takes_every_collection():
  leaf = jnp.ones(2)
  full = {
    "params": {"head": {"bias": leaf}, "aux_head_1": {"bias": leaf}},
    "batch_stats": {"stage_1": {"norm_0": {"mean": leaf}}, "aux_stage_1": {}},
  }
  stripped = strip_auxiliary(full)
  assert jax.tree.structure(stripped) == jax.tree.structure(
    {
      "params": {"head": {"bias": 0}},
      "batch_stats": {"stage_1": {"norm_0": {"mean": 0}}},
    }
  )
  assert stripped["params"]["head"]["bias"] is leaf
  assert strip_auxiliary(stripped) == stripped


def test_loss_matches_float64():
  outputs = [normal(k, 6, 4) for k in range(4)]
  labels = np.array([0, 3, 2, 1, 1, 0], np.int32)
  batch = {"label": labels}
  for weight in (0.25, 0.0, 2.0):
    loss, found = programmable_gradient_information(
      (outputs[0], outputs[1:]), batch, aux_weight=weight
    )
    # float32 against float64
    expected = oracle.loss(outputs[0], outputs[1:], labels, weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
  main, same = cross_entropy(outputs[0], batch)
  assert found["main_loss"] == main
  assert found["accuracy"] == same["accuracy"]


def test_evaluation_and_no_auxiliary_outputs_are_the_main_loss():
  main, batch = normal(0, 5, 3), {"label": jnp.array([0, 1, 2, 1, 0])}
  expected, _ = cross_entropy(main, batch)
  for outputs in (main, (main, []), (main, ())):
    loss, found = programmable_gradient_information(outputs, batch)
    assert loss == expected
    assert found["aux_loss"] == 0.0


def test_masked_examples_do_not_count_for_any_head():
  main, auxiliary = normal(0, 5, 3), normal(1, 5, 3)
  batch = {"label": jnp.array([0, 1, 2, 1, 9]), "mask": jnp.array([1, 1, 1, 1, 0.0])}
  loss, _ = programmable_gradient_information((main, [auxiliary]), batch)
  short, _ = programmable_gradient_information(
    (main[:4], [auxiliary[:4]]), {"label": batch["label"][:4]}
  )
  np.testing.assert_allclose(loss, short, rtol=1e-6)


def test_objective_by_name():
  main, auxiliary, target = normal(0, 5, 3), normal(1, 5, 3), normal(2, 5, 3)
  loss, _ = programmable_gradient_information(
    (main, [auxiliary]), {"y": target}, objective="squared_error", label="y"
  )
  each = [squared_error(z, {"label": target})[0] for z in (main, auxiliary)]
  np.testing.assert_allclose(loss, each[0] + 0.25 * each[1], rtol=1e-6)


@jax.jit
def _gradients(outputs, weight):
  batch = {"label": jnp.array([0, 2, 1, 1])}
  return jax.grad(
    lambda o: programmable_gradient_information(o, batch, aux_weight=weight)[0]
  )(outputs)


@settings(max_examples=20, deadline=None)
@given(weight=st.floats(0.0, 4.0, width=32), seed=st.integers(0, 99))
def test_gradients_are_affine_in_the_weight(weight, seed):
  outputs = normal(seed, 4, 3), [normal(seed + 100, 4, 3)]
  main, (auxiliary,) = _gradients(outputs, weight)
  zero_main, (zero,) = _gradients(outputs, 0.0)
  np.testing.assert_array_equal(zero, jnp.zeros_like(zero))
  np.testing.assert_array_equal(main, zero_main)
  unit = _gradients(outputs, 1.0)[1][0]
  # the weight enters a float32 difference of numbers below one
  np.testing.assert_allclose(auxiliary, weight * unit, rtol=1e-5, atol=1e-6)


def test_low_precision_losses_are_float32_and_double_stays():
  low = jnp.asarray(normal(0, 4, 3), jnp.bfloat16)
  seen = []

  def loss_fn(output, targets):
    del targets
    seen.append(output.dtype)
    return jnp.mean(output**2)

  loss, found = pgi_loss(low, [low, low], None, loss_fn)
  assert {*seen, loss.dtype, *(v.dtype for v in found.values())} == {
    jnp.dtype("float32")
  }
  with jax.enable_x64(True):
    loss, _ = pgi_loss(jnp.float64(1.2), [jnp.float64(3.2)], None, lambda o, _: o)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, 2.0, rtol=1e-15)


def test_bad_auxiliary_loss_spoils_the_step_but_not_the_main_metric():
  main, batch = normal(0, 4, 3), {"label": jnp.array([0, 2, 1, 1])}
  broken = jnp.full((4, 3), jnp.nan)
  loss, found = programmable_gradient_information((main, [broken]), batch)
  assert jnp.isnan(loss)
  assert jnp.isnan(found["aux_loss"])
  assert found["main_loss"] == cross_entropy(main, batch)[0]


def test_bad_arguments():
  main, batch = jnp.zeros((2, 3)), {"label": jnp.array([0, 1])}
  with pytest.raises(ValueError, match="aux_weight must lie in"):
    programmable_gradient_information((main, [main]), batch, aux_weight=-0.1)
  with pytest.raises(ValueError, match="aux_weight must lie in"):
    pgi_loss(main, (), None, lambda o, _: jnp.sum(o), aux_weight=-1)
  with pytest.raises(ValueError, match="objective must be one of cross_entropy, squ"):
    programmable_gradient_information(main, batch, objective="hinge")
  with pytest.raises(ValueError, match="the batch has no field 'y'"):
    programmable_gradient_information(main, batch, label="y")
