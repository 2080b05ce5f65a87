"""The training loop of a batch of arms: as ``gradlab.loop``, with a writer per arm."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab._arm_program import ArmProgram, row
from gradlab.checkpoint import Checkpoints
from gradlab.loop import all_finite, next_stop
from gradlab.metrics import Delayed, Writer, first_nonfinite
from gradlab.state import Artifacts, TrainState
from gradlab.types import Interrupted, NonFiniteError, PyTree

if TYPE_CHECKING:
  from gradlab._arm_batch import Batch

_each_finite = jax.jit(jax.vmap(all_finite))


def run(
  batch: "Batch",
  program: ArmProgram,
  name: str,
  artifacts: Mapping[int, Artifacts],
  folder: Path,
  *,
  first_step: int,
  should_stop: Callable[[], bool],
) -> dict[int, Artifacts]:
  """Runs a train stage from its newest checkpoint, or from the artifacts.

  Args:
    batch: the arms.
    program: the stage's.
    name: of the stage.
    artifacts: what earlier stages left; empty for a first stage.
    folder: of the batch's own state.
    first_step: steps that earlier stages took.
    should_stop: asked after each dispatch.

  Returns:
    Live arm -> its artifacts with the trained parameters and the stage's numbers.

  Raises:
    Interrupted: ``should_stop`` said so; the state is saved.
  """
  stage = batch.pipeline.config["stages"][name]
  state = program.init(batch.seeds, batch.values[name], _given(batch, artifacts))
  before = {i: a.params for i, a in artifacts.items()} or _rows(
    jax.device_get(state.params), batch.live
  )
  with contextlib.ExitStack() as opened:
    checkpoints = opened.enter_context(Checkpoints(folder / "checkpoints" / name))
    step = 0
    if (found := checkpoints.restore(_saved_form(program, batch.count))) is not None:
      step, state = found[0], _placed(found[1], program, len(batch.seeds))
    writers = {
      i: opened.enter_context(
        Writer(arm.folder, start_step=first_step + step, log_every=stage["log_every"])
      )
      for i, arm in batch.live.items()
    }
    loop = _Loop(batch, name, writers, first_step)
    numbers: dict[int, dict[str, float]] = {}
    while step < stage["steps"] and batch.live:
      stop = next_stop(step, stage)
      state, metrics = program.dispatch(state, batch.seeds, step, stop - step)
      loop.take(range(step + 1, stop + 1), metrics)
      step, last, asked = stop, stop == stage["steps"], should_stop()
      measured, saved = (
        last or (stage[every] > 0 and step % stage[every] == 0)
        for every in ("eval_every", "checkpoint_every")
      )
      if measured or saved or asked:
        loop.settle(step, state)
      if measured:
        numbers = loop.measure(step, state, last=last)
      # last: whoever resumes from it finds everything before it written
      if batch.live and (saved or asked):
        loop.keep(step)
        checkpoints.save(step, _first(state, batch.count))
      if asked and not last:
        checkpoints.wait()
        raise Interrupted(f"stopped at step {step} of {stage['steps']} of {name!r}.")
    checkpoints.wait()
    if not numbers:
      numbers = loop.measure(None, state, last=True)
  return _results(batch, name, step, state, artifacts, before, numbers)


class _Loop:
  """What is pending on the host, and the arms' writers."""

  def __init__(
    self, batch: "Batch", name: str, writers: Mapping[int, Writer], first_step: int
  ) -> None:
    self._batch, self._name = batch, name
    self._writers, self._first = writers, first_step
    self._delayed = Delayed()
    self._stops = batch.pipeline.config["stages"][name]["on_nonfinite"] == "stop"

  def take(self, steps: Sequence[int], metrics: Mapping[str, jax.Array]) -> None:
    """Keeps a dispatch's metrics and writes those of the one before."""
    for ready in self._delayed.push(steps, metrics):
      self._write(*ready)

  def settle(self, step: int, state: TrainState) -> None:
    """Writes what is pending; takes out the arms whose parameters are not finite."""
    for ready in self._delayed.flush():
      self._write(*ready)
    if self._stops:
      finite = np.asarray(_each_finite(state.params))
      for i in [i for i in self._batch.live if not finite[i]]:
        self._fail(i, f"the parameters are not finite after step {step}")

  def measure(
    self, step: int | None, state: TrainState, *, last: bool
  ) -> dict[int, dict[str, float]]:
    """The arms' numbers on the validation split, written as records of ``step``."""
    batch = self._batch
    found = batch.measure(
      self._name, state.params, state.model_state, batch.pipeline.dataset.validation
    )
    if step is not None:
      for i, numbers in found.items():
        if last:
          self._writers[i].flush()
        self._writers[i].write(self._first + step, numbers, "validation")
    return found

  def keep(self, step: int) -> None:
    """Stores the windows of metrics that are open."""
    for i in self._batch.live:
      self._writers[i].keep(self._first + step)

  def _write(self, steps: Sequence[int], metrics: Mapping[str, np.ndarray]) -> None:
    at = [self._first + step for step in steps]
    for i in tuple(self._batch.live):
      own = {metric: values[:, i] for metric, values in metrics.items()}
      self._writers[i].log(at, own)
      losses = {n: v for n, v in own.items() if n.split("/")[-1] == "loss"}
      if self._stops and (bad := first_nonfinite(steps, losses)):
        self._writers[i].flush()
        self._fail(i, f"{bad[1]} is not finite at step {bad[0]}")

  def _fail(self, place: int, said: str) -> None:
    self._batch.fail(place, NonFiniteError(f"{said} of stage {self._name!r}."))


