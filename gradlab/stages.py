"""The stages that do not train: score, edit, search, evaluate."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab import data, execution, schema
from gradlab.experiment import Pipeline, evaluator
from gradlab.gradients import loss_function
from gradlab.parts import Part, build_part
from gradlab.state import Artifacts, hold_zeros, keep_all
from gradlab.types import Batch, ConfigError, Metrics, Params, PyTree, State


def _batch(dataset: data.Dataset, split: str, count: int) -> Batch:
  """The first ``count`` examples of a split, on the device."""
  examples = getattr(dataset, split)
  rows = np.arange(min(count, data.num_examples(examples)))
  return {n: jnp.asarray(values) for n, values in data.take(examples, rows).items()}


def _loss_on(
  pipeline: Pipeline, name: str, model_state: State
) -> Callable[[Params, Batch], jax.Array]:
  part = pipeline.parts[name]["objective"]
  if part is None:
    raise ConfigError(f"stages.{name}.objective: missing; the method needs a loss.")
  objective = build_part(part, {})

  def loss(params: Params, batch: Batch) -> jax.Array:
    fn = loss_function(objective, pipeline.model, model_state, batch, train=False)
    return fn(params)[0]

  return loss


def _call(part: Part, available: Mapping[str, Callable[[], Any]], path: str) -> Any:
  """Calls the method on what stands before ``*`` in its signature, by name."""
  wanted = inspect.signature(part.method.factory).parameters.values()
  given = []
  for parameter in wanted:
    if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
      break
    if parameter.name in available:
      given.append(available[parameter.name]())
    elif parameter.default is inspect.Parameter.empty:
      raise ConfigError(
        f"{path}: {part.method.name} needs {parameter.name!r}, which this stage "
        f"does not have; it has {', '.join(available)}."
      )
    else:
      break
  with schema.at(path):
    return build_part(part, {})(*given)


def _scores(pipeline: Pipeline, name: str, artifacts: Artifacts) -> PyTree:
  stage = pipeline.config["stages"][name]
  return _call(
    pipeline.parts[name]["method"],
    {
      "loss_fn": lambda: _loss_on(pipeline, name, artifacts.model_state),
      "params": lambda: artifacts.params,
      "reference_params": lambda: artifacts.reference_params,
      "batch": lambda: _batch(pipeline.dataset, stage["split"], stage["num_examples"]),
      "model_apply": lambda: pipeline.model.apply,
      "key": lambda: jax.random.key(pipeline.config["seed"]),
    },
    f"stages.{name}.method",
  )


def _score(pipeline: Pipeline, name: str, artifacts: Artifacts) -> Artifacts:
  scores = _scores(pipeline, name, artifacts)
  return artifacts._replace(scores={**artifacts.scores, name: scores})


def _edited(pipeline: Pipeline, name: str, artifacts: Artifacts) -> Params:
  stage = pipeline.config["stages"][name]
  part: Part = pipeline.parts[name]["method"]
  if stage["scores"] is not None:
    static = {**part.static, "scores": artifacts.scores[stage["scores"]]}
    part = part._replace(static=static)
  return _call(part, {"params": lambda: artifacts.params}, f"stages.{name}.method")


def _edit(pipeline: Pipeline, name: str, artifacts: Artifacts) -> Artifacts:
  stage = pipeline.config["stages"][name]
  params = _edited(pipeline, name, artifacts)
  masks = artifacts.masks
  if stage["hold_zeros"]:
    masks = keep_all(params) if masks is None else masks
    masks = hold_zeros(masks, artifacts.params, params)
  leaves = jax.tree.leaves(params)
  zeros = sum(int(jnp.sum(leaf == 0)) for leaf in leaves)
  metrics = {"zeros": zeros, "sparsity": zeros / sum(leaf.size for leaf in leaves)}
  return artifacts._replace(
    params=params,
    reference_params=artifacts.params,
    masks=masks,
    metrics={**artifacts.metrics, name: metrics},
  )


def _found(
  pipeline: Pipeline, name: str, artifacts: Artifacts
) -> tuple[Batch, Metrics]:
  stage = pipeline.config["stages"][name]
  batch = _batch(pipeline.dataset, stage["split"], stage["num_examples"])
  loss = _loss_on(pipeline, name, artifacts.model_state)

  def each(x: jax.Array, y: jax.Array) -> jax.Array:
    """One loss per example."""
    return jax.vmap(
      lambda x, y: loss(artifacts.params, {"inputs": x[None], "label": y[None]})
    )(x, y)

  found = _call(
    pipeline.parts[name]["method"],
    {
      "loss_fn": lambda: each,
      "x": lambda: batch["inputs"],
      "y": lambda: batch["label"],
      "key": lambda: jax.random.key(pipeline.config["seed"]),
    },
    f"stages.{name}.method",
  )
  x = found[0] if isinstance(found, tuple) else found
  metrics = {
    "loss_before": jnp.mean(each(batch["inputs"], batch["label"])),
    "loss_after": jnp.mean(each(x, batch["label"])),
    "max_change": jnp.max(jnp.abs(x - batch["inputs"])),
  }
  return {**batch, "inputs": x}, metrics


def _search(pipeline: Pipeline, name: str, artifacts: Artifacts) -> Artifacts:
  batch, found = _found(pipeline, name, artifacts)
  metrics = {metric: float(value) for metric, value in found.items()}
  return artifacts._replace(
    inputs={**artifacts.inputs, name: batch},
    metrics={**artifacts.metrics, name: metrics},
  )


def _evaluate(pipeline: Pipeline, name: str, artifacts: Artifacts) -> Artifacts:
  stage = pipeline.config["stages"][name]
  split = getattr(pipeline.dataset, stage["split"])
  if stage["inputs"] is not None:
    split = jax.tree.map(np.asarray, artifacts.inputs[stage["inputs"]])
  sums = functools.partial(
    evaluator(pipeline, name), artifacts.params, artifacts.model_state
  )
  means = execution.evaluate_split(sums, data.eval_batches(split, stage["batch_size"]))
  metrics = {metric: float(value) for metric, value in means.items()}
  return artifacts._replace(metrics={**artifacts.metrics, name: metrics})


RUN: dict[str, Callable[[Pipeline, str, Artifacts], Artifacts]] = {
  "score": _score,
  "edit": _edit,
  "search": _search,
  "evaluate": _evaluate,
}


def check(pipeline: Pipeline) -> None:
  """Calls the stages' methods on shapes alone: what does not fit is found here.

  A method that needs numbers cannot be called so; it and the stages after it are
  checked when they run.

  Raises:
    ConfigError: one sentence with the path of what is wrong.
  """
  params, model_state = jax.eval_shape(
    pipeline.model.init,
    jax.random.key(0),
    execution.example_inputs(pipeline.dataset.train),
  )
  artifacts = Artifacts(params, model_state, params, None, {}, {}, {})
  calls = {"score": _scores, "edit": _edited, "search": _found}
  for name, stage in pipeline.config["stages"].items():
    kind = stage["kind"]
    if kind not in calls:
      continue
    with schema.at(f"stages.{name}.method", also=(TypeError,)):
      try:
        made = jax.eval_shape(functools.partial(calls[kind], pipeline, name), artifacts)
      except jax.errors.JAXTypeError:
        return
    if kind == "score":
      artifacts = artifacts._replace(scores={**artifacts.scores, name: made})
    elif kind == "edit":
      artifacts = artifacts._replace(params=made, reference_params=artifacts.params)
