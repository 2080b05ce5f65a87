"""Two plain float64 loops: train the prompt, then train the model."""

import numpy as np


def sgd(learning_rate, momentum=0.0, weight_decay=0.0):
  """``make() -> step(theta, g) -> theta`` with its own buffer."""

  def make():
    buffer = 0.0

    def step(theta, g):
      nonlocal buffer
      buffer = momentum * buffer + g + weight_decay * theta
      return theta - learning_rate * buffer

    return step

  return make


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
  """``make() -> step(theta, g) -> theta``; the rate may be a schedule."""

  def make():
    m, v, t = 0.0, 0.0, 0

    def step(theta, g):
      nonlocal m, v, t
      rate = learning_rate(t) if callable(learning_rate) else learning_rate
      t += 1
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
      return theta - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)

    return step

  return make


def run(prompt, model, gradient, prompt_rule, model_rule, prompt_steps, model_steps):
  """(P, theta) after each step; ``gradient(P, theta) -> (dL/dP, dL/dtheta)``."""
  out = []
  step = prompt_rule()
  for _ in range(prompt_steps):
    prompt = step(prompt, gradient(prompt, model)[0])
    out.append((prompt, model))
  step = model_rule()
  for _ in range(model_steps):
    model = step(model, gradient(prompt, model)[1])
    out.append((prompt, model))
  return out
