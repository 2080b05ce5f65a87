"""DHSPG on a dict of float64 arrays: loops over families, groups and slices."""

import math

import numpy as np

DEFAULTS = {
  "sgd": (1e-3, 2.0, 10.0, 0.0, 0.0, 0.0),
  "adam": (1e-2, 20.0, 1e3, 0.9, 0.999, 0.0),
  "adamw": (1e-2, 20.0, 1e3, 0.9, 0.999, 1e-2),
}


def strength(x, d, penalty, amplify, cap, descent_bound=True):
  """lambda of one group."""
  p, norm = x @ d, np.sqrt(x @ x)
  if p >= 0 or norm == 0:
    return penalty
  low, high = -p / norm, -(d @ d) * norm / p
  value = min(max(amplify * low, penalty), penalty * cap)
  return (low + high) / 2 if descent_bound and value >= high else value


def gather(tree, family, group):
  """All slices of one group as one vector."""
  return np.concatenate(
    [np.take(tree[path], group, axis).ravel() for path, axis in family]
  )


def redundant_groups(x, d, groups, limit, eligible=None):
  """Bool arrays, one per family."""
  sizes = [x[family[0][0]].shape[family[0][1]] for family in groups]
  names = [(f, g) for f, size in enumerate(sizes) for g in range(size)]
  cosines, inverses = [], []
  for f, g in names:
    a, b = gather(x, groups[f], g), gather(d, groups[f], g)
    norm = np.sqrt(a @ a)
    cosines.append(a @ b / max(norm * np.sqrt(b @ b), 1e-8))
    inverses.append(1 / (norm / a.size + 1e-6))
  score = np.zeros(len(names))
  for part in (np.array(cosines), np.array(inverses)):
    length = np.sqrt((part**2).sum())
    score += 0.5 * part / (length if length else 1)
  chosen = np.zeros(len(names), bool)
  order = sorted(range(len(names)), key=lambda i: -score[i])
  for i in order:
    trial = chosen.copy()
    trial[i] = True
    if chosen.sum() < limit and (eligible is None or eligible(trial)):
      chosen = trial
  out = np.split(chosen, np.cumsum(sizes)[:-1])
  scores = np.split(score, np.cumsum(sizes)[:-1])
  for mask, values in zip(out, scores, strict=True):
    if mask.all():
      mask[np.argmin(values)] = False
  return out


def trajectory(
  params,
  groups,
  gradient,
  steps,
  learning_rate,
  target_sparsity=0.5,
  *,
  tolerance=0.05,
  start_step=0,
  half_space_eps=0.0,
  variant="sgd",
  dampening=0.0,
  freeze_zero_groups=True,
  descent_bound=True,
  eligible=None,
  **given,
):
  """[(params, redundant, zero_fraction)] for gradients ``gradient(step, params)``."""
  names = ("penalty", "penalty_amplify", "penalty_cap", "b1", "b2", "weight_decay")
  hyper = dict(zip(names, DEFAULTS[variant], strict=True)) | given
  b1, b2, decay = hyper["b1"], hyper["b2"], hyper["weight_decay"]
  x = {name: np.array(leaf, np.float64) for name, leaf in params.items()}
  m = {name: np.zeros_like(leaf) for name, leaf in x.items()}
  v = {name: np.zeros_like(leaf) for name, leaf in x.items()}
  sizes = [x[family[0][0]].shape[family[0][1]] for family in groups]
  total, fraction = sum(sizes), 0.0
  redundant, out = None, []
  for t in range(1, steps + 1):
    eta = learning_rate(t - 1) if callable(learning_rate) else learning_rate
    d, trial = {}, {}
    for name, g in gradient(t - 1, x).items():
      g = np.asarray(g, np.float64)
      if variant != "adamw":
        g = g + decay * x[name]
      if variant == "sgd":
        if b1 > 0:
          m[name] = g if t == 1 else b1 * m[name] + (1 - dampening) * g
          g = m[name]
        d[name] = g
      else:
        m[name] = b1 * m[name] + (1 - b1) * g
        v[name] = b2 * v[name] + (1 - b2) * g**2
        root = np.sqrt(v[name] / (1 - b2**t)) + 1e-8
        d[name] = m[name] / (1 - b1**t) / root
      trial[name] = x[name] - eta * d[name]
      if variant == "adamw":
        trial[name] = trial[name] - eta * decay * x[name]
    if t - 1 == start_step:
      share = min(target_sparsity + tolerance, 0.999)
      limit = math.floor(total * share + 1e-9)
      redundant = redundant_groups(x, d, groups, limit, eligible)
    active = redundant is not None and fraction < target_sparsity - 1e-9
    for f, family in enumerate(groups):
      for g in range(sizes[f]):
        old = gather(x, family, g)
        norm = np.sqrt(old @ old)
        if active and redundant[f][g]:
          pull = strength(
            old,
            gather(d, family, g),
            hyper["penalty"],
            hyper["penalty_amplify"],
            hyper["penalty_cap"],
            descent_bound,
          )
          for path, axis in family:
            where = (slice(None),) * (axis % x[path].ndim) + (g,)
            trial[path][where] -= eta * pull * x[path][where] / (norm + 1e-8)
          if gather(trial, family, g) @ old < half_space_eps * norm**2:
            _clear(trial, family, g)
        if redundant is not None and freeze_zero_groups and norm == 0:
          _clear(trial, family, g)
    x = trial
    zero = [
      not gather(x, family, g).any()
      for f, family in enumerate(groups)
      for g in range(sizes[f])
    ]
    fraction = sum(zero) / total
    out.append(({name: leaf.copy() for name, leaf in x.items()}, redundant, fraction))
  return out


def _clear(tree, family, group):
  for path, axis in family:
    tree[path][(slice(None),) * (axis % tree[path].ndim) + (group,)] = 0.0
