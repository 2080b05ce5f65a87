import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.updates import (
  DiagonalHessian,
  LowRankHessian,
  empirical_fisher,
  exact_hessian,
  gauss_newton,
  gradient_normalized_smoothness,
  rank_one,
  regularized_newton_direction,
  scale_by_gns,
  zero,
)
from gradlab.transforms.updates._curvature import make_metric, regularized_solve
from tests.oracles import gradient_normalized_smoothness as oracle

quick = hypothesis.settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31 - 1)
DATA = np.random.default_rng(0).normal(size=(12, 4))
SIGNS = np.sign(np.random.default_rng(1).normal(size=12))
# float64 against float64, through Cholesky factors instead of a general solve.
EXACT = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _float64():
  """The test of a step compares differences of values: float32 is too coarse."""
  with jax.enable_x64(True):
    yield


def losses(x):
  return jax.nn.softplus(-(jnp.asarray(DATA) @ x) * jnp.asarray(SIGNS))


def logistic(x):
  return jnp.mean(losses(x)) + 0.005 * jnp.vdot(x, x)


def logistic_numpy(x):
  margins = SIGNS * (DATA @ x)
  weights = -SIGNS / (1 + np.exp(margins)) / len(SIGNS)
  return np.logaddexp(0, -margins).mean() + 0.005 * x @ x, DATA.T @ weights + 0.01 * x


def logistic_hessian(x):
  p = 1 / (1 + np.exp(-DATA @ x))
  return (DATA.T * (p * (1 - p))) @ DATA / len(SIGNS) + 0.01 * np.eye(4)


def fisher_numpy(x):
  rows = DATA * (-SIGNS / (1 + np.exp(SIGNS * (DATA @ x))))[:, None]
  return rows.T @ rows / len(rows)


def iterate(solver, state, steps, batch=None):
  step, out = jax.jit(solver.step), []
  for _ in range(steps):
    state = step(state) if batch is None else step(state, batch)
    out.append(state)
  return out


def assert_follows(solver, expected, x=None, rtol=1e-8):
  start = jnp.zeros(4) if x is None else jnp.asarray(x)
  for state, (x, f, gamma, evaluations, accepted) in zip(
    iterate(solver, solver.init(start), len(expected)), expected, strict=True
  ):
    np.testing.assert_allclose(state.params, x, rtol=rtol, atol=1e-10)
    np.testing.assert_allclose(state.value, f, rtol=rtol)
    np.testing.assert_allclose(state.gamma, gamma, rtol=1e-12)
    assert state.num_evals == evaluations
    assert state.accepted == accepted


def test_worked_example():
  square = jax.value_and_grad(lambda x: x**2 / 2)
  solver = gradient_normalized_smoothness(square, lambda x: jnp.ones(()))
  state = solver.init(jnp.array(2.0))
  assert (state.value, state.grad, state.num_evals) == (2, 2, 1)
  after = solver.step(state)
  np.testing.assert_allclose(after.params, 2 - 2 / 3, rtol=1e-7)
  np.testing.assert_allclose(state.value - after.value, 1.1111, atol=1e-4)
  assert (after.gamma, after.count, after.num_evals, after.accepted) == (2, 1, 2, True)
  d, lam = regularized_newton_direction(
    jnp.array([2.0]), lambda lam, b: b / (1 + lam), 1.0
  )
  np.testing.assert_allclose(lam, 1.99999998, rtol=1e-10)
  np.testing.assert_allclose(d, -2 / 3, rtol=1e-7)
  g = jnp.array([3.0, 4.0])
  solve = regularized_solve(
    rank_one(lambda x: x)(g), make_metric(None, 2, float), float
  )
  d, lam = regularized_newton_direction(g, solve, 2.0, eps=0.0)
  assert lam == 2.5
  np.testing.assert_allclose(d, [-0.10909091, -0.14545455], rtol=1e-7)


