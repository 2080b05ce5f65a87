"""The settings of Slurm jobs: ``--slurm=partition=gpu,time=60``."""

import difflib
from collections.abc import Mapping
from typing import Any

from gradlab.types import ConfigError

Setting = str | int | bool

DEFAULTS: Mapping[str, Setting] = {"time": 60, "cpus_per_task": 2, "mem": "8GB"}
# A default that one of these replaces.
_INSTEAD = {
  "mem": ("mem_per_cpu", "mem_per_gpu"),
  "cpus_per_task": ("cpus_per_gpu",),
}
_WHOLE = ("time", "cpus_per_task", "signal_delay_s")
# One job is one process, and the executor names and throttles the array.
_OURS = frozenset(
  {
    "additional_parameters",
    "array_parallelism",
    "dependency",
    "job_name",
    "nodes",
    "ntasks_per_node",
    "num_gpus",
    "setup",
    "srun_args",
    "stderr_to_stdout",
    "teardown",
    "use_srun",
  }
)


def submitit() -> Any:
  """The module, or a ConfigError that says how to get it."""
  try:
    import submitit as module
  except ModuleNotFoundError as error:
    raise ConfigError(
      "executor: Slurm needs the package submitit: pip install 'gradlab[slurm]'."
    ) from error
  return module


def parse_settings(text: str) -> dict[str, Setting]:
  """Reads ``name=value,name=value``.

  A piece without "=" belongs to the value before it (``nodelist=a1,a2``).

  Args:
    text: names are those of submitit's ``SlurmExecutor``, which are ``sbatch``'s with
      "_" for "-": partition, time (minutes), mem, cpus_per_task, gpus_per_node, ...

  Returns:
    Name -> value; whole numbers as int, "true" as True.

  Raises:
    ConfigError: no submitit, an unknown name, or a value that cannot be.

  Examples:
    >>> from gradlab.launch._slurm.settings import parse_settings
    >>> parse_settings("partition=gpu,time=90,exclude=a1,a2")
    {'partition': 'gpu', 'time': 90, 'exclude': 'a1,a2'}
  """
  values: dict[str, str] = {}
  name = None
  for piece in filter(None, (part.strip() for part in text.split(","))):
    if "=" in piece:
      name, value = (part.strip() for part in piece.split("=", 1))
      if name in values:
        raise ConfigError(f"flags: --slurm has {name!r} twice.")
      values[name] = value
    elif name is None:
      raise ConfigError(f"flags: --slurm must be name=value,..., got {text!r}.")
    else:
      values[name] += f",{piece}"
  return check({name: _read(value) for name, value in values.items()})


def check(settings: Mapping[str, Setting]) -> dict[str, Setting]:
  """The settings, when each is known and can be; raises ConfigError."""
  allowed = sorted(submitit().SlurmExecutor._valid_parameters() - _OURS)
  for name, value in settings.items():
    if name in _OURS:
      raise ConfigError(
        f"flags: --slurm cannot set {name!r}; the sweep does, and a job is one process."
      )
    if name not in allowed:
      near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)
      raise ConfigError(
        f"flags: --slurm has no {name!r}; did you mean {near[0]!r}? Allowed: "
        f"{', '.join(allowed)}."
      )
    if value == "":
      raise ConfigError(f"flags: --slurm's {name!r} has no value.")
    if name in _WHOLE and (type(value) is not int or value < 1):
      unit = {"time": " of minutes", "signal_delay_s": " of seconds"}.get(name, "")
      raise ConfigError(
        f"flags: --slurm's {name!r} must be a whole number{unit} of at least 1, got "
        f"{value!r}."
      )
  return dict(settings)


def complete(settings: Mapping[str, Setting]) -> dict[str, Setting]:
  """The checked settings, with ``DEFAULTS`` for what they leave open."""
  given = check(settings)
  defaults = {
    name: value
    for name, value in DEFAULTS.items()
    if not any(other in given for other in _INSTEAD.get(name, ()))
  }
  return {**defaults, **given}


def _read(value: str) -> Setting:
  if value.isdecimal():
    return int(value)
  return True if value.lower() == "true" else value
