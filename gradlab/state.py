"""What a run carries: from step to step, and from stage to stage."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradlab.types import Batch, Params, PyTree, State


class TrainState(NamedTuple):
  """Everything that one train stage carries.

  Attributes:
    step: int32 number of steps done.
    params: what is trained.
    model_state: the model's own state (running statistics), ``{}`` without one.
    update: state of the named chain of update rules.
    estimator: state of the gradient estimator.
    aggregator: state of the aggregator; ``()`` without one.
    compressor: state of the compressor; ``()`` without one.
    controllers: path of a controlled hyperparameter -> the controller's state.
    masks: bool tree like ``params``, False where a weight is held at zero, or None.
    hyperparams: path -> float32 scalar; what a sweep maps over and controllers set.
    key: the run's jax key; step t uses ``fold_in(key, t)``.
  """

  step: jax.Array
  params: Params
  model_state: State
  update: State
  estimator: State
  aggregator: State
  compressor: State
  controllers: dict[str, State]
  masks: PyTree
  hyperparams: dict[str, jax.Array]
  key: jax.Array


def keep_all(params: Params) -> PyTree:
  """Masks that hold nothing at zero."""
  return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)


def hold_zeros(masks: PyTree, before: Params, after: Params) -> PyTree:
  """Masks that also hold what an edit has just set to zero."""
  return jax.tree.map(lambda m, a, b: m & ~((a != 0) & (b == 0)), masks, before, after)


class Artifacts(NamedTuple):
  """What the stages hand on.

  Attributes:
    params: the current parameters.
    model_state: the model's own state.
    reference_params: the parameters before the last stage that changed them.
    masks: bool tree like ``params``, False where a weight is held at zero, or None.
    scores: name of a score stage -> its scores.
    inputs: name of a search stage -> the batch that it found.
    metrics: name of a stage -> its numbers.
  """

  params: Params
  model_state: State
  reference_params: Params
  masks: PyTree
  scores: dict[str, PyTree]
  inputs: dict[str, Batch]
  metrics: dict[str, dict[str, float]]
