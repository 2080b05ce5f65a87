"""Float64 MeZO as published: perturb in place, three times, then update in place."""

import numpy as np


def step(params, z, loss_fn, learning_rate, eps, weight_decay=0.0, no_decay=()):
  """One step on a flat dict of arrays along a given direction.

  Returns:
    (params, projected gradient, loss of the + pass).
  """
  theta = {name: np.array(value, np.float64) for name, value in params.items()}

  def perturb(scale):
    for name in theta:
      theta[name] += scale * eps * np.asarray(z[name], np.float64)

  perturb(1.0)
  plus = loss_fn(theta)
  perturb(-2.0)
  minus = loss_fn(theta)
  perturb(1.0)
  g = (plus - minus) / (2.0 * eps)
  for name in theta:
    decay = 0.0 if name in no_decay else weight_decay
    theta[name] -= learning_rate * (g * np.asarray(z[name]) + decay * theta[name])
  return theta, g, plus


def rosenbrock_like(theta):
  """A smooth loss that is neither linear nor quadratic, on leaves w, b and s."""
  w, b, s = theta["w"], theta["b"], theta["s"]
  return (np.sum(np.tanh(w) ** 2) + np.sum((w[0] - b) ** 4) + np.sin(s)) / 3.0
