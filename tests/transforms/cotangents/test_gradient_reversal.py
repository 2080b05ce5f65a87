"""``gradient_reversal``: identity forward in every bit, ``-scale`` backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from gradlab.transforms.cotangents.gradient_reversal import (
  adversarial_multitask_loss,
  gradient_reversal,
  reversal_schedule,
)
from tests.oracles import gradient_reversal as oracle


def test_worked_example():
  def f(x):
    return jnp.sum(gradient_reversal(x, 0.5) ** 2) / 2

  value, gradient = jax.value_and_grad(f)(jnp.array([1.0, -2.0]))
  assert value == 2.5
  np.testing.assert_array_equal(gradient, [-0.5, 1.0])


@pytest.mark.parametrize(
  "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
)
def test_forward_is_the_same_bits(dtype):
  x = jnp.array([0.0, -0.0, jnp.nan, jnp.inf, -jnp.inf, 1e-30, 1 / 3], dtype)
  bits = np.asarray(x).tobytes()
  assert np.asarray(gradient_reversal(x, 0.7)).tobytes() == bits
  assert np.asarray(jax.jit(gradient_reversal)(x, 0.7)).tobytes() == bits
  assert gradient_reversal(x, 0.7).dtype == dtype


def test_forward_is_the_same_bits_under_scan_and_shard_map():
  x = jnp.arange(6.0).reshape(3, 2) / 7
  _, scanned = jax.lax.scan(lambda c, row: (c, gradient_reversal(row, c)), 0.3, x)
  np.testing.assert_array_equal(scanned, x)
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  spec = PartitionSpec("data")
  x = jnp.arange(16.0).reshape(8, 2) / 7

  def loss(x, scale):
    mapped = jax.shard_map(
      gradient_reversal, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    return jnp.sum(mapped(x, scale) ** 2) / 2

  np.testing.assert_array_equal(jax.grad(loss)(x, jnp.float32(0.5)), -0.5 * x)


@settings(max_examples=20, deadline=None)
@given(
  a=st.floats(-4.0, 4.0, width=32),
  b=st.floats(-4.0, 4.0, width=32),
  y_bar=st.tuples(*[st.floats(-100.0, 100.0, width=32)] * 3),
)
def test_reverse_and_forward_mode_scale_by_minus_scale(a, b, y_bar):
  x = jnp.array([1.0, -2.0, 0.5])
  y_bar = jnp.asarray(y_bar, jnp.float32)
  once = functools.partial(gradient_reversal, scale=a)
  np.testing.assert_array_equal(jax.vjp(once, x)[1](y_bar)[0], -jnp.float32(a) * y_bar)
  np.testing.assert_array_equal(
    jax.jvp(once, (x,), (y_bar,))[1], -jnp.float32(a) * y_bar
  )
  twice = jax.vjp(lambda x: gradient_reversal(once(x), b), x)[1](y_bar)[0]
  # Two float32 products against one.
  np.testing.assert_allclose(twice, a * b * np.asarray(y_bar), rtol=1e-6, atol=1e-37)


def test_scale_minus_one_is_the_identity_and_zero_detaches():
  f = lambda x, s: jnp.sum(jnp.sin(gradient_reversal(x, s)))  # noqa: E731
  x = jnp.array([0.3, -1.2])
  np.testing.assert_array_equal(jax.grad(f)(x, -1.0), jnp.cos(x))
  np.testing.assert_array_equal(jax.grad(f)(x, 0.0), [0.0, 0.0])
  stopped = jax.grad(lambda x: f(jax.lax.stop_gradient(x), 1.0))(x)
  np.testing.assert_array_equal(jax.grad(f)(x, 0.0), stopped)


def test_gradient_in_scale_is_exactly_zero():
  f = lambda s: jnp.sum(gradient_reversal(jnp.array([1.0, 5.0]), s) ** 3)  # noqa: E731
  assert jax.grad(f)(jnp.float32(0.5)) == 0.0
  assert jax.jvp(f, (jnp.float32(0.5),), (jnp.float32(1.0),))[1] == 0.0


@pytest.mark.parametrize("hessian", [jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))])
def test_second_derivative_passes_the_reversal_twice(hessian):
  x = jnp.array([1.0, -2.0])
  for a in (0.5, -1.5):
    f = lambda x, a=a: jnp.sum(gradient_reversal(x, a) ** 3)  # noqa: E731
    np.testing.assert_allclose(hessian(f)(x), np.diag(a**2 * 6 * x), rtol=1e-6)


def test_vmap_over_scales_equals_one_at_a_time():
  x = jnp.array([1.0, -2.0])
  grad = jax.grad(lambda x, s: jnp.sum(gradient_reversal(x, s) ** 2))
  scales = jnp.array([0.0, 0.5, 2.0])
  expected = jnp.stack([grad(x, s) for s in scales])
  np.testing.assert_array_equal(jax.vmap(grad, (None, 0))(x, scales), expected)


def test_trees_are_reversed_leaf_by_leaf_and_integers_pass():
  tree = {
    "f": jnp.array([1.0, 2.0]),
    "i": jnp.array([3], jnp.int32),
    "flag": jnp.array(True),
    "none": None,
    "masked": optax.MaskedNode(),
    "pair": (jnp.array(4.0), jnp.zeros((0, 2))),
  }
  out, pull = jax.vjp(lambda t: gradient_reversal(t, 2.0), tree)
  assert jax.tree.structure(out) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, out, tree)
  assert out["i"].dtype == jnp.int32
  zero = lambda shape: np.zeros(shape, jax.dtypes.float0)  # noqa: E731
  y_bar = {**out, "i": zero((1,)), "flag": zero(())}
  (x_bar,) = pull(y_bar)
  np.testing.assert_array_equal(x_bar["f"], [-2.0, -4.0])
  assert x_bar["pair"][0] == -8.0
  assert x_bar["i"].dtype == jax.dtypes.float0
  assert x_bar["flag"].dtype == jax.dtypes.float0
  assert gradient_reversal({}, 1.0) == {}


def test_bfloat16_cotangent_is_multiplied_in_bfloat16():
  x = jnp.array([1.0, 3.0], jnp.bfloat16)
  y_bar = jnp.array([1.0, 1 / 3], jnp.bfloat16)
  (x_bar,) = jax.vjp(lambda x: gradient_reversal(x, 0.3), x)[1](y_bar)
  assert x_bar.dtype == jnp.bfloat16
  np.testing.assert_array_equal(x_bar, -jnp.bfloat16(0.3) * y_bar)


def test_infinite_cotangent_times_zero_is_not_masked():
  pull = jax.vjp(lambda x: gradient_reversal(x, 0.0), jnp.ones(2))[1]
  np.testing.assert_array_equal(pull(jnp.array([jnp.inf, 1.0]))[0], [np.nan, 0.0])


def test_scale_must_be_scalar():
  for scale in (jnp.ones(1), jnp.ones((2, 2)), [1.0, 2.0]):
    with pytest.raises(ValueError, match="scale must be scalar"):
      gradient_reversal(jnp.ones(2), scale)


def test_schedule_values():
  progress = jnp.array([0.0, 0.1, 0.5, 1.0])
  scales = reversal_schedule(progress)
  assert scales.dtype == jnp.float32
  # The values are printed to eight decimals; float32 resolves 6e-8 near one.
  np.testing.assert_allclose(
    scales, [0.0, 0.46211716, 0.98661430, 0.99990920], atol=1e-7
  )
  assert scales[0] == 0.0
  np.testing.assert_array_equal(reversal_schedule(jnp.array([-3.0, 7.0])), scales[::3])


@settings(max_examples=20, deadline=None)
@given(progress=st.floats(-0.5, 1.5), gamma=st.floats(0.1, 20.0))
def test_schedule_matches_the_logistic_form(progress, gamma):
  # Float32 tanh against float64 exp.
  np.testing.assert_allclose(
    reversal_schedule(progress, gamma), oracle.schedule(progress, gamma), atol=5e-7
  )


def test_schedule_of_steps():
  schedule = jax.jit(functools.partial(reversal_schedule, num_steps=200))
  for step in (0, 20, 100, 200, 300):
    # Float32 tanh against float64 exp.
    np.testing.assert_allclose(
      schedule(jnp.int32(step)), oracle.schedule(step / 200), atol=5e-7
    )
  with pytest.raises(ValueError, match="num_steps must lie in"):
    reversal_schedule(1, num_steps=0)


def _problem(seed):
  rng = np.random.default_rng(seed)
  params = {
    "encoder": rng.normal(size=(4, 3)),
    "head": rng.normal(size=(3, 5)),
    "critic": rng.normal(size=(3, 2)),
  }
  inputs = rng.normal(size=(8, 4))
  return params, inputs, rng.integers(0, 5, 8), rng.integers(0, 2, 8)


@jax.jit
def _adversarial_grads(params, inputs, labels, domains, scale, weight):
  def loss_fn(p):
    hidden = jnp.tanh(inputs @ p["encoder"])
    entropy = optax.softmax_cross_entropy_with_integer_labels(
      hidden @ p["head"], labels
    )
    return adversarial_multitask_loss(
      jnp.mean(entropy),
      lambda h: h @ p["critic"],
      hidden,
      domains,
      scale=scale,
      weight=weight,
    )

  return jax.value_and_grad(loss_fn)(params)


@pytest.mark.parametrize(("scale", "weight"), [(1.0, 0.5), (0.3, 2.0), (-1.0, 0.001)])
def test_every_part_descends_its_own_objective(scale, weight):
  params, inputs, labels, domains = _problem(0)
  tree = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  x = jnp.asarray(inputs, jnp.float32)
  for _ in range(3):
    loss, grads = _adversarial_grads(tree, x, labels, domains, scale, weight)
    main, domain = oracle.losses(params, inputs, labels, domains)
    expected = oracle.gradients(params, inputs, labels, domains, scale, weight)
    # Float32 against float64, and 1e-10 of truncation in the central difference.
    np.testing.assert_allclose(loss, main + weight * domain, rtol=2e-6)
    for name in params:
      np.testing.assert_allclose(grads[name], expected[name], rtol=1e-4, atol=2e-6)
    params = {name: params[name] - 0.2 * expected[name] for name in params}
    tree = jax.tree.map(lambda p, g: p - 0.2 * g, tree, grads)


def test_scale_moves_the_encoder_only_and_affinely():
  params, inputs, labels, domains = _problem(1)
  tree = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  x = jnp.asarray(inputs, jnp.float32)
  at = [
    _adversarial_grads(tree, x, labels, domains, s, 0.7)[1] for s in (0.0, 1.0, 2.0)
  ]
  for grads in at[1:]:
    np.testing.assert_array_equal(grads["head"], at[0]["head"])
    np.testing.assert_array_equal(grads["critic"], at[0]["critic"])
  slope = at[1]["encoder"] - at[0]["encoder"]
  domain = oracle.central_difference(
    lambda p: oracle.losses(p, inputs, labels, domains)[1], params, "encoder"
  )
  # Float32 rounding of a difference of gradients of order one.
  np.testing.assert_allclose(slope, -0.7 * domain, atol=2e-6)
  np.testing.assert_allclose(at[2]["encoder"] - at[1]["encoder"], slope, atol=2e-6)


def test_multitask_loss_dtype_and_bad_arguments():
  features, labels = jnp.zeros((4, 2), jnp.bfloat16), jnp.array([0, 1, 1, 0])
  call = functools.partial(
    adversarial_multitask_loss, jnp.bfloat16(1.0), lambda h: h, features
  )
  loss = call(labels, scale=1.0, weight=1.0)
  assert loss.dtype == jnp.float32
  assert loss.shape == ()
  np.testing.assert_allclose(loss, 1.0 + np.log(2.0), rtol=1e-6)
  with pytest.raises(ValueError, match="domain_labels must be integers of shape"):
    call(labels[:3], scale=1.0, weight=1.0)
  with pytest.raises(ValueError, match="domain_labels must be integers of shape"):
    call(jnp.zeros(4), scale=1.0, weight=1.0)
  with pytest.raises(ValueError, match="weight must lie in"):
    call(labels, scale=1.0, weight=-1.0)
  with pytest.raises(ValueError, match="scale must be scalar"):
    call(labels, scale=jnp.ones(2), weight=1.0)
