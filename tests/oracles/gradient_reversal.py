"""Float64 adversarial two-head model, differentiated by central differences."""

import numpy as np


def cross_entropy(logits, labels):
  shifted = logits - logits.max(axis=-1, keepdims=True)
  log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
  return -np.mean(log_probs[np.arange(len(labels)), labels])


def losses(params, inputs, labels, domains):
  hidden = np.tanh(inputs @ params["encoder"])
  return (
    cross_entropy(hidden @ params["head"], labels),
    cross_entropy(hidden @ params["critic"], domains),
  )


def central_difference(function, params, name, step=1e-5):
  grad = np.zeros_like(params[name])
  for index in np.ndindex(grad.shape):
    values = []
    for sign in (1.0, -1.0):
      moved = {key: value.copy() for key, value in params.items()}
      moved[name][index] += sign * step
      values.append(function(moved))
    grad[index] = (values[0] - values[1]) / (2.0 * step)
  return grad


def gradients(params, inputs, labels, domains, scale, weight):
  """What encoder, main head and discriminator must each descend."""

  def mixed(main_factor, domain_factor):
    def function(p):
      main, domain = losses(p, inputs, labels, domains)
      return main_factor * main + domain_factor * domain

    return function

  return {
    "encoder": central_difference(mixed(1.0, -scale * weight), params, "encoder"),
    "head": central_difference(mixed(1.0, 0.0), params, "head"),
    "critic": central_difference(mixed(0.0, weight), params, "critic"),
  }


def schedule(progress, gamma=10.0):
  progress = np.clip(np.asarray(progress, np.float64), 0.0, 1.0)
  return 2.0 / (1.0 + np.exp(-gamma * progress)) - 1.0
