"""``fst`` and ``future_self_training``: the two orders, and who follows whom."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.pipeline import build
from gradlab.transforms.updates import fst, future_self_training
from gradlab.types import ConfigError
from tests.oracles import future_self_training as oracle
from tests.transforms.updates.trajectories import noise

quick = hypothesis.settings(max_examples=20, deadline=None)
numbers = st.floats(-4, 4, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
# float32 against float64: some roundings per iteration, half a dozen iterations.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
MODES = ("deep", "wide", "none")
OPTIMIZERS = {
  "sgd": (lambda: optax.sgd(0.1), lambda: oracle.Sgd(0.1)),
  "momentum": (lambda: optax.sgd(0.1, 0.9), lambda: oracle.Sgd(0.1, 0.9)),
  "adam": (lambda: optax.adam(0.1), lambda: oracle.Adam(0.1)),
  "still": (lambda: optax.sgd(0.0), lambda: oracle.Sgd(0.0)),
}
THETA = noise(5, seed=9)
BATCHES = noise(6, 5, seed=1)
FUTURES = noise(6, 3, 5, seed=2)


def gradient(params, teacher, batch):
  """Of a bowl around the batch and a label in the direction of the teacher."""
  return (params - batch) + 0.5 * (params - 0.8 * teacher) ** 3


def alone(params, teacher, batch):
  return params - batch


@functools.cache
def runner(name, grad_fn, **options):
  """The jitted scan of iterations over batches: states and the virtual norms."""
  init, step = fst(OPTIMIZERS[name][0](), **options)

  @jax.jit
  def run(theta, batches, futures):
    def iterate(state, data):
      state, aux = step(state, data[0], grad_fn, data[1])
      return state, (state.params, state.teacher, aux["virtual_grad_norm"])

    return jax.lax.scan(iterate, init(theta), (batches, futures))

  return run


def follow(name="sgd", grad_fn=gradient, theta=THETA, count=6, futures=FUTURES, **more):
  ahead = more.get("num_ahead", 3)
  with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes counters with floats
    state, trace = runner(name, grad_fn, **more)(
      jnp.asarray(theta), BATCHES[:count], futures[:count, :ahead]
    )
  return state, trace


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
  ("name", "commit"), [("sgd", False), ("momentum", True), ("adam", False)]
)
def test_follows_the_oracle(mode, legacy, name, commit):
  state, (thetas, phis, _) = follow(
    name,
    mode=mode,
    legacy_order=legacy,
    commit_opt_state=commit,
    ema_decay=0.7,
  )
  loop = oracle.released if legacy else oracle.textbook
  data = list(zip(BATCHES, FUTURES, strict=True))
  expected = loop(THETA, gradient, data, OPTIMIZERS[name][1](), 0.7, 3, mode, commit)
  for ours, theirs in zip((thetas, phis), zip(*expected, strict=True), strict=True):
    np.testing.assert_allclose(ours, theirs, **CLOSE)
  assert state.count == 6


def test_released_code_in_float64():
  """All of it: order, warm-up of the decay, momentum that leaks from virtual steps."""
  with jax.enable_x64(True):
    for mode in ("deep", "wide"):
      state, (thetas, phis, norms) = follow(
        "momentum",
        theta=THETA.astype(np.float64),
        mode=mode,
        legacy_order=True,
        commit_opt_state=True,
      )
      assert state.teacher.dtype == norms.dtype == jnp.float64
      data = list(zip(BATCHES, FUTURES, strict=True))
      expected = oracle.released(
        THETA, gradient, data, oracle.Sgd(0.1, 0.9), 0.999, 3, mode, commit=True
      )
      for ours, theirs in zip((thetas, phis), zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def scalar_gradient(params, teacher, batch):
  return (params - batch) + 0.5 * (params - teacher)


def test_worked_examples():
  one = jnp.float32(1)
  init, step = fst(optax.sgd(0.2), ema_decay=0.9, num_ahead=2)
  state, aux = jax.jit(lambda s: step(s, one, scalar_gradient))(init(0.0))
  np.testing.assert_allclose(state.params, 0.20522, rtol=1e-6)
  np.testing.assert_allclose(state.teacher, 0.0522, rtol=1e-6)
  # The gradients at (0, 0) and at (0.2, 0.02): -1 and -0.71.
  np.testing.assert_allclose(aux["virtual_grad_norm"], 1.0, rtol=1e-6)
  init, step = fst(optax.sgd(0.2), ema_decay=0.9, num_ahead=2, mode="wide")
  futures = jnp.array([1.0, 3.0])
  state, aux = jax.jit(lambda s: step(s, one, scalar_gradient, futures))(init(0.0))
  np.testing.assert_allclose(state.teacher, 0.04, rtol=1e-6)
  np.testing.assert_allclose(state.params, 0.204, rtol=1e-6)
  np.testing.assert_allclose(aux["virtual_grad_norm"], 3.0, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_decay_one_keeps_the_teacher(mode):
  _, (thetas, phis, _) = follow(mode=mode, ema_decay=1.0)
  np.testing.assert_array_equal(phis, np.stack([THETA] * 6))
  theta = THETA.astype(np.float64)
  for ours, batch in zip(thetas, BATCHES, strict=True):
    theta = theta - 0.1 * gradient(theta, THETA, batch)
    np.testing.assert_allclose(ours, theta, **CLOSE)


def test_decay_zero_makes_the_teacher_the_last_virtual_student():
  _, (_, phis, _) = follow(ema_decay=0.0, num_ahead=1)
  _, (thetas, _, _) = follow(grad_fn=lambda v, p, b: gradient(v, THETA, b), mode="none")
  np.testing.assert_array_equal(phis[0], thetas[0])


@quick
@hypothesis.given(st.lists(numbers, min_size=5, max_size=5), st.sampled_from(MODES))
def test_rate_zero_moves_nothing(theta, mode):
  theta = np.array(theta, np.float32)
  state, _ = follow("still", theta=theta, mode=mode, count=2, ema_decay=0.7)
  np.testing.assert_array_equal(state.params, theta)
  np.testing.assert_array_equal(state.teacher, theta)


def test_wide_with_the_batch_itself_is_deep_with_one():
  deep = follow("momentum", num_ahead=1)
  wide = follow("momentum", num_ahead=1, mode="wide", futures=BATCHES[:, None])
  for ours, theirs in zip(wide[1], deep[1], strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@quick
@hypothesis.given(st.permutations(range(3)))
def test_wide_does_not_see_the_order_of_the_future(order):
  _, first = follow("momentum", mode="wide")
  _, second = follow("momentum", mode="wide", futures=FUTURES[:, order])
  for ours, theirs in zip(first, second, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # a sum of three


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_without_labels_the_student_is_the_plain_one(mode, name):
  """Operation by operation: whole programs are fused, and so rounded, each its way."""
  optimizer = OPTIMIZERS[name][0]()
  init, step = fst(optimizer, mode=mode)
  state, theta = init(THETA), jnp.asarray(THETA)
  plain = optimizer.init(theta)
  with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes counters with floats
    for batch, futures in zip(BATCHES[:3], FUTURES, strict=False):
      updates, plain = optimizer.update(alone(theta, None, batch), plain, theta)
      theta = optax.apply_updates(theta, updates)
      state, _ = step(state, jnp.asarray(batch), alone, jnp.asarray(futures))
      np.testing.assert_array_equal(state.params, theta)


@quick
@hypothesis.given(
  st.lists(numbers, min_size=5, max_size=5), st.sampled_from(("deep", "none"))
)
def test_teacher_stays_among_its_start_and_the_students(theta, mode):
  """Every coordinate lies between the least and the greatest that was averaged."""
  theta = np.array(theta, np.float32)
  _, (thetas, phis, _) = follow(theta=theta, mode=mode, count=2, ema_decay=0.7)
  seen = [theta]
  for start, phi, batch in zip(
    (theta, thetas[0]), (theta, phis[0]), BATCHES, strict=False
  ):
    v, phi = np.float64(start), np.float64(phi)
    if mode == "none":
      seen.append(v)
      continue
    for _ in range(3):
      v = v - 0.1 * gradient(v, phi, batch)
      phi = 0.7 * phi + 0.3 * v
      seen.append(v)
  # Rounding of float32 trajectories, whose numbers reach a hundred here.
  slack = 1e-4 * (1 + np.max(np.abs(seen)))
  assert np.all(phis[-1] >= np.min(seen, axis=0) - slack)
  assert np.all(phis[-1] <= np.max(seen, axis=0) + slack)


def test_integers_are_copied_and_do_not_move():
  params = {"w": jnp.ones(3), "n": jnp.arange(2), "on": jnp.array(True)}

  def grad_fn(params, teacher, batch):
    grads = jax.grad(lambda p: jnp.sum((p["w"] - batch) ** 2), allow_int=True)(params)
    assert grads["n"].dtype == jax.dtypes.float0
    return grads

  for mode in ("deep", "wide"):
    init, step = fst(optax.sgd(0.1, 0.9), mode=mode)
    state, _ = jax.jit(lambda s, step=step: step(s, 0.0, grad_fn, jnp.zeros(3)))(
      init(params)
    )
    for tree in (state.params, state.teacher):
      np.testing.assert_array_equal(tree["n"], params["n"])
      assert tree["n"].dtype == params["n"].dtype
      assert tree["on"].dtype == jnp.bool_
    assert state.params["w"][0] < 1

  transform = future_self_training(optax.sgd(0.1))
  extra = {"grad_fn": grad_fn, "batch": 0.0}
  updates, _ = transform.update(params, transform.init(params), params, **extra)
  np.testing.assert_array_equal(updates["n"], 0)
  moved = optax.apply_updates(params, {**updates, "on": jnp.array(False)})
  np.testing.assert_array_equal(moved["n"], params["n"])


def test_bfloat16_has_a_float32_teacher_that_moves():
  theta = jnp.ones(3, jnp.bfloat16)

  def grad_fn(params, teacher, batch):
    assert teacher.dtype == jnp.float32
    return (params - teacher.astype(params.dtype)) + params

  init, step = fst(optax.sgd(0.1, 0.9))
  state, _ = jax.jit(lambda s: step(s, None, grad_fn))(init(theta))
  assert state.params.dtype == jnp.bfloat16
  assert state.teacher.dtype == jnp.float32
  # A thousandth of the way from 1 to about 0.5: lost in bfloat16.
  assert np.all(state.teacher < 1)
  assert np.all(state.teacher > 0.99)


def test_state_has_buffers_of_its_own():
  theta = jnp.ones(3)
  init, step = fst(optax.sgd(0.1, 0.9))
  run = jax.jit(lambda s: step(s, jnp.ones(3), gradient)[0], donate_argnums=0)
  state = init(theta)
  after = run(state)
  assert state.params.is_deleted()
  assert not theta.is_deleted()
  assert run(after).count == 2


def test_a_bad_virtual_gradient_shows_and_can_be_skipped():
  def grad_fn(params, teacher, batch):
    # Only the second virtual student, beyond 0.15, meets it.
    return jnp.where(params > 0.15, jnp.nan, scalar_gradient(params, teacher, batch))

  one = jnp.float32(1)
  init, step = fst(optax.sgd(0.2), num_ahead=2)
  state, aux = step(init(0.0), one, grad_fn)
  assert np.isnan(aux["virtual_grad_norm"])
  assert np.isnan(state.teacher)
  init, step = fst(optax.apply_if_finite(optax.sgd(0.2), 3), num_ahead=2)
  state, aux = step(init(0.0), one, grad_fn)
  assert np.isnan(aux["virtual_grad_norm"])
  assert np.isfinite(state.teacher)


def test_empty_trees():
  for mode in MODES:
    init, step = fst(optax.sgd(0.1), mode=mode)
    state, aux = step(init({}), None, lambda params, teacher, batch: {}, jnp.zeros(3))
    assert state.params == state.teacher == {}
    assert aux["virtual_grad_norm"] == 0


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_ahead": 0}, "num_ahead"),
    ({"mode": "far"}, "mode must be one of deep, wide, none"),
    ({"ema_decay": 1.5}, "ema_decay"),
    ({"ema_decay": -0.1}, "ema_decay"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    fst(optax.sgd(0.1), **options)
  with pytest.raises(ValueError, match=message):
    future_self_training(optax.sgd(0.1), **options)


def test_bad_futures():
  init, step = fst(optax.sgd(0.1), mode="wide")
  state = init(jnp.ones(5))
  for futures, message in (
    (None, "needs future_batches"),
    (jnp.ones((2, 5)), "num_ahead = 3"),
    (jnp.float32(1), "num_ahead = 3"),
  ):
    with pytest.raises(ValueError, match=message):
      step(state, jnp.ones(5), gradient, futures)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("legacy", [False, True])
def test_transformation_is_the_step(mode, legacy):
  options = {"mode": mode, "legacy_order": legacy, "ema_decay": 0.7}
  transform = future_self_training(optax.sgd(0.1, 0.9), **options)

  @jax.jit
  def run(theta):
    def step(carry, data):
      theta, state = carry
      batch, futures = data
      extra = {"grad_fn": gradient, "batch": batch, "future_batches": futures}
      updates, state = transform.update(theta, state, theta, **extra)
      theta = optax.apply_updates(theta, updates)
      return (theta, state), (theta, state.teacher)

    return jax.lax.scan(step, (theta, transform.init(theta)), (BATCHES, FUTURES))

  (_, state), found = run(jnp.asarray(THETA))
  _, expected = follow("momentum", **options)
  for ours, theirs in zip(found, expected, strict=False):
    np.testing.assert_allclose(ours, theirs, **CLOSE)
  assert state.count == 6


def test_a_gradient_without_a_teacher_only_looks_ahead():
  target = jnp.array([1.0, -2.0])
  transform, theta = future_self_training(optax.sgd(0.2), 0.5, 2), jnp.zeros(2)
  loss_gradient = jax.grad(lambda p: 0.5 * jnp.sum((p - target) ** 2))
  updates, state = transform.update(
    jnp.ones(2), transform.init(theta), theta, grad_fn=loss_gradient, value=0.0
  )
  np.testing.assert_allclose(updates, -0.2 * np.ones(2), rtol=1e-6)
  # v = 0.2 and 0.36 of the target, each followed half way.
  np.testing.assert_allclose(state.teacher, 0.23 * np.array([1, -2]), rtol=1e-6)


def test_missing_extra_arguments():
  theta = jnp.ones(5)
  for mode, extra, message in (
    ("deep", {}, "extra argument grad_fn"),
    ("deep", {"grad_fn": gradient}, "extra argument batch"),
    ("wide", {"grad_fn": gradient, "batch": theta}, "future_batches"),
    ("wide", {"grad_fn": jnp.sin}, r"grad_fn of \(params, teacher, batch\)"),
  ):
    transform = future_self_training(optax.sgd(0.1), mode=mode)
    state = transform.init(theta)
    with pytest.raises(ValueError, match=message):
      transform.update(theta, state, theta, **extra)
    with pytest.raises(ValueError, match="needs params"):
      transform.update(theta, state, **extra)


def test_hyperparameters_vmap():
  grid = jnp.array([[0.1, 0.9, 0.7], [0.3, 0.0, 1.0], [0.2, 0.5, 0.0]])

  def one(rate, momentum, decay):
    transform = future_self_training(optax.sgd(rate, momentum), decay)
    theta = jnp.asarray(THETA)
    state = transform.init(theta)
    extra = {"grad_fn": gradient, "batch": jnp.asarray(BATCHES[0])}
    _, state = transform.update(theta, state, theta, **extra)
    updates, state = transform.update(theta, state, theta, **extra)
    return updates, state.teacher

  swept = jax.jit(jax.vmap(one))(*grid.T)
  compiled = jax.jit(one)
  for k, row in enumerate(grid):
    for ours, theirs in zip(swept, compiled(*row), strict=True):
      np.testing.assert_allclose(ours[k], theirs, rtol=1e-5, atol=1e-6)


def _config(**options):
  return {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "features": (4,)},
    "stages": {
      "train": {
        "steps": 1,
        "batch_size": 8,
        "objective": {"name": "cross_entropy"},
        "update": {"future_self_training": options},
      }
    },
  }


def test_what_a_config_can_say():
  rule = {"optax.sgd": {"learning_rate": 0.1, "momentum": 0.9}}
  built = build(_config(optimizer=rule, num_ahead=1, ema_decay=0.99))
  assert set(built.programs["train"].hyperparams) == {
    "update.future_self_training.ema_decay",
    "update.future_self_training.optimizer.optax.sgd.learning_rate",
    "update.future_self_training.optimizer.optax.sgd.momentum",
  }
  with pytest.raises(ConfigError, match=r"future_self_training\.optimizer: missing"):
    build(_config())
  with pytest.raises(ConfigError, match=r"grad_fn of \(params, teacher, batch\)"):
    build(_config(optimizer=rule, mode="wide"))
