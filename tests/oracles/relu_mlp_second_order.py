"""A ReLU network in NumPy float64; its gradients by central differences."""

import math

import numpy as np


def evaluate(params, x, channel=0):
  """(y, dy_dx): the gradient from the product of the local Jacobians, per example."""
  outputs, gradients = [], []
  for row in x:
    h, jacobian = row, np.eye(len(row))
    for index, (w, b) in enumerate(params):
      a = w @ h + (0.0 if b is None else b)
      jacobian = w @ jacobian
      if index < len(params) - 1:
        a, jacobian = np.where(a > 0, a, 0.0), (a > 0)[:, None] * jacobian
      h = a
    outputs.append(h)
    gradients.append(jacobian[channel])
  return np.array(outputs), np.array(gradients)


def pairing(params, x, y_bar, v, channel=0):
  y, dy_dx = evaluate(params, x, channel)
  return np.sum(y_bar * y) + np.sum(v * dy_dx)


def gradients(params, x, y_bar, v, channel=0, step=1e-6):
  """Derivative of ``pairing`` in every entry of params and x; not at a kink."""
  params = [(w.copy(), None if b is None else b.copy()) for w, b in params]
  x = x.copy()

  def partial(array):
    out = np.zeros_like(array)
    for index in np.ndindex(array.shape):
      values = []
      for sign in (1.0, -1.0):
        kept = array[index]
        array[index] = kept + sign * step
        values.append(pairing(params, x, y_bar, v, channel))
        array[index] = kept
      out[index] = (values[0] - values[1]) / (2.0 * step)
    return out

  layers = [(partial(w), None if b is None else partial(b)) for w, b in params]
  return layers, partial(x)


def smallest_preactivation(params, x):
  """How far the nearest kink is, in units of the pre-activations."""
  smallest = math.inf
  for row in x:
    h = row
    for w, b in params[:-1]:
      a = w @ h + (0.0 if b is None else b)
      smallest, h = min(smallest, np.abs(a).min()), np.maximum(a, 0.0)
  return smallest


def active_levels(step, num_levels, base=0.2, rate=0.02, start=100):
  if step <= 0:
    return num_levels
  valid = math.ceil(base * num_levels + rate * max(0, step - start))
  return min(num_levels, min(num_levels, valid) + 1)
