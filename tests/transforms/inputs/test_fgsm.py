"""``fgsm``: one signed step, against a hand-written gradient and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlab.transforms.inputs.fgsm import fgsm, fgsm_with_trace
from tests.oracles import fgsm as oracle


def _problem(batch, width, classes):
  rng = np.random.default_rng(batch + 10 * width + 100 * classes)
  x, y = rng.uniform(size=(batch, width)), rng.integers(0, classes, batch)
  return x, y, rng.normal(size=(width, classes)), rng.normal(size=(classes,))


def _loss_fn(weights, bias):
  w, b = jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32)

  def loss_fn(x, y):
    log_probs = jax.nn.log_softmax(jnp.tanh(x) @ w + b[None])
    return -jnp.sum(jnp.take_along_axis(log_probs, y[:, None], axis=1))

  return loss_fn


def _logistic(x, y):
  logits = x @ jnp.array([1.0, -2.0])
  return -jnp.sum(jax.nn.log_sigmoid((2 * y - 1).astype(jnp.float32) * logits))


def test_worked_example():
  x, y = jnp.array([[0.5, 0.2]]), jnp.array([1])
  np.testing.assert_allclose(jnp.exp(-_logistic(x, y)), 0.52498, atol=5e-6)
  np.testing.assert_allclose(
    jax.grad(_logistic)(x, y), [[-0.47502, 0.95004]], atol=5e-6
  )
  x_adv = fgsm(_logistic, x, y, eps=0.1)
  # One float32 addition per entry.
  np.testing.assert_allclose(x_adv, [[0.4, 0.3]], rtol=1e-6)
  np.testing.assert_allclose(jnp.exp(-_logistic(x_adv, y)), 0.45017, atol=5e-6)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 0.5)])
@pytest.mark.parametrize("shape", [(1, 2, 2), (6, 5, 3), (9, 16, 10)])
def test_matches_the_hand_written_gradient(shape, bounds, targeted):
  x, y, weights, bias = _problem(*shape)
  _, grad = oracle.losses_and_gradient(x, y, weights, bias)
  expected = oracle.fgsm(x, grad, 0.07, targeted, bounds)
  args = {"eps": 0.07, "targeted": targeted, "bounds": bounds}
  x32 = jnp.asarray(x, jnp.float32)
  # One float32 addition; no gradient here is so small that its sign is in doubt.
  x_adv = fgsm(_loss_fn(weights, bias), x32, y, **args)
  np.testing.assert_allclose(x_adv, expected, atol=1e-6)
  given_grad = fgsm(None, x32, None, grad=grad, **args)
  np.testing.assert_array_equal(given_grad, x_adv)


@jax.jit
def _jitted_step(x, grad, eps):
  return fgsm(None, x, None, eps=eps, grad=grad)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), eps=st.floats(0.0, 0.5), scale=st.floats(1e-3, 1e3))
def test_ball_box_and_scale_invariance(seed, eps, scale):
  rng = np.random.default_rng(seed)
  x = rng.uniform(size=(3, 4)).astype(np.float32)
  grad = (rng.normal(size=(3, 4)) * rng.integers(0, 2, (3, 4))).astype(np.float32)
  x_adv = np.asarray(_jitted_step(x, grad, eps))
  distance = np.abs(np.asarray(x_adv) - np.asarray(x))
  # One float32 rounding of numbers below 1.5.
  assert np.all(distance <= eps + 1.2e-7)
  assert np.all((x_adv >= 0.0) & (x_adv <= 1.0))
  free = (grad != 0) & (x_adv > 0.0) & (x_adv < 1.0)
  np.testing.assert_allclose(distance[free], eps, atol=1.2e-7)
  np.testing.assert_array_equal(x_adv[grad == 0], x[grad == 0])
  scaled = _jitted_step(x, grad * np.float32(scale), eps)
  np.testing.assert_array_equal(scaled, x_adv)


def test_mean_sum_and_per_example_losses_agree():
  x, y, weights, bias = _problem(6, 5, 3)
  x = jnp.asarray(x, jnp.float32)
  total = _loss_fn(weights, bias)
  each = lambda x, y: jax.vmap(lambda a, b: total(a[None], b[None]))(x, y)  # noqa: E731
  expected = fgsm(total, x, jnp.asarray(y), eps=0.1)
  mean = fgsm(lambda x, y: total(x, y) / 6, x, jnp.asarray(y), eps=0.1)
  np.testing.assert_array_equal(mean, expected)
  np.testing.assert_array_equal(fgsm(each, x, jnp.asarray(y), eps=0.1), expected)


def test_it_maximises_the_linearised_loss_and_is_exact_for_a_linear_model():
  rng = np.random.default_rng(0)
  x, y = jnp.full((1, 2), 0.5), jnp.array([0])
  grad = jax.grad(_logistic)(x, y)
  x_adv = fgsm(_logistic, x, y, eps=0.2)
  gain = jnp.sum(grad * (x_adv - x))
  # Two float32 sums of two products.
  np.testing.assert_allclose(gain, 0.2 * jnp.sum(jnp.abs(grad)), rtol=1e-5)
  others = x + jnp.asarray(rng.uniform(-0.2, 0.2, size=(500, 2)), jnp.float32)
  losses = jax.vmap(lambda z: _logistic(z[None], y))(others)
  assert jnp.all(losses <= _logistic(x_adv, y))


def test_eps_zero_clips_and_the_gradient_is_taken_at_the_unclipped_input():
  x = jnp.array([[-0.5, 0.5, 1.5]])
  ones = jnp.ones_like(x)
  np.testing.assert_array_equal(fgsm(None, x, None, eps=0.0, grad=ones), [[0, 0.5, 1]])
  # The slope of (x + 0.25)^2 is negative at -0.5 and positive once clipped to 0.
  x_adv = fgsm(lambda x, _: jnp.sum((x + 0.25) ** 2), x[:, :1], None, eps=0.75)
  np.testing.assert_array_equal(x_adv, [[0.0]])
  x_adv = fgsm(
    lambda x, _: jnp.sum((x + 0.25) ** 2), x[:, :1], None, eps=0.75, bounds=(-2.0, 1.0)
  )
  np.testing.assert_array_equal(x_adv, [[-1.25]])


def test_nan_gradients_move_nothing_and_are_counted():
  x = jnp.full((2, 2), 0.5)
  grad = jnp.array([[jnp.nan, 0.0], [jnp.inf, -jnp.nan]])
  x_adv, trace = jax.jit(lambda x: fgsm_with_trace(None, x, None, eps=0.25, grad=grad))(
    x
  )
  np.testing.assert_array_equal(x_adv, [[0.5, 0.5], [0.75, 0.5]])
  assert trace.nan_count == 2
  assert trace.nan_count.dtype == jnp.int32


def test_vmap_over_eps_and_bounds_may_be_traced():
  x, y = jnp.array([[0.5, 0.2]]), jnp.array([1])
  sizes = jnp.array([0.0, 0.1, 0.4])

  def attack(eps, high):
    return fgsm(_logistic, x, y, eps=eps, bounds=(0.0, high))

  batched = jax.jit(jax.vmap(attack, (0, None)))(sizes, jnp.float32(0.45))
  single = jnp.stack([attack(e, 0.45) for e in sizes])
  np.testing.assert_array_equal(batched, single)


def test_bfloat16_keeps_its_dtype():
  seen = []

  def loss_fn(x, y):
    seen.append(x.dtype)
    return jnp.sum(x * y)

  x = jnp.array([[0.5, 0.25]], jnp.bfloat16)
  x_adv = fgsm(loss_fn, x, jnp.array([[1.0, -1.0]], jnp.bfloat16), eps=0.125)
  assert x_adv.dtype == jnp.bfloat16
  assert seen == [jnp.bfloat16]
  np.testing.assert_array_equal(x_adv, jnp.array([[0.625, 0.125]], jnp.bfloat16))


def test_bad_arguments_are_refused():
  x, grad = jnp.full((1, 2), 0.5), jnp.ones((1, 2))
  with pytest.raises(ValueError, match="floating-point inputs, got int32"):
    fgsm(None, jnp.ones((1, 2), jnp.int32), None, eps=0.1, grad=grad)
  with pytest.raises(ValueError, match="eps must lie in"):
    fgsm(None, x, None, eps=-0.1, grad=grad)
  with pytest.raises(ValueError, match="eps must be a scalar"):
    fgsm(None, x, None, eps=jnp.ones(2), grad=grad)
  for bounds in ((1.0, 0.0), (0.5, 0.5)):
    with pytest.raises(ValueError, match="lo < hi"):
      fgsm(None, x, None, eps=0.1, grad=grad, bounds=bounds)
  with pytest.raises(ValueError, match="must be a pair"):
    fgsm(None, x, None, eps=0.1, grad=grad, bounds=(0.0,))
  with pytest.raises(ValueError, match="needs loss_fn or grad"):
    fgsm(None, x, None, eps=0.1)
  with pytest.raises(ValueError, match="grad must have the shape"):
    fgsm(None, x, None, eps=0.1, grad=jnp.ones(2))
