"""``models/decoder.py`` in PyTorch: the same parameters, the same numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gradlab.launch._bench import torch as torch_
from gradlab.types import Params

EPSILON = 1e-6  # of flax's RMSNorm
MAX_WAVELENGTH = 10_000.0

Tensor = torch_.Tensor
Weights = dict[str, Tensor]


def weights(params: Params) -> Weights:
  """The decoder's parameters as tensors to train; stacked layers become single ones."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = "/".join(entry.key for entry in path).rsplit("/", 1)[0]
    if name.startswith("blocks/"):
      for index, layer in enumerate(np.asarray(leaf)):
        found[name.replace("blocks", str(index), 1)] = torch_.tensor(layer)
    else:
      found[name] = torch_.tensor(leaf)
  for tensor in found.values():
    tensor.requires_grad_(True)
  return found


def _norm(x: Tensor, scale: Tensor, dtype: Any) -> Tensor:
  """Root-mean-square norm in float32."""
  x = x.float()
  mean = x.pow(2).mean(-1, keepdim=True)
  return (x * (mean + EPSILON).rsqrt() * scale).to(dtype)


def _rotary(x: Tensor) -> Tensor:
  """Rotates the features of [B, T, heads, d] by their positions."""
  torch = torch_.load("torch")
  half = x.shape[-1] // 2
  exponents = -torch.arange(half, device=x.device) / half
  positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
  angles = torch.outer(positions, MAX_WAVELENGTH**exponents)[:, None, :]
  left, right = x.float().chunk(2, dim=-1)
  cos, sin = angles.cos(), angles.sin()
  turned = (left * cos - right * sin, right * cos + left * sin)
  return torch.cat(turned, dim=-1).to(x.dtype)


def _attention(w: Weights, layer: str, x: Tensor, num_heads: int) -> Tensor:
  functional = torch_.load("torch.nn.functional")

  def project(name: str) -> Tensor:
    y = x @ w[f"{layer}/attention/{name}"].to(x.dtype)
    return y.unflatten(-1, (num_heads, -1))

  query, key, value = (
    _rotary(project("query")),
    _rotary(project("key")),
    project("value"),
  )
  mixed = functional.scaled_dot_product_attention(
    *(part.transpose(1, 2) for part in (query, key, value)), is_causal=True
  )
  return mixed.transpose(1, 2).flatten(-2) @ w[f"{layer}/attention/out"].to(x.dtype)


def loss(
  w: Weights,
  batch: Mapping[str, Tensor],
  *,
  num_layers: int,
  num_heads: int,
  dtype: Any,
) -> Tensor:
  """Mean cross-entropy of the labels, the products in ``dtype``, the head float32."""
  functional = torch_.load("torch.nn.functional")
  x = w["embed"].to(dtype)[batch["inputs"]]
  for layer in map(str, range(num_layers)):
    y = _norm(x, w[f"{layer}/attention_norm"], dtype)
    x = x + _attention(w, layer, y, num_heads)
    y = _norm(x, w[f"{layer}/mlp_norm"], dtype) @ w[f"{layer}/mlp/up"].to(dtype)
    y = functional.gelu(y, approximate="tanh")
    x = x + y @ w[f"{layer}/mlp/down"].to(dtype)
  logits = _norm(x, w["norm"], x.float().dtype) @ w["head"]
  return functional.cross_entropy(logits.flatten(0, 1), batch["label"].flatten())
