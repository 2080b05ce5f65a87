"""diffGrad on one float64 array, from the equations; and Adam with epsilon-hat."""

import numpy as np


def adam_directions(gradients, b1=0.9, b2=0.999, eps=1e-8):
  """Adam's directions with eps added to the root before the bias correction."""
  mu = nu = 0.0
  out = []
  for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    out.append(np.sqrt(1 - b2**t) / (1 - b1**t) * mu / (np.sqrt(nu) + eps))
  return out


def frictions(gradients):
  """xi_t = sigmoid(|g_{t-1} - g_t|) with g_0 = 0."""
  g = np.asarray(gradients, np.float64)
  before = np.concatenate([np.zeros_like(g[:1]), g[:-1]])
  return 1 / (1 + np.exp(-np.abs(before - g)))


def trajectory(
  theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, l2=0.0, weight_decay=0.0
):
  """theta_1, theta_2, ... and the last (mu, nu, g_prev)."""
  theta = np.asarray(theta, np.float64)
  mu = nu = previous = np.zeros_like(theta)
  out = []
  for t, gradient in enumerate(gradients, start=1):
    g = np.asarray(gradient, np.float64) + l2 * theta
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g * g
    xi = 1 / (1 + np.exp(-np.abs(previous - g)))
    a = np.sqrt(1 - b2**t) / (1 - b1**t)
    eta = learning_rate(t - 1) if callable(learning_rate) else learning_rate
    theta = theta - eta * (a * xi * mu / (np.sqrt(nu) + eps) + weight_decay * theta)
    previous = g
    out.append(theta)
  return out, (mu, nu, previous)
