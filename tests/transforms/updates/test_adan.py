import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.updates import adan, scale_by_adan
from tests.oracles import adan as oracle
from tests.transforms.updates import trajectories
from tests.transforms.updates.trajectories import follow, noise

# float32 against float64: a few roundings per step, a dozen steps.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
EXAMPLE = (1.0, 0.5, -0.25)
quick = hypothesis.settings(max_examples=20, deadline=None)
floats = st.floats(-4, 4, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
sequences = hnp.arrays(np.float32, (6, 5), elements=floats)


def direct(gradients, factory=scale_by_adan, **options):
  """s_1, s_2, ... of one array."""
  return trajectories.direct(gradients, factory, **options)


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, (0.90000000, 0.82805028, 0.82731290)),
    ({"weight_decay": 0.5}, (0.85714286, 0.74780298, 0.71149105)),
    ({"weight_decay": 0.5, "prox": False}, (0.85, 0.73555027, 0.69803538)),
  ],
)
def test_worked_example(options, expected):
  thetas, state = follow(adan(0.1, **options), jnp.float32(1), EXAMPLE)
  # Three float32 steps on numbers near one: within a few units of 6e-8.
  np.testing.assert_allclose(thetas, expected, rtol=3e-7)
  if not options:
    np.testing.assert_allclose(state.m, 0.024008, rtol=1e-6)
    np.testing.assert_allclose(state.v, -0.0968, rtol=1e-6)
    np.testing.assert_allclose(state.n, 0.01865284, rtol=1e-6)
    assert state.g_prev == -0.25
    assert state.count == 3


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"b1": 0.9, "b2": 0.5, "b3": 0.999, "eps": 1e-3},
    {"b1": 0.0, "b2": 0.0, "b3": 0.0},
    {"weight_decay": 0.3},
    {"weight_decay": 0.3, "prox": False},
    {"max_grad_norm": 1.5, "eps": 1e-2},
  ],
)
@pytest.mark.parametrize("shape", [(), (3, 4), (2, 3, 2)])
def test_follows_the_oracle(shape, options):
  gradients, theta = noise(12, *shape), noise(*shape, seed=1)
  thetas, state = follow(adan(0.05, **options), jnp.asarray(theta), gradients)
  np.testing.assert_allclose(
    thetas, oracle.trajectory(theta, gradients, 0.05, **options), **CLOSE
  )
  hyper = {k: v for k, v in options.items() if k not in ("weight_decay", "prox")}
  _, kept = oracle.directions(gradients, **hyper)
  for ours, theirs in zip(state[1:], kept, strict=True):
    np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_long_run_keeps_the_bias_corrections_accurate():
  gradients = noise(300, 4)
  s = direct(gradients)
  # float32 rounding of the betas, seen through 300 steps of averaging.
  np.testing.assert_allclose(s, oracle.directions(gradients)[0], rtol=2e-4, atol=2e-5)


def test_schedule_counts_from_zero():
  gradients, theta = noise(4, 3), noise(3, seed=1)
  thetas, _ = follow(adan(lambda k: 0.1 / (1 + k)), jnp.asarray(theta), gradients)
  expected = oracle.trajectory(theta, gradients, lambda k: 0.1 / (1 + k))
  np.testing.assert_allclose(thetas, expected, **CLOSE)


@quick
@hypothesis.given(hnp.arrays(np.float32, 5, elements=floats))
def test_first_direction_is_the_sign(g):
  s = direct(g[None], eps=1e-30)[0]
  np.testing.assert_allclose(s, np.sign(g), rtol=1e-6)  # a few float32 roundings


@quick
@hypothesis.given(sequences)
def test_without_differences_it_is_adam(gradients):
  ours = direct(gradients, b1=0.9, b2=0.0, b3=0.999)
  with jax.numpy_dtype_promotion("standard"):  # optax mixes counters with floats
    adam = direct(gradients, optax.scale_by_adam)
  # optax computes 1 - 0.999**t in float32, which loses up to 6e-5 of it.
  np.testing.assert_allclose(ours, adam, rtol=1e-4, atol=1e-6)


