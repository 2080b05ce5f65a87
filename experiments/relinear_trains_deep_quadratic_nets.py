"""Quadratic networks that start linear and stay slow, beside ones that do not.

``python -m gradlab.launch.claims --only=relinear_trains_deep_quadratic_nets``
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.claims import TUNING_SEEDS, Claim, Comparison
from gradlab.data import index_block
from gradlab.models import quadratic_mlp
from gradlab.sources import digits
from gradlab.transforms.updates import relinear_sg
from gradlab.types import Model

# Arm -> initialisation of the quadratic layers and gamma of both branches. With gamma 0
# the layers stay what they are at first: the linear network.
ARMS = {
  "random": ("random", 1.0),
  "free": ("relinear", 1.0),
  "gamma 0.1": ("relinear", 1e-1),
  "gamma 0.01": ("relinear", 1e-2),
  "gamma 0.0001": ("relinear", 1e-4),
  "linear": ("relinear", 0.0),
}
RATES = (0.0008, 0.003, 0.0125, 0.05, 0.2)
DEPTHS = (2, 5)
BATCH, STEPS, CHANCE = 32, 400, 0.1


def drawn(model: Model, seed: int, init: str):
  """Kaiming normal kernels and zero biases, or the linear point in branches g and b."""
  random = np.random.default_rng(seed)

  def leaf(path, like):
    branch, name = path[-2].key, path[-1].key
    normal = random.normal(size=like.shape) * np.sqrt(2 / like.shape[0])
    value = normal if name == "kernel" else np.zeros(like.shape)
    if init == "relinear" and branch in ("g", "b"):
      value = np.full(like.shape, float((branch, name) == ("g", "bias")))
    return value.astype(np.float32)

  shapes, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 64)))
  return jax.tree_util.tree_map_with_path(leaf, shapes)


def program(model: Model):
  """(params, rows, rates, gamma) -> diverged, validation and test accuracy.

  All of shape [rates, seeds]; params and rows have a leading axis of seeds.
  """
  data = digits()
  train, validation, test = (
    (jnp.asarray(split["inputs"]), jnp.asarray(split["label"]))
    for split in (data.train, data.validation, data.test)
  )

  def loss(params, x, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      model.apply(params, {}, x)[0], y
    )
    return jnp.mean(losses)

  def run(params, rows, rate, gamma):
    optimiser = relinear_sg(optax.sgd(rate, momentum=0.9), gamma, gamma)

    def step(carry, chosen):
      params, state = carry
      grads = jax.grad(loss)(params, train[0][chosen], train[1][chosen])
      updates, state = optimiser.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), rows)
    finite = jnp.isfinite(loss(params, *train))

    def accuracy(x, y):
      guesses = jnp.argmax(model.apply(params, {}, x)[0], -1)
      return jnp.where(finite, jnp.mean(guesses == y), CHANCE)

    return ~finite, accuracy(*validation), accuracy(*test)

  seeds = jax.vmap(run, (0, 0, None, None))
  return jax.jit(jax.vmap(seeds, (None, None, 0, None)))


def measure(seeds: Sequence[int], folder: Path, smoke: bool):
  """Per arm and depth: share of the rates that diverge, accuracy at the tuned one."""
  del folder
  everything, tuning = (*TUNING_SEEDS, *seeds), len(TUNING_SEEDS)
  size, steps = len(digits().train["label"]), 2 if smoke else STEPS
  rows = np.stack([index_block(seed, 0, steps, size, BATCH) for seed in everything])
  out: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
  for depth in DEPTHS:
    model = quadratic_mlp((32,) * depth)
    run = program(model)
    for arm, (init, gamma) in ARMS.items():
      params = [drawn(model, seed, init) for seed in everything]
      params = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
      found = run(params, rows, np.float32(RATES), np.float32(gamma))
      diverged, validation, test = (np.asarray(each, np.float64) for each in found)
      best = int(validation[:, :tuning].mean(1).argmax())
      out[arm] |= {
        f"diverged at depth {depth}": diverged[:, tuning:].mean(0).tolist(),
        f"accuracy at depth {depth}": test[best, tuning:].tolist(),
      }
  return out


def claim() -> Claim:
  """Stability and accuracy, at two depths."""

  def stable(depth, method, baseline):
    metric = f"diverged at depth {depth}"
    return Comparison("diverges less often", metric, method, baseline, "lower")

  def accurate(says, depth, method, baseline, margin=0.0):
    metric = f"accuracy at depth {depth}"
    return Comparison(says, metric, method, baseline, "higher", margin)

  slow = "gamma 0.01"
  return Claim(
    methods=("relinear",),
    paper="quadratic networks trained this way beat conventional ones of the same "
    "structure, where generic training collapses",
    setting="MLPs of 2 and 5 quadratic layers of width 32 on the digits, SGD with "
    f"momentum 0.9, batch {BATCH}, {STEPS} steps; every arm at the rates {RATES}: the "
    "share that diverges, and the test accuracy at the rate that is best on "
    f"validation data (a diverged run counts as chance, {CHANCE}).",
    measure=measure,
    comparisons=(
      stable(2, slow, "random"),
      stable(5, slow, "random"),
      stable(5, slow, "free"),
      accurate("beats random initialisation", 2, slow, "random"),
      accurate("beats random initialisation", 5, slow, "random"),
      accurate("beats free training", 5, slow, "free"),
      accurate("no worse than linear neurons", 5, slow, "linear", -0.01),
      accurate("beats linear neurons", 5, slow, "linear"),
    ),
  )
