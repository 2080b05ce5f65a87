"""Diffusion samplers to compare with, and a distance between samples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


def ddim(denoise_fn: Denoiser, x: jax.Array, sigmas: jax.Array) -> jax.Array:
  """Euler steps in 1 / sigma, then the prediction at the last level."""

  def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    s, t = pair
    return t / s * x + (1 - t / s) * denoise_fn(x, s), None

  x, _ = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))
  return denoise_fn(x, sigmas[-1])


def dpmpp_2m(denoise_fn: Denoiser, x: jax.Array, sigmas: jax.Array) -> jax.Array:
  """DPM-Solver++(2M), of first order at both ends."""
  levels, count = -jnp.log(sigmas), sigmas.shape[0] - 1

  def step(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[Any, None]:
    x, old = carry
    new, h = denoise_fn(x, sigmas[i]), levels[i + 1] - levels[i]
    ratio = h / (levels[i] - levels[i - 1])
    slope = jnp.where((i > 0) & (i < count - 1), ratio / 2, 0.0)
    x = jnp.exp(-h) * x - jnp.expm1(-h) * (new + slope * (new - old))
    return (x, new), None

  (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), jnp.arange(count))
  return denoise_fn(x, sigmas[-1])


def heun(denoise_fn: Denoiser, x: jax.Array, sigmas: jax.Array) -> jax.Array:
  """Two predictions a step: exact for practical purposes on a fine grid."""

  def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    s, t = pair
    slope = (x - denoise_fn(x, s)) / s
    ahead = x + (t - s) * slope
    return x + (t - s) / 2 * (slope + (ahead - denoise_fn(ahead, t)) / t), None

  x, _ = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))
  return denoise_fn(x, sigmas[-1])


def energy_distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """Between two samples of rows; zero for equal distributions, on average."""

  def total(a: jax.Array, b: jax.Array) -> jax.Array:
    squares = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None] - 2 * a @ b.T
    return jnp.sum(jnp.sqrt(jnp.maximum(squares, 0.0)))

  n, m = len(a), len(b)
  within = total(a, a) / (n * (n - 1)) + total(b, b) / (m * (m - 1))
  return 2 * total(a, b) / (n * m) - within
