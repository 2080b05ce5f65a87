import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.updates import (
  adaptive_forget_weights,
  forget_remain_mask,
  sfr_on,
)
from tests.oracles import sfr_on as oracle
from tests.transforms.updates.trajectories import noise

# float32 against float64: a few roundings per step, a dozen iterations.
CLOSE = {"rtol": 5e-5, "atol": 5e-6}
X, Y = noise(12, 6), noise(12, seed=1)
FORGET = np.arange(12) < 4
HESSIAN = (X[~FORGET].T @ X[~FORGET] / 8).astype(float)
quick = hypothesis.settings(max_examples=20, deadline=None)
losses_ = hnp.arrays(
  np.float32, 5, elements=st.sampled_from((0.0, 1e-6)) | st.floats(2**-7, 9, width=32)
)


def forget_loss(theta, power=0.5):
  each = jnp.square(X[FORGET] @ theta - Y[FORGET])
  return -jnp.sum(adaptive_forget_weights(each, power) * each)


def remain_loss(theta):
  return jnp.mean(jnp.square(X[~FORGET] @ theta - Y[~FORGET])) / 2


def forget_grad(theta, s, power=0.5):
  x, r = X[FORGET].astype(float), X[FORGET] @ theta - Y[FORGET]
  return -2 * x.T @ (oracle.weights(r**2, power) * r)


def remain_grad(theta, s):
  x = X[~FORGET].astype(float)
  return x.T @ (x @ theta - Y[~FORGET]) / len(x)


def follow(transform, theta, steps, before=None):
  """theta after each iteration and the last state."""
  step = jax.jit(
    lambda theta, state: transform.update(
      jax.grad(forget_loss)(theta), state, theta, remain_grad_fn=jax.grad(remain_loss)
    )
  )
  state, out = transform.init(theta), []
  for s in range(steps):
    state = state if before is None else before(state, s)
    update, state = step(theta, state)
    theta = optax.apply_updates(theta, update)
    out.append(theta)
  return out, state


def sgd(rate, momentum=0.0, weight_decay=0.0):
  return optax.chain(
    optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum)
  )


@pytest.mark.parametrize(
  ("inner", "options"),
  [
    ({}, {}),
    ({"momentum": 0.9, "weight_decay": 0.01}, {}),
    ({"momentum": 0.9}, {"forget_every": 1, "slow_step_size": 0.5}),
    ({}, {"forget_every": 3, "max_norm": 0.2}),
    ({"momentum": 0.5}, {"forget_every": 2, "selected": noise(6, seed=5) > 0}),
  ],
)
def test_follows_the_oracle(inner, options):
  theta = noise(6, seed=2)
  given = {"mask" if k == "selected" else k: v for k, v in options.items()}
  thetas, state = follow(sfr_on(sgd(0.05, **inner), 0.7, 12, **given), theta, 12)
  expected = oracle.trajectory(
    theta, forget_grad, remain_grad, 0.05, 0.7, 12, **inner, **options
  )
  np.testing.assert_allclose(thetas, expected, **CLOSE)
  assert state.count == 12


def test_follows_the_oracle_in_double_precision():
  with jax.enable_x64(), jax.numpy_dtype_promotion("standard"):
    theta = jnp.asarray(noise(6, seed=2), jnp.float64)
    transform = sfr_on(sgd(0.05, 0.9, 0.01), 0.7, 12, forget_every=3, max_norm=0.5)
    state, out = transform.init(theta), []
    for s in range(12):
      update, state = transform.update(
        jnp.asarray(forget_grad(np.asarray(theta), s)),
        state,
        theta,
        remain_grad_fn=lambda p, s=s: jnp.asarray(remain_grad(np.asarray(p), s)),
      )
      theta = theta + update
      out.append(theta)
    assert theta.dtype == jnp.float64
    assert state.count.dtype == jnp.int32
  expected = oracle.trajectory(
    noise(6, seed=2),
    forget_grad,
    remain_grad,
    0.05,
    0.7,
    12,
    0.9,
    0.01,
    forget_every=3,
    max_norm=0.5,
  )
  # 1e-13: hundreds of float64 roundings of numbers near one.
  np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)


