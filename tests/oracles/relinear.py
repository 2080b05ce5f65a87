"""Quadratic layers in float64 NumPy: outputs, gradients by hand, shrunken SGD."""

import numpy as np

BRANCHES = ("r", "g", "b")


def forward(params, x):
  """q(x) for x [n, inputs]; without branch g its factor is one."""
  p = {b: {k: np.asarray(v, np.float64) for k, v in params[b].items()} for b in params}
  line = x @ p["r"]["kernel"] + p["r"]["bias"]
  gate = x @ p["g"]["kernel"] + p["g"]["bias"] if "g" in p else 1.0
  return line * gate + x**2 @ p["b"]["kernel"] + p["b"]["bias"]


def gradients(params, x, delta):
  """Of sum(delta * q(x)), summed over the rows of x."""
  p = {b: {k: np.asarray(v, np.float64) for k, v in params[b].items()} for b in params}
  line = x @ p["r"]["kernel"] + p["r"]["bias"]
  gate = x @ p["g"]["kernel"] + p["g"]["bias"]
  parts = {"r": (gate * delta, x), "g": (line * delta, x), "b": (delta, x**2)}
  return {
    b: {"kernel": inputs.T @ d, "bias": d.sum(0)} for b, (d, inputs) in parts.items()
  }


def trajectory(
  params,
  grads,
  learning_rate,
  gamma=(1.0, 1.0),
  alpha=(1.0, 1.0),
  momentum=0.0,
  decay=0.0,
):
  """params_1, params_2, ... of SGD with one rate per branch, then the pull."""
  rate = {"r": 1.0, "g": gamma[0], "b": gamma[1]}
  keep = {"r": 1.0, "g": alpha[0], "b": alpha[1]}
  x = {(b, k): np.array(params[b][k], np.float64) for b in BRANCHES for k in params[b]}
  m = {where: np.zeros_like(leaf) for where, leaf in x.items()}
  out = []
  for g in grads:
    for b, k in x:
      m[b, k] = momentum * m[b, k] + g[b][k] + decay * x[b, k]
      stepped = x[b, k] - learning_rate * rate[b] * m[b, k]
      point = 1.0 if (b, k) == ("g", "bias") else 0.0
      pulled = point + keep[b] * (stepped - point)
      x[b, k] = stepped if b == "r" else pulled
    out.append({b: {k: x[b, k].copy() for k in params[b]} for b in BRANCHES})
  return out
