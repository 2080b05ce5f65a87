"""AdamW on one float64 array, from the equations."""

import numpy as np


def trajectory(
  theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4
):
  """theta_1, theta_2, ... for given gradients."""
  theta = np.asarray(theta, np.float64)
  m = v = np.zeros_like(theta)
  out = []
  for t, gradient in enumerate(gradients, start=1):
    g = np.asarray(gradient, np.float64)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    eta = learning_rate(t - 1) if callable(learning_rate) else learning_rate
    theta = theta - eta * (step + weight_decay * theta)
    out.append(theta)
  return out
