"""Parts inside parts: update rules in a transformation's place, keys of objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from gradlab import pipeline
from gradlab.transforms.updates import adan
from gradlab.types import ConfigError


def scaled(
  inner: optax.GradientTransformation, scale: float = 1.0
) -> optax.GradientTransformationExtraArgs:
  """A transformation that takes another one."""
  return optax.with_extra_args_support(optax.chain(inner, optax.scale(scale)))


def noisy(outputs, batch, *, key=None, label="label"):
  """A loss that shows the key it was given."""
  number = jax.random.uniform(jax.random.key(0) if key is None else key)
  del label
  loss = jnp.mean(jnp.square(outputs))
  return loss, {"number": number, "given": jnp.float32(key is not None)}


NAME = {"name": f"{__name__}:scaled"}


def _config(update, objective=None):
  return ConfigDict(
    {
      "data": {"name": "digits"},
      "model": {"name": "mlp", "features": (4,)},
      "stages": {
        "train": {
          "steps": 3,
          "batch_size": 8,
          "log_every": 1,
          "steps_per_dispatch": 3,
          "objective": objective or {"name": "cross_entropy"},
          "update": update,
        },
      },
    }
  )


def _program(update, objective=None):
  built = pipeline.build(_config(update, objective))
  batch = {"inputs": jnp.ones((8, 64)), "label": jnp.arange(8, dtype=jnp.int32)}
  return built.programs["train"], batch


def test_rules_in_a_transformations_place_are_that_chain():
  clip = {"name": "optax.clip_by_global_norm", "max_norm": 0.5}
  inner = {"clip": clip, "adan": {"learning_rate": 0.01}}
  program, batch = _program({"mine": {**NAME, "scale": 2.0, "inner": inner}})
  start = program.init(jax.random.key(1), batch["inputs"])
  after, _ = program.step(start, batch)
  plain, _ = _program({"adan": {"learning_rate": 0.01}})
  grads = _gradients(plain, start, batch)
  with jax.numpy_dtype_promotion("standard"):
    chained = optax.chain(optax.clip_by_global_norm(0.5), adan(0.01), optax.scale(2.0))
    updates, _ = chained.update(grads, chained.init(start.params), start.params)
  expected = optax.apply_updates(start.params, updates)
  for found, wanted in zip(
    jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True
  ):
    # the same float32 operations in another program
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


def _gradients(program, state, batch):
  """Of the stage's loss: what plain gradient descent at rate one takes away."""
  sgd, _ = _program({"sgd": {"name": "optax.sgd", "learning_rate": 1.0}})
  begun = sgd.init(jax.random.key(1), batch["inputs"], params=state.params)
  after, _ = sgd.step(begun._replace(model_state=state.model_state), batch)
  return jax.tree.map(jnp.subtract, state.params, after.params)


def test_floats_of_inner_rules_are_hyperparameters():
  rate = {"name": "warmup_cosine", "peak_value": 0.02, "warmup_steps": 1}
  inner = {"adan": {"learning_rate": {**rate, "decay_steps": 4}, "b1": 0.9}}
  program, batch = _program({"mine": {**NAME, "inner": inner}})
  assert program.hyperparams == {
    "update.mine.inner.adan.b1": 0.9,
    "update.mine.inner.adan.learning_rate.peak_value": 0.02,
  }
  state = program.init(jax.random.key(0), batch["inputs"])
  state, _ = program.step(state, batch)
  controlled = state.hyperparams["update.mine.inner.adan.learning_rate"]
  np.testing.assert_allclose(controlled, 0.02, rtol=1e-6)


def test_a_piece_that_goes_around_the_others_does_so_in_a_stage():
  pieces = {
    "low_rank_projection": {"rank": 2},
    "quantised_moments": {"bits": 8, "min_size": 0},
    "diffgrad": {"learning_rate": 0.01},
  }
  program, batch = _program(pieces)
  state = program.init(jax.random.key(0), batch["inputs"])
  (outer,) = state.update
  assert outer == "low_rank_projection"
  low = state.update[outer].inner["quantised_moments"].inner["diffgrad"]
  shapes = {x.shape for x in jax.tree.leaves(low) if x.dtype == jnp.uint8}
  assert (64, 2) in shapes  # the moments of the first layer in its subspace
  after, _ = program.step(state, batch)
  assert program.hyperparams["update.diffgrad.learning_rate"] == 0.01
  moved = jax.tree.map(lambda a, b: jnp.any(a != b), state.params, after.params)
  assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize(
  ("given", "says"),
  [
    ({"inner": {"adm": {}}}, r"mine\.inner\.adm: unknown updates method 'adm'"),
    ({"inner": {"adan": {"b": 1.0}}}, r"mine\.inner\.adan\.b: unknown argument"),
    ({"inner": {}}, r"mine\.inner: name at least one update rule\.$"),
    ({"inner": 3}, r"mine\.inner: expected updates, got 3 \(int\)\.$"),
    ({}, r"mine\.inner: missing; it has no default\.$"),
  ],
)
def test_a_mistake_inside_is_named_with_its_path(given, says):
  with pytest.raises(ConfigError, match=rf"^stages\.train\.update\.{says}"):
    pipeline.build(_config({"mine": {**NAME, **given}}))


def test_an_objective_that_asks_for_a_key_gets_a_new_one_each_step():
  program, batch = _program(
    {"adan": {"learning_rate": 0.0}}, {"name": f"{__name__}:noisy"}
  )
  state, drawn = program.init(jax.random.key(0), batch["inputs"]), []
  for _ in range(3):
    state, metrics = program.step(state, batch)
    assert metrics["given"] == 1
    drawn.append(float(metrics["number"]))
  assert len(set(drawn)) == 3


def test_a_mapping_of_bools_may_stand_where_anything_may():
  program, batch = _program(
    {
      "promot": {
        "prompt_tx": {"adamw": {"learning_rate": 0.1}},
        "model_tx": {"adan": {"learning_rate": 0.01}},
        "num_prompt_steps": 1,
        "is_prompt": {"head": True, "hidden_0": False},
      }
    }
  )
  state = program.init(jax.random.key(0), batch["inputs"])
  after, _ = program.step(state, batch)
  before, now = state.params, after.params
  assert jnp.any(now["head"]["bias"] != before["head"]["bias"])
  assert jnp.all(now["hidden_0"]["kernel"] == before["hidden_0"]["kernel"])
