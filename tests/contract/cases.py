"""The table: how the contract tests use each method of the catalogue.

A method without a case fails ``test_every_method_has_a_case``. A case names only
what the method cannot do without and one value for every float that is off by
default, so that each float hyperparameter is traced in some case.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.transforms.updates import adamw, scale_by_adan, scale_by_diffgrad
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


def _quadratic_branches(params: Tree) -> Tree:
  labels = {"bias": "g", "kernel": "b"}

  def label(path: Any, _: Any) -> str:
    return labels.get(getattr(path[-1], "key", None), "other")

  return jax.tree_util.tree_map_with_path(label, params)


def _keyed_examples(i: int, dtype: Any) -> tuple[Tree, ...]:
  return (*_examples(i, dtype), jax.random.key(i))


def _keyed_margins(i: int, dtype: Any) -> tuple[Tree, ...]:
  logits = np.random.default_rng(i).normal(size=EXAMPLES)
  labels = 2 * (batch(i)["label"] % 2) - 1
  return jnp.asarray(logits, dtype), labels, jax.random.key(i)


def _error_log(i: int, dtype: Any) -> tuple[Tree, ...]:
  rng = np.random.default_rng(i)
  shapes = ((2 * EXAMPLES, 3), (2 * EXAMPLES,), (EXAMPLES, 3))
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def _params_and_batch(i: int, dtype: Any) -> tuple[Tree, ...]:
  return tree(100 + i, dtype), batch(i, dtype)


def _relu_network(i: int, dtype: Any) -> tuple[Tree, ...]:
  """What is differentiated, a weight and the inputs, and the rest of the network."""
  rng = np.random.default_rng(i)
  weight, head, bias, x = (
    jnp.asarray(rng.normal(size=shape), dtype)
    for shape in ((4, 8), (4, 4), (4,), (EXAMPLES, 8))
  )
  return {"weight": weight, "x": x}, (bias, head)


def _second_order(f: Any, inputs: tuple[Tree, ...], **kwargs: Any) -> Tree:
  """Outputs and input gradients, brought to the shapes of what is differentiated."""
  free, (bias, head) = inputs
  layers = [(free["weight"], bias), (head, None)]
  y, dy_dx = f(layers, free["x"], **kwargs)
  return {"weight": y.T @ dy_dx, "x": dy_dx}


def _noise_and_centres(i: int, dtype: Any) -> tuple[Tree, ...]:
  rng = np.random.default_rng(i)
  noise, centres = rng.normal(size=(2, EXAMPLES, 3, 3, 2))
  return jnp.asarray(4 * noise, dtype), jnp.asarray(centres, dtype)


def _denoised(f: Any, inputs: tuple[Tree, ...], **kwargs: Any) -> Tree:
  """Samples of normal data, each around its centre."""
  x, centres = inputs
  sigmas = np.geomspace(4.0, 0.1, 6)
  return f(
    lambda x, s: (x + s**2 * centres) / (1 + s**2), x, jnp.asarray(sigmas), **kwargs
  )[0]


def _self_training(params: Tree) -> dict[str, Any]:
  """A gradient that follows the batch and, less, the teacher."""

  def grad_fn(params: Tree, teacher: Tree, target: jax.Array) -> Tree:
    return jax.tree.map(
      lambda p, t: 1.5 * p - (target + 0.4 * t).astype(p.dtype), params, teacher
    )

  futures = jnp.array([0.5, -0.5])
  return {"grad_fn": grad_fn, "batch": futures[0], "future_batches": futures}


# What a method that zeroes groups may zero: the rows of one matrix.
ROWS = ((("dense/kernel", 0),),)

_LAZY = {
  "rank": 3,
  "update_proj_gap": 1,
  "lazy": True,
  "cos_threshold": 0.5,
  "gamma_proj": 3.0,
  "queue_size": 1,
}
_GALORE = {
  **_LAZY,
  "rank": 4,
  "learning_rate": 1e-2,
  "eps": 1e-4,
  "weight_decay": 0.02,
  "seed_key": 0,
}


def _bowl(params: Tree) -> jax.Array:
  """A convex loss that is steeper in each leaf than in the one before."""
  leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
  parts = [(k + 1) * jnp.sum(jnp.cosh(leaf / 2)) for k, leaf in enumerate(leaves)]
  return jnp.asarray(sum(parts), jnp.float32)


def _downhill(i: int, dtype: Any) -> Tree:
  """A step's inputs of which the updates are the gradient of ``_bowl``."""
  params = tree(100 + i, dtype)
  return {"updates": jax.grad(_bowl)(params), "params": params}


def _remaining(params: Tree) -> dict[str, Any]:
  """The gradient of a bowl, at whatever parameters SFR-on asks for."""
  return {"remain_grad_fn": lambda p: jax.tree.map(lambda leaf: 0.5 * leaf, p)}


