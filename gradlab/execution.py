"""How a program runs: compiled once, on a mesh or as replicas, many steps at a time.

A dispatch runs several steps under ``lax.scan``. A split held in memory lives on the
devices and each step gathers its rows there; any other source is read on the host.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from gradlab import data, schema, sharding
from gradlab.gradients import loss_function
from gradlab.state import TrainState
from gradlab.step import Program
from gradlab.types import Batch, ConfigError, Metrics, Model, Params, PyTree, State

Dispatch = Callable[[PyTree, int, int], Any]


class Execution(NamedTuple):
  """A compiled train stage.

  Attributes:
    init: ``init(**given) -> state``, placed; ``given`` as for ``Program.init``.
    dispatch: ``dispatch(state, start, num_steps) -> (state, metrics)``; the state is
      donated, the metrics are stacked over the steps.
    target: the state's shapes, dtypes and shardings, as a checkpoint restores it.
    place: a restored state -> the form that ``dispatch`` takes.
    local: the placed state -> the one to save, evaluate and hand on.
  """

  init: Callable[..., PyTree]
  dispatch: Dispatch
  target: PyTree
  place: Callable[[TrainState], PyTree]
  local: Callable[[PyTree], TrainState]


def scan_steps(
  program: Program, state: TrainState, arrays: Batch, rows: jax.Array
) -> tuple[TrainState, Metrics]:
  """Several steps on rows [n, B] of a split that lives on the devices."""

  def body(state: TrainState, rows: jax.Array) -> tuple[TrainState, Metrics]:
    return program.step(state, {name: a[rows] for name, a in arrays.items()})

  return lax.scan(body, state, rows)


def _check_batch(batch_size: int, parts: int, what: str, path: str) -> None:
  if batch_size % parts:
    raise ConfigError(
      f"{path}.batch_size: {batch_size} is not divisible by {what} ({parts})."
    )


def _check_data(split: Any, batch_size: int, path: str) -> None:
  count = data.num_examples(split)
  if count < batch_size:
    raise ConfigError(
      f"{path}.batch_size: {batch_size} is more than the {count} training examples."
    )


def compile_stage(
  program: Program,
  train: Any,
  *,
  seed: int,
  batch_size: int,
  parallel: Mapping[str, Any],
  path: str,
) -> Execution:
  """Places and compiles a train stage as the config's ``parallel`` says.

  Args:
    program: the stage's functions; made with ``axis_name="data"`` for pmap.
    train: the training split.
    seed: of the run: initialisation, noise and the order of the data.
    batch_size: rows of the global batch.
    parallel: ``mode``, ``mesh`` and ``rules`` of the resolved config.
    path: of the stage in the config, for error messages.

  Raises:
    ConfigError: a batch or a mesh that does not divide, too few examples, or rules
      that do not fit.
  """
  _check_data(train, batch_size, path)
  build = _compile_pmap if parallel["mode"] == "pmap" else _compile_jit
  return build(program, train, seed, batch_size, parallel, path)


def example_inputs(split: Any) -> jax.Array:
  """One training example's inputs with a batch axis, to initialise a model with."""
  return jnp.asarray(data.take(split, np.arange(1))["inputs"])


def _compile_jit(
  program: Program,
  train: Any,
  seed: int,
  batch_size: int,
  parallel: Mapping[str, Any],
  path: str,
) -> Execution:
  with_rest = -1 in parallel["mesh"].values()
  needed = int(np.prod(list(parallel["mesh"].values())))
  devices = jax.devices() if with_rest else jax.devices()[:needed]
  with schema.within("parallel.mesh"):
    mesh = sharding.make_mesh(parallel["mesh"], devices)
  _check_batch(
    batch_size, mesh.shape.get(sharding.DATA_AXIS, 1), "the mesh's data axis", path
  )
  inputs = example_inputs(train)
  start = functools.partial(program.init, jax.random.key(seed), inputs)
  shapes = jax.eval_shape(start)
  with schema.within("parallel.rules"):
    specs = sharding.param_specs(shapes.params, parallel["rules"], mesh)
  placed = sharding.named(mesh, sharding.state_specs(shapes, shapes.params, specs))
  replicated = jax.sharding.NamedSharding(mesh, P())
  spread = jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh, leading=1))

  def init(**given: Any) -> TrainState:
    state: TrainState = jax.jit(start, out_shardings=placed)(**given)
    return state

  def spread_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    one = jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh))
    batch = {n: lax.with_sharding_constraint(x, one) for n, x in batch.items()}
    return program.step(state, batch)

  spread_program = program._replace(step=spread_step)
  jitted = functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(placed, replicated)
  )
  dispatch: Dispatch
  if isinstance(train, Mapping):
    arrays = {n: jax.device_put(np.asarray(a), replicated) for n, a in train.items()}
    run_rows = jitted(functools.partial(scan_steps, spread_program))
    count = data.num_examples(train)

    def dispatch(state: PyTree, start: int, num_steps: int) -> Any:
      return run_rows(
        state, arrays, data.index_block(seed, start, num_steps, count, batch_size)
      )
  else:
    read = _reader(train, seed, batch_size)
    run_batches = jitted(lambda state, b: lax.scan(spread_program.step, state, b))

    def dispatch(state: PyTree, start: int, num_steps: int) -> Any:
      batches = {
        name: jax.make_array_from_process_local_data(spread, values)
        for name, values in read(start, num_steps).items()
      }
      return run_batches(state, batches)

  target = jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed
  )
  return Execution(
    init,
    dispatch,
    target,
    lambda state: jax.device_put(state, placed),
    lambda state: state,
  )


