"""What the tests of the update rules share: trajectories, directions, noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def follow(transform, theta, gradients):
  """theta_1, theta_2, ... and the last state; one compiled step."""
  update = jax.jit(transform.update)
  state, out = transform.init(theta), []
  for g in gradients:
    u, state = update(jax.tree.map(jnp.asarray, g), state, theta)
    theta = optax.apply_updates(theta, u)
    out.append(theta)
  return out, state


@functools.cache
def compiled(factory, options):
  """The scan of a direction over gradients; compiled once per shape and options."""
  transform = factory(**dict(options))

  def step(state, g):
    s, state = transform.update(g, state)
    return state, s

  return jax.jit(lambda g: jax.lax.scan(step, transform.init(g[0]), g)[1])


def direct(gradients, factory, **options):
  """s_1, s_2, ... of one array."""
  scan = compiled(factory, tuple(options.items()))
  return scan(jnp.asarray(gradients, jnp.float32))


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