METRIC = np.diag([1.0, 2.0, 0.5, 1.0]) + 0.1


@pytest.mark.parametrize(
  ("hess_fn", "hess", "options"),
  [
    (exact_hessian(logistic), logistic_hessian, {}),
    (exact_hessian(logistic), logistic_hessian, {"gamma_init": 50.0, "eps": 0.1}),
    (exact_hessian(logistic), logistic_hessian, {"metric": METRIC}),
    (exact_hessian(logistic), logistic_hessian, {"adaptive": False}),
    (empirical_fisher(losses), fisher_numpy, {}),
    (zero, lambda x: np.zeros((4, 4)), {}),
    (None, lambda x: np.zeros((4, 4)), {"metric": np.diag(METRIC)}),
    (None, lambda x: np.zeros((4, 4)), {"metric": METRIC, "gamma_init": 100.0}),
    (
      lambda x: DiagonalHessian(jnp.arange(1.0, 5.0)),
      lambda x: np.diag(np.arange(1.0, 5.0)),
      {"gamma_init": 30.0},
    ),
  ],
)
def test_follows_the_oracle(hess_fn, hess, options):
  theirs = dict(options)
  if "gamma_init" in theirs:
    theirs["gamma"] = theirs.pop("gamma_init")
  if np.ndim(theirs.get("metric")) == 1:
    theirs["metric"] = np.diag(theirs["metric"])
  expected = oracle.iterate(logistic_numpy, hess, np.zeros(4), 5, **theirs)
  solver = gradient_normalized_smoothness(
    jax.value_and_grad(logistic), hess_fn, **options
  )
  assert_follows(solver, expected)


def rosenbrock_residuals(x):
  return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def test_gauss_newton_on_rosenbrock():
  def value(x):
    return jnp.sum(jnp.square(rosenbrock_residuals(x))) / 2

  def value_and_grad(x):
    r = np.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])
    jacobian = np.array([[-20 * x[0], 10], [-1, 0]])
    return r @ r / 2, jacobian.T @ r

  def hess(x):
    jacobian = np.array([[-20 * x[0], 10], [-1, 0]])
    return jacobian.T @ jacobian

  start = np.array([-1.2, 1.0])
  solver = gradient_normalized_smoothness(
    jax.value_and_grad(value), gauss_newton(rosenbrock_residuals)
  )
  assert_follows(solver, oracle.iterate(value_and_grad, hess, start, 8), start, 1e-6)
  states = iterate(solver, solver.init(jnp.asarray(start)), 40)
  assert states[-1].value < 1e-5 * value(jnp.asarray(start))
  with_loss = gauss_newton(rosenbrock_residuals, lambda r: jnp.sum(r**2) / 2)
  np.testing.assert_allclose(with_loss(jnp.asarray(start)), hess(start), **EXACT)


@quick
@hypothesis.given(seeds, st.sampled_from(["dense", "low", "diagonal", "none"]))
def test_solves_and_directions(seed, kind):
  """Each form equals its dense matrix; the step stays in the ball and descends."""
  rng = np.random.default_rng(seed)
  factor, g = rng.normal(size=(2, 4)), rng.normal(size=4)
  c, gamma = 10 ** rng.uniform(-2, 2), 10 ** rng.uniform(-2, 2)
  root = rng.normal(size=(4, 4))
  form, matrix = {
    "dense": (factor.T @ factor, factor.T @ factor),
    "low": (LowRankHessian(jnp.asarray(factor), c), c * factor.T @ factor),
    "diagonal": (DiagonalHessian(jnp.asarray(g**2)), np.diag(g**2)),
    "none": (None, np.zeros((4, 4))),
  }[kind]
  for b in (None, np.exp(g), root @ root.T + np.eye(4)):
    metric = make_metric(b, 4, jnp.float64)
    solve = regularized_solve(form, metric, jnp.float64)
    norm = metric.dual_norm(jnp.asarray(g))
    d, lam = regularized_newton_direction(g, solve, gamma, 1e-8, norm)
    dense = np.asarray(metric.dense())
    expected, damping = oracle.direction(g, matrix, gamma, metric=dense)
    np.testing.assert_allclose(lam, damping, rtol=1e-10)
    # Woodbury's form subtracts.
    np.testing.assert_allclose(d, expected, rtol=1e-6, atol=1e-9)
    d = np.asarray(d)
    assert np.sqrt(d @ dense @ d) <= (gamma + 1e-8) * (1 + 1e-6)
    assert g @ d < 0