def test_a_rate_set_from_outside_serves_both_steps():
  """A schedule inside would advance twice; an injected rate does not."""

  def rate(s):
    return 0.05 * (1 + np.cos(np.pi * s / 8)) / 2

  def before(state, s):
    given = {"learning_rate": jnp.float32(rate(s))}
    return state._replace(inner=state.inner._replace(hyperparams=given))

  inner = optax.inject_hyperparams(optax.sgd, static_args=("nesterov", "momentum"))(
    learning_rate=0.05, momentum=0.9
  )
  theta = noise(6, seed=2)
  thetas, _ = follow(sfr_on(inner, 0.7, 8, forget_every=2), theta, 8, before=before)
  expected = oracle.trajectory(
    theta, forget_grad, remain_grad, rate, 0.7, 8, 0.9, forget_every=2
  )
  np.testing.assert_allclose(thetas, expected, **CLOSE)
  scheduled = optax.sgd(optax.piecewise_constant_schedule(1.0, {1: 0.5}))
  transform = sfr_on(scheduled, 1.0, 4)
  update, _ = transform.update(
    jnp.ones(2), transform.init(jnp.ones(2)), jnp.ones(2), remain_grad_fn=jnp.ones_like
  )
  np.testing.assert_array_equal(update, -1.5)


def test_worked_quadratic():
  """And the displacement is (I - eta H)^K of the forget step, from a remain minimum."""
  hessian = jnp.array([4.0, 1.0])
  transform, theta = sfr_on(optax.sgd(0.2), 1.0, 10), jnp.zeros(2)
  state = transform.init(theta)
  for k in range(1, 5):
    update, state = transform.update(
      jnp.full(2, -1.5), state, theta, remain_grad_fn=lambda p: hessian * p
    )
    theta = theta + update
    # 0.3 = 0.2 * 1.5; a rounding or two per step.
    np.testing.assert_allclose(theta, 0.3 * (1 - 0.2 * hessian) ** k, rtol=1e-6)
    if k == 2:
      np.testing.assert_allclose(theta, (0.012, 0.192), rtol=1e-6)


@quick
@hypothesis.given(st.integers(1, 6), st.integers(0, 99))
def test_remain_steps_damp_the_forget_step(steps, seed):
  eta = 0.1
  optimum = np.linalg.solve(HESSIAN, X[~FORGET].T @ Y[~FORGET] / 8)
  g = noise(6, seed=seed)
  thetas, _ = _damped(jnp.asarray(optimum, jnp.float32), jnp.asarray(g))
  expected = np.linalg.matrix_power(np.eye(6) - eta * HESSIAN, steps) @ (-eta * g)
  # float32: the optimum itself is rounded.
  np.testing.assert_allclose(thetas[steps - 1] - optimum, expected, atol=3e-6)


@jax.jit
def _damped(theta, g):
  transform = sfr_on(optax.sgd(0.1), 1.0, 10, forget_every=99, max_norm=1e9)

  def step(carry, _):
    theta, state = carry
    update, state = transform.update(
      g, state, theta, remain_grad_fn=jax.grad(remain_loss)
    )
    return (theta + update, state), theta + update

  (_, state), out = jax.lax.scan(step, (theta, transform.init(theta)), length=6)
  return out, state


@quick
@hypothesis.given(losses_, st.sampled_from((0.25, 0.5, 1.0)))
def test_weights(losses, power):
  w = np.asarray(_weights(losses, power))
  assert (w > 0).all()
  np.testing.assert_allclose(w.sum(), 1, rtol=1e-6)
  np.testing.assert_allclose(w, oracle.weights(losses, power), rtol=1e-5)
  np.testing.assert_allclose(_weights(losses[::-1], power), w[::-1], rtol=1e-6)
  np.testing.assert_allclose(_weights(losses, 0.0), 0.2, rtol=1e-6)
  assert np.isfinite(-np.sum(w * losses))
  if (losses > 1e-3).all():
    np.testing.assert_allclose(_weights(4 * losses, power), w, rtol=1e-5)


@jax.jit
def _weights(losses, power):
  return adaptive_forget_weights(losses, power)