@quick
@hypothesis.given(
  hnp.arrays(np.float32, 5, elements=floats), st.sampled_from((0.5, 0.92, 0.99))
)
def test_constant_gradient_forgets_b2(g, b2):
  gradients = np.stack([g] * 4)
  np.testing.assert_array_equal(
    direct(gradients, b2=b2),
    direct(gradients, b2=0.0),
  )


@quick
@hypothesis.given(sequences, st.floats(1e-3, 1e3))
def test_scale_invariant_and_odd(gradients, scale):
  # eps far below every root, so that it takes no part.
  s = direct(gradients, eps=1e-30)
  scaled = direct(-np.float32(scale) * gradients, eps=1e-30)
  np.testing.assert_allclose(scaled, -s, rtol=1e-4, atol=1e-5)  # cancelling sums


def test_equal_decays_average_the_look_ahead_gradient():
  gradients, b = noise(8, 5), 0.8
  _, state = follow(adan(0.0, b1=b, b2=b), jnp.zeros(5), gradients)
  average, previous = np.zeros(5), gradients[0]
  for g in gradients.astype(np.float64):
    average = b * average + (1 - b) * (g + b * (g - previous))
    previous = g
  np.testing.assert_allclose(state.m + b * state.v, average, rtol=1e-5, atol=1e-6)


@quick
@hypothesis.given(sequences, st.permutations(range(5)))
def test_coordinates_and_leaves_are_independent(gradients, order):
  transform = scale_by_adan()
  s = direct(gradients)
  np.testing.assert_array_equal(direct(gradients[:, order]), s[:, order])
  tree = {"a": gradients[0, :2], "b": gradients[0, 2:]}
  split, _ = transform.update(tree, transform.init(tree))
  joined = np.concatenate([split["a"], split["b"]])
  np.testing.assert_allclose(joined, s[0], rtol=1e-6)  # eager against compiled


@pytest.mark.parametrize(("prox", "factor"), [(True, 1 / 1.05), (False, 0.95)])
def test_zero_gradients_only_decay(prox, factor):
  transform = adan(0.1, weight_decay=0.5, prox=prox)
  thetas, _ = follow(transform, jnp.array([1.0, -2.0]), np.zeros((3, 2), np.float32))
  np.testing.assert_allclose(thetas[-1], np.array([1, -2]) * factor**3, rtol=1e-6)


def test_optax_weighs_the_difference_otherwise():
  """If this fails, optax has adopted the official rule: drop the warning on it."""
  ours, _ = follow(adan(0.1), jnp.float32(1), EXAMPLE)
  with jax.numpy_dtype_promotion("standard"):  # optax mixes counters with floats
    theirs, _ = follow(optax.adan(0.1, eps_root=0.0), jnp.float32(1), EXAMPLE)
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
  assert abs(ours[1] / theirs[1] - 1) > 1e-4
  np.testing.assert_allclose(theirs, (0.9, 0.80648814, 0.74975705), rtol=1e-5)


def test_mask_selects_what_decays():
  theta = {"w": jnp.ones(2), "b": {"x": jnp.ones(2)}}
  zeros = jax.tree.map(jnp.zeros_like, theta)
  prefix = {"w": True, "b": False}
  for mask in (prefix, lambda params: jax.tree.map(lambda _: False, params) | prefix):
    thetas, _ = follow(adan(0.1, weight_decay=0.5, mask=mask), theta, [zeros])
    np.testing.assert_allclose(thetas[0]["w"], 1 / 1.05, rtol=1e-6)
    np.testing.assert_array_equal(thetas[0]["b"]["x"], 1)


def test_clipping_is_global_and_kept_as_the_previous_gradient():
  g = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  transform = adan(0.1, max_grad_norm=1.0)
  _, state = transform.update(g, transform.init(g))
  np.testing.assert_allclose(state.g_prev["a"], 0.6, rtol=1e-6)
  np.testing.assert_allclose(state.g_prev["b"], 0.8, rtol=1e-6)
  for off in (None, 0.0, jnp.float32(0)):
    _, state = adan(0.1, max_grad_norm=off).update(g, transform.init(g))
    assert state.g_prev["b"] == 4