def quadratic(seed):
  rng = np.random.default_rng(seed)
  factor = rng.normal(size=(6, 4))
  return factor.T @ factor, rng.normal(size=4)


@jax.jit
def _step_quadratic(matrix, x, gamma, scale, hess_scale):
  def value_and_grad(x):
    return scale * jnp.vdot(x, matrix @ x) / 2, scale * (matrix @ x)

  solver = gradient_normalized_smoothness(
    value_and_grad, lambda x: hess_scale * matrix, gamma_init=gamma, eps=0.0
  )
  before = solver.init(x)
  return before, solver.step(before)


@quick
@hypothesis.given(seeds, st.floats(-3, 3))
def test_convex_quadratic_takes_the_first_trial(seed, power):
  matrix, x = quadratic(seed)
  gamma = 10.0**power
  before, after = _step_quadratic(matrix, x, gamma, 1.0, 1.0)
  assert after.accepted
  assert after.num_evals == 2
  np.testing.assert_allclose(after.gamma, 2 * gamma, rtol=1e-12)
  # f - f+ >= <g+, -d> >= |g+|^2 / (2 lam)
  g, g_after = np.asarray(before.grad), np.asarray(after.grad)
  d, lam = np.asarray(after.params) - x, np.linalg.norm(g) / gamma
  inner = -(g_after @ d)
  assert before.value - after.value >= inner - 1e-9 * before.value
  assert inner >= g_after @ g_after / (2 * lam) - 1e-9 * before.value
  far = _step_quadratic(matrix, x, 1e12, 1.0, 1.0)[1]
  np.testing.assert_allclose(far.params, 0, atol=1e-6)  # pure Newton


@quick
@hypothesis.given(seeds, st.floats(0.01, 100))
def test_rescaling_and_rotation(seed, scale):
  matrix, x = quadratic(seed)
  plain = _step_quadratic(matrix, x, 1.0, 1.0, 0.1)[1]
  scaled = _step_quadratic(matrix, x, 1.0, scale, 0.1 * scale)[1]
  np.testing.assert_allclose(scaled.params, plain.params, rtol=1e-8, atol=1e-10)
  assert scaled.gamma == plain.gamma
  turn, _ = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(4, 4)))
  turned = _step_quadratic(turn @ matrix @ turn.T, turn @ x, 1.0, 1.0, 0.1)[1]
  np.testing.assert_allclose(turned.params, turn @ np.asarray(plain.params), **EXACT)


def test_gamma_of_smooth_functions():
  """H = 0 and gamma = |g| / L: gradient descent with step 1 / L, accepted at once."""
  matrix, x = quadratic(3)
  top = np.linalg.eigvalsh(matrix)[-1]
  g = matrix @ x
  gamma = np.linalg.norm(g) / top
  _, after = _step_quadratic(matrix, x, gamma, 1.0, 0.0)
  np.testing.assert_allclose(after.params, x - g / top, rtol=1e-9)
  assert after.num_evals == 2
  # |x|^3 / 6 has the 1-Lipschitz Hessian |x|: lam = sqrt(|g| / 2) is accepted.
  solver = gradient_normalized_smoothness(
    jax.value_and_grad(lambda x: jnp.abs(x) ** 3 / 6),
    lambda x: jnp.abs(x),
    gamma_init=np.sqrt(2 * 2.0),
    eps=0.0,
  )
  state = solver.step(solver.init(jnp.array(2.0)))
  assert state.num_evals == 2
  np.testing.assert_allclose(state.params, 2 - 2 / (2 + 1), rtol=1e-12)


