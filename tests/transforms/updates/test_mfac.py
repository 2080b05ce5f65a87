import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.updates import (
  fisher_inverse_diag,
  fisher_ivp,
  fisher_ivp_blocked,
  flat_window,
  mfac,
  scale_by_mfac,
)
from tests.oracles import mfac as oracle
from tests.transforms.updates.trajectories import direct, follow, noise

quick = hypothesis.settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31 - 1)
EXAMPLE = np.array([[1.0, 0.0], [1.0, 1.0]])
# float64 against float64: a Cholesky factor of condition up to 1e6.
EXACT = {"rtol": 1e-9, "atol": 1e-11}
ivp, diag = jax.jit(fisher_ivp), jax.jit(fisher_inverse_diag)


def problem(seed, m=4, d=7):
  rng = np.random.default_rng(seed)
  window = rng.normal(size=(m, d)) * 10 ** rng.uniform(-1, 1)
  return window, rng.normal(size=d), 10 ** rng.uniform(-2, 1)


def test_worked_example():
  with jax.enable_x64(True):
    x = jnp.array([2.0, -1.0])
    np.testing.assert_allclose(fisher_ivp(EXAMPLE, x, 0.5), [2, -2], **EXACT)
    np.testing.assert_allclose(fisher_inverse_diag(EXAMPLE, 0.5), [0.8, 1.2], **EXACT)
    transform = scale_by_mfac(2, 0.5)
    state = transform.init(x)
    for g in EXAMPLE:
      u, state = jax.jit(transform.update)(jnp.asarray(g), state)
    np.testing.assert_allclose(u, [0.4, 0.8], **EXACT)
    np.testing.assert_array_equal(state.gram, [[1, 1], [1, 2]])
    np.testing.assert_array_equal(state.grads, EXAMPLE)
  d, b = oracle.recursion(EXAMPLE, 0.5)
  np.testing.assert_allclose(d, [[2, 2], [0, 3]])
  np.testing.assert_allclose(b, [[2, 0], [-1, 2]])


