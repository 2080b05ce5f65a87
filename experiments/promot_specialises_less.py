"""ProMoT beside fine-tuning and prompt tuning of a pretrained byte-level decoder.

``python -m gradlab.launch.claims --only=promot_specialises_less``
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from gradlab.claims import TUNING_SEEDS, Claim, Comparison, Results
from gradlab.data import index_block
from gradlab.models import decoder
from gradlab.sources import stdlib_bytes
from gradlab.transforms.updates import attach_prompt, init_prompt, promot

CONTEXT, TOKENS, BATCH, STEPS = 40, 8, 16, 160
YES, NO, ASK = ord("Y"), ord("N"), b" #def? "
# Steps of the first stage, rate of the prompt, rate of the model: as many per arm.
GRIDS = {
  "fine-tuning": [(0, 0.0, r) for r in (3e-4, 1e-3, 3e-3, 1e-2)],
  "prompt tuning": [(STEPS, r, 0.0) for r in (0.03, 0.1, 0.3, 1.0)],
  "ProMoT": [(STEPS // 2, p, r) for p in (0.1, 0.3) for r in (1e-3, 3e-3)],
}


def questions(text: np.ndarray, limit: int) -> dict[str, np.ndarray]:
  """Lines of the text, half of them the start of a def, each with the question."""
  width = CONTEXT - len(ASK)
  lines = [line for line in bytes(text.astype(np.uint8)).split(b"\n") if line.strip()]
  asked: dict[bool, list[list[int]]] = {True: [], False: []}
  for line in lines:
    padded = line[:width].rjust(width, b"\n")
    asked[line.strip().startswith(b"def ")].append(list(padded + ASK))
  count = min(limit // 2, len(asked[True]))
  stride = len(asked[False]) // count
  inputs = asked[True][:count] + asked[False][::stride][:count]
  label = [YES] * count + [NO] * count
  return {"inputs": np.array(inputs, np.int32), "label": np.array(label, np.int32)}


def measure(seeds: Sequence[int], folder: Path, smoke: bool) -> Results:
  """One pretrained model, one program for every run."""
  data, model = stdlib_bytes(context=CONTEXT), decoder()
  pretraining, steps = (2, 2) if smoke else (500, STEPS)
  splits = {
    name: questions(
      getattr(data, name)["inputs"].ravel(), 2000 if name == "train" else 200
    )
    for name in ("train", "validation", "test")
  }
  text = {k: jnp.asarray(x[:: len(x) // 64][:64]) for k, x in data.test.items()}

  def logits(params, inputs, prompt=None):
    """Of the model on [P; E(x)]: the prompt enters behind the embedding."""

    def attach(call, args, kwargs, context):
      out = call(*args, **kwargs)
      embeds = (context.module.name, context.method_name) == ("embed", "__call__")
      return attach_prompt(prompt, out) if embeds else out

    if prompt is None:
      return model.apply(params, {}, inputs)[0]
    with nn.intercept_methods(attach):
      return model.apply(params, {}, inputs)[0][:, TOKENS:]

  def text_loss(params, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return jnp.mean(losses(logits(params, batch["inputs"]), batch["label"]))

  def answers(params, batch, prompted):
    out = jax.lax.cond(
      prompted,
      lambda p: logits(p["model"], batch["inputs"], p["prompt"])[:, -1],
      lambda p: logits(p["model"], batch["inputs"])[:, -1],
      params,
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])
    return jnp.mean(loss), jnp.mean(jnp.argmax(out, -1) == batch["label"])

  @jax.jit
  def pretrain(params, batches):
    rule = optax.adam(optax.cosine_decay_schedule(3e-3, pretraining))

    def step(carry, batch):
      params, state = carry
      updates, state = rule.update(jax.grad(text_loss)(params, batch), state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, rule.init(params)), batches)[0][0]

  def batches(source, seed, count):
    rows = index_block(seed, 0, count, len(source["label"]), BATCH)
    return {name: jnp.asarray(values[rows]) for name, values in source.items()}

  start, _ = model.init(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))
  start = pretrain(start, batches(data.train, 0, pretraining))

  def generate(params, key):
    """Share of Y and N among 24 sampled bytes after each held-out window."""

    def grow(window, key):
      byte = jax.random.categorical(key, logits(params, window)[:, -1])
      return jnp.concatenate([window[:, 1:], byte[:, None]], 1), byte

    _, written = jax.lax.scan(grow, text["inputs"], jax.random.split(key, 24))
    return jnp.mean((written == YES) | (written == NO))

  @jax.jit
  def train(point, seed, stream, given):
    switch, prompt_rate, rate = point
    table = start["embed"]["embedding"]
    prompt = init_prompt(jax.random.key(seed), TOKENS, table.shape[1], table)
    params = {"prompt": prompt, "model": start}
    rule = promot(
      optax.adam(prompt_rate),
      optax.adam(rate),
      switch.astype(jnp.int32),
      {"prompt": True, "model": False},
    )
    prompted = switch > 0

    def step(carry, batch):
      params, state = carry
      slope = jax.grad(lambda params: answers(params, batch, prompted)[0])(params)
      updates, state = rule.update(slope, state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), stream)
    loss, accuracy = answers(params, given, prompted)
    return {
      "task loss": loss,
      "task accuracy": accuracy,
      "text loss": text_loss(params["model"], text),
      "share of Y and N": generate(params["model"], jax.random.key(seed)),
    }

  def run(point, seed, split):
    """The metrics of one run."""
    stream = batches(splits["train"], seed, steps)
    given = {name: jnp.asarray(x) for name, x in splits[split].items()}
    found = train(tuple(jnp.float32(point)), jnp.uint32(seed), stream, given)
    return {name: float(x) for name, x in found.items()}

  results = {}
  for label, grid in GRIDS.items():

    def loss(point):
      return sum(run(point, seed, "validation")["task loss"] for seed in TUNING_SEEDS)

    best = min(grid[:1] if smoke else grid, key=loss)
    rows = [run(best, seed, "test") for seed in seeds]
    results[label] = {name: [row[name] for row in rows] for name in rows[0]}
  return results


def claim() -> Claim:
  """As good on the task, less harm elsewhere."""
  ours, tuned, prompt = "ProMoT", "fine-tuning", "prompt tuning"
  return Claim(
    methods=("promot",),
    paper="close to fine-tuning on the task, most of the pretrained abilities kept",
    setting=f"Byte-level decoder (2 layers, width 64) pretrained on the standard "
    f"library's source; 'does this line start a def?', answered Y or N, {STEPS} Adam "
    f"steps per arm (ProMoT: half of them on {TOKENS} prompt tokens); four points per "
    "arm, chosen by validation loss of the task.",
    measure=measure,
    comparisons=(
      Comparison("close on the task", "task accuracy", ours, tuned, "higher", -0.03),
      Comparison("less lost on text", "text loss", ours, tuned, "lower"),
      Comparison("fewer leaked answers", "share of Y and N", ours, tuned, "lower"),
      Comparison("better than its prompt", "task accuracy", ours, prompt, "higher"),
    ),
  )
