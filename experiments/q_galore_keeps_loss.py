"""Q-GaLore's four savings, each alone and all together, on a byte-level decoder.

``python -m gradlab.launch.claims --only=q_galore_keeps_loss``
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.claims import TUNING_SEEDS, Claim, Comparison
from gradlab.models import decoder
from gradlab.sources import stdlib_bytes
from gradlab.transforms.objectives import next_token
from gradlab.transforms.updates import q_galore, quantize_params

STEPS, BATCH, CONTEXT, GAP = 160, 8, 64, 5
RATES = {"galore": (1.2e-2, 2.4e-2, 4.8e-2), "adamw": (1.5e-3, 3e-3, 6e-3)}
GALORE = {
  "rank": 16,
  "update_proj_gap": GAP,
  "queue_size": 3,
  "proj_group_size": 64,
  "weight_group_size": 64,
  # The smallest moments, of a 64 x 64 matrix, are 64 x 16.
  "min_8bit_size": 1024,
}
SWITCHES = ("quantize_projector", "lazy", "quantize_moments", "quantize_weights")
ARMS = {
  "GaLore": {},
  "one fixed subspace": {"update_proj_gap": 10 * STEPS},
  "INT4 projector": {"quantize_projector": True},
  "lazy": {"lazy": True},
  "8-bit moments": {"quantize_moments": True},
  "INT8 nearest": {"quantize_weights": True, "stochastic_rounding": False},
  "INT8 stochastic": {"quantize_weights": True},
  "all together": dict.fromkeys(SWITCHES, True),
}
MODEL = decoder(num_layers=2, width=64, num_heads=4)


def _windows(split, count, seed=0):
  rows = np.random.default_rng(seed).choice(len(split["inputs"]), count, replace=False)
  return {name: jnp.asarray(split[name][rows]) for name in ("inputs", "label")}


@jax.jit
def _loss(params, batch):
  outputs, _ = MODEL.apply(params, {}, batch["inputs"])
  return next_token(outputs, batch)[0]


def _transform(arm, rate, seed, steps):
  shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10 + 1, steps + 1)

  def schedule(count):
    return rate * shape(count)

  if arm == "adamw":
    return optax.adamw(schedule, weight_decay=0.0)
  options = {**GALORE, **dict.fromkeys(SWITCHES, False), **ARMS[arm]}
  return q_galore(schedule, seed_key=seed, **options)


def _bytes(arm, params, state):
  """Bytes per parameter of the optimiser's state and of the weights as stored."""
  if ARMS.get(arm, {}).get("quantize_weights"):
    stored = functools.partial(quantize_params, storage=True, weight_group_size=64)
    weights = jax.eval_shape(stored, params)
  else:
    weights = params
  if arm != "adamw":
    state = state._replace(key=None)
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((weights, state)))
  return held / sum(x.size for x in jax.tree.leaves(params))


def _train(arm, steps, train, seed, rate):
  """The parameters after training and the state of the rule."""
  key = jax.random.key(seed)
  params, _ = MODEL.init(key, train["inputs"][:1])
  if ARMS.get(arm, {}).get("quantize_weights"):
    params = quantize_params(params, weight_group_size=64)
  transform = optax.chain(
    optax.clip_by_global_norm(1.0), _transform(arm, rate, seed, steps)
  )

  def step(carry, k):
    params, state = carry
    draw = jax.random.fold_in(key, k)
    rows = jax.random.randint(draw, (BATCH,), 0, len(train["inputs"]))
    batch = jax.tree.map(lambda x: x[rows], train)
    gradient = jax.grad(_loss)(params, batch)
    updates, state = transform.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  carry = params, transform.init(params)
  (params, (_, state)), _ = jax.lax.scan(step, carry, jnp.arange(steps))
  return params, state


def _metrics(arm, data, params, state):
  return {
    "validation/loss": float(_loss(params, data["validation"])),
    "test/loss": float(_loss(params, data["test"])),
    "SVDs": float(sum(p.num_svd.sum() for p in _projectors(arm, params, state))),
    "bytes per parameter": _bytes(arm, params, state),
  }


def _projectors(arm, params, state):
  if arm == "adamw":
    return []
  nodes = jax.tree.structure(params).flatten_up_to(state.projector)
  return [node for node in nodes if node != optax.MaskedNode()]


def measure(seeds, folder, smoke):
  """The rate of GaLore, shared by all its variants, and of AdamW are tuned alike."""
  del folder
  source = stdlib_bytes(context=CONTEXT)
  data = {
    "train": _windows(source.train, 8192),
    "validation": _windows(source.validation, 512),
    "test": _windows(source.test, 512),
  }
  steps = 2 if smoke else STEPS
  out, best = {}, {}
  for arm in ("all together",) if smoke else (*ARMS, "adamw"):
    # Seeds in turn: under vmap every step would pay for the decompositions.
    train = jax.jit(functools.partial(_train, arm, steps))

    def run(seed, rate, arm=arm, train=train):
      return _metrics(arm, data, *train(data["train"], seed, rate))

    group = "adamw" if arm == "adamw" else "galore"
    if group not in best:
      losses = [
        sum(run(seed, rate)["validation/loss"] for seed in TUNING_SEEDS)
        for rate in RATES[group]
      ]
      best[group] = RATES[group][int(np.nanargmin(losses))]
    runs = [run(seed, best[group]) for seed in seeds]
    out[arm] = {name: [r[name] for r in runs] for name in runs[0]}
  if smoke:  # the arm that uses everything stands for all
    out = dict.fromkeys((*ARMS, "adamw"), out["all together"])
  scheduled = out["GaLore"]["SVDs"]
  return {
    arm: {**found, "share of SVDs": list(np.divide(found["SVDs"], scheduled))}
    for arm, found in out.items()
  }


def claim() -> Claim:
  """All four together lose nothing; laziness saves decompositions."""
  test = "test/loss"
  return Claim(
    methods=("q_galore", "low_rank_projection"),
    paper="INT4 projectors, lazy refreshes, 8-bit moments and stochastically rounded "
    "INT8 weights keep the loss of GaLore and of full-rank training",
    setting=f"Byte-level decoder of 2 layers, width 64, rank 16, {STEPS} steps of "
    f"{BATCH} x {CONTEXT} bytes; GaLore's rate (one for its variants) from "
    f"{RATES['galore']}, AdamW's from {RATES['adamw']} by validation loss.",
    measure=measure,
    comparisons=(
      Comparison(
        "together as low as GaLore", test, "all together", "GaLore", "lower", -0.03
      ),
      Comparison("GaLore as low as AdamW", test, "GaLore", "adamw", "lower", -0.03),
      Comparison(
        "INT4 projector costs nothing", test, "INT4 projector", "GaLore", "lower", -0.03
      ),
      Comparison(
        "8-bit moments cost nothing", test, "8-bit moments", "GaLore", "lower", -0.03
      ),
      Comparison(
        "a third of the SVDs saved", "share of SVDs", "lazy", "GaLore", "lower", 1 / 3
      ),
      Comparison(
        "stochastic beats nearest", test, "INT8 stochastic", "INT8 nearest", "lower"
      ),
      Comparison("refreshing helps", test, "GaLore", "one fixed subspace", "lower"),
    ),
  )
