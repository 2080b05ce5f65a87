"""EnsLoss in float64 with Python's own sort, from given normal numbers."""

import math


def derivatives(z, margins, box_cox=0.0, floor=1e-6):
  drawn = []
  for normal in z:
    if box_cox == 0:
      v = math.exp(normal)
    else:
      base = max(1.0 + box_cox * normal, 0.0)
      v = (math.inf if box_cox < 0 else 0.0) if base == 0 else base ** (1.0 / box_cox)
    drawn.append(max(-v, -1.0))
  drawn.sort()
  ranked = sorted(range(len(margins)), key=lambda i: margins[i])
  rank = {example: place for place, example in enumerate(ranked)}
  out = []
  for i, margin in enumerate(margins):
    g = drawn[rank[i]]
    if margin > 1:
      g = g / margin
    out.append(g - floor)
  return out


def loss_and_gradient(z, logits, labels, **options):
  margins = [y * f for y, f in zip(labels, logits, strict=True)]
  g = derivatives(z, margins, **options)
  n = len(margins)
  value = sum(a * s for a, s in zip(g, margins, strict=True)) / n
  return value, [y * a / n for y, a in zip(labels, g, strict=True)]
