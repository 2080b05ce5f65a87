import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.updates import diffgrad, scale_by_diffgrad
from tests.oracles import diffgrad as oracle
from tests.transforms.updates import trajectories
from tests.transforms.updates.trajectories import follow, noise

# float32 against float64: a few roundings per step, a dozen steps.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
EXAMPLE = (1.0, 0.5, -0.25)
quick = hypothesis.settings(max_examples=20, deadline=None)
floats = st.floats(-4, 4, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
sequences = hnp.arrays(np.float32, (6, 5), elements=floats)


def direct(gradients, factory=scale_by_diffgrad, **options):
  """s_1, s_2, ... of one array."""
  return trajectories.direct(gradients, factory, **options)


def test_worked_example():
  thetas, state = follow(diffgrad(0.1), jnp.float32(1), EXAMPLE)
  # Three float32 steps on numbers near one: within a few units of 6e-8.
  np.testing.assert_allclose(thetas, (0.92689417, 0.86886979, 0.83058712), rtol=3e-7)
  np.testing.assert_allclose(state.mu, 0.101, rtol=1e-6)
  np.testing.assert_allclose(state.nu, 0.00131025, rtol=1e-5)  # printed rounded
  assert state.g_prev == -0.25
  assert state.count == 3


def test_worked_frictions():
  expected = (0.73105858, 0.62245933, 0.67917870)
  np.testing.assert_allclose(oracle.frictions(EXAMPLE), expected, rtol=1e-8)
  ratio = direct(EXAMPLE) / np.array(oracle.adam_directions(EXAMPLE))
  np.testing.assert_allclose(ratio, expected, rtol=1e-6)  # float32 directions


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"b1": 0.5, "b2": 0.9, "eps": 1e-2},
    {"b1": 0.0, "b2": 0.0},
    {"l2": 0.3},
    {"weight_decay": 0.3},
  ],
)
@pytest.mark.parametrize("shape", [(), (3, 4), (2, 3, 2)])
def test_follows_the_oracle(shape, options):
  gradients, theta = 3 * noise(12, *shape), noise(*shape, seed=1)
  thetas, state = follow(diffgrad(0.05, **options), jnp.asarray(theta), gradients)
  expected, kept = oracle.trajectory(theta, gradients, 0.05, **options)
  np.testing.assert_allclose(thetas, expected, **CLOSE)
  for ours, theirs in zip(state[1:], kept, strict=True):
    np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_schedule_counts_from_zero():
  gradients, theta = noise(4, 3), noise(3, seed=1)
  thetas, _ = follow(diffgrad(lambda k: 0.1 / (1 + k)), jnp.asarray(theta), gradients)
  expected, _ = oracle.trajectory(theta, gradients, lambda k: 0.1 / (1 + k))
  np.testing.assert_allclose(thetas, expected, **CLOSE)


@quick
@hypothesis.given(sequences)
def test_friction_damps_adam_by_at_most_one_half(gradients):
  s = direct(gradients)
  adam = np.array(oracle.adam_directions(gradients))
  np.testing.assert_allclose(s, oracle.frictions(gradients) * adam, **CLOSE)
  # Where Adam moves by more than rounding, the sign is Adam's and the ratio in bounds.
  moves = np.abs(adam) > 1e-3
  ratio = np.asarray(s)[moves] / adam[moves]
  assert np.all(ratio > 0.5 - 1e-3)
  assert np.all(ratio < 1)


@quick
@hypothesis.given(hnp.arrays(np.float32, 5, elements=floats))
def test_constant_gradient_is_half_an_adam_step(g):
  gradients = np.stack([g] * 4)
  s = direct(gradients, eps=1e-30)
  adam = np.array(oracle.adam_directions(gradients, eps=1e-30))
  np.testing.assert_allclose(s[1:], adam[1:] / 2, rtol=1e-5)
  np.testing.assert_allclose(s[0], np.sign(g) / (1 + np.exp(-abs(g))), rtol=1e-5)


@pytest.mark.parametrize(("scale", "friction"), [(1e-6, 0.5), (1e6, 1.0)])
def test_friction_depends_on_the_scale(scale, friction):
  gradients = noise(5, 4)
  s = direct(np.float32(scale) * gradients, eps=1e-30)
  adam = np.array(oracle.adam_directions(gradients, eps=0.0))
  np.testing.assert_allclose(s, friction * adam, rtol=2e-5)


@quick
@hypothesis.given(sequences, st.permutations(range(5)))
def test_odd_and_coordinatewise(gradients, order):
  s = direct(gradients)
  permuted = direct(-gradients[:, order])
  np.testing.assert_array_equal(permuted, -s[:, order])


