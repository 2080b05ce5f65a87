"""The convolutional network in NumPy float64, pixel by pixel."""

import numpy as np


def convolve(x, kernel, bias):
  """x [B, H, W, C], odd kernel [k, k, C, D]; zeros outside the image."""
  batch, height, width, _ = x.shape
  reach = kernel.shape[0] // 2
  padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
  out = np.zeros((batch, height, width, kernel.shape[-1]))
  for i in range(height):
    for j in range(width):
      patch = padded[:, i : i + kernel.shape[0], j : j + kernel.shape[1]]
      out[:, i, j] = np.tensordot(patch, kernel, 3) + bias
  return out


def pool(x):
  """Means of 2 x 2 cells; a cell at an odd edge holds fewer pixels."""
  rows, columns = range(0, x.shape[1], 2), range(0, x.shape[2], 2)
  cells = [[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in columns] for i in rows]
  return np.moveaxis(np.array(cells), 2, 0)


def forward(params, images, act, batch_norm=False):
  """images [B, H, W, C] -> (outputs, [(mean, variance) before each normalisation])."""
  x, moments = images, []
  for index in range(sum(name.startswith("conv_") for name in params)):
    x = convolve(x, **params[f"conv_{index}"])
    if batch_norm:
      mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
      moments.append((mean, var))
      scaling = params[f"norm_{index}"]
      x = (x - mean) / np.sqrt(var + 1e-5) * scaling["scale"] + scaling["bias"]
    x = pool(act(x))
  head = params["head"]
  return x.reshape(len(x), -1) @ head["kernel"] + head["bias"], moments
