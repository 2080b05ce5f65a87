"""PGI in NumPy float64: routes, nearest fusion, and the network pixel by pixel."""

import numpy as np


def route(kernel, bias, h, sizes):
  """One output channel at a time; h [B, H, W, C], kernel [C, sum(sizes)]."""
  columns = [
    sum(h[..., c] * kernel[c, d] for c in range(h.shape[-1])) + bias[d]
    for d in range(sum(sizes))
  ]
  pieces, start = [], 0
  for size in sizes:
    pieces.append(np.stack(columns[start : start + size], axis=-1))
    start += size
  return pieces


def nearest(x, height, width):
  out = np.zeros((len(x), height, width, x.shape[-1]))
  for i in range(height):
    for j in range(width):
      out[:, i, j] = x[:, (i * x.shape[1]) // height, (j * x.shape[2]) // width]
  return out


def fuse(routed, target):
  return target + sum(nearest(c, *target.shape[1:3]) for c in routed)


def convolve(x, kernel, bias, stride):
  """Odd kernels; zeros outside, as many as ceil(H / stride) outputs need."""
  size, (_, height, width, _) = kernel.shape[0], x.shape
  new = [-(-length // stride) for length in (height, width)]
  pads = [
    max((count - 1) * stride + size - length, 0)
    for count, length in zip(new, (height, width), strict=True)
  ]
  # An odd number of zeros has its extra one at the end.
  padded = np.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)))
  out = np.zeros((len(x), *new, kernel.shape[-1]))
  for i in range(new[0]):
    for j in range(new[1]):
      top, left = i * stride, j * stride
      patch = padded[:, top : top + size, left : left + size]
      out[:, i, j] = np.tensordot(patch, kernel, 3) + bias
  return out


def _stage(params, x, routed):
  for index in range(len(params)):
    conv = params[f"conv_{index}"]
    x = np.tanh(convolve(x, conv["kernel"], conv["bias"], 1 if index else 2))
    if index == 0 and len(routed):
      x = fuse(routed, x)
  return x


def _head(params, h):
  return h.reshape(len(h), -1) @ params["kernel"] + params["bias"]


def network(params, x, levels):
  """(main output, auxiliary outputs) with tanh; no branch where it has no params."""
  main, h = {}, x
  for level in range(1, 1 + sum(name.startswith("stage_") for name in params)):
    main[level] = h = _stage(params[f"stage_{level}"], h, ())
  maps = main
  if any(name.startswith("aux_stage_") for name in params):
    pieces = {}
    for k in levels:
      fed = [j for j in levels if j <= k]
      sizes = [main[j].shape[-1] for j in fed]
      kernel = params[f"aux_route_{k}"]["kernel"][0, 0]
      split = route(kernel, params[f"aux_route_{k}"]["bias"], main[k], sizes)
      pieces |= {(k, j): c for j, c in zip(fed, split, strict=True)}
    maps, g = {}, x
    for j in range(1, max(levels) + 1):
      routed = [pieces[k, j] for k in levels if (k, j) in pieces]
      maps[j] = g = _stage(params[f"aux_stage_{j}"], g, routed)
  return _head(params["head"], h), [
    _head(params[f"aux_head_{j}"], maps[j]) for j in levels
  ]


def loss(main, auxiliary, labels, weight):
  def cross_entropy(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -np.mean(log_probs[np.arange(len(labels)), labels])

  return cross_entropy(main) + weight * sum(map(cross_entropy, auxiliary))