def test_values_fall_and_the_fisher_beats_nothing():
  ends = {}
  for name, hess_fn in (
    ("exact", exact_hessian(logistic)),
    ("fisher", empirical_fisher(losses)),
    ("zero", zero),
  ):
    solver = gradient_normalized_smoothness(jax.value_and_grad(logistic), hess_fn)
    states = iterate(solver, solver.init(jnp.zeros(4)), 6)
    values = [float(state.value) for state in states if state.accepted]
    assert (np.diff(values) <= 0).all()
    ends[name] = values[-1]
  assert ends["exact"] < min(ends["fisher"], ends["zero"])


def test_forms_of_the_approximations():
  x = jnp.asarray(DATA[0])
  low = empirical_fisher(lambda x: losses(x)[:2])(x)
  assert isinstance(low, LowRankHessian)
  assert low.G.shape == (2, 4)
  dense = empirical_fisher(losses)(x)
  np.testing.assert_allclose(dense, fisher_numpy(DATA[0]), **EXACT)
  assert zero(x) is None
  solver = gradient_normalized_smoothness(
    jax.value_and_grad(lambda x, scale: scale * logistic(x)),
    exact_hessian(lambda x, scale: scale * logistic(x)),
  )
  last = iterate(solver, solver.init(jnp.zeros(4), 2.0), 3, 2.0)[-1]
  plain = gradient_normalized_smoothness(
    jax.value_and_grad(logistic), exact_hessian(logistic)
  )
  np.testing.assert_allclose(
    last.params, iterate(plain, plain.init(jnp.zeros(4)), 3)[-1].params, **EXACT
  )


def test_tree_is_raveled():
  def value(tree):
    return logistic(jnp.concatenate([tree["a"].reshape(-1), tree["b"][None]]))

  tree = {"a": jnp.zeros((3, 1)), "b": jnp.zeros(())}
  solver = gradient_normalized_smoothness(
    jax.value_and_grad(value), exact_hessian(value)
  )
  state = iterate(solver, solver.init(tree), 3)[-1]
  expected = oracle.iterate(logistic_numpy, logistic_hessian, np.zeros(4), 3)[-1][0]
  np.testing.assert_allclose(state.params["a"][:, 0], expected[:3], **EXACT)
  np.testing.assert_allclose(state.params["b"], expected[3], **EXACT)
  assert state.grad["a"].shape == (3, 1)


def test_chain_equals_step():
  """From value_fn and grad_fn, from value_fn, from value_and_grad_fn; H as told."""
  value_and_grad = jax.value_and_grad(logistic)
  expected = oracle.iterate(logistic_numpy, logistic_hessian, np.zeros(4), 4)
  ways = (
    (scale_by_gns(hessian="exact"), {"value_fn": logistic}),
    (
      scale_by_gns(hessian="exact"),
      {"value_fn": logistic, "grad_fn": jax.grad(logistic)},
    ),
    (
      scale_by_gns(),
      {"value_and_grad_fn": value_and_grad, "hess": exact_hessian(logistic)},
    ),
    (gradient_normalized_smoothness(value_and_grad, exact_hessian(logistic)), {}),
  )
  for transform, given in ways:
    chain, x = optax.chain(transform), jnp.zeros(4)
    state = transform.init(x)

    @jax.jit
    def step(x, state, transform=transform, given=given):
      value, grad = value_and_grad(x)
      more = dict(given)
      if "hess" in more:
        more["hess"] = more["hess"](x)
      u, state = transform.update(grad, state, x, value=value, batch=None, **more)
      return optax.apply_updates(x, u), state

    for point, f, gamma, _, _ in expected:
      x, state = step(x, state)
      np.testing.assert_allclose(x, point, **EXACT)
      np.testing.assert_allclose(state.value, f, rtol=1e-9)
      assert state.gamma == gamma
    assert isinstance(chain, optax.GradientTransformationExtraArgs)
  stored = optax.value_and_grad_from_state(logistic)
  value, grad = stored(x, state=state)
  np.testing.assert_allclose(value, state.value)
  np.testing.assert_allclose(grad, state.grad)


