"""Optimiser states in 8 and 4 bits beside float32 ones, on the digits.

``python -m gradlab.launch.claims --only=quantised_moments_keep_accuracy``
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.claims import TUNING_SEEDS, Claim, Comparison
from gradlab.data import index_block
from gradlab.models import mlp
from gradlab.sources import digits
from gradlab.transforms.objectives import cross_entropy
from gradlab.transforms.updates import adamw, adan, diffgrad, quantised_moments

STEPS, BATCH = 300, 128
# Arrays below 4096 stay in float32: the kernel of the head and the biases.
MODEL = mlp(features=(128, 128))
RULES = {"adamw": adamw, "adan": adan, "diffgrad": diffgrad}
RATES = (3e-3, 1e-2)
# What counts as no worse, in nats of test loss.
MARGIN = 0.01


def update_rule(rule, bits, rate):
  """The rule with its states in so many bits."""
  plain = RULES[rule](rate)
  return plain if bits == 32 else quantised_moments(bits, plain)


def loss(params, batch):
  """Nats per digit."""
  return cross_entropy(MODEL.apply(params, {}, batch["inputs"])[0], batch)[0]


def train(rule, bits, rate, params, rows, split):
  """The parameters after as many steps as there are rows."""
  update = update_rule(rule, bits, rate)

  def step(carry, chosen):
    params, state = carry
    batch = jax.tree.map(lambda x: x[chosen], split)
    updates, state = update.update(jax.grad(loss)(params, batch), state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, update.init(params)), rows)[0][0]


def bytes_per_parameter(rule, bits):
  """Of the state, the arrays that are too small to be quantised included."""
  params, _ = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 64)))
  state = jax.eval_shape(update_rule(rule, bits, 0.1).init, params)
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  return held / sum(leaf.size for leaf in jax.tree.leaves(params))


def measure(seeds, folder, smoke):
  """Every arm at its best rate; all its runs, tuning and final, are one program."""
  del folder
  data = digits()
  splits = [
    jax.tree.map(jnp.asarray, dict(split))
    for split in (data.train, data.validation, data.test)
  ]
  every = [*TUNING_SEEDS, *seeds]
  count, steps = len(splits[0]["label"]), 2 if smoke else STEPS
  rows = np.stack([index_block(seed, 0, steps, count, BATCH) for seed in every])
  # Once for all arms: the start of every seed, and the losses of [rate, seed].
  inputs = splits[0]["inputs"][:1]
  start = jax.jit(jax.vmap(lambda seed: MODEL.init(jax.random.key(seed), inputs)[0]))
  params = start(jnp.asarray(every))
  measured = jax.jit(jax.vmap(jax.vmap(loss, (0, None)), (0, None)))
  out = {}
  for rule in RULES:
    for bits in (32, 8, 4):
      over_seeds = jax.vmap(functools.partial(train, rule, bits), (None, 0, 0, None))
      runs = jax.jit(jax.vmap(over_seeds, (0, None, None, None)))
      found = runs(jnp.asarray(RATES), params, jnp.asarray(rows), splits[0])
      validation, test = (np.asarray(measured(found, s), float) for s in splits[1:])
      tuning = validation[:, : len(TUNING_SEEDS)].mean(1)
      best = np.where(np.isfinite(tuning), tuning, np.inf).argmin()
      out[f"{rule} {bits}"] = {
        "loss": test[best, len(TUNING_SEEDS) :].tolist(),
        "bytes per parameter": [bytes_per_parameter(rule, bits)] * len(seeds),
      }
  return out


def claim() -> Claim:
  """Each rule with its states in 32, 8 and 4 bits."""

  def compare(says, metric, margin, bits):
    return [
      Comparison(f"{r}: {says}", metric, f"{r} {bits}", f"{r} 32", "lower", margin)
      for r in RULES
    ]

  return Claim(
    methods=("quantised_moments",),
    paper="8-bit states keep the accuracy of 32-bit ones at a quarter of the memory; "
    "4-bit ones (Li et al., 2023) at an eighth",
    setting=f"Two-layer MLP of width 128 on the digits, {STEPS} steps of batch {BATCH};"
    f" rate of every arm from {RATES} by validation loss; arrays below 4096 stay in "
    "float32.",
    measure=measure,
    comparisons=(
      *compare("8 bits no worse", "loss", -MARGIN, 8),
      *compare("4 bits no worse", "loss", -MARGIN, 4),
      *compare("8 bits are smaller", "bytes per parameter", 0.0, 8),
    ),
  )
