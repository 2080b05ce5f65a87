"""Teachers that look ahead against a mean teacher, on digits with few labels.

``python -m gradlab.launch.claims --only=future_self_training_labels_better``
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.claims import TUNING_SEEDS, Claim, Comparison
from gradlab.models import mlp
from gradlab.sources import digits
from gradlab.transforms.updates import fst

MODEL = mlp(features=(64, 64), outputs=10)
LABELLED, STEPS = 54, 500  # 5 % of 1078 training examples
GRID = tuple(itertools.product((0.03, 0.1, 0.3), (0.9, 0.99, 0.999)))
THRESHOLD = 0.968  # the paper's, for a confident teacher


class Arm(NamedTuple):
  """How far ahead, and how many iterations for each of the shortest arm's."""

  mode: str
  num_ahead: int
  times: int = 1


ARMS = {
  "none": Arm("none", 1),
  "none, 4x iterations": Arm("none", 1, 4),
  "deep 1": Arm("deep", 1),
  "deep 3": Arm("deep", 3),
  "wide 3": Arm("wide", 3),
}


def logits(params: Any, inputs: jax.Array) -> jax.Array:
  """The network's outputs [..., 10]."""
  out: jax.Array = MODEL.apply(params, {}, inputs)[0]
  return out


def accuracy(params: Any, split: Mapping[str, jax.Array]) -> jax.Array:
  """The share of examples whose greatest output is the label's."""
  return jnp.mean(jnp.argmax(logits(params, split["inputs"]), -1) == split["label"])


class Task(NamedTuple):
  """What all arms share under one seed: the start, the labels, the order of batches.

  Attributes:
    params: the network's first parameters.
    labelled: the rows of the training split whose labels are known.
    few: [T, 32] which of them each batch has.
    many: [T, 64] which training rows it has without a label.
    keep: [T, 64, pixels] which pixels of those the student sees.
  """

  params: Any
  labelled: jax.Array
  few: jax.Array
  many: jax.Array
  keep: jax.Array


def make_task(key: jax.Array, train: Any, steps: int) -> Task:
  """The task of one seed."""
  init_key, label_key, few_key, many_key, keep_key = jax.random.split(key, 5)
  count, pixels = train["inputs"].shape
  return Task(
    MODEL.init(init_key, train["inputs"][:1])[0],
    jax.random.permutation(label_key, count)[:LABELLED],
    jax.random.randint(few_key, (steps, 32), 0, LABELLED),
    jax.random.randint(many_key, (steps, 64), 0, count),
    jax.random.bernoulli(keep_key, 2 / 3, (steps, 64, pixels)),
  )


def loss(params: Any, teacher: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
  """Cross entropy on labels and, by the teacher's confidence, on pseudo-labels."""
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  seen = jax.lax.stop_gradient(jax.nn.softmax(logits(teacher, batch["clean"])))
  weight = jnp.mean(jnp.max(seen, -1) >= THRESHOLD)
  dropped = batch["clean"] * batch["keep"]
  outputs = logits(params, jnp.concatenate([batch["inputs"], dropped]))
  each = cross_entropy(outputs, jnp.concatenate([batch["label"], jnp.argmax(seen, -1)]))
  return jnp.mean(each[:32]) + weight * jnp.mean(each[32:])


def run(
  task: Task, rate: jax.Array, decay: jax.Array, splits: Any, arm: Arm, steps: int
) -> tuple[jax.Array, ...]:
  """Validation and test accuracy of the student, mean accuracy of pseudo-labels."""
  train, validation, test = splits
  init, step = fst(
    optax.sgd(rate, momentum=0.9),
    ema_decay=decay,
    num_ahead=arm.num_ahead,
    mode=arm.mode,
  )

  def at(t: jax.Array) -> dict[str, jax.Array]:
    few, many = task.labelled[task.few[t]], task.many[t]
    return {
      "inputs": train["inputs"][few],
      "label": train["label"][few],
      "clean": train["inputs"][many],
      "keep": task.keep[t],
    }

  def iterate(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
    batch, futures = at(t), None
    if arm.mode == "wide":
      futures = jax.vmap(at)(t + 1 + jnp.arange(arm.num_ahead))
    state, _ = step(state, batch, jax.grad(loss), futures)
    pseudo = jnp.argmax(logits(state.teacher, batch["clean"]), -1)
    return state, jnp.mean(pseudo == train["label"][task.many[t]])

  times = jnp.arange(steps * arm.times)
  state, correct = jax.lax.scan(iterate, init(task.params), times)
  student = state.params
  return accuracy(student, validation), accuracy(student, test), jnp.mean(correct)


def measure(
  seeds: Sequence[int], folder: Path, smoke: bool
) -> Mapping[str, Mapping[str, Sequence[float]]]:
  """Every arm at the rate and decay of its best validation accuracy on tuning seeds."""
  del folder
  source, steps = digits(), 2 if smoke else STEPS
  grid = jnp.array(GRID[:1] if smoke else GRID)
  splits = jax.tree.map(jnp.asarray, (source.train, source.validation, source.test))
  tasks = jax.jit(jax.vmap(lambda key: make_task(key, splits[0], 4 * steps)))
  tuning, final = (
    tasks(jnp.stack([jax.random.key(seed) for seed in some]))
    for some in (TUNING_SEEDS[: len(seeds)] if smoke else TUNING_SEEDS, seeds)
  )
  found = {}
  for label, arm in ARMS.items():
    one = functools.partial(run, splits=splits, arm=arm, steps=steps)
    over_seeds = jax.vmap(one, in_axes=(0, None, None))
    over_grid = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, 0)))
    tuned, _, _ = over_grid(tuning, *grid.T)
    best = grid[np.asarray(tuned).mean(axis=1).argmax()]
    _, test, pseudo = over_grid(final, *best[:, None])
    found[label] = {
      "test/accuracy": np.asarray(test)[0].tolist(),
      "pseudo-labels/accuracy": np.asarray(pseudo)[0].tolist(),
    }
  return found


def claim() -> Claim:
  """Deep ahead of plain, plain not behind the mean teacher, deep ahead of wide."""
  student, pseudo = "test/accuracy", "pseudo-labels/accuracy"
  return Claim(
    methods=("future_self_training",),
    paper="A teacher that follows students that look ahead labels better; three steps "
    "deep beat one, and beat three side by side.",
    setting=f"digits, {LABELLED} labels, MLP 64-64, SGD with momentum, {STEPS} "
    "iterations; rate and decay of the teacher tuned over 3 x 3 points per arm on "
    "validation accuracy",
    measure=measure,
    comparisons=(
      Comparison(
        "deep beats a mean teacher, iterations equal",
        student,
        "deep 3",
        "none",
        "higher",
      ),
      Comparison(
        "deep beats a mean teacher, gradients equal",
        student,
        "deep 3",
        "none, 4x iterations",
        "higher",
      ),
      Comparison("three steps ahead beat one", student, "deep 3", "deep 1", "higher"),
      Comparison(
        "one step ahead is no worse than none",
        student,
        "deep 1",
        "none",
        "higher",
        -0.01,
      ),
      Comparison("deep beats wide", student, "deep 3", "wide 3", "higher"),
      Comparison("better pseudo-labels", pseudo, "deep 3", "none", "higher"),
      Comparison(
        "better pseudo-labels, gradients equal",
        pseudo,
        "deep 3",
        "none, 4x iterations",
        "higher",
      ),
    ),
  )
