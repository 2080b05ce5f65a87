"""Arms: runs that differ only in seeds and float hyperparameters, as one program.

Each arm has a run's folder of its own and leaves there what it would leave if it ran
alone. While a batch of arms runs, its state is one checkpoint in the sweep's folder.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradlab import _arm_program as arm_program
from gradlab import config as configs
from gradlab import runfolder, stages
from gradlab._arm_batch import Arm as Arm
from gradlab._arm_batch import Batch, floats
from gradlab._arm_program import ArmProgram
from gradlab.experiment import build
from gradlab.sweeps import digest
from gradlab.types import ConfigError


def program_key(config: Mapping[str, Any]) -> str:
  """Equal for configs whose runs are one program: all but seeds and floats."""
  traced = {f"stages.{s}.{p}" for s, paths in floats(config).items() for p in paths}

  def kept(value: Any, path: str) -> Any:
    if path in traced or path == "seed":
      return None
    if isinstance(value, Mapping):
      return {k: kept(v, f"{path}.{k}" if path else k) for k, v in value.items()}
    return value

  return json.dumps(runfolder.jsonable(kept(config, "")))


def obstacle(config: Mapping[str, Any]) -> str | None:
  """The field that keeps an experiment's arms from being one program, and why."""
  parallel = config["parallel"]
  if parallel["mode"] != "jit":
    return "parallel.mode: the arms of one program run under jit, not pmap"
  if set(parallel["mesh"].values()) != {1} or parallel["rules"]:
    return "parallel.mesh: the arms of one program take all devices for themselves"
  if not isinstance(configs.build_data(config["data"]).train, Mapping):
    return "data: the arms of one program need a training split in memory"
  return None


def run(
  arms: Sequence[Arm],
  folder: Path,
  *,
  memory: int | None = None,
  should_stop: Callable[[], bool] = lambda: False,
) -> None:
  """Runs arms of one ``program_key`` in as few batches as the devices' memory allows.

  An arm that is finished or has failed is left alone; a batch that was broken off goes
  on from its newest checkpoint.

  Args:
    arms: the arms.
    folder: where batches keep their state while they run.
    memory: bytes that a device may use; None for what it has.
    should_stop: asked between dispatches.

  Raises:
    ConfigError: a config, a folder or a checkpoint that cannot be used, or arms that
      cannot be one program.
    Interrupted: ``should_stop`` said so; the state is saved.
  """
  if len({program_key(arm.config) for arm in arms}) != 1:
    raise ConfigError("arms of one program differ in seeds and floats only.")
  waiting = {arm.name: arm for arm in arms if runfolder.status(arm.folder) == "open"}
  if not waiting:
    return
  if reason := obstacle(arms[0].config):
    raise ConfigError(f"{reason}.")
  pipeline = build(arms[0].config)
  stages.check(pipeline)
  batches = [names for names in begun(folder) if waiting.keys() & set(names)]
  new = [name for name in waiting if not any(name in batch for batch in batches)]
  programs: dict[int, dict[str, ArmProgram]] = {}
  if new:
    limit = arm_program.device_memory() if memory is None else memory
    size, programs_of_size = arm_program.fitting(pipeline, len(new), limit)
    programs[size] = programs_of_size
    batches += [tuple(new[at : at + size]) for at in range(0, len(new), size)]
  for names in batches:
    size = min((n for n in programs if n >= len(names)), default=0)
    if not size:
      size = arm_program.rounded(len(names))
      programs[size] = {
        name: arm_program.make(pipeline, name, size) for name in pipeline.programs
      }
    batch = Batch(pipeline, [waiting.get(name) for name in names], size)
    state = folder / digest(names)[:12]
    state.mkdir(parents=True, exist_ok=True)
    runfolder.write_json(state / "arms.json", names)
    batch.run(programs[size], state, should_stop)
    shutil.rmtree(state)


def begun(folder: Path) -> list[tuple[str, ...]]:
  """The arms' names of each batch that was broken off and has a state to go on from."""
  return [
    tuple(json.loads(path.read_text()))
    for path in sorted(folder.glob("*/arms.json"))
    if any(path.parent.glob("checkpoints/*/*"))
  ]
