import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.updates import adamw
from tests.oracles import adamw as oracle
from tests.transforms.updates.trajectories import follow, noise


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"weight_decay": 0.0},
    {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "eps_root": 1e-4, "weight_decay": 0.1},
    {"nesterov": True},
    {"mask": {"w": True, "b": False}, "weight_decay": 0.1},
    {"learning_rate": optax.exponential_decay(0.1, 2, 0.5)},
  ],
)
def test_equals_optax_bit_for_bit(options):
  theta = {"w": jnp.asarray(noise(3, 4)), "b": jnp.asarray(noise(4, seed=1))}
  gradients = [{"w": noise(3, 4, seed=k), "b": noise(4, seed=9 + k)} for k in range(6)]
  options = {"learning_rate": 0.05} | options
  ours = follow(adamw(**options), theta, gradients)
  with jax.numpy_dtype_promotion("standard"):  # optax mixes counters with floats
    theirs = follow(optax.adamw(**options), theta, gradients)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_follows_the_oracle(shape):
  gradients, theta = noise(10, *shape), noise(*shape, seed=1)
  thetas, _ = follow(adamw(0.05, weight_decay=0.1), jnp.asarray(theta), gradients)
  expected = oracle.trajectory(theta, gradients, 0.05, weight_decay=0.1)
  # optax computes 1 - 0.999**t in float32, which loses up to 6e-5 of it, half of that
  # in the root: 3e-5 of a step of 0.05, over ten steps.
  np.testing.assert_allclose(thetas, expected, rtol=1e-5, atol=2e-5)


def test_bfloat16_with_traced_hyperparameters():
  theta = jnp.ones(3, jnp.bfloat16)
  gradients = noise(4, 3).astype(jnp.bfloat16)
  names = ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay")
  values = jnp.array([[0.1, 0.9, 0.99, 1e-3, 0.0, 0.1], [0.2, 0.5, 0.9, 1.0, 0.1, 0.0]])

  def run(values):
    transform = adamw(**dict(zip(names, values, strict=True)))

    def step(carry, g):
      theta, state = carry
      u, state = transform.update(g, state, theta)
      return (optax.apply_updates(theta, u), state), u

    return jax.lax.scan(step, (theta, transform.init(theta)), jnp.asarray(gradients))

  (thetas, state), updates = jax.vmap(run)(values)
  assert thetas.dtype == updates.dtype == jnp.bfloat16
  assert state[0].mu.dtype == state[0].nu.dtype == jnp.float32
  for row, swept in zip(np.asarray(values, float), updates, strict=True):
    options = dict(zip(names, map(float, row), strict=True))
    first, _ = adamw(**options).update(
      jnp.asarray(gradients[0]), adamw(**options).init(theta), theta
    )
    # One bfloat16 rounding of the same float32 number.
    np.testing.assert_allclose(
      swept[0].astype(jnp.float32), first.astype(jnp.float32), rtol=2**-7
    )


def test_moments_do_not_stall_in_bfloat16():
  theta = jnp.ones((), jnp.bfloat16)
  transform = adamw(0.0)
  state = transform.init(theta)
  for _ in range(20):
    _, state = transform.update(theta, state, theta)
  # In bfloat16 nu would stop growing; 1 - 0.999**20 = 0.019811.
  np.testing.assert_allclose(state[0].nu, 1 - 0.999**20, rtol=1e-5)


def test_odd_trees_survive():
  tree = {
    "scalar": jnp.float32(2),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    "masked": optax.MaskedNode(),
    "pair": (jnp.ones(2), {}),
  }
  transform = adamw(0.1)
  u, _ = transform.update(tree, transform.init(tree), tree, value=1.0)
  assert jax.tree.structure(u) == jax.tree.structure(tree)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"b1": 1.0}, "b1"),
    ({"b2": -0.1}, "b2"),
    ({"eps": -1.0}, "eps"),
    ({"eps_root": -1.0}, "eps_root"),
    ({"learning_rate": -1.0}, "learning_rate"),
    ({"weight_decay": -1.0}, "weight_decay"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    adamw(**{"learning_rate": 0.1} | options)


def test_missing_params():
  transform = adamw(0.1)
  with pytest.raises(ValueError, match="params"):
    transform.update(jnp.ones(2), transform.init(jnp.ones(2)))