def _given(batch: "Batch", artifacts: Mapping[int, Artifacts]) -> dict[str, PyTree]:
  """What ``Program.init`` starts from; nothing before a first stage."""
  if not artifacts:
    return {}
  fields = ["params", "model_state"]
  if next(iter(artifacts.values())).masks is not None:
    fields.append("masks")
  return {
    field: batch.stacked({i: getattr(artifacts[i], field) for i in batch.live})
    for field in fields
  }


def _rows(tree: PyTree, places: Any) -> dict[int, PyTree]:
  return {i: row(tree, i) for i in places}


def _of_arms(fn: Callable[[Any], Any], state: TrainState) -> TrainState:
  """``fn`` of every leaf with an axis of arms; the step has none."""
  fields = {n: getattr(state, n) for n in state._fields if n != "step"}
  return state._replace(**jax.tree.map(fn, fields))


def _first(state: TrainState, count: int) -> TrainState:
  """The places that a checkpoint has: all but those that fill up the devices."""
  size = state.key.shape[0]
  return state if size == count else _of_arms(lambda leaf: leaf[:count], state)


def _saved_form(program: ArmProgram, count: int) -> TrainState:
  """What a checkpoint restores: arrays of the host, which any devices can take."""

  def form(leaf: jax.ShapeDtypeStruct) -> Any:
    shape = (count, *leaf.shape[1:])
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.ShapeDtypeStruct(shape, leaf.dtype)
    return np.empty(shape, leaf.dtype)

  step: Any = jax.ShapeDtypeStruct((), np.int32)
  return _of_arms(form, program.target)._replace(step=step)


def _placed(state: TrainState, program: ArmProgram, size: int) -> TrainState:
  """A restored state on the devices, with all places filled."""

  count = state.key.shape[0]
  order = np.where(np.arange(size) < count, np.arange(size), 0)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, program.target)
  placed: TrainState = jax.device_put(
    _of_arms(lambda leaf: leaf[order], state), shardings
  )
  return placed


def _results(
  batch: "Batch",
  name: str,
  step: int,
  state: TrainState,
  artifacts: Mapping[int, Artifacts],
  before: Mapping[int, PyTree],
  numbers: Mapping[int, Mapping[str, float]],
) -> dict[int, Artifacts]:
  """The arms' final checkpoints, each in its own folder, and their artifacts."""
  fields = {n: getattr(state, n) for n in state._fields if n not in ("step", "key")}
  host = jax.device_get(fields)
  out = {}
  for i, arm in batch.live.items():
    own = state._replace(
      **{n: row(tree, i) for n, tree in host.items()},
      step=jnp.asarray(step, jnp.int32),
      key=state.key[i],
    )
    with Checkpoints(arm.folder / "checkpoints" / name) as checkpoints:
      checkpoints.save(step, own)
    earlier = artifacts.get(i)
    out[i] = Artifacts(
      params=own.params,
      model_state=own.model_state,
      reference_params=before[i],
      masks=own.masks,
      scores=earlier.scores if earlier else {},
      inputs=earlier.inputs if earlier else {},
      metrics={**(earlier.metrics if earlier else {}), name: dict(numbers[i])},
    )
  return out
