"""M-FAC in float64: dense solves, and the recursion of the paper's implementation."""

import numpy as np


def fisher(window, damping):
  """``damping I + G^T G / m``."""
  window = np.asarray(window, np.float64)
  m, d = window.shape
  return damping * np.eye(d) + window.T @ window / m


def dense_ivp(window, x, damping):
  """``F^{-1} x`` for x [d] or [k, d]."""
  return np.linalg.solve(fisher(window, damping), np.asarray(x, np.float64).T).T


def recursion(window, damping):
  """D_ij = g_i^T F_{i-1}^{-1} g_j, and B with F_{k-1}^{-1} g_k = sum_j B_kj g_j."""
  window = np.asarray(window, np.float64)
  m = len(window)
  upper = window @ window.T / damping + m * np.eye(m)
  for i in range(m):
    for k in range(i + 1, m):  # elimination without pivots
      upper[k] -= upper[k, i] / upper[i, i] * upper[i]
  d = np.triu(upper) - m * np.eye(m)
  b = np.zeros((m, m))
  for k in range(m):
    b[k, k] = 1 / damping
    for i in range(k):
      b[k] -= d[i, k] / (m + d[i, i]) * b[i]
  return d, b


def recursive_ivp(window, x, damping):
  """``F^{-1} x`` by forward elimination with D and B."""
  window, x = np.asarray(window, np.float64), np.asarray(x, np.float64)
  d, b = recursion(window, damping)
  m = len(window)
  q = window @ x / damping
  for i in range(m):
    for earlier in range(i):
      q[i] -= d[earlier, i] * q[earlier] / (m + d[earlier, earlier])
  return x / damping - window.T @ (b.T @ (q / (m + np.diag(d))))


def sherman_morrison(window, x, damping):
  """``F^{-1} x`` and ``diag(F^{-1})``, one gradient at a time."""
  window, x = np.asarray(window, np.float64), np.asarray(x, np.float64)
  m, dim = window.shape
  inverse = np.eye(dim) / damping
  for g in window:
    h = inverse @ g
    inverse = inverse - np.outer(h, h) / (m + g @ h)
  return inverse @ x, np.diag(inverse)


def directions(gradients, num_grads, damping):
  """u_0, u_1, ... for flat gradients; also the window at the end."""
  window = np.zeros((num_grads, len(gradients[0])))
  out = []
  for t, g in enumerate(gradients):
    window[t % num_grads] = g
    out.append(dense_ivp(window, window[t % num_grads], damping))
  return out, window


def trajectory(
  theta, gradients, learning_rate, num_grads, damping, momentum=0.0, l2=0.0
):
  """theta_1, theta_2, ... for given loss gradients."""
  theta = np.asarray(theta, np.float64)
  window, v, out = np.zeros((num_grads, theta.size)), np.zeros(theta.size), []
  for t, gradient in enumerate(gradients):
    g = np.asarray(gradient, np.float64) + l2 * theta
    window[t % num_grads] = g
    u = recursive_ivp(window, g, damping)
    if momentum > 0:
      v = momentum * v + (1 - momentum) * u
      u = v
    eta = learning_rate(t) if callable(learning_rate) else learning_rate
    theta = theta - eta * u
    out.append(theta)
  return out
