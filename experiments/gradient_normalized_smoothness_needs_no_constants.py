"""Gradient-normalised smoothness with three Hessians, beside dampings that are tuned.

``python -m gradlab.launch.claims`` with
``--only=gradient_normalized_smoothness_needs_no_constants``
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.claims import TUNING_SEEDS, Claim, Comparison, Results
from gradlab.sources import breast_cancer
from gradlab.transforms.updates import (
  empirical_fisher,
  exact_hessian,
  gradient_normalized_smoothness,
  zero,
)

L2, TARGET, LIMIT = 1e-4, 1e-6, 5000
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def losses(x, batch):
  """The logistic loss of every example."""
  inputs, signs = batch
  return jax.nn.softplus(-signs * (inputs @ x[:-1] + x[-1]))


def value(x, batch):
  """The objective: strongly convex, if only just."""
  return jnp.mean(losses(x, batch)) + L2 / 2 * jnp.vdot(x, x)


def fisher(x, batch):
  """The empirical Fisher and the penalty's own curvature."""
  return empirical_fisher(losses)(x, batch) + L2 * jnp.eye(x.size)


HESSIANS = {"exact": exact_hessian(value), "fisher": fisher, "zero": zero}


def subset(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Four fifths of the tumours, standardised, with labels -1 and 1."""
  data = breast_cancer()
  parts = (data.train, data.validation, data.test)
  inputs = np.concatenate([part["inputs"] for part in parts]).astype(np.float64)
  label = np.concatenate([part["label"] for part in parts])
  rows = np.random.default_rng(seed).permutation(len(label))[: len(label) * 4 // 5]
  inputs = inputs[rows]
  inputs = (inputs - inputs.mean(0)) / inputs.std(0)
  return inputs, 2.0 * label[rows] - 1.0


@functools.partial(jax.jit, static_argnums=0)
def adaptive(kind, batch, goal, limit):
  """Iterations and gradients until the value is at most the goal."""
  solver = gradient_normalized_smoothness(jax.value_and_grad(value), HESSIANS[kind])
  last = jax.lax.while_loop(
    lambda state: (state.value > goal) & (state.count < limit),
    lambda state: solver.step(state, batch),
    solver.init(jnp.zeros(batch[0].shape[1] + 1), batch),
  )
  return last.count, last.num_evals, last.value


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0, None))
def fixed(kind, batch, goal, damping, limit):
  """Iterations of Newton-type steps with one damping; the limit if it diverges."""

  def step(carry):
    x, count, _ = carry
    hess = HESSIANS[kind](x, batch)
    matrix = damping * jnp.eye(x.size) + (0.0 if hess is None else hess)
    x = x - jnp.linalg.solve(matrix, jax.grad(value)(x, batch))
    return x, count + 1, value(x, batch)

  x = jnp.zeros(batch[0].shape[1] + 1)
  start = (x, jnp.zeros([], jnp.int32), value(x, batch))
  _, count, last = jax.lax.while_loop(
    lambda carry: ~(carry[2] <= goal) & (carry[1] < limit), step, start
  )
  return jnp.where(last <= goal, count, limit)


def run_fixed(kind, runs, limit) -> list[float]:
  """Counts of (batch, goal, damping) side by side."""
  stacked = jax.tree.map(lambda *leaves: jnp.stack([*map(jnp.asarray, leaves)]), *runs)
  return [float(count) for count in fixed(kind, *stacked, limit)]


def measure(seeds: Sequence[int], folder: Path, smoke: bool) -> Results:
  """In float64; a damping is the best of the grid on other subsets."""
  del folder
  limit = 5 if smoke else LIMIT
  with jax.enable_x64(True):

    def problem(seed):
      batch = jax.tree.map(jnp.asarray, subset(seed))
      return batch, adaptive("exact", batch, -jnp.inf, 5 if smoke else 60)[2] + TARGET

    found = {kind: {"iterations": [], "gradients": []} for kind in HESSIANS}
    problems = [problem(seed) for seed in seeds]
    for kind in HESSIANS:
      for batch, goal in problems:
        count, evaluations, _ = adaptive(kind, batch, goal, limit)
        found[kind]["iterations"].append(float(count))
        found[kind]["gradients"].append(float(evaluations))
    others = [problem(seed) for seed in TUNING_SEEDS]
    for kind in ("fisher", "zero"):
      pairs = [(*other, damping) for damping in DAMPINGS for other in others]
      best = 0.1
      if not smoke:
        tried = np.reshape(run_fixed(kind, pairs, limit), (len(DAMPINGS), -1))
        best = DAMPINGS[int(np.argmin(tried.mean(1)))]
      counts = run_fixed(kind, [(*p, best) for p in problems], limit)
      found[f"{kind}, fixed damping"] = {
        "iterations": counts,
        "gradients": [count + 1 for count in counts],
      }
  return found


def claim() -> Claim:
  """Counts until the value is within 1e-6 of the minimum."""

  def fewer(says, metric, method, baseline):
    return Comparison(says, metric, method, baseline, "lower")

  return Claim(
    methods=("gradient_normalized_smoothness",),
    paper="one algorithm without problem constants, fast with exact and approximate "
    "Hessians",
    setting=f"Logistic regression (l2 {L2}) on 80% of breast_cancer, standardised, "
    f"from 0 to f - f* <= {TARGET}, at most {LIMIT} iterations, float64; fixed "
    f"dampings tuned over {DAMPINGS}.",
    measure=measure,
    comparisons=(
      fewer(
        "exact Hessian: fewer iterations than Fisher", "iterations", "exact", "fisher"
      ),
      fewer("Fisher: fewer gradients than no Hessian", "gradients", "fisher", "zero"),
      fewer(
        "Fisher: fewer gradients than with a tuned damping",
        "gradients",
        "fisher",
        "fisher, fixed damping",
      ),
      fewer(
        "no Hessian: fewer gradients than tuned gradient descent",
        "gradients",
        "zero",
        "zero, fixed damping",
      ),
    ),
  )
