"""SNIP on a ReLU network with biases: gates and backpropagation by hand, float64."""

import numpy as np


def mlp_gradient(layers, x, y):
  """Gradients of the mean softmax cross-entropy of ``[(kernel, bias), ...]``."""
  layers = [(np.asarray(w, np.float64), np.asarray(b, np.float64)) for w, b in layers]
  inputs, h = [], np.asarray(x, np.float64)
  for i, (w, b) in enumerate(layers):
    inputs.append(h)
    h = h @ w + b
    if i < len(layers) - 1:
      h = np.maximum(h, 0)
  e = np.exp(h - h.max(1, keepdims=True))
  delta = e / e.sum(1, keepdims=True)
  delta[np.arange(len(y)), y] -= 1
  delta /= len(y)
  grads = []
  for i in reversed(range(len(layers))):
    grads.append((inputs[i].T @ delta, delta.sum(0)))
    delta = (delta @ layers[i][0].T) * (inputs[i] > 0)
  return grads[::-1]


def scores(layers, x, y, normalize=True):
  grads = mlp_gradient(layers, x, y)
  out = [
    np.abs(np.asarray(w, np.float64) * g)
    for (w, _), (g, _) in zip(layers, grads, strict=True)
  ]
  total = sum(s.sum() for s in out) if normalize else 1.0
  return [s / total for s in out]


def mask(flat, keep_ratio):
  """Everything at or above the int(n * keep_ratio)-th largest."""
  count = int(len(flat) * keep_ratio)
  return np.asarray(flat) >= np.sort(flat)[::-1][count - 1]
