"""Arms: runs that differ only in seeds and float hyperparameters, as one program.

The train step is vmapped over the arms; their step counter is shared, so that what
depends on it (edits that are due, schedules) stays a branch and is not computed twice.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradlab import data, execution
from gradlab.experiment import Pipeline, build, evaluator
from gradlab.state import TrainState
from gradlab.types import ConfigError, Metrics

Arm = Mapping[str, float]
# Every field of the state has one value per arm, but for the step.
ARM_AXES = TrainState(None, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)  # type: ignore[arg-type]


class ArmResults(NamedTuple):
  """What a set of arms gave; the first axis is always the arm.

  Attributes:
    steps: [E] steps at which the curves were measured.
    curves: split -> metric -> [arms, E]; "train" is the mean since the last point.
    final: split -> metric -> [arms] at the end.
    compile_seconds: until the first dispatch had ended.
    seconds: of everything, compilation included.
  """

  steps: np.ndarray
  curves: dict[str, dict[str, np.ndarray]]
  final: dict[str, dict[str, np.ndarray]]
  compile_seconds: float
  seconds: float


def _columns(
  pipeline: Pipeline, name: str, arms: Sequence[Arm]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """The arms' seeds and their hyperparameters, from overrides by config path."""
  known = pipeline.programs[name].hyperparams
  prefix = f"stages.{name}."
  for arm in arms:
    for path in arm:
      if path != "seed" and path.removeprefix(prefix) not in known:
        allowed = ", ".join(["seed", *(prefix + p for p in known)])
        raise ConfigError(
          f"{path}: arms of one program differ in seeds and float hyperparameters "
          f"only; allowed: {allowed}."
        )
  seeds = [int(arm.get("seed", pipeline.config["seed"])) for arm in arms]
  values = {
    path: np.asarray([arm.get(prefix + path, default) for arm in arms], np.float32)
    for path, default in known.items()
  }
  return np.asarray(seeds), values


def run_arms(
  config: Any,
  arms: Sequence[Arm],
  *,
  progress: Callable[[int, int], None] = lambda step, steps: None,
) -> ArmResults:
  """Trains all arms of a one-stage experiment in one compiled program.

  Args:
    config: an experiment with one train stage and ``eval_every`` set; other kinds of
      stages are not run.
    arms: per arm, config path -> value; paths are "seed" and the float
      hyperparameters of the train stage.
    progress: called with (step, steps) after each dispatch.

  Returns:
    The arms' curves and their final numbers on the validation and the test split.

  Raises:
    ConfigError: a path that cannot differ between the arms of one program, no arm, or
      a config with another number of train stages.
  """
  begun = time.monotonic()
  pipeline = build(config)
  if len(pipeline.programs) != 1 or not arms:
    raise ConfigError("arms: needs one train stage and at least one arm.")
  name, program = next(iter(pipeline.programs.items()))
  stage = pipeline.config["stages"][name]
  seeds, values = _columns(pipeline, name, arms)
  train = pipeline.dataset.train
  inputs = execution.example_inputs(train)
  arrays = {field: jnp.asarray(array) for field, array in train.items()}
  count = data.num_examples(train)
  step_arms = jax.vmap(program.step, in_axes=(ARM_AXES, 0), out_axes=(ARM_AXES, 0))
  arms_program = program._replace(step=step_arms)

  def init(seed: jax.Array, values: Mapping[str, jax.Array]) -> TrainState:
    return program.init(jax.random.key(seed), inputs, hyperparams=values)

  def run(state: TrainState, rows: jax.Array) -> tuple[TrainState, Metrics]:
    state, metrics = execution.scan_steps(arms_program, state, arrays, rows)
    return state, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

  init_arms = jax.jit(jax.vmap(init, out_axes=ARM_AXES))
  dispatch = jax.jit(run, donate_argnums=0)
  measure = jax.jit(jax.vmap(evaluator(pipeline, name), in_axes=(0, 0, None)))

  def means(state: TrainState, split: Any) -> dict[str, np.ndarray]:
    return execution.evaluate_split(
      lambda batch: measure(state.params, state.model_state, batch),
      data.eval_batches(split, 256),
    )

  state = init_arms(seeds, values)
  points: dict[str, list[Any]] = {"steps": [], "train": [], "validation": []}
  every = stage["eval_every"] or stage["steps"]
  compiled_at = 0.0
  for start in range(0, stage["steps"], every):
    stop = min(start + every, stage["steps"])
    rows = np.stack(
      [
        data.index_block(seed, start, stop - start, count, stage["batch_size"])
        for seed in seeds.tolist()
      ],
      axis=1,
    )
    state, metrics = dispatch(state, rows)
    points["steps"].append(stop)
    points["train"].append(jax.tree.map(np.asarray, metrics))
    points["validation"].append(means(state, pipeline.dataset.validation))
    compiled_at = compiled_at or time.monotonic()
    progress(stop, stage["steps"])
  curves = {
    split: {
      metric: np.stack([point[metric] for point in points[split]], axis=1)
      for metric in points[split][0]
    }
    for split in ("train", "validation")
  }
  final = {
    split: means(state, getattr(pipeline.dataset, split))
    for split in ("validation", "test")
  }
  return ArmResults(
    np.asarray(points["steps"]),
    curves,
    final,
    compiled_at - begun,
    time.monotonic() - begun,
  )