def _reader(
  train: Any, seed: int, batch_size: int
) -> Callable[[int, int], dict[str, np.ndarray]]:
  """Reads this process's rows of several steps, prefetched while the device works."""
  ds = data.batches(
    train,
    batch_size=batch_size,
    seed=seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  position: list[Any] = [-1, None]

  def read(start: int, num_steps: int) -> dict[str, np.ndarray]:
    if position[0] != start:
      position[1] = iter(ds[start:].to_iter_dataset())
    batches = [next(position[1]) for _ in range(num_steps)]
    position[0] = start + num_steps
    return {n: np.stack([batch[n] for batch in batches]) for n in batches[0]}

  return read


def _compile_pmap(
  program: Program,
  train: Any,
  seed: int,
  batch_size: int,
  parallel: Mapping[str, Any],
  path: str,
) -> Execution:
  axis = sharding.DATA_AXIS
  if tuple(parallel["mesh"]) != (axis,) or parallel["rules"]:
    raise ConfigError(
      "parallel: mode 'pmap' replicates the parameters over the one mesh axis 'data' "
      f"and takes no rules, got mesh {dict(parallel['mesh'])} and "
      f"{len(parallel['rules'])} rules."
    )
  size = parallel["mesh"][axis]
  local = jax.local_device_count() if size == -1 else size // jax.process_count()
  total = local * jax.process_count()
  if size not in (-1, total) or not 1 <= local <= jax.local_device_count():
    raise ConfigError(
      f"parallel.mesh: {size} replicas do not fit {jax.device_count()} devices of "
      f"{jax.process_count()} process(es)."
    )
  _check_batch(batch_size, total, "the number of replicas", path)
  inputs = example_inputs(train)
  start = functools.partial(program.init, jax.random.key(seed), inputs)
  first = jax.process_index() * local
  devices = jax.local_devices()[:local] if jax.process_count() == 1 else None
  pmapped = functools.partial(
    jax.pmap, axis_name=axis, donate_argnums=0, devices=devices
  )

  def place(state: TrainState) -> PyTree:
    return sharding.replicate(state, local)

  def init(**given: Any) -> PyTree:
    return place(jax.jit(start)(**given))

  dispatch: Dispatch
  if isinstance(train, Mapping):
    arrays = sharding.replicate({n: np.asarray(a) for n, a in train.items()}, local)
    run_rows = pmapped(functools.partial(scan_steps, program))
    count = data.num_examples(train)

    def dispatch(state: PyTree, start: int, num_steps: int) -> Any:
      rows = data.index_block(seed, start, num_steps, count, batch_size)
      rows = rows.reshape(num_steps, total, -1).swapaxes(0, 1)
      state, metrics = run_rows(state, arrays, rows[first : first + local])
      return state, sharding.unreplicate(metrics)
  else:
    read = _reader(train, seed, batch_size)
    run_batches = pmapped(lambda state, b: lax.scan(program.step, state, b))

    def dispatch(state: PyTree, start: int, num_steps: int) -> Any:
      batches = {
        name: values.reshape(num_steps, local, -1, *values.shape[2:]).swapaxes(0, 1)
        for name, values in read(start, num_steps).items()
      }
      state, metrics = run_batches(state, batches)
      return state, sharding.unreplicate(metrics)

  return Execution(init, dispatch, jax.eval_shape(start), place, sharding.unreplicate)


def make_evaluate(
  tasks: Mapping[str, Callable[..., Any]], model: Model
) -> Callable[[Params, State, Batch], Metrics]:
  """``(params, model_state, batch) -> sums``: metrics times the examples they count.

  Args:
    tasks: head -> objective; the head "" is the whole output.
    model: the model, applied with ``train=False``.
  """

  def evaluate(params: Params, model_state: State, batch: Batch) -> Metrics:
    weight = jnp.sum(batch["mask"])
    sums = {"weight": weight}
    for task, objective in tasks.items():
      loss_fn = loss_function(
        objective, model, model_state, batch, train=False, head=task
      )
      loss, (_, metrics) = loss_fn(params)
      prefix = f"{task}/" if task else ""
      for name, value in {"loss": loss, **metrics}.items():
        sums[prefix + name] = weight * value
    return sums

  return evaluate


def evaluate_split(
  evaluate: Callable[[Any], Metrics], batches: Iterator[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
  """The exact mean of every metric over a split; ``evaluate`` returns ``sums``."""
  total: dict[str, Any] = {}
  for batch in batches:
    for name, value in evaluate(batch).items():
      total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
  weight = total.pop("weight")
  return {name: value / weight for name, value in total.items()}