def test_rank_one_choice_uses_the_gradient():
  x, g = jnp.zeros(2), jnp.array([3.0, 4.0])
  transform = scale_by_gns(gamma_init=2.0, eps=0.0, hessian="rank_one")
  u, _ = transform.update(
    g, transform.init(x), x, value=0.0, value_fn=lambda x: jnp.vdot(g, x)
  )
  # The linear objective accepts: 25 / (8 lam) is less than the fall.
  d = np.array([-0.10909091, -0.14545455])
  fall = -(np.asarray(g) @ d)
  assert fall < 25 / (8 * 2.5)  # not at gamma = 2, but at half of it or less
  ratio = np.asarray(u) / d
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
  assert 0 < ratio[0] < 1


def test_zero_gradient_and_tolerance():
  solver = gradient_normalized_smoothness(
    jax.value_and_grad(lambda x: jnp.vdot(x, x)), lambda x: jnp.zeros((3, 3))
  )
  before = solver.init(jnp.zeros(3))
  after = solver.step(before)
  np.testing.assert_array_equal(after.params, 0)
  assert (after.gamma, after.accepted, after.num_evals) == (1, True, 1)
  solver = gradient_normalized_smoothness(
    jax.value_and_grad(lambda x: jnp.vdot(x, x)), tol=10.0
  )
  assert (solver.step(solver.init(jnp.ones(3))).params == 1).all()


def test_indefinite_hessian_is_a_rejected_trial():
  """(x^2 - 1)^2 at 0.1 with H = -4 + ...: only lam > 4 can be factorised."""

  def value(x):
    return (x**2 - 1) ** 2

  solver = gradient_normalized_smoothness(
    jax.value_and_grad(value), exact_hessian(value), eps=0.0
  )
  state = solver.step(solver.init(jnp.array(0.1)))
  assert state.accepted
  lam = abs(4 * 0.1 * (0.01 - 1)) / (state.gamma / 2)
  assert lam > 4 - 12 * 0.01
  assert state.num_evals > 3
  assert state.value < value(0.1)


def test_exhausted_search():
  """A concave spike: no step can pass."""

  def wrong(x):
    return jnp.vdot(x, x), -2 * x  # uphill

  kept = gradient_normalized_smoothness(wrong, max_search=3)
  state = kept.step(kept.init(jnp.ones(2)))
  np.testing.assert_array_equal(state.params, 1)
  assert not state.accepted
  assert (state.gamma, state.num_evals, state.value) == (1 / 16, 5, 2)
  floored = gradient_normalized_smoothness(wrong, max_search=40, gamma_min=1e-3)
  assert floored.step(floored.init(jnp.ones(2))).gamma == 1e-3
  parity = gradient_normalized_smoothness(wrong, max_search=3, accept_last=True)
  state = parity.step(parity.init(jnp.ones(2)))
  assert not state.accepted
  assert state.gamma == 1 / 16
  np.testing.assert_allclose(state.params, 1 + 1 / 8 / np.sqrt(2), rtol=1e-7)


def test_non_finite_trials_are_rejected():
  def value(x):
    return -jnp.log(x) + x  # NaN for x < 0

  solver = gradient_normalized_smoothness(jax.value_and_grad(value), gamma_init=64.0)
  state = solver.step(solver.init(jnp.array(3.0)))
  assert state.accepted
  assert 0 < state.params < 3
  fixed = gradient_normalized_smoothness(
    jax.value_and_grad(value), gamma_init=64.0, adaptive=False
  )
  state = fixed.step(fixed.init(jnp.array(3.0)))
  assert not state.accepted
  assert state.params == 3
  bad = solver.step(solver.init(jnp.array(-1.0)))
  assert (bad.params, bad.gamma, bad.accepted) == (-1, 64, False)


