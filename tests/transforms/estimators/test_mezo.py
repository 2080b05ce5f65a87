"""``mezo`` and the SPSA core against the published in-place algorithm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from gradlab.transforms.estimators import mezo as mezo_from_family
from gradlab.transforms.estimators.mezo import (
  mezo,
  mezo_step,
  spsa_gradient,
  spsa_noise,
  spsa_projected_gradient,
)
from tests.oracles import mezo as oracle


def _params(dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "w": jnp.asarray(rng.normal(size=(3, 4)), dtype),
    "b": jnp.asarray(rng.normal(size=(4,)), dtype),
    "s": jnp.asarray(rng.normal(), dtype),
  }


def _loss(p):
  tail = jnp.sum((p["w"][0] - p["b"]) ** 4) + jnp.sin(p["s"])
  return (jnp.sum(jnp.tanh(p["w"]) ** 2) + tail) / 3


def _numpy(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@functools.partial(jax.jit, static_argnames="masked")
def _jitted_step(params, key, learning_rate, eps, weight_decay, masked):
  mask = {"w": True, "b": False, "s": False} if masked else None
  return mezo_step(_loss, params, key, learning_rate, eps, weight_decay, mask)


@pytest.mark.parametrize(
  ("learning_rate", "eps", "weight_decay", "masked"),
  [(0.01, 1e-3, 0.0, False), (0.003, 1e-2, 0.1, True), (0.02, 0.3, 0.5, False)],
)
def test_trajectory_equals_the_in_place_algorithm_in_float64(
  learning_rate, eps, weight_decay, masked
):
  with jax.enable_x64(True):
    params = _params(jnp.float64)
    expected = _numpy(params)
    for t in range(6):
      key = jax.random.fold_in(jax.random.key(5), t)
      z = _numpy(spsa_noise(params, key))
      expected, g, plus = oracle.step(
        expected,
        z,
        oracle.rosenbrock_like,
        learning_rate,
        eps,
        weight_decay,
        no_decay=("b", "s") if masked else (),
      )
      params, aux = _jitted_step(params, key, learning_rate, eps, weight_decay, masked)
      # In-place restoration and the loss difference cancel: 1e-16 / eps at most.
      np.testing.assert_allclose(aux["projected_gradient"], g, rtol=1e-9, atol=1e-11)
      np.testing.assert_allclose(aux["loss"], plus, rtol=1e-12)
      for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-9, atol=1e-11)


def test_trajectory_in_float32_follows_float64():
  params = _params()
  expected = _numpy(params)
  for t in range(5):
    key = jax.random.fold_in(jax.random.key(9), t)
    z = _numpy(spsa_noise(params, key))
    expected, g, _ = oracle.step(expected, z, oracle.rosenbrock_like, 0.003, 0.05, 0.1)
    params, aux = _jitted_step(params, key, 0.003, 0.05, 0.1, False)
    assert aux["projected_gradient"].dtype == jnp.float32
    # A loss near 30 carries 4e-6 of float32 rounding, divided by 2 eps = 0.1.
    np.testing.assert_allclose(aux["projected_gradient"], g, rtol=1e-5, atol=3e-4)
    for name in expected:
      np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-5)


def test_worked_example():
  theta = {"a": jnp.array(1.0), "b": jnp.array(-2.0)}
  z = spsa_noise(theta, 3)
  wanted = {"a": 0.5, "b": -1.0}
  # Stretches the drawn direction onto the wanted one.
  stretch = {name: wanted[name] / z[name] for name in z}

  def loss_fn(p):
    a, b = (theta[n] + (p[n] - theta[n]) * stretch[n] for n in ("a", "b"))
    return a**2 + 3.0 * b

  g, plus = spsa_projected_gradient(loss_fn, theta, 3, 0.1)
  # Float32 rounding of a loss near 5, divided by 2 eps.
  np.testing.assert_allclose(plus, -5.1975, rtol=1e-6)
  np.testing.assert_allclose(g, -2.0, rtol=1e-5)
  new, _ = mezo_step(loss_fn, theta, 3, learning_rate=0.2, eps=0.1, weight_decay=0.0)
  moved = {n: theta[n] + (new[n] - theta[n]) * stretch[n] for n in theta}
  np.testing.assert_allclose(moved["a"], 1.2, rtol=1e-5)
  np.testing.assert_allclose(moved["b"], -2.4, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
  seed=st.integers(0, 2**31 - 1),
  eps=st.floats(0.01, 10.0),
  slopes=st.tuples(*[st.floats(-3.0, 3.0, width=32)] * 3),
)
def test_linear_and_quadratic_losses_give_the_exact_slope(seed, eps, slopes):
  c = np.asarray(slopes)
  with jax.enable_x64(True):
    theta = jnp.array([0.5, -1.0, 2.0], jnp.float64)
    z = np.asarray(spsa_noise(theta, seed))
    linear, _ = spsa_projected_gradient(lambda p: jnp.sum(c * p), theta, seed, eps)
    square, _ = spsa_projected_gradient(lambda p: jnp.sum(c * p**2), theta, seed, eps)
    # Float64 rounding of losses up to 1e3, divided by 2 eps >= 0.02.
    np.testing.assert_allclose(linear, c @ z, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(square, 2 * c * theta @ z, rtol=1e-9, atol=1e-10)


def test_bias_is_second_order_in_eps():
  with jax.enable_x64(True):
    theta = jnp.array([0.3, -0.7], jnp.float64)
    z = spsa_noise(theta, 0)
    exact = jnp.sum(3 * theta**2 * z)
    errors = [
      spsa_projected_gradient(lambda p: jnp.sum(p**3), theta, 0, eps)[0] - exact
      for eps in (0.01, 0.02)
    ]
    # For a cubic the error is exactly eps^2 sum(z^3); rounding is 1e-13.
    np.testing.assert_allclose(errors[0], 1e-4 * jnp.sum(z**3), rtol=1e-8)
    np.testing.assert_allclose(errors[1] / errors[0], 4.0, rtol=1e-8)


def test_mean_estimate_of_a_quadratic_is_its_gradient():
  theta = jnp.array([1.0, -0.5, 0.25])
  curvature = jnp.array([2.0, 1.0, 4.0])

  def estimate(key):
    return spsa_gradient(lambda p: jnp.sum(curvature * p**2) / 2, theta, key, 0.1)

  keys = jax.random.split(jax.random.key(0), 20000)
  estimates = np.asarray(jax.jit(jax.vmap(estimate))(keys), np.float64)
  # Five standard errors of the mean.
  bound = 5 * estimates.std(axis=0) / np.sqrt(len(keys))
  assert np.all(np.abs(estimates.mean(axis=0) - curvature * theta) < bound)


def test_mirrored_direction_gives_the_same_update():
  params = _params()

  def mirrored(p):
    return _loss(jax.tree.map(lambda a, b: 2.0 * a - b, params, p))

  g, _ = spsa_projected_gradient(_loss, params, 1, 0.1)
  g_mirrored, _ = spsa_projected_gradient(mirrored, params, 1, 0.1)
  # Reflecting theta is the same as replacing z by -z: g changes sign, so g z does not.
  np.testing.assert_allclose(g_mirrored, -g, rtol=1e-4)


def test_noise_depends_on_the_leaf_path_only():
  params = {"block": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}, "head": jnp.zeros(2)}
  whole = spsa_noise(params, 4)
  for part in ({"block": params["block"]}, {"head": params["head"]}):
    alone = spsa_noise(part, 4)
    for name in part:
      jax.tree.map(np.testing.assert_array_equal, alone[name], whole[name])
  assert not np.any(whole["block"]["b"][:2] == whole["head"])
  assert not np.any(spsa_noise(params, 5)["head"] == whole["head"])


def test_loss_is_evaluated_twice_and_only_twice():
  calls = []

  def loss_fn(p):
    calls.append(1)
    return jnp.sum(p), {}

  estimator = mezo(0)
  w = jnp.ones(3)
  estimator.estimate(loss_fn, w, estimator.init(w))
  assert len(calls) == 2


def test_estimator_draws_fresh_noise_and_reports_the_plus_pass():
  estimator = mezo_from_family(key=11, eps=0.1)
  params = _params()
  state = estimator.init(params)

  def loss_fn(p):
    return _loss(p), {"s": p["s"], "pair": (p["b"],)}

  estimate = jax.jit(lambda p, s: estimator.estimate(loss_fn, p, s))
  for t in range(3):
    key = jax.random.fold_in(jax.random.key(11), t)
    (loss, aux), grads, new = estimate(params, state)
    z = spsa_noise(params, key)
    # Equal up to the fusion of a compiled against an eager sum.
    np.testing.assert_allclose(aux["s"], params["s"] + 0.1 * z["s"], rtol=1e-6)
    np.testing.assert_allclose(
      loss, spsa_projected_gradient(_loss, params, key, 0.1)[1], rtol=1e-5
    )
    expected = spsa_gradient(_loss, params, key, 0.1)
    for name in params:
      # Rounding of a loss near 30, divided by 2 eps.
      np.testing.assert_allclose(grads[name], expected[name], rtol=1e-4, atol=1e-4)
    assert new.step == t + 1
    assert new.skipped == 0
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(
      lambda x: x.dtype, state
    )
    state = new


def test_state_is_a_scan_carry_and_training_descends():
  estimator = mezo(key=0, eps=1e-2)
  target = jnp.arange(4.0)

  def body(carry, _):
    w, state = carry
    loss_fn = lambda p: (jnp.sum((p - target) ** 2), {})  # noqa: E731
    (loss, _), grads, state = estimator.estimate(loss_fn, w, state)
    return (w - 0.05 * grads, state), loss

  w = jnp.zeros(4)
  (w, state), losses = jax.jit(
    lambda w: jax.lax.scan(body, (w, estimator.init(w)), length=300)
  )(w)
  assert state.step == 300
  # The contraction of the mean is 0.9 a step; 300 steps leave nothing but noise.
  np.testing.assert_allclose(w, target, atol=1e-2)
  assert losses[-1] < 1e-2 * losses[0]


def test_state_may_be_donated_and_traces_once():
  traces = []
  key = jax.random.key(2)
  estimator = mezo(key)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(w, state):
    traces.append(1)
    _, grads, state = estimator.estimate(lambda p: (jnp.sum(p**2), {}), w, state)
    return w - 0.1 * grads, state

  for _ in range(2):
    w = jnp.ones(3)
    state = estimator.init(w)
    for _ in range(3):
      w, state = step(w, state)
    assert state.step == 3
  assert len(traces) == 1
  assert not key.is_deleted()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_loss_that_is_not_finite_gives_no_gradient(bad, side):
  w = jnp.array(0.0)
  side = side * jnp.sign(spsa_noise(w, jax.random.fold_in(jax.random.key(0), 0)))

  def loss_fn(p):
    return jnp.where(p * side > 0, bad, p), {}

  estimator = mezo(0)
  state = estimator.init(w)
  _, grads, state = jax.jit(lambda w, s: estimator.estimate(loss_fn, w, s))(w, state)
  assert grads == 0.0
  assert state.skipped == 1
  assert state.step == 1
  _, grads, state = estimator.estimate(lambda p: (2.0 * p, {}), w, state)
  assert grads != 0.0
  assert state.skipped == 1


def test_skipped_step_changes_nothing_and_says_so():
  w = jnp.array([1.0, -2.0])
  new, aux = mezo_step(lambda p: jnp.sum(p) * jnp.nan, w, 0, 0.1, 0.1, 0.5)
  np.testing.assert_array_equal(new, w)
  assert aux["skipped"] == 1
  assert aux["projected_gradient"] == 0.0
  huge = jnp.array(3e38)
  # Both losses are finite, their difference is not.
  new, aux = mezo_step(lambda p: huge * jnp.sign(p), jnp.array(0.0), 0, 0.1)
  assert new == 0.0
  assert aux["skipped"] == 1


def test_decay_applies_when_the_projected_gradient_is_zero():
  w = jnp.array([1.0, -2.0])
  new, aux = mezo_step(lambda p: 0.0 * jnp.sum(p), w, 0, 0.5, 0.1, 0.1)
  np.testing.assert_allclose(new, [0.95, -1.9], rtol=1e-6)
  assert aux["skipped"] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_rate_changes_nothing(dtype):
  params = _params(dtype)
  new, _ = mezo_step(_loss, params, 0, learning_rate=0.0, eps=0.1, weight_decay=0.0)
  jax.tree.map(np.testing.assert_array_equal, new, params)


@pytest.mark.parametrize(
  "mask",
  [
    {"layer": {"w": True, "b": False}, "norm": {"scale": False}},
    {"layer": {"w": True, "b": False}, "norm": False},
    lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p),
  ],
)
def test_decay_mask_is_a_tree_a_prefix_or_a_function(mask):
  params = {
    "layer": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)},
    "norm": {"scale": jnp.ones(2)},
  }
  flat = lambda p: 0.0 * p["norm"]["scale"][0]  # noqa: E731
  new, _ = mezo_step(flat, params, 0, 0.5, 0.1, 0.2, decay_mask=mask)
  np.testing.assert_allclose(new["layer"]["w"], 0.9 * np.ones((2, 2)), rtol=1e-6)
  np.testing.assert_array_equal(new["layer"]["b"], [1.0, 1.0])
  np.testing.assert_array_equal(new["norm"]["scale"], [1.0, 1.0])


def test_odd_trees_keep_structure_and_dtypes():
  params = {
    "half": jnp.ones((2, 3), jnp.bfloat16),
    "index": jnp.array([2, 0], jnp.int32),
    "flag": jnp.array(True),
    "scalar": jnp.array(0.5),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    "masked": optax.MaskedNode(),
    "pair": (jnp.ones(1), jnp.zeros(1)),
  }

  def loss_fn(p):
    np.testing.assert_array_equal(p["index"], [2, 0])
    return jnp.sum(p["half"][0, p["index"]].astype(jnp.float32)) + p["scalar"], {}

  estimator = mezo(0, eps=0.25)
  (loss, _), grads, _ = estimator.estimate(loss_fn, params, estimator.init(params))
  new, _ = mezo_step(loss_fn, params, 0, 0.1, 0.25, 0.1)
  for tree in (grads, new):
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(
      lambda x: x.dtype, params
    )
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, params)
  np.testing.assert_array_equal(grads["index"], [0, 0])
  np.testing.assert_array_equal(new["index"], [2, 0])
  assert new["flag"]
  assert np.any(np.asarray(grads["half"], np.float32) != 0)
  assert loss.dtype == jnp.float32


def test_bfloat16_gradient_is_the_rounded_float32_one():
  w = jnp.array([1.0, -0.5, 0.25], jnp.bfloat16)
  linear = lambda p: jnp.sum(jnp.array([1.0, 2.0, 4.0]) * p.astype(jnp.float32))  # noqa: E731
  g, _ = spsa_projected_gradient(linear, w, 2, 0.5)
  grads = spsa_gradient(linear, w, 2, 0.5)
  z = spsa_noise(w, 2)
  assert z.dtype == jnp.float32
  np.testing.assert_array_equal(grads, (g * z).astype(jnp.bfloat16))
  # Rounding theta +- eps z to eight bits, relative to eps = 0.5.
  np.testing.assert_allclose(g, jnp.sum(jnp.array([1.0, 2.0, 4.0]) * z), atol=0.1)


def test_vmap_over_eps_equals_one_at_a_time():
  params = _params()

  def run(eps):
    estimator = mezo(key=1, eps=eps)
    loss_fn = lambda p: (_loss(p), {})  # noqa: E731
    return estimator.estimate(loss_fn, params, estimator.init(params))[1]["b"]

  run_jit = jax.jit(run)
  sizes = jnp.array([0.03, 0.3, 1.0])
  # Rounding of a loss near 30, divided by 2 eps = 0.06.
  np.testing.assert_allclose(
    jax.jit(jax.vmap(run))(sizes),
    jnp.stack([run_jit(e) for e in sizes]),
    rtol=1e-4,
    atol=1e-3,
  )


def test_averaged_loss_gives_every_replica_the_gradient_of_the_whole_batch():
  estimator = mezo(key=3, eps=0.1)
  w = jnp.array([0.5, -1.0])
  batch = jnp.arange(16.0).reshape(8, 2) / 8
  state = estimator.init(w)

  def total(p):
    return jnp.mean((batch @ p) ** 2), {}

  def replica(p, s, row):
    loss_fn = lambda p: (jax.lax.pmean(jnp.mean((row @ p) ** 2), "data"), {})  # noqa: E731
    return estimator.estimate(loss_fn, p, s)

  expected = jax.jit(lambda w: estimator.estimate(total, w, state)[1])(w)
  by_vmap = jax.jit(jax.vmap(replica, (None, None, 0), axis_name="data"))
  # The average is formed in another order.
  np.testing.assert_allclose(
    by_vmap(w, state, batch)[1], jnp.stack([expected] * 8), rtol=1e-4
  )

  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  by_shard = jax.shard_map(
    replica,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
    out_specs=PartitionSpec(),
  )
  grads, new = jax.jit(by_shard)(w, state, batch)[1:]
  np.testing.assert_allclose(grads, expected, rtol=1e-4)
  assert new.step == 1


def test_bad_arguments_are_refused():
  w = jnp.ones(2)
  square = lambda p: jnp.sum(p**2)  # noqa: E731
  for eps in (0.0, -1e-3):
    with pytest.raises(ValueError, match="eps must lie in"):
      mezo(0, eps=eps)
    with pytest.raises(ValueError, match="eps must lie in"):
      spsa_projected_gradient(square, w, 0, eps)
  with pytest.raises(ValueError, match="learning_rate must lie in"):
    mezo_step(square, w, 0, -1.0)
  with pytest.raises(ValueError, match="weight_decay must lie in"):
    mezo_step(square, w, 0, 0.1, 0.1, -1.0)
  with pytest.raises(ValueError, match="scalar loss, got \\(2,\\)"):
    spsa_gradient(lambda p: p, w, 0)
  for tree in ({}, {"none": None}, {"index": jnp.arange(3)}):
    with pytest.raises(ValueError, match="at least one floating-point leaf"):
      mezo(0).init(tree)
  with pytest.raises(ValueError, match=r"real parameters, but \['c'\]"):
    spsa_gradient(square, {"c": jnp.ones(2, jnp.complex64), "w": w}, 0)
  tied = {"embed": w, "head": {"w": w}}
  for call in (
    lambda: mezo(0).init(tied),
    lambda: mezo_step(lambda p: jnp.sum(p["embed"]), tied, 0),
  ):
    with pytest.raises(ValueError, match="tied parameters must be a single leaf"):
      call()
