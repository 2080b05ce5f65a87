"""Gradient reversal against two domains of digits: labels from one, tests on the other.

``python -m gradlab.launch.claims --only=gradient_reversal_hides_the_domain``
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.claims import TUNING_SEEDS, Claim, Comparison
from gradlab.sources import digits
from gradlab.transforms.cotangents import (
  adversarial_multitask_loss,
  reversal_schedule,
)

STEPS, BATCH, BLOCKS = 1000, 64, 10
GRID = tuple(itertools.product((0.01, 0.03, 0.1), (0.3, 1.0)))
ENCODER, HEAD, CRITIC = (64, 64, 64), (64, 10), (64, 64, 2)
ARMS = ("source only", "constant", "schedule")


def other(x):
  """The second domain: the digits turned by 90 degrees."""
  return np.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)


def layers(key, widths):
  """He-initialised dense layers."""
  keys = jax.random.split(key, len(widths) - 1)
  return [
    (jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, jnp.zeros(n))
    for k, (m, n) in zip(keys, itertools.pairwise(widths), strict=True)
  ]


def dense(params, x):
  """Dense layers with ReLU between them."""
  for index, (w, b) in enumerate(params):
    x = (jax.nn.relu(x) if index else x) @ w + b
  return x


def encode(params, x):
  """The features that both heads read."""
  return jax.nn.relu(dense(params["encoder"], x))


def domains(x, y):
  """Both inputs in one array, and which domain each row is from."""
  return jnp.concatenate([x, y]), np.repeat(np.arange(2), len(x))


def probe(features, domain, test_features, test_domain):
  """Accuracy of a ridge regression that reads the domain from frozen features."""
  mean, std = features.mean(0), features.std(0) + 1e-3

  def rows(h):
    return jnp.concatenate([(h - mean) / std, jnp.ones((len(h), 1))], axis=1)

  x, sign = rows(features), 2.0 * domain - 1
  weights = jnp.linalg.solve(x.T @ x + jnp.eye(x.shape[1]), x.T @ sign)
  return jnp.mean((rows(test_features) @ weights > 0) == (test_domain == 1))


@functools.partial(jax.jit, static_argnums=4)
def train(arms, seeds, rates, weights, steps):
  """One run per entry of the arrays -> metrics [runs]."""
  data = digits()
  half = len(data.train["label"]) // 2
  source, target = data.train["inputs"][:half], other(data.train["inputs"][half:])
  labels = jnp.asarray(data.train["label"][:half])
  source, target = jnp.asarray(source), jnp.asarray(target[:half])

  def one(arm, seed, rate, weight):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
      name: layers(key, widths)
      for name, key, widths in zip(
        ("encoder", "head", "critic"), keys, (ENCODER, HEAD, CRITIC), strict=False
      )
    }
    sgd = optax.sgd(rate, 0.9)

    def loss(params, scale, rows):
      x, domain = domains(source[rows[0]], target[rows[1]])
      h = encode(params, x)
      main = optax.softmax_cross_entropy_with_integer_labels(
        dense(params["head"], h[:BATCH]), labels[rows[0]]
      )
      return adversarial_multitask_loss(
        jnp.mean(main),
        functools.partial(dense, params["critic"]),
        h,
        domain,
        scale=scale,
        weight=weight,
      )

    def step(state, count):
      key = jax.random.fold_in(keys[3], count)
      rows = jax.random.randint(key, (2, BATCH), 0, half)
      scales = jnp.stack([0.0, 1.0, reversal_schedule(count, num_steps=steps)])
      grads = jax.grad(loss)(state[0], scales[arm], rows)
      updates, inner = sgd.update(grads, state[1])
      return (optax.apply_updates(state[0], updates), inner), None

    def accuracy(params, split):
      logits = dense(params["head"], encode(params, other(split["inputs"])))
      return jnp.mean(jnp.argmax(logits, 1) == split["label"])

    def block(state, counts):
      state, _ = jax.lax.scan(step, state, counts)
      return state, accuracy(state[0], data.test)

    counts = jnp.arange(steps).reshape(BLOCKS, -1)
    (params, _), trace = jax.lax.scan(block, (params, sgd.init(params)), counts)
    seen, domain = domains(source, target)
    unseen, test_domain = domains(data.test["inputs"], other(data.test["inputs"]))
    features, test_features = encode(params, seen), encode(params, unseen)
    return {
      "validation": accuracy(params, data.validation),
      "target accuracy": trace[-1],
      "swing": jnp.std(trace[BLOCKS // 2 :]),
      "probe accuracy": probe(features, domain, test_features, test_domain),
    }

  return jax.vmap(one)(arms, seeds, rates, weights)


def measure(seeds, folder, smoke):
  """Every arm at its best point of one grid of rates and weights."""
  del folder
  steps, grid = (BLOCKS, GRID[:1]) if smoke else (STEPS, GRID)

  def run(arm, seeds, points):
    runs = [(seed, *point) for point in points for seed in seeds]
    columns = [jnp.asarray(column) for column in zip(*runs, strict=True)]
    found = train(jnp.full(len(runs), ARMS.index(arm)), *columns, steps)
    return {name: np.asarray(values, float) for name, values in found.items()}

  out = {}
  for arm in ARMS:
    best = grid[0]
    if len(grid) > 1:
      tuning = run(arm, TUNING_SEEDS, grid)["validation"]
      best = grid[int(np.argmax(tuning.reshape(len(grid), -1).mean(1)))]
    found = run(arm, seeds, [best])
    out[arm] = {name: values.tolist() for name, values in found.items()}
  return out


def claim() -> Claim:
  """Both forms of reversal against the source alone, and against each other."""

  def compare(says, metric, method, baseline, better):
    return Comparison(says, metric, method, baseline, better)

  reverse = [
    compare(f"{says}, {arm} scale", metric, arm, "source only", better)
    for arm in ("schedule", "constant")
    for says, metric, better in (
      ("better on the unlabelled domain", "target accuracy", "higher"),
      ("domain harder to read", "probe accuracy", "lower"),
    )
  ]
  last = ("schedule", "constant")
  return Claim(
    methods=("gradient_reversal",),
    paper="features from which the domain cannot be told transfer to the unlabelled "
    "domain; the scale is best raised gradually",
    setting="MLP on the digits, labels for plain images only, tested on images "
    f"turned by 90 degrees; {STEPS} steps of SGD with momentum, {BATCH} images per "
    f"domain; rate and weight of the domain loss from {GRID}, chosen for every arm by "
    "validation accuracy in the target domain; swing is the standard deviation over "
    "the second half.",
    measure=measure,
    comparisons=(
      *reverse,
      compare("schedule better than constant", "target accuracy", *last, "higher"),
      compare("schedule steadier than constant", "swing", *last, "lower"),
    ),
  )
