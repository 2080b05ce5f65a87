"""The table: how the contract tests use each method of the catalogue.

A method without a case fails ``test_every_method_has_a_case``. A case names only
what the method cannot do without and one value for every float that is off by
default, so that each float hyperparameter is traced in some case.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.contract.examples import (
  EXAMPLES,
  Tree,
  batch,
  example_losses,
  loss,
  mean_example_loss,
  tree,
)
from tests.contract.machines import Case


def _logits(i: int, dtype: Any) -> tuple[Tree, ...]:
  outputs = np.random.default_rng(i).normal(size=(EXAMPLES, 4))
  return jnp.asarray(outputs, dtype), batch(i, dtype)


def _regression(i: int, dtype: Any) -> tuple[Tree, ...]:
  outputs, data = _logits(i, dtype)
  return outputs, {"inputs": data["inputs"], "label": data["target"]}


def _tokens(i: int, dtype: Any) -> tuple[Tree, ...]:
  rng = np.random.default_rng(i)
  outputs = jnp.asarray(rng.normal(size=(EXAMPLES, 5, 7)), dtype)
  return outputs, {"inputs": jnp.asarray(rng.integers(0, 7, (EXAMPLES, 5)), jnp.int32)}


def _examples(i: int, dtype: Any) -> tuple[Tree, ...]:
  data = batch(i, dtype)
  return data["inputs"], data["label"]


def _keyed_examples(i: int, dtype: Any) -> tuple[Tree, ...]:
  return (*_examples(i, dtype), jax.random.key(i))


def _params_and_batch(i: int, dtype: Any) -> tuple[Tree, ...]:
  return tree(100 + i, dtype), batch(i, dtype)


CASES: dict[str, tuple[Case, ...]] = {
  # updates
  "adamw": (Case({"learning_rate": 1e-2, "eps_root": 1e-8, "weight_decay": 0.02}),),
  "adan": (
    Case({"learning_rate": 1e-2, "weight_decay": 0.02}),
    Case({"learning_rate": 1e-2, "max_grad_norm": 0.5, "prox": False}),
  ),
  "diffgrad": (
    Case({"learning_rate": 1e-2, "weight_decay": 0.02}),
    Case({"learning_rate": 1e-2, "l2": 0.02}),
  ),
  "sinkgd": (
    Case({"learning_rate": 1e-2, "matrix_lr_scale": 0.5, "weight_decay": 0.02}),
  ),
  # estimators
  "backprop": (Case(),),
  # A wide perturbation: the difference of two losses must stand above rounding.
  "mezo": (Case({"key": 0, "eps": 0.1}),),
  # aggregators
  "mean": (Case(),),
  "pcgrad": (Case({"key": 0}), Case({"key": 0, "scope": "leaf"})),
  # compressors
  "top_k": (Case({"ratio": 0.25}),),
  "sketched_first_order": tuple(
    Case({"kind": kind, "ratio": 0.25, "key": 0, "scope": scope})
    for kind, scope in (
      ("srht", "leaf"),
      ("countsketch", "leaf"),
      ("gaussian", "global"),
    )
  ),
  # cotangents
  "gradient_reversal": (Case({"scale": 0.5}),),
  # scores
  "magnitude": (Case(),),
  "snip": (
    Case(
      call=lambda f, inputs, **kwargs: f(loss, *inputs, **kwargs),
      inputs=_params_and_batch,
    ),
  ),
  # params
  "magnitude_prune": (Case({"sparsity": 0.5}),),
  # inputs
  "fgsm": (
    Case(
      {"eps": 0.1},
      call=lambda f, inputs, **kwargs: f(mean_example_loss, *inputs, **kwargs),
      inputs=_examples,
    ),
  ),
  "pgd": tuple(
    Case(
      {"eps": 0.1, "step_size": 0.04, "num_steps": 3, "norm": norm},
      call=lambda f, inputs, **kwargs: f(example_losses, *inputs, **kwargs),
      inputs=_keyed_examples,
    )
    for norm in ("linf", "l2")
  ),
  # controllers
  "warmup_cosine": (
    Case(
      {
        "peak_value": 0.1,
        "warmup_steps": 2,
        "decay_steps": 6,
        "init_value": 0.01,
        "end_value": 0.001,
      }
    ),
  ),
  "cubic_sparsity": (
    Case(
      {
        "final_sparsity": 0.9,
        "num_updates": 2,
        "interval": 1,
        "initial_sparsity": 0.1,
        "start_step": 1,
      }
    ),
  ),
  # objectives
  "cross_entropy": (Case({"label_smoothing": 0.1}, inputs=_logits),),
  "squared_error": (Case(inputs=_regression),),
  "next_token": (Case({"label_smoothing": 0.1}, inputs=_tokens),),
}