@quick
@hypothesis.given(seeds)
def test_three_oracles_and_the_library_agree(seed):
  window, x, damping = problem(seed)
  expected = oracle.dense_ivp(window, x, damping)
  one_by_one, diagonal = oracle.sherman_morrison(window, x, damping)
  # Sherman-Morrison updates lose the digits of |g|^2 / damping.
  np.testing.assert_allclose(one_by_one, expected, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(
    oracle.recursive_ivp(window, x, damping), expected, rtol=1e-6, atol=1e-8
  )
  with jax.enable_x64(True):
    y = np.asarray(ivp(window, x, damping))
    np.testing.assert_allclose(y, expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(diag(window, damping), diagonal, rtol=1e-6)
  # F (F^{-1} x) = x, and F^{-1} is between the inverse eigenvalues.
  matrix = oracle.fisher(window, damping)
  np.testing.assert_allclose(matrix @ y, x, rtol=1e-6, atol=1e-6)
  top, energy = np.linalg.eigvalsh(matrix)[-1], x @ y
  assert 0 < x @ x / top * (1 - 1e-6) <= energy <= x @ x / damping * (1 + 1e-6)


@quick
@hypothesis.given(seeds, st.permutations(range(4)))
def test_order_and_zero_rows_of_the_window(seed, order):
  window, x, damping = problem(seed)
  with jax.enable_x64(True):
    y = ivp(window, x, damping)
    np.testing.assert_allclose(ivp(window[order], x, damping), y, rtol=1e-6, atol=1e-8)
    # Four rows of zeros halve 1/m, which a factor sqrt(2) makes up for.
    padded = np.concatenate([np.sqrt(2) * window, np.zeros((4, 7))])
    np.testing.assert_allclose(ivp(padded, x, damping), y, rtol=1e-6, atol=1e-8)
    other = ivp(window, x[::-1].copy(), damping)
    np.testing.assert_allclose(x[::-1] @ y, x @ other, rtol=1e-6, atol=1e-8)


def test_no_gradients_and_much_damping_are_plain_descent():
  window, x, _ = problem(0)
  np.testing.assert_allclose(fisher_ivp(0 * window, x, 0.25), 4 * x, rtol=1e-6)
  far = fisher_ivp(window, x, 1e6) * 1e6
  np.testing.assert_allclose(far, x, rtol=1e-3)  # what a finite damping leaves


def test_many_vectors_and_blocks():
  window, _, damping = problem(3, m=3, d=7)
  xs = noise(5, 7)
  for size in (3, 100):
    expected = np.zeros((5, 7))
    for begin in range(0, 7, size):
      part = slice(begin, begin + size)
      expected[:, part] = oracle.dense_ivp(window[:, part], xs[:, part], damping)
    with jax.enable_x64(True):
      blocked = jax.jit(fisher_ivp_blocked, static_argnums=2)
      ours = blocked(window, xs.astype(np.float64), size, damping)
      one = blocked(window, xs[0].astype(np.float64), size, damping)
    np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(one, expected[0], rtol=1e-7, atol=1e-9)
  ours = ivp(window.astype(np.float32), xs, damping)
  assert ours.dtype == jnp.float32
  expected = oracle.dense_ivp(window, xs, damping)
  np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)  # it cancels


def test_diagonal_stays_positive_in_float32():
  """One minus a number that rounds to one."""
  window = 1e3 * noise(40, 8)
  diagonal = fisher_inverse_diag(window, 1e-4)
  _, expected = oracle.sherman_morrison(window, np.zeros(8), 1e-4)
  assert (np.asarray(diagonal) > 0).all()
  assert (np.asarray(diagonal) >= 0.99 / np.diag(oracle.fisher(window, 1e-4))).all()
  assert (expected > 0).all()


@pytest.mark.parametrize(
  ("m", "options"),
  [
    (1, {}),
    (3, {"momentum": 0.9}),
    (3, {"momentum": 0.5, "l2": 0.02}),
    (8, {"l2": 0.1}),
  ],
)
def test_follows_the_recursion(m, options):
  gradients, theta = noise(7, 6).astype(np.float64), noise(6, seed=1)
  expected = oracle.trajectory(theta, gradients, 0.05, m, 1e-2, **options)
  with jax.enable_x64(True):
    transform = mfac(0.05, m, 1e-2, **options)
    exact, state = follow(transform, jnp.asarray(theta, jnp.float64), gradients)
    np.testing.assert_allclose(exact, expected, rtol=1e-8, atol=1e-9)
    assert state.mfac.gram.dtype == state.mfac.grads.dtype == jnp.float64
  transform = mfac(0.05, m, 1e-2, **options)
  thetas, _ = follow(transform, jnp.asarray(theta), gradients.astype(np.float32))
  # float32 through a matrix of condition 1e3.
  np.testing.assert_allclose(thetas, expected, rtol=2e-4, atol=2e-5)


def test_small_damping_is_accurate_in_float32():
  """Where the recursion and Woodbury's form lose all digits."""
  gradients = noise(32, 1000)
  expected = oracle.dense_ivp(gradients, gradients[-1], 1e-5)
  ours = direct(gradients, scale_by_mfac, num_grads=32, damping=1e-5)
  error = np.linalg.norm(ours[-1] - expected) / np.linalg.norm(expected)
  assert error < 2e-6  # float32 products of a thousand terms
  other = fisher_ivp(gradients, gradients[-1], 1e-5)
  assert np.linalg.norm(other - expected) > 1e-2 * np.linalg.norm(expected)


@quick
@hypothesis.given(seeds, st.floats(1e-3, 10))
def test_window_of_one_normalises_itself(seed, damping):
  g = noise(1, 5, seed=seed)
  update = _compiled_one(jnp.asarray(g[0]), jnp.float32(damping))
  np.testing.assert_allclose(update, g[0] / (damping + g[0] @ g[0]), rtol=1e-5)
  assert np.linalg.norm(update) <= 1 / (2 * np.sqrt(damping)) * (1 + 1e-5)


@jax.jit
def _compiled_one(g, damping):
  transform = scale_by_mfac(1, damping)
  return transform.update(g, transform.init(g))[0]


@jax.jit
def _run(gradients, damping):
  transform = scale_by_mfac(3, damping)

  def step(state, g):
    u, state = transform.update(g, state)
    return state, u

  return jax.lax.scan(step, transform.init(gradients[0]), gradients)


@quick
@hypothesis.given(seeds, st.floats(0.1, 10))
def test_progress_scaling_forgetting_and_rotation(seed, scale):
  rng = np.random.default_rng(seed)
  gradients, damping = rng.normal(size=(7, 5)), 10 ** rng.uniform(-2, 0)
  with jax.enable_x64(True):
    state, us = _run(gradients, damping)
    assert (np.sum(gradients * us, axis=1) < 3).all()  # <g, u> < m
    _, scaled = _run(scale * gradients, scale**2 * damping)
    np.testing.assert_allclose(scaled, us / scale, rtol=1e-7, atol=1e-9)
    other = np.concatenate([rng.normal(size=(4, 5)), gradients[4:]])
    np.testing.assert_allclose(_run(other, damping)[1][-1], us[-1], **EXACT)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    _, turned = _run(gradients @ turn.T, damping)
    np.testing.assert_allclose(turned, us @ turn.T, rtol=1e-7, atol=1e-9)
  rows = np.asarray(state.grads)
  np.testing.assert_allclose(state.gram, rows @ rows.T, rtol=1e-10, atol=1e-12)


def test_tree_is_one_vector():
  gradients = noise(5, 11)
  theta = {"a": jnp.zeros((2, 3)), "b": (jnp.float32(0), None), "c": jnp.zeros((2, 2))}

  def split(g):
    a, b, c = np.split(g, (6, 7))
    return {"a": a.reshape(2, 3), "b": (b[0], None), "c": c.reshape(2, 2)}

  transform = scale_by_mfac(3, 0.1)
  state, update = transform.init(theta), jax.jit(transform.update)
  for g in gradients:
    u, state = update(jax.tree.map(jnp.asarray, split(g)), state)
  expected, window = oracle.directions(gradients, 3, 0.1)
  whole = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(u)])
  np.testing.assert_allclose(whole, expected[-1], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(flat_window(state), window.astype(np.float32))
  assert state.grads["a"].shape == (3, 2, 3)


def test_bfloat16_window_keeps_an_exact_gram():
  """Every entry is renewed from the stored rows, so that nothing drifts."""
  gradients = noise(40, 200)
  transform = scale_by_mfac(4, 0.1, grad_dtype=jnp.bfloat16)
  state = transform.init(jnp.zeros(200))
  update = jax.jit(transform.update)
  for g in gradients:
    u, state = update(jnp.asarray(g), state)
  assert state.grads.dtype == jnp.bfloat16
  assert state.gram.dtype == u.dtype == jnp.float32
  window = np.asarray(state.grads.astype(jnp.float32), np.float64)
  # float32 sums of 200 terms.
  np.testing.assert_allclose(state.gram, window @ window.T, rtol=1e-5, atol=1e-4)
  expected = oracle.dense_ivp(window, window[39 % 4], 0.1)
  np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient(skip, bad):
  gradients = noise(8, 5)
  poisoned = np.insert(gradients, 4, np.full(5, bad, np.float32), axis=0)
  clean = direct(gradients, scale_by_mfac, num_grads=3, damping=0.1)
  us = direct(poisoned, scale_by_mfac, num_grads=3, damping=0.1, skip_nonfinite=skip)
  np.testing.assert_array_equal(us[:4], clean[:4])
  if skip:
    np.testing.assert_array_equal(us[4], 0)
    np.testing.assert_array_equal(us[5:], clean[4:])
  else:
    assert np.isnan(us[4:7]).all()
    assert np.isfinite(us[7:]).all()
    # The bad gradient has left; the order within the window is another.
    np.testing.assert_allclose(us[7:], clean[6:], rtol=1e-4, atol=1e-5)


def test_skipping_keeps_the_state():
  transform = scale_by_mfac(2, 0.1, skip_nonfinite=True)
  update = jax.jit(transform.update)
  _, state = update(jnp.ones(3), transform.init(jnp.ones(3)))
  u, after = update(jnp.array([1.0, jnp.nan, 0.0]), state)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  np.testing.assert_array_equal(u, 0)


def test_equal_gradients_and_zero_gradients():
  """Rank one: rounding makes m damping I + G G^T indefinite in float32."""
  g = 300 * noise(50)
  us = direct(np.stack([g] * 9), scale_by_mfac, num_grads=4, damping=1e-5)
  # With k equal gradients, u = g / (damping + k/m |g|^2).
  shares = np.minimum(np.arange(1, 10), 4) / 4
  expected = g / (shares[:, None] * float(g.astype(np.float64) @ g))
  np.testing.assert_allclose(us[0], expected[0], rtol=1e-4)
  assert np.isfinite(us).all()
  assert (us @ g > 0).all()
  zeros = direct(np.zeros((3, 4)), scale_by_mfac, num_grads=2, damping=0.1)
  np.testing.assert_array_equal(zeros, 0)


def test_mask_freezes_leaves_and_entries():
  theta = {"w": jnp.asarray(noise(2, 3)), "b": jnp.ones(2), "n": jnp.arange(3)}
  g = {"w": jnp.asarray(noise(2, 3, seed=1)), "b": jnp.ones(2), "n": jnp.arange(3)}
  keep = np.array([[True, False, True], [True, True, False]])
  transform = mfac(
    0.1, 2, 0.1, momentum=0.5, l2=0.1, mask={"w": keep, "b": False, "n": False}
  )
  state = transform.init(theta)
  assert isinstance(state.mfac.grads["b"], optax.MaskedNode)
  u, state = jax.jit(transform.update)(g, state, theta)
  np.testing.assert_array_equal(u["b"], 0)
  np.testing.assert_array_equal(np.asarray(u["w"]) == 0, ~keep)
  np.testing.assert_array_equal(u["n"], [0, 0, 0])
  assert u["n"].dtype == jnp.int32
  gw = np.asarray(g["w"] + 0.1 * theta["w"])[keep]
  expected = -0.1 * 0.5 * oracle.directions([gw], 2, 0.1)[0][0]
  np.testing.assert_allclose(np.asarray(u["w"])[keep], expected, rtol=1e-5)
  only = mfac(0.1, 2, 0.1, mask=lambda tree: {"w": True, "b": False, "n": True})
  u, _ = jax.jit(only.update)(g, only.init(theta))
  np.testing.assert_array_equal(u["b"], 0)
  assert u["w"].all()


def test_integer_leaves_take_no_part():
  g = {"w": jnp.ones(2), "n": jnp.arange(3)}
  transform = scale_by_mfac(2, 1.0)
  u, state = jax.jit(transform.update)(g, transform.init(g))
  np.testing.assert_array_equal(u["n"], 0)
  assert flat_window(state).shape == (2, 2)
  np.testing.assert_allclose(u["w"], 0.5, rtol=1e-6)  # 1 / (1 + 2 / 2)


def test_empty_tree_and_zero_size_leaves():
  transform = mfac(0.1, 2, 0.1)
  u, state = transform.update({}, transform.init({}))
  assert u == {}
  assert flat_window(state.mfac).shape == (2, 0)
  u, _ = transform.update(jnp.zeros((0, 3)), transform.init(jnp.zeros((0, 3))))
  assert u.shape == (0, 3)


def test_schedule_and_piece_of_a_chain():
  gradients, theta = noise(4, 3), noise(3, seed=1)
  schedule = lambda k: 0.1 / (1 + k)  # noqa: E731
  thetas, _ = follow(mfac(schedule, 2, 0.1), jnp.asarray(theta), gradients)
  expected = oracle.trajectory(theta, gradients, schedule, 2, 0.1)
  np.testing.assert_allclose(thetas, expected, rtol=1e-4, atol=1e-5)
  chained = optax.chain(scale_by_mfac(2, 0.1), optax.scale(-0.1))
  thetas, _ = follow(chained, jnp.asarray(theta), gradients)
  expected = oracle.trajectory(theta, gradients, 0.1, 2, 0.1)
  np.testing.assert_allclose(thetas, expected, rtol=1e-4, atol=1e-5)


def test_update_is_in_place():
  """The window is overwritten where it stands: no copy of it among the temporaries."""
  params = {"a": jnp.zeros((100, 50)), "b": jnp.zeros(70)}
  transform = mfac(0.1, 16, 0.1)
  state = jax.eval_shape(transform.init, params)
  step = jax.jit(lambda state, g: transform.update(g, state), donate_argnums=0)
  memory = step.lower(state, params).compile().memory_analysis()
  one_copy = 4 * 5070
  assert memory.temp_size_in_bytes < 4 * one_copy
  assert memory.alias_size_in_bytes >= 17 * one_copy


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: scale_by_mfac(0), "num_grads must be at least 1"),
    (lambda: scale_by_mfac(damping=0.0), "damping"),
    (lambda: mfac(-1.0), "learning_rate"),
    (lambda: mfac(0.1, momentum=1.0), "momentum"),
    (lambda: mfac(0.1, l2=-1.0), "l2"),
    (lambda: fisher_ivp(np.ones((2, 3)), np.ones(3), -1.0), "damping"),
    (lambda: fisher_ivp(np.ones((2, 3)), np.ones(2), 1.0), "x must have shape"),
    (lambda: fisher_ivp(np.ones((2, 0)), np.ones(0), 1.0), "d >= 1"),
    (lambda: fisher_inverse_diag(np.ones((0, 3)), 1.0), "m >= 1"),
    (lambda: fisher_ivp_blocked(np.ones((2, 3)), np.ones(3), 0, 1.0), "block_size"),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_l2_needs_params():
  transform = mfac(0.1, 2, l2=0.1)
  with pytest.raises(ValueError, match="mfac needs params in update when l2"):
    transform.update(jnp.ones(2), transform.init(jnp.ones(2)))
