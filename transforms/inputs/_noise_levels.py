"""Grids of noise levels from large to small, for diffusion samplers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradlab.transforms._common import check_range, concrete


def _check(num_steps: int, sigma_max: ArrayLike, sigma_min: ArrayLike) -> None:
  check_range("num_steps", num_steps, 1)
  check_range("sigma_min", sigma_min, 0, open_low=True)
  if concrete(sigma_max) and concrete(sigma_min):
    check_range("sigma_max", sigma_max, np.asarray(sigma_min).item(), open_low=True)


def log_sigmas(
  num_steps: int, sigma_max: ArrayLike = 80.0, sigma_min: ArrayLike = 0.002
) -> jax.Array:
  r"""Noise levels that are uniform in log-SNR: every step divides by the same number.

  .. math::
    \sigma_i = \sigma_\max (\sigma_\min / \sigma_\max)^{i / N}

  Args:
    num_steps: N >= 1.
    sigma_max: the first level.
    sigma_min: the last level, > 0 and below ``sigma_max``.

  Returns:
    Decreasing levels ``[N + 1]``, float32 (float64 under x64).

  Raises:
    ValueError: no step, or levels that are not positive or do not decrease.

  Examples:
    >>> from gradlab.transforms.inputs import log_sigmas
    >>> print(log_sigmas(3, 8.0, 1.0).round(4))
    [8. 4. 2. 1.]
  """
  _check(num_steps, sigma_max, sigma_min)
  high, low = (jnp.asarray(end, dtype=float) for end in (sigma_max, sigma_min))
  ramp = jnp.linspace(0.0, 1.0, num_steps + 1)
  return high * jnp.exp(ramp * jnp.log(low / high))


def edm_sigmas(
  num_steps: int,
  sigma_max: ArrayLike = 80.0,
  sigma_min: ArrayLike = 0.002,
  rho: ArrayLike = 7.0,
) -> jax.Array:
  r"""Noise levels that are uniform in their ``rho``-th root.

  .. math::
    \sigma_i = \big(\sigma_\max^{1/\rho}
      + \tfrac{i}{N} (\sigma_\min^{1/\rho} - \sigma_\max^{1/\rho})\big)^\rho

  Args:
    num_steps: N >= 1.
    sigma_max: the first level.
    sigma_min: the last level, > 0 and below ``sigma_max``.
    rho: > 0; 1 is uniform, and a large one is nearly uniform in log-SNR.

  Returns:
    Decreasing levels ``[N + 1]``, float32 (float64 under x64).

  Raises:
    ValueError: no step, levels that are not positive or do not decrease, or rho <= 0.

  Examples:
    >>> from gradlab.transforms.inputs import edm_sigmas
    >>> print(edm_sigmas(2, 9.0, 1.0, rho=2.0).round(4))
    [9. 4. 1.]

  References:
    Karras, Aittala, Aila and Laine, Elucidating the Design Space of Diffusion-Based
    Generative Models, 2022, arXiv:2206.00364.
  """
  _check(num_steps, sigma_max, sigma_min)
  check_range("rho", rho, 0, open_low=True)
  high, low, power = (jnp.asarray(x, dtype=float) for x in (sigma_max, sigma_min, rho))
  ramp = jnp.linspace(0.0, 1.0, num_steps + 1)
  start, end = high ** (1 / power), low ** (1 / power)
  return (start + ramp * (end - start)) ** power
