"""Q-GaLore in float64 NumPy, one matrix at a time, from the paper's equations."""

import numpy as np


def affine(w, bits, group, uniform=None, zero_in_range=True):
  """What the affine quantiser makes of ``w``: (codes, dequantised)."""
  flat = np.asarray(w, np.float64).ravel()
  draws = None if uniform is None else np.asarray(uniform, np.float64).ravel()
  top, codes, out = 2**bits - 1, [], []
  for start in range(0, flat.size, group):
    part = flat[start : start + group]
    high, low = part.max(), part.min()
    if zero_in_range:
      high, low = max(high, 0.0), min(low, 0.0)
    s = max(high - low, 1e-5) / top
    z = np.clip(-np.round(low / s), 0, top)
    if draws is None:
      steps = np.round(part / s)
    else:
      steps = np.floor(part / s)
      steps = steps + (draws[start : start + group] < part / s - steps)
    q = np.clip(steps + z, 0, top)
    codes.append(q)
    out.append((q - z) * s)
  return np.concatenate(codes).astype(int), np.concatenate(out).reshape(np.shape(w))


def dynamic_map(signed):
  entries = [0.0, 1.0]
  for i in range(7):
    parts = 2**i if signed else 2 ** (i + 1)
    for k in range(parts):
      middle = (0.1 + 0.9 * (k + 0.5) / parts) * 10.0 ** (i - 6)
      entries += [middle, -middle] if signed else [middle]
  return np.sort(np.array(entries))


def blockwise(x, signed, block):
  """What eight bits with the dynamic map make of ``x``."""
  flat, entries = np.ravel(x), dynamic_map(signed)
  out = np.zeros_like(flat)
  for start in range(0, flat.size, block):
    part = flat[start : start + block]
    top = np.abs(part).max()
    if top > 0:
      nearest = np.abs(part[:, None] / top - entries).argmin(1)
      out[start : start + block] = entries[nearest] * top
  return out.reshape(np.shape(x))


def basis(gradient, rank, side):
  """Leading singular vectors, each with its largest entry positive."""
  u, _, vt = np.linalg.svd(gradient, full_matrices=False)
  rows = vt[:rank] if side == "right" else u[:, :rank].T
  largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
  rows = rows * np.sign(largest)
  return rows if side == "right" else rows.T


def trajectory(
  w,
  gradients,
  learning_rate,
  rank,
  update_proj_gap=200,
  scale=0.25,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  quantize_projector=False,
  proj_bits=4,
  proj_group_size=256,
  lazy=False,
  cos_threshold=0.4,
  gamma_proj=2,
  queue_size=5,
  quantize_moments=False,
  moment_block_size=256,
  min_8bit_size=4096,
  quantize_weights=False,
  weight_bits=8,
  weight_group_size=256,
  uniforms=None,
  side="small",
  zero_in_range=True,
  abs_cosine=True,
):
  """W_1, W_2, ... and the steps at which the basis was refreshed."""
  w = np.asarray(w, np.float64)
  rows, columns = w.shape
  right = side == "right" or (
    side in ("small", "large") and (rows >= columns) == (side == "small")
  )
  r = min(rank, rows, columns)
  m = np.zeros((rows, r) if right else (r, columns))
  v = np.zeros_like(m)
  p = lead = None
  gap, queue, refreshed, out = update_proj_gap, [], [], []
  for c, g in enumerate(np.asarray(gradients, np.float64)):
    due = p is None or c % gap == 0
    if due and np.isfinite(g).all() and g.any():
      refreshed.append(c)
      p = basis(g, r, "right" if right else "left")
      new = p[0] if right else p[:, 0]
      if lead is not None:
        cosine = lead @ new
        queue = [*queue, abs(cosine) if abs_cosine else cosine][-queue_size:]
        if lazy and len(queue) == queue_size and np.mean(queue) >= cos_threshold:
          gap = int(gap * gamma_proj)
      lead = new
      if quantize_projector:
        p = affine(p, proj_bits, proj_group_size, zero_in_range=zero_in_range)[1]
    used = np.zeros((r, columns) if right else (rows, r)) if p is None else p
    low = g @ used.T if right else used.T @ g
    m = b1 * m + (1 - b1) * low
    v = b2 * v + (1 - b2) * low**2
    a = m / (1 - b1 ** (c + 1)) / (np.sqrt(v) / np.sqrt(1 - b2 ** (c + 1)) + eps)
    if quantize_moments and m.size >= min_8bit_size:
      m = blockwise(m, True, moment_block_size)
      v = blockwise(v, False, moment_block_size)
    delta = -learning_rate * scale * (a @ used if right else used @ a)
    w = (w + delta) * (1 - learning_rate * weight_decay)
    if quantize_weights:
      uniform = None if uniforms is None else uniforms[c]
      w = affine(w, weight_bits, weight_group_size, uniform, zero_in_range)[1]
    out.append(w)
  return np.stack(out), refreshed
