"""SFR-on on one float64 array, from the rule; the rate may change by iteration."""

import numpy as np


def mask(forget_fisher, remain_fisher, threshold=1.0, eps=1e-15):
  return (forget_fisher + eps) / (remain_fisher + eps) >= threshold


def weights(losses, power=0.5, eps=1e-15):
  c = 1 / (np.asarray(losses, np.float64) ** power + eps)
  return c / c.sum()


def trajectory(
  theta,
  forget_grad,
  remain_grad,
  learning_rate,
  forget_scale,
  num_steps,
  momentum=0.0,
  weight_decay=0.0,
  selected=True,
  max_norm=7.0,
  forget_every=5,
  slow_step_size=1.0,
):
  """theta after each iteration; SGD inside; gradients are functions (theta, s)."""
  theta = np.asarray(theta, np.float64)
  buffer, out = np.zeros_like(theta), []
  for s in range(num_steps):
    rate = learning_rate(s) if callable(learning_rate) else learning_rate
    start = theta
    if s % forget_every == 0:
      alpha = forget_scale * (1 + np.cos(np.pi * s / num_steps)) / 2
      g = selected * alpha * forget_grad(theta, s)
      norm = np.sqrt((g**2).sum())
      g = g * min(1.0, max_norm / norm) if norm > 0 else g
      buffer = momentum * buffer + g + weight_decay * theta
      theta = theta - rate * buffer
    buffer = momentum * buffer + remain_grad(theta, s) + weight_decay * theta
    theta = theta - rate * buffer
    theta = start + slow_step_size * (theta - start)
    out.append(theta)
  return out
