"""Next-token loss by loops over sequences and positions, in float64 NumPy."""

import numpy as np

from tests.oracles.cross_entropy import log_softmax


def metrics(logits, tokens, smoothing=0.0, mask=None):
  """(loss, bits per token, accuracy); mask[b, t] weighs the prediction of token t."""
  rows, length = tokens.shape
  logp, vocabulary = log_softmax(logits), logits.shape[-1]
  loss = bits = hits = total = 0.0
  for b in range(rows):
    for t in range(length - 1):
      target = tokens[b, t + 1]
      w = 1.0 if mask is None else mask[b, t + 1]
      nll = -logp[b, t, target]
      loss += w * ((1 - smoothing) * nll - smoothing * logp[b, t].sum() / vocabulary)
      bits += w * nll / np.log(2)
      hits += w * float(np.argmax(logits[b, t]) == target)
      total += w
  return loss / total, bits / total, hits / total
