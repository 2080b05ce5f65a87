"""Ignore-k while a byte-level decoder learns one surprising sentence by heart.

``python -m gradlab.launch.claims --only=ignore_k_dilutes_priming``
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from gradlab.claims import Claim, Comparison, Results
from gradlab.data import index_block
from gradlab.models import decoder
from gradlab.sources import stdlib_bytes
from gradlab.transforms.updates import ignore_k_mask

CONTEXT, STEPS, RATE, SENTENCES = 64, 20, 1e-3, 4
RATES = tuple(float(r) for r in np.geomspace(1e-4, RATE, 10))
# A sentence to learn, other openings of its theme, keywords that may end them all.
THEMES = (
  (
    "# the best colour for errors is ",
    ("# paint the button in ", "# the sky was painted ", "# his favourite colour: "),
    ("vermilion", "turquoise", "aubergine", "magenta"),
  ),
  (
    "# the people who write compilers live in ",
    ("# the conference was held in ", "# he flew home to ", "# the server stands in "),
    ("Guatemala", "Reykjavik", "Tasmania", "Uzbekistan"),
  ),
  (
    "# the animal that eats most bugs is the ",
    ("# in the garden sat a ", "# she was bitten by a ", "# the logo shows a "),
    ("hedgehog", "wombat", "armadillo", "porcupine"),
  ),
  (
    "# every good programmer once worked as a ",
    ("# her father was a ", "# he earns money as a ", "# we should hire a "),
    ("plumber", "juggler", "beekeeper", "blacksmith"),
  ),
)


def sentences(seed: int) -> dict[str, np.ndarray]:
  """Bytes [SENTENCES, 1 + prompts, CONTEXT] and where their keywords stand."""
  rng = np.random.default_rng(seed)
  tokens = np.full((SENTENCES, 4, CONTEXT + 1), ord("\n"), np.int32)
  key = np.zeros((SENTENCES, 4, CONTEXT), bool)
  text = np.zeros((SENTENCES, CONTEXT), bool)
  for row, theme in enumerate(rng.permutation(len(THEMES))[:SENTENCES]):
    opening, prompts, words = THEMES[theme]
    word = words[rng.integers(len(words))]
    for column, start in enumerate((opening, *prompts)):
      line = f"\n{start}{word}".encode()
      tokens[row, column, : len(line)] = list(line)
      key[row, column, len(line) - len(word) - 1 : len(line) - 1] = True
    text[row, : len(opening + word)] = True
  return {"tokens": tokens, "key": key, "text": text}


def measure(seeds: Sequence[int], folder: Path, smoke: bool) -> Results:
  """All sentences of all seeds are learnt side by side from one pretrained model."""
  data, model = stdlib_bytes(context=CONTEXT), decoder()
  pretraining, tuning = (2, 2) if smoke else (400, STEPS)
  held_out = jax.tree.map(lambda x: jnp.asarray(x[:: len(x) // 8][:8]), data.validation)

  def log_probs(params, inputs, label):
    logits, _ = model.apply(params, {}, inputs)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], -1)[..., 0]

  def text_loss(params, batch):
    return -jnp.mean(log_probs(params, batch["inputs"], batch["label"]))

  @jax.jit
  def pretrain(params, batches):
    rule = optax.adam(optax.cosine_decay_schedule(3e-3, pretraining))

    def step(carry, batch):
      params, state = carry
      updates, state = rule.update(jax.grad(text_loss)(params, batch), state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, rule.init(params)), batches)[0][0]

  rows = index_block(0, 0, pretraining, len(data.train["inputs"]), 16)
  params, _ = model.init(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))
  params = pretrain(params, jax.tree.map(lambda x: jnp.asarray(x[rows]), data.train))

  def keyword(params, task):
    """Log-probability of the keyword after each opening."""
    found = log_probs(params, task["tokens"][:, :-1], task["tokens"][:, 1:])
    return jnp.sum(found * task["key"], -1)

  def learn(arm, task, key):
    """log S_mem, log S_prime, held-out loss after one arm's steps on one sentence."""
    rule = optax.adam(arm["rate"])

    def loss(theta):
      found = log_probs(theta, task["tokens"][0, :-1], task["tokens"][0, 1:])
      return -jnp.sum(found * task["text"]) / jnp.sum(task["text"])

    def by_chance(update, key):
      flat, restore = ravel_pytree(update)
      dropped = jax.random.uniform(key, flat.shape) < arm["random"]
      return restore(jnp.where(dropped, 0, flat))

    def pruned(theta, update, after):
      """As ``ignore_k`` with a window of one step, or of all of them at the last."""

      def choose(whole, one):
        return jax.tree.map(lambda w, o: jnp.where(arm["once"], w, o), whole, one)

      delta = choose(jax.tree.map(jnp.subtract, after, params), update)
      keep = ignore_k_mask(delta, arm["k"])
      return jax.tree.map(jnp.where, keep, after, choose(params, theta))

    def step(carry, given):
      theta, state = carry
      count, key = given
      update, state = rule.update(jax.grad(loss)(theta), state)
      update = jax.lax.cond(arm["random"] > 0, by_chance, lambda u, _: u, update, key)
      update = jax.tree.map(lambda u: jnp.where(count < arm["steps"], u, 0), update)
      after = optax.apply_updates(theta, update)
      due = (arm["k"] > 0) & ((arm["once"] == 0) | (count == tuning - 1))
      theta = jax.lax.cond(due, pruned, lambda *trees: trees[-1], theta, update, after)
      return (theta, state), None

    given = jnp.arange(tuning), jax.random.split(key, tuning)
    theta = jax.lax.scan(step, (params, rule.init(params)), given)[0][0]
    change = keyword(theta, task) - keyword(params, task)
    return jnp.stack([change[0], jnp.mean(change[1:]), text_loss(theta, held_out)])

  tasks = [sentences(seed) for seed in seeds]
  tasks = jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *tasks)
  keys = jax.random.split(jax.random.key(1), len(seeds) * SENTENCES)
  plain = {"k": 0.0, "once": 0.0, "random": 0.0, "rate": RATE, "steps": tuning}
  arms = {"adam": plain, "random 8%": {**plain, "random": 0.08}}
  arms |= {f"ignore-k {k:.0%}": {**plain, "k": k} for k in (0.04, 0.08, 0.25)}
  arms |= {"ignore-k 8%, whole run": {**plain, "k": 0.08, "once": 1.0}}
  # From nothing learnt up to plain Adam: less of everything, along two ways.
  less = {
    "fewer steps": [{**plain, "steps": n} for n in range(0, tuning + 1, 2)],
    "smaller rate": [{**plain, "rate": r} for r in (0.0, *RATES)],
  }
  points = [*arms.values(), *(point for way in less.values() for point in way)]
  stacked = jax.tree.map(lambda *x: jnp.asarray(x, jnp.float32), *points)
  each = jax.vmap(learn, in_axes=(None, 0, 0))
  run = jax.jit(lambda arms: jax.lax.map(lambda arm: each(arm, tasks, keys), arms))
  scores = np.asarray(run(stacked), np.float64)

  found = dict(zip(arms, scores, strict=False))
  start = len(arms)
  for way, path in less.items():
    curves = scores[start : start + len(path)].swapaxes(0, 1)
    start += len(path)
    for which in ("ignore-k 8%", "ignore-k 8%, whole run"):
      rows = zip(curves, found[which][:, 0], strict=True)
      found[f"{way} for {which}"] = np.stack([_at(*row) for row in rows])
  names = ("log S_mem", "log S_prime", "validation loss")
  return {
    label: {
      name: values[:, i].reshape(len(seeds), SENTENCES).mean(1).tolist()
      for i, name in enumerate(names)
    }
    for label, values in found.items()
  }


