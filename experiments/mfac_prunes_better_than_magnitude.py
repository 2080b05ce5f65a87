"""A digits MLP pruned in one shot by what M-FAC's Fisher says, and by magnitude.

``python -m gradlab.launch.claims --only=mfac_prunes_better_than_magnitude``
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from gradlab.claims import TUNING_SEEDS, Claim, Comparison, Results
from gradlab.data import index_block
from gradlab.models import mlp
from gradlab.sources import digits
from gradlab.transforms.updates import fisher_inverse_diag

SPARSITY, STEPS, WINDOW = 0.9, 330, 512
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def measure(seeds: Sequence[int], folder: Path, smoke: bool) -> Results:
  """Every seed trains one network, which is then pruned in both ways."""
  del folder
  data, model, steps = digits(), mlp(features=(32,)), 2 if smoke else STEPS
  train, validation, test = (
    jax.tree.map(jnp.asarray, part) for part in (data.train, data.validation, data.test)
  )
  start, _ = model.init(jax.random.key(0), train["inputs"][:1])
  unravel, rule = ravel_pytree(start)[1], optax.adam(1e-2)

  def loss(flat, batch):
    logits, _ = model.apply(unravel(flat), {}, batch["inputs"])
    found = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    right = jnp.argmax(logits, -1) == batch["label"]
    return jnp.mean(found), jnp.mean(right.astype(jnp.float32))

  gradient = jax.grad(loss, has_aux=True)

  @jax.jit
  @jax.vmap
  def trained(key, rows):
    def step(carry, rows):
      flat, state = carry
      batch = jax.tree.map(lambda x: x[rows], train)
      updates, state = rule.update(gradient(flat, batch)[0], state)
      return (optax.apply_updates(flat, updates), state), None

    flat = ravel_pytree(model.init(key, train["inputs"][:1])[0])[0]
    return jax.lax.scan(step, (flat, rule.init(flat)), rows)[0][0]

  @jax.jit
  def pruned(flat, damping):
    """By magnitude (damping 0) or by Fisher: test and validation accuracy, loss."""
    examples = jax.tree.map(lambda x: x[:WINDOW, None], train)
    grads = jax.lax.map(lambda one: gradient(flat, one)[0], examples, batch_size=64)
    diagonal = fisher_inverse_diag(grads, jnp.where(damping > 0, damping, 1.0))
    score = jnp.square(flat) / jnp.where(damping > 0, 2 * diagonal, 2.0)
    kept = jnp.argsort(jnp.argsort(score)) >= round(SPARSITY * flat.size)
    left = jnp.where(kept, flat, 0)
    return jnp.stack(
      [loss(left, test)[1], loss(left, validation)[1], loss(left, train)[0]]
    )

  def networks(seeds):
    size = len(data.train["label"])
    rows = np.stack([index_block(seed, 0, steps, size, 64) for seed in seeds])
    return trained(jnp.stack([jax.random.key(seed) for seed in seeds]), rows)

  best = DAMPINGS[0]
  if not smoke:
    tried = [
      [float(pruned(flat, damping)[1]) for flat in networks(TUNING_SEEDS)]
      for damping in DAMPINGS
    ]
    best = DAMPINGS[int(np.argmax(np.mean(tried, axis=1)))]
  found = {}
  for arm, damping in (("magnitude", 0.0), ("mfac", best)):
    numbers = np.stack([pruned(flat, damping) for flat in networks(seeds)])
    found[arm] = {
      "test accuracy": numbers[:, 0].tolist(),
      "train loss": numbers[:, 2].tolist(),
    }
  return found


def claim() -> Claim:
  """Without any training after the pruning."""
  return Claim(
    methods=("mfac",),
    paper="better one-shot pruning through the diagonal of the inverse Fisher",
    setting=f"Digits, MLP 64-32-10, {STEPS} steps of Adam, then {SPARSITY:.0%} of all "
    f"parameters pruned by theta^2 / (2 [F^-1]_ii) of {WINDOW} examples' gradients or "
    f"by magnitude; damping tuned over {DAMPINGS} by validation accuracy.",
    measure=measure,
    comparisons=(
      Comparison("higher accuracy", "test accuracy", "mfac", "magnitude", "higher"),
      Comparison("lower training loss", "train loss", "mfac", "magnitude", "lower"),
    ),
  )
