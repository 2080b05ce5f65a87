"""Quantisers, and three update rules with quantised states, in float64 NumPy."""

import numpy as np


def affine(w, bits, group_size, zero_in_range=True, uniform=None):
  """(codes, scale, zero, dequantised), group by group over the flattened array."""
  flat = np.asarray(w, np.float64).reshape(-1)
  drawn = None if uniform is None else np.asarray(uniform, np.float64).reshape(-1)
  top = 2**bits - 1
  codes, scales, zeros, out = [], [], [], []
  for start in range(0, flat.size, group_size):
    group = flat[start : start + group_size]
    high, low = group.max(), group.min()
    if zero_in_range:
      high, low = max(high, 0.0), min(low, 0.0)
    scale = max(high - low, 1e-5) / top
    zero = np.clip(-np.round(low / scale), 0, top)
    steps = group / scale
    if drawn is None:
      rounded = np.round(steps)
    else:
      floor = np.floor(steps)
      rounded = floor + (drawn[start : start + group_size] < steps - floor)
    code = np.clip(rounded + zero, 0, top)
    codes.append(code)
    scales.append(scale)
    zeros.append(zero)
    out.append((code - zero) * scale)
  return (
    np.concatenate(codes).reshape(np.shape(w)),
    np.array(scales),
    np.array(zeros),
    np.concatenate(out).reshape(np.shape(w)),
  )


def dynamic_map(signed, bits=8):
  """Entry by entry: midpoints of the equal parts of each decade."""
  entries = {0.0, 1.0}
  for i in range(bits - 1):
    parts = 2**i if signed else 2 ** (i + 1)
    for k in range(parts):
      middle = (0.1 + 0.9 * (k + 0.5) / parts) * 10.0 ** (i - (bits - 2))
      entries |= {middle, -middle} if signed else {middle}
  return np.array(sorted(entries))


def moment_map(signed, bits):
  """As the states are kept: second moments have no zero, and are linear at 4 bits."""
  if signed:
    return dynamic_map(True, bits)
  if bits == 8:
    return dynamic_map(False, 8)[1:]
  return np.arange(1, 17) / 16


def blockwise(x, entries, block):
  """(codes, absmax, dequantised) by comparing with every entry of the map."""
  flat = np.asarray(x, np.float64).reshape(-1)
  codes, scales, out = [], [], []
  for start in range(0, flat.size, block):
    part = flat[start : start + block]
    absmax = np.abs(part).max()
    unit = part / absmax if absmax > 0 else part
    code = np.abs(unit[:, None] - entries[None, :]).argmin(axis=1)
    codes.append(code)
    scales.append(absmax)
    out.append(entries[code] * absmax)
  join = lambda parts: np.concatenate(parts).reshape(np.shape(x))  # noqa: E731
  return join(codes), np.array(scales), join(out)


def _adamw(g, s, t, b1=0.9, b2=0.999, eps=1e-8):
  mu = b1 * s["mu"] + (1 - b1) * g
  nu = b2 * s["nu"] + (1 - b2) * g**2
  direction = mu / (1 - b1**t) / (np.sqrt(nu / (1 - b2**t)) + eps)
  return direction, {"mu": mu, "nu": nu}


def _adan(g, s, t, b1=0.98, b2=0.92, b3=0.99, eps=1e-8):
  d = 0 * g if t == 1 else g - s["g_prev"]
  m = b1 * s["m"] + (1 - b1) * g
  v = b2 * s["v"] + (1 - b2) * d
  n = b3 * s["n"] + (1 - b3) * (g + b2 * d) ** 2
  top = m / (1 - b1**t) + b2 * v / (1 - b2**t)
  direction = top / (np.sqrt(n / (1 - b3**t)) + eps)
  return direction, {"m": m, "v": v, "n": n, "g_prev": g}


def _diffgrad(g, s, t, b1=0.9, b2=0.999, eps=1e-8):
  mu = b1 * s["mu"] + (1 - b1) * g
  nu = b2 * s["nu"] + (1 - b2) * g**2
  friction = 1 / (1 + np.exp(-np.abs(s["g_prev"] - g)))
  step = np.sqrt(1 - b2**t) / (1 - b1**t) * friction * mu / (np.sqrt(nu) + eps)
  return step, {"mu": mu, "nu": nu, "g_prev": g}


RULES = {
  "adamw": (_adamw, ("mu", "nu")),
  "adan": (_adan, ("m", "v", "n", "g_prev")),
  "diffgrad": (_diffgrad, ("mu", "nu", "g_prev")),
}


def trajectory(rule, theta, gradients, learning_rate, bits, block):
  """theta_1, theta_2, ... and the last state as it is kept, for given gradients."""
  step, fields = RULES[rule]
  theta = np.asarray(theta, np.float64)
  state, out = {name: np.zeros(theta.shape) for name in fields}, []
  for t, g in enumerate(gradients, start=1):
    direction, state = step(np.asarray(g, np.float64), state, t)
    theta = theta - learning_rate * direction
    state = {
      name: blockwise(x, moment_map(name not in ("nu", "n"), bits), block)[2]
      for name, x in state.items()
    }
    out.append(theta)
  return out, state