def test_weights_of_the_card():
  losses = jnp.array([0.5, 2.0, 4.0])
  w = adaptive_forget_weights(losses)
  np.testing.assert_allclose(w, (0.53950429, 0.26975214, 0.19074357), rtol=1e-6)
  np.testing.assert_allclose(-jnp.sum(w * losses), -1.57223071, rtol=1e-6)
  equal = jnp.full(7, 3.0)
  np.testing.assert_allclose(-jnp.sum(adaptive_forget_weights(equal) * equal), -3.0)
  slope = jax.grad(lambda x: jnp.sum(adaptive_forget_weights(x)[0]))(losses)
  np.testing.assert_array_equal(slope, 0)
  half = adaptive_forget_weights(losses.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  assert np.isnan(adaptive_forget_weights(jnp.array([1.0, jnp.nan]))).all()
  with pytest.raises(ValueError, match="must not be negative"):
    adaptive_forget_weights(jnp.array([1.0, -1.0]))
  with pytest.raises(ValueError, match="eps must lie in"):
    adaptive_forget_weights(losses, eps=0.0)


def test_masks():
  forget, remain = jnp.array([4e-4, 1e-4, 0, 9e-4]), jnp.array([1e-4, 1e-4, 0, 1e-3])
  mask = forget_remain_mask(forget, remain)
  assert mask.tolist() == [True, True, True, False]
  assert mask.dtype == bool
  tree = {"a": forget, "b": (remain.astype(jnp.bfloat16), None)}
  found = forget_remain_mask(tree, {"a": remain, "b": (remain, None)}, threshold=2.0)
  assert found["a"].tolist() == [True, False, False, False]
  values = np.abs(noise(50, seed=1)), np.abs(noise(50, seed=2))
  for threshold in (0.5, 1.0, jnp.float32(3.0)):
    ours = forget_remain_mask(*map(jnp.asarray, values), threshold)
    np.testing.assert_array_equal(ours, oracle.mask(*values, float(threshold)))
  with pytest.raises(ValueError, match="threshold must lie in"):
    forget_remain_mask(forget, remain, 0.0)
  with pytest.raises(ValueError, match="remain_fisher must have the structure"):
    forget_remain_mask({"a": forget}, {"b": remain})


def test_masked_out_without_decay_is_a_remain_step():
  theta = noise(6, seed=2)
  for mask in (np.zeros(6, bool), noise(6, seed=5) > 0):
    transform = sfr_on(optax.sgd(0.1), 5.0, 4, mask=jnp.asarray(mask))
    (after,), _ = follow(transform, theta, 1)
    if not mask.any():
      plain = theta - 0.1 * remain_grad(theta, 0)
      np.testing.assert_allclose(after, plain, **CLOSE)
    still, _ = transform.update(
      jnp.where(mask, 1.0, jnp.nan),
      transform.init(theta),
      theta,
      remain_grad_fn=jnp.zeros_like,
    )
    np.testing.assert_array_equal(still != 0, mask)


@quick
@hypothesis.given(st.sampled_from((0.1, 0.25, 0.5)), st.integers(0, 99))
def test_slow_step_scales_the_update(beta, seed):
  theta = jnp.asarray(noise(6, seed=seed))
  fast, state = _one(theta, jnp.float32(1))
  slow, other = _one(theta, jnp.float32(beta))
  np.testing.assert_allclose(slow, np.float32(beta) * fast, rtol=1e-6, atol=1e-9)
  jax.tree.map(np.testing.assert_array_equal, state, other)


@jax.jit
def _one(theta, beta, scale=3.0, max_norm=7.0):
  transform = sfr_on(
    sgd(0.1, 0.9),
    scale,
    5,
    forget_every=1,
    max_norm=max_norm,
    slow_step_size=beta,
  )
  return transform.update(
    jax.grad(forget_loss)(theta),
    transform.init(theta),
    theta,
    remain_grad_fn=jax.grad(remain_loss),
  )


@quick
@hypothesis.given(st.floats(0.01, 100), st.floats(0.01, 10))
def test_clip_is_global_and_after_the_scale(scale, max_norm):
  g = {"a": noise(3), "b": noise(2, 2, seed=1)}
  moved = _clipped(g, jnp.float32(scale), jnp.float32(max_norm))
  norm = np.sqrt(sum((np.asarray(x, float) ** 2).sum() for x in g.values()))
  length = np.sqrt(sum((np.asarray(x, float) ** 2).sum() for x in moved.values()))
  np.testing.assert_allclose(length, min(scale * norm, max_norm), rtol=1e-5)
  assert length <= max_norm * (1 + 1e-6)


@jax.jit
def _clipped(g, scale, max_norm):
  transform = sfr_on(optax.sgd(1.0), scale, 5, max_norm=max_norm)
  zeros = jax.tree.map(jnp.zeros_like, g)
  return transform.update(
    g, transform.init(zeros), zeros, remain_grad_fn=lambda p: zeros
  )[0]


def test_zero_gradients_give_no_nan():
  theta = {"a": jnp.ones(3), "empty": jnp.ones((0, 2)), "scalar": jnp.ones(())}
  transform = sfr_on(optax.adam(0.1), 25.0, 5)
  zeros = jax.tree.map(jnp.zeros_like, theta)
  update, state = transform.update(
    zeros, transform.init(theta), theta, remain_grad_fn=lambda p: zeros
  )
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(update))
  assert state.count == 1


