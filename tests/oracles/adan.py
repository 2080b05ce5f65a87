"""Adan on one float64 array, from the equations."""

import numpy as np


def directions(gradients, b1=0.98, b2=0.92, b3=0.99, eps=1e-8, max_grad_norm=None):
  """The directions s_1, s_2, ... and the last (m, v, n, g_prev)."""
  shape = np.shape(gradients[0])
  m, v, n, previous = (np.zeros(shape) for _ in range(4))
  out = []
  for t, gradient in enumerate(gradients, start=1):
    g = np.asarray(gradient, np.float64)
    if max_grad_norm is not None:
      g = g * min(1.0, max_grad_norm / (np.sqrt((g**2).sum()) + eps))
    d = np.zeros(shape) if t == 1 else g - previous
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * d
    n = b3 * n + (1 - b3) * (g + b2 * d) ** 2
    m_hat, v_hat, n_hat = m / (1 - b1**t), v / (1 - b2**t), n / (1 - b3**t)
    out.append((m_hat + b2 * v_hat) / (np.sqrt(n_hat) + eps))
    previous = g
  return out, (m, v, n, previous)


def trajectory(
  theta, gradients, learning_rate, weight_decay=0.0, prox=True, **hyperparameters
):
  """theta_1, theta_2, ... for given gradients; learning_rate may be a schedule."""
  theta = np.asarray(theta, np.float64)
  out = []
  for step, s in enumerate(directions(gradients, **hyperparameters)[0]):
    eta = learning_rate(step) if callable(learning_rate) else learning_rate
    if prox:
      theta = (theta - eta * s) / (1 + eta * weight_decay)
    else:
      theta = (1 - eta * weight_decay) * theta - eta * s
    out.append(theta)
  return out
