"""The decoder in NumPy float64: unscanned blocks, rotation as a complex product."""

import numpy as np


def norm(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotary(x, positions, max_wavelength):
  """x: [T, heads, d]; feature j is the real, j + d / 2 the imaginary part."""
  half = x.shape[-1] // 2
  turns = max_wavelength ** (-2.0 * np.arange(half) / (2 * half))
  phase = np.exp(1j * np.asarray(positions)[:, None, None] * turns)
  turned = (x[..., :half] + 1j * x[..., half:]) * phase
  return np.concatenate([turned.real, turned.imag], -1)


def attention(kernels, x, num_heads, max_wavelength):
  length, width = x.shape
  query, key, value = (
    (x @ kernels[name]["kernel"]).reshape(length, num_heads, -1)
    for name in ("query", "key", "value")
  )
  query, key = (rotary(z, np.arange(length), max_wavelength) for z in (query, key))
  mixed = np.zeros_like(value)
  for head in range(num_heads):
    for t in range(length):
      scores = key[: t + 1, head] @ query[t, head] / np.sqrt(width // num_heads)
      weights = np.exp(scores - scores.max())
      mixed[t, head] = weights / weights.sum() @ value[: t + 1, head]
  return mixed.reshape(length, width) @ kernels["out"]["kernel"]


def forward(params, tokens, num_heads, max_wavelength=10_000.0):
  """Float64 params in the tree of the model, tokens [T] -> logits [T, V]."""
  x = params["embed"]["embedding"][tokens]
  blocks = params["blocks"]
  for layer in range(len(blocks["attention_norm"]["scale"])):
    attend = {k: {"kernel": v["kernel"][layer]} for k, v in blocks["attention"].items()}
    y = norm(x, blocks["attention_norm"]["scale"][layer])
    x = x + attention(attend, y, num_heads, max_wavelength)
    y = norm(x, blocks["mlp_norm"]["scale"][layer])
    up, down = (blocks["mlp"][name]["kernel"][layer] for name in ("up", "down"))
    x = x + gelu(y @ up) @ down
  return norm(x, params["norm"]["scale"]) @ params["head"]["kernel"]