CASES: dict[str, tuple[Case, ...]] = {
  # updates
  "adamw": (Case({"learning_rate": 1e-2, "eps_root": 1e-8, "weight_decay": 0.02}),),
  "adan": (
    Case({"learning_rate": 1e-2, "weight_decay": 0.02}),
    Case({"learning_rate": 1e-2, "max_grad_norm": 0.5, "prox": False}),
  ),
  "dhspg": (
    Case(
      {
        "learning_rate": 1e-2,
        "groups": ROWS,
        "target_sparsity": 0.5,
        "tolerance": 0.25,
        "half_space_eps": 0.995,
        "penalty": 0.2,
        "penalty_amplify": 1.5,
        "penalty_cap": 2.0,
        "b1": 0.9,
        "dampening": 0.5,
        "weight_decay": 0.02,
      },
      prunes=True,
    ),
    Case(
      {
        "learning_rate": 1e-2,
        "groups": ROWS,
        "tolerance": 0.25,
        "half_space_eps": 0.995,
        "penalty_cap": 2.0,
        "variant": "adam",
        "b1": 0.9,
        "b2": 0.99,
      },
      prunes=True,
    ),
  ),
  "diffgrad": (
    Case({"learning_rate": 1e-2, "weight_decay": 0.02}),
    Case({"learning_rate": 1e-2, "l2": 0.02}),
  ),
  "ignore_k": (
    Case({"k": 0.25}),
    Case({"k": 0.25, "scope": "global", "window": 2}),
  ),
  "promot": (
    Case(
      {
        "prompt_tx": adamw(1e-2),
        "model_tx": adamw(1e-2),
        "num_prompt_steps": 1,
        "is_prompt": lambda path, leaf: "bias" in jax.tree_util.keystr(path),
      }
    ),
  ),
  "relinear": (
    Case(
      {
        "gamma_g": 0.5,
        "gamma_b": 0.25,
        "alpha_g": 0.9,
        "alpha_b": 0.8,
        "labels": _quadratic_branches,
      }
    ),
  ),
  "quantised_moments": (
    Case(
      {
        "inner": scale_by_adan(),
        "block_size": 16,
        "min_size": 0,
        "stochastic_rounding": True,
        "key": 0,
      }
    ),
    Case(
      {
        "bits": 4,
        "inner": scale_by_diffgrad(),
        "min_size": 8,
        "stochastic_rounding": True,
        "key": 0,
      }
    ),
  ),
  "future_self_training": tuple(
    Case(
      {"optimizer": adamw(1e-2), "num_ahead": 2, "ema_decay": 0.5, **options},
      extra=_self_training,
    )
    for options in (
      {},
      {"mode": "wide", "commit_opt_state": True, "legacy_order": True},
    )
  ),
  # A threshold between the cosines of the two matrices: one gap grows, one does not.
  "low_rank_projection": (
    Case({**_LAZY, "inner": optax.scale_by_rms(0.9)}),
    Case({**_LAZY, "quantize_projector": True, "scale": 0.25}),
  ),
  # Rounding moves weights that are off the grid even at a rate of zero: second.
  "q_galore": (
    Case({**_GALORE, "min_8bit_size": 0, "quantize_weights": False}),
    Case({**_GALORE, "quantize_projector": False, "quantize_moments": False}),
  ),
  "sfr_on": (
    Case(
      {
        "inner": optax.sgd(1e-2, momentum=0.9),
        "forget_scale": 0.5,
        "num_steps": 6,
        "forget_every": 2,
      },
      extra=_remaining,
    ),
  ),
  "sinkgd": (
    Case({"learning_rate": 1e-2, "matrix_lr_scale": 0.5, "weight_decay": 0.02}),
  ),
  "gradient_normalized_smoothness": tuple(
    Case(
      {
        "hessian": hessian,
        "gamma_init": 0.5,
        "gamma_min": 1.5,
        "eps": 0.1,
        "tol": tol,
      },
      inputs=_downhill,
      extra=lambda params: {"value": _bowl(params), "value_fn": _bowl},
    )
    for hessian, tol in (("exact", 0.0), ("zero", 0.0), ("rank_one", 9.3))
  ),
  "mfac": (
    Case(
      {
        "learning_rate": 0.2,
        "num_grads": 3,
        "damping": 2.0,
        "momentum": 0.3,
        "l2": 0.02,
      }
    ),
    Case(
      {"learning_rate": 0.2, "num_grads": 2, "damping": 2.0, "skip_nonfinite": True}
    ),
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
  "ensloss": (
    Case(
      {"box_cox": 0.5, "floor": 0.01},
      call=lambda f, inputs, **kwargs: f(inputs[2], *inputs[:2], **kwargs),
      inputs=_keyed_margins,
    ),
  ),
  "gradient_reversal": (Case({"scale": 0.5}),),
  "pixelwise_gradient_clip": tuple(
    Case(
      {"max_norm": 1.0, "ord": ord, "mode": mode},
      inputs=lambda i, dtype: (tree(100 + i, dtype)["pair"][0],),
    )
    for ord, mode in (("inf", "hard"), (2, "soft"))
  ),
  "relu_mlp_second_order": (Case(call=_second_order, inputs=_relu_network),),
  # scores
  "magnitude": (Case(),),
  "reloop2": (Case({"capacity": 5, "k": 3}, inputs=_error_log),),
  "snip": (
    Case(
      call=lambda f, inputs, **kwargs: f(loss, *inputs, **kwargs),
      inputs=_params_and_batch,
    ),
  ),
  # params
  "magnitude_prune": (Case({"sparsity": 0.5}),),
  # inputs
  "evodiff": (Case(call=_denoised, inputs=_noise_and_centres),),
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
  "programmable_gradient_information": (
    Case(
      call=lambda f, inputs, **kwargs: f(
        (inputs[0], [2 * inputs[0], inputs[0][:, ::-1]]), inputs[1], **kwargs
      ),
      inputs=_logits,
    ),
  ),
}
