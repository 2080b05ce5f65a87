"""From a config file and the names of its sweeps to arms, and from arms to jobs."""

import inspect
import json
import math
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradlab import arms, config, runfolder, sweeps
from gradlab.arms import Arm
from gradlab.launch._config_flag import Fields
from gradlab.launch._sweep.executors import Job
from gradlab.schema import unknown
from gradlab.types import ConfigError


def folder(path: str, names: Sequence[str]) -> Path:
  """Where a sweep goes that is not told where.

  Examples:
    >>> from gradlab.launch._sweep.plan import folder
    >>> str(folder("experiments/digits.py", ("learning_rate", "seed")))
    'runs/digits_learning_rate_seed'
  """
  return Path("runs") / "_".join((Path(path.split(":")[0]).stem, *names))


def overrides(path: str, names: Sequence[str]) -> list[sweeps.Arm]:
  """The product of the sweeps that a config file defines as ``sweep_<name>()``.

  Args:
    path: the file, as ``--config`` takes it; what follows a colon goes to the
      functions that take an argument.
    names: of the sweeps.

  Raises:
    ConfigError: a name that the file does not define, a function that returns no list
      of mappings, or no arm at all.
  """
  file, *argument = path.split(":", 1)
  defined = {
    name.removeprefix("sweep_"): function
    for name, function in runpy.run_path(file).items()
    if name.startswith("sweep_") and callable(function)
  }
  for name in names:
    if name not in defined:
      error = unknown("--sweep", "sweep", name, tuple(defined))
      raise ConfigError(f"{error} {file} has: {', '.join(defined) or 'none'}.")
  found = sweeps.product(*(_called(defined[n], n, file, argument) for n in names))
  if not found:
    empty = [n for n in names if not _called(defined[n], n, file, argument)]
    raise ConfigError(f"--sweep: zero arms; {', '.join(empty)} of {file} is empty.")
  return found


def _called(
  function: Callable[..., Any], name: str, file: str, argument: Sequence[str]
) -> list[sweeps.Arm]:
  takes = inspect.signature(function).parameters
  found = function(*argument) if takes else function()
  if not isinstance(found, list | tuple) or not all(
    isinstance(arm, Mapping) for arm in found
  ):
    raise ConfigError(
      f"--sweep: sweep_{name}() of {file} must return a list of mappings from config "
      "paths to values."
    )
  return [dict(arm) for arm in found]


def make_arms(
  base: Fields, changes: Sequence[sweeps.Arm], folder: Path, given: Sequence[str]
) -> list[Arm]:
  """The arms with their resolved configs and their folders.

  Args:
    base: the config, with what the command line changed.
    changes: one mapping per arm.
    folder: of the sweep.
    given: what the command line changed, as it was written.

  Raises:
    ConfigError: a config that is wrong, two arms that are the same, or a folder that
      holds a run of another config.
  """
  made: dict[str, Arm] = {}
  for change in changes:
    name = sweeps.name(change)
    try:
      resolved = config.resolve(sweeps.override(base, change))
    except ConfigError as error:
      raise ConfigError(f"arm {name}: {error}") from error
    said = tuple(f"--config.{path}={value!r}" for path, value in change.items())
    arm = Arm(name, folder / "arms" / name, resolved, (*given, *said))
    if name in made:
      raise ConfigError(f"--sweep: duplicate arms: {name} comes twice.")
    runfolder.check_run(arm.folder, resolved)
    made[name] = arm
  same: dict[str, str] = {}
  for arm in made.values():
    key = json.dumps(runfolder.jsonable(arm.config))
    if key in same:
      raise ConfigError(
        f"--sweep: duplicate arms: {same[key]} and {arm.name} have the same config."
      )
    same[key] = arm.name
  return list(made.values())


class Group(NamedTuple):
  """The arms of one program, and from how many on they are one job."""

  arms: tuple[Arm, ...]
  least: float


def make_groups(known: Sequence[Arm], vmap: str) -> list[Group]:
  """The arms by program.

  Args:
    known: all arms.
    vmap: "auto" makes one job of the arms of one program, "always" demands that this
      be all, "never" makes a job of each arm.

  Raises:
    ConfigError: ``vmap="always"`` with arms that cannot be one program.
  """
  groups: dict[str, list[Arm]] = {}
  for arm in known:
    groups.setdefault(arms.program_key(arm.config), []).append(arm)
  if vmap == "always":
    _check_one_program(list(groups))
    if reason := arms.obstacle(known[0].config):
      raise ConfigError(f"--vmap=always: {reason}.")
    return [Group(tuple(known), 1)]

  def least(group: Sequence[Arm]) -> float:
    alone = vmap == "never" or len(group) == 1 or arms.obstacle(group[0].config)
    return math.inf if alone else 2

  return [Group(tuple(group), least(group)) for group in groups.values()]


def make_jobs(
  groups: Sequence[Group], path: str, folder: Path, *, memory: int | None
) -> list[Job]:
  """The jobs that run the arms which are not finished and have not failed.

  Args:
    groups: all arms. A batch that was broken off is gone on with as a batch.
    path: the config file.
    folder: of the sweep.
    memory: bytes of a device that a batch may use; None for what it has.
  """
  begun = {name for batch in arms.begun(folder / "batches") for name in batch}
  jobs = []
  for group in groups:
    left = [arm for arm in group.arms if runfolder.status(arm.folder) == "open"]
    one_job = len(left) >= group.least
    together = [arm for arm in left if one_job or arm.name in begun]
    apart = [arm for arm in left if arm not in together]
    for members in [together, *([arm] for arm in apart)]:
      if members:
        jobs.append(
          Job(
            config=path,
            folder=str(folder),
            arms=tuple(arm.name for arm in members),
            configs=tuple(arm.config for arm in members),
            vmapped=members is together,
            overrides=tuple(arm.overrides for arm in members),
            memory=memory,
          )
        )
  return jobs


def _check_one_program(keys: Sequence[str]) -> None:
  first = dict(runfolder.flat(json.loads(keys[0])))
  for key in keys[1:]:
    other = dict(runfolder.flat(json.loads(key)))
    differ = [p for p in {**first, **other} if first.get(p, key) != other.get(p, key)]
    raise ConfigError(
      f"--vmap=always: the arms differ in {', '.join(differ)}; the arms of one program "
      "differ in seeds and float hyperparameters only."
    )