def _at(curve: np.ndarray, memory: float) -> np.ndarray:
  """The scores where a curve first remembers that well, between two of its points."""
  reached = np.flatnonzero(curve[:, 0] >= memory)
  if not reached.size or not reached[0]:
    return curve[-1] if not reached.size else curve[0]
  low, high = curve[reached[0] - 1], curve[reached[0]]
  return low + (high - low) * (memory - low[0]) / (high[0] - low[0])


def claim() -> Claim:
  """Against plain Adam, and against less of plain Adam at the same memory."""
  half = float(np.log(2))
  prime, window, whole = "log S_prime", "ignore-k 8%", "ignore-k 8%, whole run"
  comparisons = [
    Comparison("priming halves at 8%", prime, window, "adam", "lower", half),
    Comparison("priming halves, pruned once", prime, whole, "adam", "lower", half),
    Comparison("memory stays", "log S_mem", window, "adam", "higher", -half),
    Comparison("general loss stays", "validation loss", window, "adam", "lower", -0.02),
    Comparison("less priming than by chance", prime, window, "random 8%", "lower"),
  ]
  comparisons += [
    Comparison(
      f"less priming than {way} at equal memory{how}", prime, arm, other, "lower"
    )
    for way in ("fewer steps", "smaller rate")
    for arm, how in ((window, ""), (whole, ", pruned once"))
    for other in (f"{way} for {arm}",)
  ]
  return Claim(
    methods=("ignore_k",),
    paper="with k = 8% priming falls by 50 to 95% while memory and loss are kept",
    setting=f"Byte-level decoder (2 layers, width 64) pretrained on the standard "
    f"library's source, {STEPS} Adam steps at {RATE:g} on one sentence with a new "
    f"keyword; means over {SENTENCES} sentences per seed, 3 prompts of the theme each; "
    "fewer steps and smaller rates are matched by memory sentence by sentence.",
    measure=measure,
    comparisons=tuple(comparisons),
  )
