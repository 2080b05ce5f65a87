"""``pgd``: against a loop over examples and steps, and its closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlab.transforms.inputs.fgsm import fgsm
from gradlab.transforms.inputs.pgd import pgd
from tests.oracles import fgsm as model
from tests.oracles import pgd as oracle


def _problem(batch=5, width=4, classes=3):
  rng = np.random.default_rng(batch + width + classes)
  x, y = rng.uniform(size=(batch, width)), rng.integers(0, classes, batch)
  weights, bias = 3 * rng.normal(size=(width, classes)), rng.normal(size=(classes,))
  w, b = jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32)

  def loss_fn(x, y):
    log_probs = jax.nn.log_softmax(jnp.tanh(x) @ w + b[None])
    return -jnp.take_along_axis(log_probs, y[:, None], axis=1)[:, 0]

  def grad_fn(x):
    return model.losses_and_gradient(x, y, weights, bias)[1]

  return jnp.asarray(x, jnp.float32), jnp.asarray(y), loss_fn, grad_fn


def _norms(delta):
  return np.sqrt(np.sum(np.asarray(delta, np.float64) ** 2, axis=1))


def test_worked_linf_example():
  for num_steps, expected in enumerate([0.5, 0.54, 0.58, 0.6, 0.6]):
    x_adv = pgd(
      lambda x, y: x,
      jnp.array([0.5]),
      None,
      eps=0.1,
      step_size=0.04,
      num_steps=num_steps,
      random_start=False,
    )
    # Up to four float32 additions.
    np.testing.assert_allclose(x_adv, [expected], rtol=5e-7)


def test_worked_l2_example():
  w = jnp.array([1.0, -2.0])
  x_adv = pgd(
    lambda x, y: -jax.nn.log_sigmoid(x @ w),
    jnp.array([[0.5, 0.2]]),
    None,
    eps=1.0,
    step_size=0.2,
    num_steps=1,
    norm="l2",
    random_start=False,
  )
  # The reference is printed to five decimals.
  np.testing.assert_allclose(x_adv, [[0.41056, 0.37889]], atol=5e-6)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-5.0, 0.8)])
@pytest.mark.parametrize(
  ("norm", "eps", "step_size", "num_steps"),
  [("linf", 0.1, 0.03, 7), ("linf", 0.3, 0.5, 3), ("l2", 0.5, 0.2, 7), ("l2", 2, 1, 4)],
)
def test_matches_the_loop_in_float64(norm, eps, step_size, num_steps, bounds, targeted):
  x, y, loss_fn, grad_fn = _problem()
  x = jnp.clip(x, *bounds)
  args = {
    "eps": eps,
    "step_size": step_size,
    "num_steps": num_steps,
    "norm": norm,
    "targeted": targeted,
    "bounds": bounds,
  }
  expected = oracle.pgd(np.asarray(x, np.float64), grad_fn, **args)
  x_adv = jax.jit(lambda x: pgd(loss_fn, x, y, random_start=False, **args))(x)
  # A few float32 steps against float64; the signs of these gradients are clear.
  np.testing.assert_allclose(x_adv, expected, atol=2e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_are_projected_per_example_as_optax_does(norm):
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.uniform(size=(4, 3, 3, 2)), jnp.float32)
  slope = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  radius = 0.3
  x_adv = pgd(
    lambda x, y: jnp.sum(slope * x, axis=(1, 2, 3)),
    x,
    None,
    eps=radius,
    step_size=1.0,
    num_steps=1,
    norm=norm,
    random_start=False,
    bounds=(-9.0, 9.0),
  )
  moved = jnp.sign(slope)
  project = optax.projections.projection_linf_ball
  if norm == "l2":
    moved = slope / jnp.sqrt(jnp.sum(slope**2, axis=(1, 2, 3), keepdims=True))
    project = optax.projections.projection_l2_ball
  expected = x + jax.vmap(lambda delta: project(delta, radius))(moved)
  # The two normalise in another order, in float32.
  np.testing.assert_allclose(x_adv, expected, atol=1e-6)


@functools.partial(jax.jit, static_argnames=("num_steps", "norm"))
def _jitted_attack(seed, eps, step_size, num_steps, norm):
  x, y, loss_fn, _ = _problem()
  args = {"eps": eps, "step_size": step_size, "num_steps": num_steps, "norm": norm}
  return pgd(loss_fn, x, y, seed, **args)


@settings(max_examples=20, deadline=None)
@given(
  seed=st.integers(0, 1000),
  eps=st.floats(0.0, 2.0),
  step_size=st.floats(0.0, 2.0),
  num_steps=st.sampled_from([0, 3]),
  norm=st.sampled_from(["linf", "l2"]),
)
def test_every_iterate_stays_in_ball_and_box(seed, eps, step_size, num_steps, norm):
  x = _problem()[0]
  x_adv = np.asarray(_jitted_attack(seed, eps, step_size, num_steps, norm))
  delta = np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)
  distance = np.abs(delta).max(axis=1) if norm == "linf" else _norms(delta)
  # Float32 rounding of x + delta, below 3, and of the l2 rescaling.
  assert np.all(distance <= eps + 5e-7)
  assert np.all((x_adv >= 0.0) & (x_adv <= 1.0))


def test_one_full_step_is_fgsm():
  x, y, loss_fn, _ = _problem()
  attack = jax.jit(
    lambda step_size: pgd(
      loss_fn, x, y, eps=0.1, step_size=step_size, num_steps=1, random_start=False
    )
  )
  expected = fgsm(loss_fn, x, y, eps=0.1)
  for step_size in (0.1, 0.7):
    # x + ((x + a) - x) against x + a in float32.
    np.testing.assert_allclose(attack(step_size), expected, atol=1.2e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_eps_zero_returns_the_clipped_input(norm, random_start):
  x = jnp.array([[-0.5, 0.25], [0.5, 1.5]])
  x_adv = pgd(
    lambda x, y: jnp.sum(x, axis=1),
    x,
    None,
    0,
    eps=0.0,
    step_size=0.5,
    num_steps=2,
    norm=norm,
    random_start=random_start,
  )
  np.testing.assert_array_equal(x_adv, [[0.0, 0.25], [0.5, 1.0]])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rescaled_loss_gives_the_same_point(norm):
  x, y, loss_fn, _ = _problem()
  args = {"eps": 0.3, "step_size": 0.1, "num_steps": 4, "norm": norm}
  args["random_start"] = False
  attack = jax.jit(
    lambda factor: pgd(lambda x, y: factor * loss_fn(x, y), x, y, **args)
  )
  expected = attack(1.0)
  for factor in (0.01, 100.0):
    # The l2 guard of 1e-10 and float32 rounding of the factor.
    np.testing.assert_allclose(attack(factor), expected, atol=1e-6)
  mean = pgd(lambda x, y: jnp.mean(loss_fn(x, y)), x, y, **args)
  np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_affine_loss_reaches_the_corner_after_the_expected_number_of_steps():
  slope = jnp.array([[1.0, -3.0, 0.0]])
  x = jnp.full((1, 3), 0.5)
  loss_fn = lambda x, y: jnp.sum(slope * x, axis=1)  # noqa: E731
  args = {"eps": 0.1, "step_size": 0.03, "random_start": False}
  corner = x + 0.1 * jnp.sign(slope)
  before = pgd(loss_fn, x, None, num_steps=3, **args)
  # Three or four float32 additions.
  np.testing.assert_allclose(before, x + 0.09 * jnp.sign(slope), atol=3e-7)
  np.testing.assert_allclose(
    pgd(loss_fn, x, None, num_steps=4, **args), corner, atol=3e-7
  )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_steps_return_the_start(norm):
  x = jnp.full((2000, 3), 0.5)
  loss_fn = lambda x, y: jnp.sum(x, axis=1)  # noqa: E731
  args = {"eps": 0.2, "step_size": 0.1, "num_steps": 0, "norm": norm}
  still = pgd(loss_fn, x, None, random_start=False, **args)
  np.testing.assert_array_equal(still, x)
  start = pgd(loss_fn, x, None, 7, **args)
  np.testing.assert_array_equal(start, pgd(loss_fn, x, None, jax.random.key(7), **args))
  assert np.any(start != pgd(loss_fn, x, None, 8, **args))
  delta = np.asarray(start, np.float64) - 0.5
  if norm == "linf":
    # Uniform in the cube: every coordinate has mean 0 and variance eps^2 / 3.
    sample, variance = delta.ravel(), 0.2**2 / 3
    np.testing.assert_allclose(np.mean(sample**2), variance, rtol=0.1)
    assert abs(sample.mean()) < 5 * np.sqrt(variance / sample.size)
  else:
    # Uniform radius, uniform direction.
    radii = _norms(delta)
    np.testing.assert_allclose(
      np.quantile(radii, [0.1, 0.5, 0.9]), [0.02, 0.1, 0.18], atol=0.01
    )
    assert np.all(np.abs(delta.mean(axis=0)) < 5 * delta.std(axis=0) / np.sqrt(2000))
  assert np.abs(delta).max() <= 0.2 + 1e-7


def test_random_start_is_clipped_to_the_box():
  x = jnp.zeros((50, 3))
  start = pgd(
    lambda x, y: jnp.sum(x, axis=1), x, None, 0, eps=0.2, step_size=0.1, num_steps=0
  )
  assert jnp.min(start) == 0.0
  assert jnp.max(start) > 0.1


@pytest.mark.parametrize("targeted", [False, True])
def test_restarts_keep_the_best_result_of_each_example(targeted):
  x = jnp.full((40, 1), 0.5)
  # Two hills of different height: the start decides which one is climbed.
  loss_fn = lambda x, y: y * (x[:, 0] - 0.45) ** 2 * 4  # noqa: E731
  y = -jnp.ones(40) if targeted else jnp.ones(40)
  args = {"eps": 0.3, "step_size": 0.1, "num_steps": 10, "targeted": targeted}
  attack = jax.jit(
    lambda restarts: pgd(loss_fn, x, y, 5, restarts=restarts, **args), static_argnums=0
  )
  losses = {r: loss_fn(attack(r), jnp.ones(40)) for r in (1, 2, 16)}
  assert jnp.all(losses[2] >= losses[1])
  assert jnp.all(losses[16] >= losses[2])
  # Five starts in twelve climb the lower hill; sixteen do so once in a million.
  assert jnp.any(losses[1] < 0.3)
  np.testing.assert_allclose(losses[16], 4 * 0.35**2, rtol=1e-5)


def test_restarts_ignore_a_result_whose_loss_is_nan():
  x = jnp.full((30, 1), 0.5)
  loss_fn = lambda x, y: jnp.where(x[:, 0] < 0.5, jnp.nan, x[:, 0])  # noqa: E731
  x_adv = pgd(loss_fn, x, None, 0, eps=0.1, step_size=0.0, num_steps=1, restarts=12)
  assert jnp.all(x_adv[:, 0] >= 0.5)


def test_flat_nan_and_infinite_gradients():
  x = jnp.full((3, 2), 0.5)
  slope = jnp.array([[0.0, 0.0], [jnp.nan, 1.0], [jnp.inf, 0.0]])
  loss_fn = lambda x, y: jnp.sum(slope * x, axis=1)  # noqa: E731
  args = {"eps": 0.25, "step_size": 0.125, "num_steps": 1, "random_start": False}
  linf = pgd(loss_fn, x, None, norm="linf", **args)
  np.testing.assert_array_equal(linf, [[0.5, 0.5], [0.5, 0.625], [0.625, 0.5]])
  l2 = pgd(loss_fn, x, None, norm="l2", **args)
  # A guard of 1e-10 is lost in float32; an infinite slope has no l2 direction.
  np.testing.assert_array_equal(l2, [[0.5, 0.5], [0.5, 0.625], [0.5, 0.5]])


def test_vmap_over_eps_and_step_size_equals_one_at_a_time():
  x, y, loss_fn, _ = _problem()

  def attack(eps, step_size, key):
    return pgd(
      loss_fn,
      x,
      y,
      key,
      eps=eps,
      step_size=step_size,
      num_steps=3,
      norm="l2",
      restarts=2,
    )

  keys = jax.random.split(jax.random.key(0), 2)
  sizes, steps = jnp.array([0.1, 0.5]), jnp.array([0.05, 0.2])
  attack = jax.jit(attack)
  batched = jax.vmap(attack)(sizes, steps, keys)
  single = jnp.stack([attack(*each) for each in zip(sizes, steps, keys, strict=True)])
  # Batched matrix products add in another order.
  np.testing.assert_allclose(batched, single, atol=1e-5)


def test_bfloat16_iterates_are_kept_in_float32():
  seen = set()

  def loss_fn(x, y):
    seen.add(str(x.dtype))
    return jnp.sum(x, axis=1)

  x = jnp.full((1, 2), 0.5, jnp.bfloat16)
  x_adv = pgd(
    loss_fn, x, None, eps=0.1, step_size=0.001, num_steps=50, random_start=False
  )
  assert x_adv.dtype == jnp.bfloat16
  assert seen == {"bfloat16"}
  # Steps of 0.001 would be lost in bfloat16, whose spacing at 0.5 is 0.004.
  np.testing.assert_array_equal(x_adv, jnp.full((1, 2), 0.55, jnp.bfloat16))


def test_bad_arguments_are_refused():
  x = jnp.full((2, 2), 0.5)
  each = lambda x, y: jnp.sum(x, axis=1)  # noqa: E731

  def attack(loss_fn=each, x=x, key=0, **changes):
    args = {"eps": 0.1, "step_size": 0.1, "num_steps": 1, **changes}
    return pgd(loss_fn, x, None, key, **args)

  with pytest.raises(ValueError, match="needs a key for its random start"):
    attack(key=None)
  for name in ("eps", "step_size", "num_steps"):
    with pytest.raises(ValueError, match=f"{name} must lie in"):
      attack(**{name: -1})
  with pytest.raises(ValueError, match="step_size must be a scalar"):
    attack(step_size=jnp.ones(2))
  with pytest.raises(ValueError, match="restarts must lie in"):
    attack(restarts=0)
  with pytest.raises(ValueError, match="norm must be 'linf' or 'l2', got 'l1'"):
    attack(norm="l1")
  with pytest.raises(ValueError, match="lo < hi"):
    attack(bounds=(1.0, 0.0))
  with pytest.raises(ValueError, match="floating-point inputs, got int32"):
    attack(x=jnp.ones((2, 2), jnp.int32))
  with pytest.raises(ValueError, match="one loss per example"):
    attack(loss_fn=lambda x, y: jnp.sum(x), restarts=2)