def test_idle_iterations_do_not_read_the_forget_gradient():
  """And the inner state advances once there, twice where it forgets."""
  theta = jnp.asarray(noise(6, seed=2))
  transform = sfr_on(optax.adam(0.1), 1.0, 9, forget_every=2)
  state = transform.init(theta)
  remain = jax.grad(remain_loss)
  _, state = transform.update(theta, state, theta, remain_grad_fn=remain)
  assert state.inner[0].count == 2
  update, state = transform.update(
    jnp.full(6, jnp.nan), state, theta, remain_grad_fn=remain
  )
  assert state.inner[0].count == 3
  assert jnp.isfinite(update).all()


def test_past_the_last_iteration_nothing_is_forgotten():
  transform, theta = sfr_on(optax.sgd(1.0), 2.0, 2, forget_every=1), jnp.zeros(1)
  state, seen = transform.init(theta), []
  for _ in range(4):
    update, state = transform.update(
      jnp.ones(1), state, theta, remain_grad_fn=jnp.zeros_like
    )
    seen.append(float(update[0]))
  # cos(pi) in float32 is exact, cos(pi / 2) is not.
  np.testing.assert_allclose(seen, (-2, -1, 0, 0), atol=1e-6)


def test_bfloat16():
  theta = jnp.asarray(noise(6, seed=2), jnp.bfloat16)
  seen = []

  def remain(p):
    seen.append(p.dtype)
    return p

  transform = sfr_on(optax.sgd(0.1, momentum=0.9), jnp.float32(0.5), 3)
  update, state = transform.update(
    theta, transform.init(theta), theta, remain_grad_fn=remain
  )
  assert update.dtype == jnp.bfloat16
  assert seen == [jnp.bfloat16]
  assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


def test_hyperparameters_vmap():
  theta = jnp.asarray(noise(6, seed=2))
  grid = jnp.array([[1.0, 3.0, 7.0], [0.5, 9.0, 0.5], [0.1, 0.5, 2.0]])
  swept, _ = jax.vmap(lambda row: _one(theta, row[0], row[1], row[2]))(grid)
  for row, ours in zip(grid, swept, strict=True):
    expected, _ = _one(theta, *row)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "match"),
  [
    ({"forget_scale": 0.0}, "forget_scale must lie in"),
    ({"num_steps": 0}, "num_steps must lie in"),
    ({"forget_every": 0}, "forget_every must lie in"),
    ({"max_norm": 0.0}, "max_norm must lie in"),
    ({"slow_step_size": 0.0}, "slow_step_size must lie in"),
    ({"slow_step_size": 1.5}, "slow_step_size must lie in"),
  ],
)
def test_bad_arguments(arguments, match):
  given = {"inner": optax.sgd(0.1), "forget_scale": 1.0, "num_steps": 3, **arguments}
  with pytest.raises(ValueError, match=match):
    sfr_on(**given)


def test_bad_calls():
  theta = {"w": jnp.ones(3)}
  plain = sfr_on(optax.sgd(0.1), 1.0, 3)
  state = plain.init(theta)
  with pytest.raises(ValueError, match="needs remain_grad_fn"):
    plain.update(theta, state, theta, grad_fn=jnp.ones_like)
  with pytest.raises(ValueError, match="needs params"):
    plain.update(theta, state, remain_grad_fn=lambda p: p)
  for mask, match in (
    ({"v": jnp.ones(3, bool)}, r"mask must have the structure of params"),
    ({"w": jnp.ones(2, bool)}, r"mask\['w'\] must have the shape of params, \(3,\)"),
  ):
    with pytest.raises(ValueError, match=match):
      sfr_on(optax.sgd(0.1), 1.0, 3, mask=mask).update(
        theta, state, theta, remain_grad_fn=lambda p: p
      )
  with pytest.raises(ValueError, match="needs floating-point"):
    plain.init({"w": jnp.ones(3, jnp.int32)})