def test_float32_slack_ends_near_the_minimum():
  data, signs = DATA.astype(np.float32), SIGNS.astype(np.float32)

  def single(x):
    found = jax.nn.softplus(-(jnp.asarray(data) @ x) * jnp.asarray(signs))
    return jnp.mean(found) + 0.005 * jnp.vdot(x, x)

  solver = gradient_normalized_smoothness(jax.value_and_grad(single), zero)
  last = iterate(solver, solver.init(jnp.zeros(4, jnp.float32)), 150)[-1]
  best = oracle.iterate(logistic_numpy, logistic_hessian, np.zeros(4), 12)[-1][1]
  assert last.value.dtype == last.gamma.dtype == jnp.float32
  # A few units in the last place of a value of about a half.
  assert float(last.value) - best < 5e-7
  assert float(last.gamma) > 1e-6


def test_hyperparameters_vmap():
  def one(gamma_init, gamma_min, eps, tol):
    solver = gradient_normalized_smoothness(
      jax.value_and_grad(logistic),
      gamma_init=gamma_init,
      gamma_min=gamma_min,
      eps=eps,
      tol=tol,
    )
    return solver.step(solver.step(solver.init(jnp.zeros(4)))).params

  grid = np.array([[1.0, 1e-9, 1e-8, 0.0], [40.0, 30.0, 0.1, 0.0], [1.0, 1, 0, 9.0]])
  swept = jax.jit(jax.vmap(one))(*jnp.asarray(grid).T)
  alone = jax.jit(one)
  for row, values in zip(swept, grid, strict=True):
    np.testing.assert_allclose(row, alone(*values), **EXACT)
  np.testing.assert_array_equal(swept[2], 0)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"gamma_init": 0.0}, "gamma_init"),
    ({"gamma_min": 0.0}, "gamma_min"),
    ({"eps": -1.0}, "eps"),
    ({"tol": -1.0}, "tol"),
    ({"max_search": -1}, "max_search"),
    ({"hessian": "fisher"}, "hessian must be one of zero, rank_one, exact"),
    ({"metric": np.diag([1.0, -1.0])}, "positive definite"),
    ({"metric": np.array([1.0, 0.0])}, "positive definite"),
    ({"metric": np.array([[1.0, 0.5], [0.0, 1.0]])}, "symmetric"),
    ({"metric": np.ones((2, 3))}, "metric must have shape"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    gradient_normalized_smoothness(**options)


@pytest.mark.parametrize(
  ("params", "extra", "message"),
  [
    (None, {"value": 0.0, "value_fn": logistic}, "needs params"),
    (np.zeros(4), {"value_fn": logistic}, "needs value in"),
    (np.zeros(4), {"value": 0.0}, "needs value_fn"),
    (np.zeros(4), {"value": 0.0, "value_fn": logistic, "hess": np.eye(3)}, "hess must"),
  ],
)
def test_missing_arguments(params, extra, message):
  transform = scale_by_gns()
  with pytest.raises(ValueError, match=message):
    transform.update(jnp.ones(4), transform.init(jnp.zeros(4)), params, **extra)


def test_other_mistakes():
  transform = gradient_normalized_smoothness()
  with pytest.raises(ValueError, match="made with value_and_grad_fn"):
    transform.step(transform.init(jnp.zeros(4)))
  with pytest.raises(ValueError, match="floating-point"):
    transform.init(jnp.arange(3))
  sized = gradient_normalized_smoothness(
    jax.value_and_grad(logistic), metric=np.ones(3)
  )
  with pytest.raises(ValueError, match="metric is for 3 parameters"):
    sized.step(sized.init(jnp.zeros(4)))
