"""The search over gamma in float64 NumPy, with dense matrices."""

import numpy as np


def direction(g, hessian, gamma, eps=1e-8, metric=None):
  """``-(H + lam B)^{-1} g`` and lam."""
  g = np.asarray(g, np.float64)
  b = np.eye(g.size) if metric is None else np.asarray(metric, np.float64)
  lam = np.sqrt(g @ np.linalg.solve(b, g)) / (gamma + eps)
  return -np.linalg.solve(hessian + lam * b, g), lam


def iterate(
  value_and_grad,
  hess,
  x,
  steps,
  gamma=1.0,
  gamma_min=1e-9,
  max_search=40,
  adaptive=True,
  eps=1e-8,
  metric=None,
):
  """One (x, value, gamma, evaluations so far, accepted) per iteration."""
  x = np.asarray(x, np.float64)
  b = np.eye(x.size) if metric is None else np.asarray(metric, np.float64)
  f, g = value_and_grad(x)
  evaluations, out = 1, []
  for _ in range(steps):
    hessian, accepted = hess(x), False
    for _ in range(max_search + 1):
      d, lam = direction(g, hessian, gamma, eps, b)
      f_new, g_new = value_and_grad(x + d)
      evaluations += 1
      if not adaptive:
        accepted = True
        break
      if f - f_new >= g_new @ np.linalg.solve(b, g_new) / (8 * lam):
        accepted, gamma = True, max(2 * gamma, gamma_min)
        break
      gamma /= 2
    if accepted:
      x, f, g = x + d, f_new, g_new
    else:
      gamma = max(gamma, gamma_min)
    out.append((x, f, gamma, evaluations, accepted))
  return out
