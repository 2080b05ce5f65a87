"""Softmax cross-entropy with smoothed one-hot targets, in float64 NumPy."""

import numpy as np


def log_softmax(z):
  z = np.asarray(z, np.float64)
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def per_example(z, y, smoothing=0.0):
  classes = z.shape[-1]
  target = np.eye(classes)[y] * (1 - smoothing) + smoothing / classes
  return -(target * log_softmax(z)).sum(-1)


def loss(z, y, smoothing=0.0, weights=None):
  return np.average(per_example(z, y, smoothing), weights=weights)


def accuracy(z, y, weights=None):
  return np.average(np.argmax(z, -1) == y, weights=weights)


def gradient(z, y, smoothing=0.0, weights=None):
  """d loss / d z = w (softmax - target) / sum w."""
  classes = z.shape[-1]
  target = np.eye(classes)[y] * (1 - smoothing) + smoothing / classes
  w = np.ones(y.shape) if weights is None else np.asarray(weights, np.float64)
  return (w / w.sum())[..., None] * (np.exp(log_softmax(z)) - target)
