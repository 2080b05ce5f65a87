"""Parameters from NumPy: compiling a model's own initialiser takes seconds."""

import math

import jax
import numpy as np


def drawn(model, inputs, seed=0):
  """Random (params, model_state) of the model's shapes; running moments are (0, 1)."""
  random = np.random.default_rng(seed)

  def leaf(path, like):
    name = path[-1].key
    if name in ("mean", "var"):
      return np.full(like.shape, name == "var", np.float32)
    normal = random.normal(size=like.shape).astype(np.float32)
    if name == "scale":
      return 1 + np.float32(0.1) * normal
    if name == "bias":
      return np.float32(0.1) * normal
    # Kernels of layers stacked in front are 3-D, those of convolutions 4-D.
    fan_in = math.prod(like.shape[:-1]) if len(like.shape) == 4 else like.shape[-2]
    return normal / np.float32(1.0 if name == "embedding" else fan_in**0.5)

  shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
  return jax.tree_util.tree_map_with_path(leaf, shapes)
