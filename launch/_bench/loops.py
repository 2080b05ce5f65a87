"""The training loop, and the same steps as a scan written by hand."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradlab import data, execution, loop
from gradlab.checkpoint import Checkpoints
from gradlab.experiment import Pipeline, evaluator
from gradlab.state import Artifacts


def gradlab_loop(pipeline: Pipeline, folder: Path) -> Callable[[], Path]:
  """Trains, in a new run folder per call; compiled once.

  Metrics, checkpoints and the evaluation at the end are part of it.
  """
  config = pipeline.config
  stage, train = config["stages"]["train"], pipeline.dataset.train
  compiled = execution.compile_stage(
    pipeline.programs["train"],
    train,
    seed=config["seed"],
    batch_size=stage["batch_size"],
    parallel=config["parallel"],
    path="stages.train",
  )
  evaluate = evaluator(pipeline, "train")
  init = jax.jit(pipeline.model.init)
  key = jax.random.split(jax.random.key(config["seed"]), 3)[0]

  def run() -> Path:
    target = Path(tempfile.mkdtemp(dir=folder))
    params, model_state = init(key, execution.example_inputs(train))
    with Checkpoints(target / "checkpoints" / "train") as checkpoints:
      loop.train(
        compiled,
        Artifacts(params, model_state, params, None, {}, {}, {}),
        loop.Settings("train", stage, target),
        checkpoints,
        validation=pipeline.dataset.validation,
        evaluate=evaluate,
        should_stop=lambda: False,
        progress=None,
      )
    return target

  return run


def bare_loop(pipeline: Pipeline) -> Callable[[], Any]:
  """The same steps on the same batches with nothing around them.

  The order of the data is computed beforehand, and nothing is written.

  Args:
    pipeline: one model, one train stage with ``adamw``, labels to classify.

  Returns:
    A function that trains and returns the metrics, one dict of arrays per dispatch.
  """
  config, train, model = pipeline.config, pipeline.dataset.train, pipeline.model
  stage = config["stages"]["train"]
  optimizer = optax.adamw(**stage["update"]["adamw"])
  arrays = {name: jnp.asarray(values) for name, values in train.items()}
  steps, size = stage["steps"], stage["steps_per_dispatch"]
  blocks = [
    jnp.asarray(
      data.index_block(
        config["seed"],
        start,
        min(size, steps - start),
        data.num_examples(train),
        stage["batch_size"],
      )
    )
    for start in range(0, steps, size)
  ]

  def loss_fn(params: Any, x: jax.Array, label: jax.Array) -> Any:
    logits, _ = model.apply(params, {}, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    return loss, jnp.mean((logits.argmax(-1) == label).astype(jnp.float32))

  def step(carry: Any, rows: jax.Array) -> Any:
    params, state = carry
    (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, arrays["inputs"][rows], arrays["label"][rows]
    )
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), {"loss": loss, "accuracy": accuracy}

  @functools.partial(jax.jit, donate_argnums=0)
  def dispatch(carry: Any, rows: jax.Array) -> Any:
    return lax.scan(step, carry, rows)

  @jax.jit
  def init() -> Any:
    key = jax.random.split(jax.random.key(config["seed"]), 3)[0]
    params, _ = model.init(key, arrays["inputs"][:1])
    return params, optimizer.init(params)

  def run() -> Any:
    carry, metrics = init(), []
    for rows in blocks:
      carry, found = dispatch(carry, rows)
      metrics.append(found)
    return jax.block_until_ready((carry, metrics))[1]

  return run