def test_zero_gradients_do_nothing():
  s = direct(np.zeros((3, 4)))
  np.testing.assert_array_equal(s, 0)


def test_friction_saturates_without_nan():
  gradients = np.array([[1e18], [-1e18], [1e18]])
  s = direct(gradients)
  adam = np.array(oracle.adam_directions(gradients))
  np.testing.assert_allclose(s, adam, rtol=2e-5)


def test_mask_selects_what_decays():
  theta = {"w": jnp.ones(2), "b": jnp.ones(2)}
  zeros = jax.tree.map(jnp.zeros_like, theta)
  for kind in ("l2", "weight_decay"):
    transform = diffgrad(0.1, mask={"w": True, "b": False}, **{kind: 0.5})
    u, _ = transform.update(zeros, transform.init(theta), theta)
    np.testing.assert_array_equal(u["b"], 0)
    assert np.all(u["w"] < 0)


@pytest.mark.parametrize("kind", ["l2", "weight_decay"])
def test_traced_zero_decay_is_a_python_zero(kind):
  theta, g = jnp.asarray(noise(5)), jnp.asarray(noise(5, seed=1))
  results = [
    transform.update(g, transform.init(theta), theta)
    for transform in (diffgrad(0.1), diffgrad(0.1, **{kind: jnp.float32(0)}))
  ]
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_hyperparameters_vmap():
  theta, g = jnp.asarray(noise(5)), jnp.asarray(noise(5, seed=1))
  names = ("learning_rate", "b1", "b2", "eps", "l2", "weight_decay")
  grid = np.array([[0.1, 0.9, 0.99, 1e-3, 0.1, 0.0], [0.2, 0.5, 0.9, 1, 0, 0.1]])

  def two_steps(values):
    transform = diffgrad(**dict(zip(names, values, strict=True)))
    state = transform.init(theta)
    _, state = transform.update(g, state, theta)
    return transform.update(-g, state, theta)[0]

  swept = jax.vmap(two_steps)(jnp.asarray(grid, jnp.float32))
  for row, values in zip(swept, grid, strict=True):
    np.testing.assert_allclose(row, two_steps([float(v) for v in values]), rtol=1e-5)


def test_bfloat16_accumulates_in_float32():
  theta = jnp.ones(3, jnp.bfloat16)
  # Differences near 7: a bfloat16 sigmoid would be one.
  gradients = (7 * np.array([[1.0], [0], [1]]) * np.ones(3)).astype(jnp.bfloat16)
  transform = scale_by_diffgrad()
  state = transform.init(theta)
  for g in gradients:
    s, state = transform.update(jnp.asarray(g), state)
  assert s.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in state[1:])
  wide = direct(gradients.astype(np.float32))[-1]
  np.testing.assert_array_equal(s, wide.astype(jnp.bfloat16))
  for kind in ("l2", "weight_decay"):
    transform = diffgrad(jnp.float32(0.1), **{kind: jnp.float32(0.1)})
    u, _ = transform.update(theta, transform.init(theta), theta)
    assert u.dtype == jnp.bfloat16


def test_odd_trees_survive():
  tree = {
    "scalar": jnp.float32(2),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    "masked": optax.MaskedNode(),
    "pair": (jnp.ones(2), {}),
  }
  transform = diffgrad(0.1, l2=0.1)
  u, state = transform.update(tree, transform.init(tree), tree)
  assert jax.tree.structure(u) == jax.tree.structure(tree)
  assert jax.tree.structure(state.g_prev) == jax.tree.structure(tree)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"b1": 1.0}, "b1"),
    ({"b2": -0.1}, "b2"),
    ({"eps": 0.0}, "eps"),
    ({"learning_rate": -1.0}, "learning_rate"),
    ({"l2": -1.0}, "l2"),
    ({"weight_decay": -1.0}, "weight_decay"),
    ({"l2": 0.1, "weight_decay": 0.1}, "not both"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    diffgrad(**{"learning_rate": 0.1} | options)


def test_bad_leaves_and_missing_params():
  with pytest.raises(ValueError, match="diffGrad needs floating-point gradients"):
    scale_by_diffgrad().init({"a": jnp.arange(3)})
  for kind in ("l2", "weight_decay"):
    transform = diffgrad(0.1, **{kind: 0.1})
    with pytest.raises(ValueError, match=f"needs params in update when {kind}"):
      transform.update(jnp.ones(2), transform.init(jnp.ones(2)))
