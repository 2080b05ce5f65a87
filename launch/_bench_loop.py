"""Steps per second of the training loop, beside a scan written by hand."""

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from gradlab import data, execution, loop
from gradlab.checkpoint import Checkpoints
from gradlab.experiment import Pipeline, build, evaluator
from gradlab.experiments import digits
from gradlab.launch import _bench_report as report
from gradlab.state import Artifacts

TARGET = 0.95
# checkpoint_every -> the row's name; 0 leaves the one at the end.
CHECKPOINTS = {0: "at the end", 1000: "every 1000 steps"}


def digits_config(steps: int, checkpoint_every: int) -> Any:
  """``experiments/digits.py``, but for the number of steps and of checkpoints."""
  config = digits.get_config()
  config.stages.train.steps = steps
  config.stages.train.checkpoint_every = checkpoint_every
  return config


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


class _MLP(nn.Module):
  features: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for index, width in enumerate(self.features):
      x = nn.relu(nn.Dense(width, name=f"hidden_{index}")(x))
    return nn.Dense(10, name="head")(x)


def bare_loop(config: Mapping[str, Any], train: Any) -> Callable[[], Any]:
  """The same steps on the same batches with nothing around them.

  The order of the data is computed beforehand, and nothing is written.

  Args:
    config: the resolved config of the ``Pipeline``.
    train: the training split.

  Returns:
    A function that trains and returns the metrics, one dict of arrays per dispatch.
  """
  stage, model = config["stages"]["train"], _MLP(config["model"]["features"])
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
    logits: Any = model.apply({"params": params}, x)
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
    params = model.init(key, arrays["inputs"][:1])["params"]
    return params, optimizer.init(params)

  def run() -> Any:
    carry, metrics = init(), []
    for rows in blocks:
      carry, found = dispatch(carry, rows)
      metrics.append(found)
    return jax.block_until_ready((carry, metrics))[1]

  return run


def measure(runs: int, steps: int = 20_000) -> report.Section:
  """Steps per second of the loops, compilation excluded."""

  def rate(function: Callable[[], Any]) -> Callable[[], float]:
    return lambda: steps / report.timed(function)

  pipelines = [build(digits_config(steps, every)) for every in CHECKPOINTS]
  with tempfile.TemporaryDirectory() as folder:
    ours = [gradlab_loop(one, Path(folder)) for one in pipelines]
    bare = bare_loop(pipelines[0].config, pipelines[0].dataset.train)
    for function in (*ours, bare):
      function()
    rates = [report.interleaved(runs, rate(one), rate(bare)) for one in ours]
  return section(rates, steps=steps)


def section(rates: Sequence[tuple[list[float], ...]], *, steps: int) -> report.Section:
  """The table of steps per second.

  Args:
    rates: per entry of ``CHECKPOINTS`` the runs of gradlab's loop and of the bare one.
    steps: of one run.
  """
  rows, records, checks = [], [], []
  for name, (ours, bare) in zip(CHECKPOINTS.values(), rates, strict=True):
    ratios = report.pairwise(ours, bare)
    check = report.Check(report.summary(ratios).median, TARGET, at_least=True)
    cells = (report.show(ours, ",.0f"), report.show(bare, ",.0f"))
    rows.append((name, *cells, report.show(ratios, ".3f"), str(check)))
    records.append(
      {
        "name": name,
        "unit": "steps/s",
        "gradlab": report.numbers(ours),
        "bare": report.numbers(bare),
        "ratio": report.numbers(ratios),
      }
    )
    checks.append(check)
  return report.Section(
    name="loop",
    says=f"{steps} steps of experiments/digits.py: gradlab's loop from its start to "
    "its end, with metrics every 50 steps, checkpoints and the final evaluation, "
    "beside the same steps as a bare lax.scan.",
    columns=("checkpoints", "gradlab steps/s", "bare steps/s", "ratio", "target"),
    rows=rows,
    records=records,
    checks=checks,
  )
