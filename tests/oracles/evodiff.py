"""EVODiff in float64, written out step by step, and denoisers with known flows."""

import itertools

import numpy as np


def logistic(x):
  return 1 / (1 + np.exp(-x))


def sample(
  denoise, x, sigmas, *, denoise_to_zero=True, feature_axes=(1, 2), sigma_norm=None
):
  """x, the list of (rho, eta, zeta) of steps 2 .. N-1, and the levels of all calls."""
  x, sigmas = np.asarray(x, np.float64), np.asarray(sigmas, np.float64)
  count, calls, coefficients = len(sigmas) - 1, [], []
  t_max, t_min = sigma_norm or (sigmas[0], sigmas[-1])

  def model(x, sigma):
    calls.append(sigma)
    return denoise(x, sigma)

  def inner(a, b):
    return np.sum(a * b, axis=tuple(feature_axes), keepdims=True)

  def pc(a, b):
    below = inner(b, b)
    out = np.zeros_like(below)
    np.divide(inner(a, b), below, out=out, where=below != 0)
    return np.clip(out, -2, 2)

  m = [model(x, sigmas[0])]
  t, s = sigmas[1], sigmas[0]
  x = t / s * x + t * (1 / t - 1 / s) * m[0]
  m.append(model(x, t))
  for i in range(2, count):
    t, s, p = sigmas[i], sigmas[i - 1], sigmas[i - 2]
    q, h = t / s, 1 / t - 1 / s
    e = q * x + t * h * m[i - 1]
    r = np.log(p / s) / np.log(s / t)
    tau = (t + t_min) / (t_max + t_min)
    w, b = (1 - tau**2) / 2, np.sqrt((t / s) / (s / p))
    a1 = (1 - w) * b + w * pc(m[i - 1], m[i - 2])
    d1 = m[i - 1] - a1 * m[i - 2]
    rho = np.clip(logistic(0.25 * np.abs(a1)) * r, 0.25 * r, 1.5 * r)
    xp = e + t * h * d1 / (2 * rho)
    m.append(model(xp, t))
    a2 = (1 - w) * b + w * pc(m[i], m[i - 1])
    d2 = m[i] - a2 * m[i - 1]
    bp, bn = d1 / (r * h), r * d2 / h
    eta = 0.5 * logistic(np.abs(0.5 * pc(bn + bp, bn - bp)))
    big = -(eta / r) * d1 + (1 - eta) * r * d2
    z = np.abs(pc(xp - e - t * h * big / (2 * rho), d1) / (h * t)) - 0.5
    if count <= 20:
      zeta = logistic(z)
    else:
      g = (m[i - 1] - m[i - 2]) / h
      zeta = logistic(-z * logistic(pc(m[i - 1], g) * (2 - q**2)))
    x = e + t * h * big / (2 * zeta)
    coefficients.append((rho, eta, zeta))
  t, s = sigmas[-1], sigmas[-2]
  q, h = t / s, 1 / t - 1 / s
  c = 1 - 0.5 * np.sqrt(q) if q < 0.5 else 1 - 0.5 * np.sqrt(q - 0.5)
  d = m[-1] - c * m[-2]
  x = (1 - np.sqrt(t * s)) * (q * x + t * h * m[-1]) + 0.5 * t * h * d
  if denoise_to_zero:
    x = model(x, t)
  return x, coefficients, calls


def ddim(denoise, x, sigmas):
  """x_N of the Euler steps in 1 / sigma."""
  for s, t in itertools.pairwise(sigmas):
    x = t / s * x + (1 - t / s) * denoise(x, s)
  return x


def normal_flow(x, sigma_max, variance):
  """The exact end of the probability flow for normal data: x scaled per coordinate."""
  return x * np.sqrt(variance / (variance + sigma_max**2))


def mixture_denoiser(means, scale, xp=np):
  """E[x0 | x] for equal parts normal(mean, scale^2); means [K, H, W, C]."""
  flat = means.reshape(len(means), -1)

  def denoise(x, sigma):
    rows = x.reshape(x.shape[0], -1)
    total = scale**2 + sigma**2
    offset = rows[:, None, :] - flat[None, :, :]
    logits = -0.5 * xp.sum(offset**2, axis=2) / total
    weights = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))
    weights = weights / xp.sum(weights, axis=1, keepdims=True)
    mean = (scale**2 * rows + sigma**2 * (weights @ flat)) / total
    return mean.reshape(x.shape)

  return denoise
