"""The training loop: dispatches, evaluation, metrics and checkpoints of one stage.

Dispatches end at fixed steps, whatever the step a run starts from, so that a resumed
run goes through the same programs as an uninterrupted one and ends with its bits.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradlab import data, execution
from gradlab.checkpoint import Checkpoints
from gradlab.execution import Execution
from gradlab.metrics import Delayed, Writer, first_nonfinite
from gradlab.state import Artifacts, TrainState
from gradlab.types import Interrupted, Metrics, NonFiniteError, PyTree

Progress = Callable[[str, int, int, Mapping[str, float]], None]


class Settings(NamedTuple):
  """What the loop needs to know of a train stage.

  Attributes:
    name: of the stage.
    stage: its resolved config.
    folder: the run's folder.
    first_step: steps that earlier stages took; metrics count on from there.
  """

  name: str
  stage: Mapping[str, Any]
  folder: pathlib.Path
  first_step: int = 0


def next_stop(step: int, stage: Mapping[str, Any]) -> int:
  """The step at which the dispatch that starts at ``step`` ends."""
  every = [
    stage[name]
    for name in ("steps_per_dispatch", "eval_every", "checkpoint_every")
    if stage[name]
  ]
  return int(min(stage["steps"], *((step // n + 1) * n for n in every)))


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
  """Whether every float in the tree is finite."""
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def train(
  compiled: Execution,
  artifacts: Artifacts,
  settings: Settings,
  checkpoints: Checkpoints,
  *,
  validation: Any,
  evaluate: Callable[..., Metrics],
  should_stop: Callable[[], bool],
  progress: Progress | None,
) -> Artifacts:
  """Runs a train stage from its newest checkpoint, or from the artifacts.

  Args:
    compiled: the stage's program on its devices.
    artifacts: what earlier stages left: parameters, model state and masks.
    settings: the stage.
    checkpoints: those of the stage.
    validation: the split to evaluate on.
    evaluate: ``execution.make_evaluate`` of the stage's objectives, compiled.
    should_stop: asked after each dispatch.
    progress: called after each dispatch.

  Returns:
    The artifacts with the trained parameters and the stage's numbers.

  Raises:
    NonFiniteError: the loss became non-finite; the last finite state is saved.
    Interrupted: ``should_stop`` said so; the state is saved.
  """
  stage, name, folder = settings.stage, settings.name, settings.folder
  given = {
    "params": artifacts.params,
    "model_state": artifacts.model_state,
    "masks": artifacts.masks,
  }
  if artifacts.masks is None:
    del given["masks"]

  def measure(state: TrainState) -> dict[str, float]:
    means = execution.evaluate_split(
      lambda batch: evaluate(state.params, state.model_state, batch),
      data.eval_batches(validation, 256),
    )
    return {metric: float(value) for metric, value in means.items()}

  restored, numbers = checkpoints.restore(compiled.target), {}
  step, state = (
    (0, compiled.init(**given))
    if restored is None
    else (restored[0], compiled.place(restored[1]))
  )
  if step < stage["steps"]:
    with Writer(
      folder,
      start_step=settings.first_step + step,
      log_every=stage["log_every"],
    ) as writer:
      run = _Run(compiled, settings, checkpoints, writer, given)
      while step < stage["steps"]:
        step, state = run.advance(step, state)
        stop, last = should_stop(), step == stage["steps"]
        measured, saved = (
          last or (stage[every] > 0 and step % stage[every] == 0)
          for every in ("eval_every", "checkpoint_every")
        )
        if measured or saved or stop:
          run.settle(step, state)
        if last:
          writer.flush()
        if measured:
          numbers = measure(compiled.local(state))
          writer.write(settings.first_step + step, numbers, "validation")
        # last: whoever resumes from it finds everything before it written
        if saved or stop:
          run.save(step, state)
        if progress is not None:
          progress(name, step, stage["steps"], run.last)
        if stop and not last:
          checkpoints.wait()
          raise Interrupted(
            f"stopped at step {step} of {stage['steps']} of stage {name!r}; the "
            f"same command resumes from {folder}."
          )
      checkpoints.wait()
  final = compiled.local(state)
  return artifacts._replace(
    params=final.params,
    model_state=final.model_state,
    reference_params=artifacts.params,
    masks=final.masks,
    metrics={**artifacts.metrics, name: numbers or measure(final)},
  )


class _Run:
  """One stage's dispatches, with what is pending on the host."""

  def __init__(
    self,
    compiled: Execution,
    settings: Settings,
    checkpoints: Checkpoints,
    writer: Writer,
    given: Mapping[str, Any],
  ) -> None:
    self._compiled = compiled
    self._settings = settings
    self._checkpoints = checkpoints
    self._writer = writer
    self._given = given
    self._delayed = Delayed()
    self.last: dict[str, float] = {}

  def advance(self, step: int, state: PyTree) -> tuple[int, PyTree]:
    """One dispatch; the metrics of the one before are written meanwhile."""
    stop = next_stop(step, self._settings.stage)
    state, metrics = self._compiled.dispatch(state, step, stop - step)
    steps = range(step + 1, stop + 1)
    for ready in self._delayed.push(steps, metrics):
      self._write(*ready)
    return stop, state

  def settle(self, step: int, state: PyTree) -> None:
    """Writes the pending metrics; stops a run whose parameters are not finite."""
    for ready in self._delayed.flush():
      self._write(*ready)
    if self._settings.stage["on_nonfinite"] == "continue":
      return
    if not all_finite(self._compiled.local(state).params):
      self._stop(step + 1, f"the parameters are not finite after step {step}")

  def save(self, step: int, state: PyTree) -> None:
    """Starts a checkpoint of a settled state."""
    self._writer.keep(self._settings.first_step + step)
    self._checkpoints.save(step, self._compiled.local(state))

  def _write(self, steps: Any, metrics: Mapping[str, Any]) -> None:
    first = self._settings.first_step
    self._writer.log([first + step for step in steps], metrics)
    self.last = {name: float(value[-1]) for name, value in metrics.items()}
    if self._settings.stage["on_nonfinite"] == "continue":
      return
    losses = {n: v for n, v in metrics.items() if n.split("/")[-1] == "loss"}
    bad = first_nonfinite(steps, losses)
    if bad is not None:
      self._writer.flush()
      step, metric = bad
      self._stop(step, f"{metric} is not finite at step {step}")

  def _stop(self, bad: int, said: str) -> None:
    """Saves the last state whose parameters are finite, found again by replaying."""
    name, folder = self._settings.name, self._settings.folder
    kept = self._replay(bad)
    raise NonFiniteError(
      f"{said} of stage {name!r}; the last finite state, of step {kept}, is saved in "
      f"{folder / 'checkpoints' / name}."
    )

  def _replay(self, bad: int) -> int:
    """Saves the newest finite state before step ``bad``, by running up to it again."""
    self._checkpoints.delete_after(max(bad - 1, 0))
    found = self._checkpoints.restore(self._compiled.target)
    if found is None:
      step, state = 0, self._compiled.init(**self._given)
    else:
      step, state = found[0], self._compiled.place(found[1])
    while step < bad - 2:
      stop = min(next_stop(step, self._settings.stage), bad - 2)
      state, _ = self._compiled.dispatch(state, step, stop - step)
      step = stop
    if step == bad - 2:
      copy = jax.tree.map(jnp.copy, state)
      after, _ = self._compiled.dispatch(copy, step, 1)
      if all_finite(self._compiled.local(after).params):
        step, state = step + 1, after
    self._checkpoints.save(step, self._compiled.local(state))
    self._checkpoints.wait()
    return step