def test_traced_zero_decay_is_a_python_zero():
  theta, g = jnp.asarray(noise(5)), jnp.asarray(noise(5, seed=1))
  results = [
    transform.update(g, transform.init(theta), theta)
    for transform in (adan(0.1), adan(0.1, weight_decay=jnp.float32(0)))
  ]
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_hyperparameters_vmap():
  theta, g = jnp.asarray(noise(5)), jnp.asarray(noise(5, seed=1))
  names = ("learning_rate", "b1", "b2", "b3", "eps", "weight_decay", "max_grad_norm")
  grid = np.array([[0.1, 0.9, 0.5, 0.99, 1e-3, 0.1, 1.0], [0.2, 0.5, 0, 0.9, 1, 0, 9]])

  def two_steps(values):
    transform = adan(**dict(zip(names, values, strict=True)))
    state = transform.init(theta)
    _, state = transform.update(g, state, theta)
    return transform.update(-g, state, theta)[0]

  swept = jax.vmap(two_steps)(jnp.asarray(grid, jnp.float32))
  for row, values in zip(swept, grid, strict=True):
    np.testing.assert_allclose(row, two_steps([float(v) for v in values]), rtol=1e-5)


def test_bfloat16_accumulates_in_float32():
  theta = jnp.ones(3, jnp.bfloat16)
  gradients = noise(5, 3).astype(jnp.bfloat16)
  thetas, state = follow(adan(jnp.float32(0.1), weight_decay=0.1), theta, gradients)
  assert thetas[-1].dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in state[1:])
  s = direct(gradients.astype(np.float32))
  transform, out = scale_by_adan(), None
  state = transform.init(theta)
  for g in gradients:
    out, state = transform.update(jnp.asarray(g), state)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, s[-1].astype(jnp.bfloat16))


def test_accumulator_dtype():
  g = jnp.array([1.0, 1.0 + 2**-10])
  transform = scale_by_adan(accumulator_dtype=jnp.bfloat16)
  state = transform.init(g)
  for value in (g, g + 2**-10):
    _, state = transform.update(value, state)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in state[1:])
  # Both gradients are 1 in bfloat16, so their difference there is none.
  np.testing.assert_array_equal(state.v.astype(jnp.float32), 0)


def test_zeros_stay_and_nan_passes():
  transform = scale_by_adan()
  g = jnp.array([0.0, 1.0, jnp.nan])
  s, state = transform.update(g, transform.init(g))
  s, state = transform.update(jnp.array([0.0, 1.0, 1.0]), state)
  np.testing.assert_array_equal(jnp.isnan(s), [False, False, True])
  assert s[0] == 0


def test_odd_trees_survive():
  tree = {
    "scalar": jnp.float32(2),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    "masked": optax.MaskedNode(),
    "pair": (jnp.ones(2), {}),
  }
  transform = adan(0.1, weight_decay=0.1, max_grad_norm=1.0)
  u, state = transform.update(tree, transform.init(tree), tree)
  assert jax.tree.structure(u) == jax.tree.structure(tree)
  assert jax.tree.structure(state.m) == jax.tree.structure(tree)
  nothing, _ = transform.update({}, transform.init({}), {})
  assert nothing == {}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"b1": 1.0}, "b1"),
    ({"b2": -0.1}, "b2"),
    ({"b3": 1.5}, "b3"),
    ({"eps": 0.0}, "eps"),
    ({"learning_rate": -1.0}, "learning_rate"),
    ({"weight_decay": -1.0}, "weight_decay"),
    ({"max_grad_norm": -1.0}, "max_grad_norm"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    adan(**{"learning_rate": 0.1} | options)


def test_bad_leaves_and_missing_params():
  with pytest.raises(ValueError, match="Adan needs floating-point gradients"):
    scale_by_adan().init({"a": jnp.arange(3)})
  transform = adan(0.1, weight_decay=0.1)
  state = transform.init(jnp.ones(2))
  with pytest.raises(ValueError, match="floating-point"):
    transform.update(jnp.arange(2), state, jnp.ones(2))
  with pytest.raises(ValueError, match="needs params"):
    transform.update(jnp.ones(2), state)
