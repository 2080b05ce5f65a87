"""Reads the folders that a report is about; damage in one arm stays in that arm."""

import json
import pathlib
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from gradlab import metrics
from gradlab.types import ConfigError

STATUSES = ("finished", "failed", "unfinished", "waiting")
Curves = dict[tuple[str, str], dict[int, float]]


class Arm(NamedTuple):
  """One run.

  Attributes:
    name: of its folder.
    status: one of ``STATUSES``.
    overrides: config path -> value as the sweep set them; None if nothing says.
    config: the resolved config; None if it is not there.
    environment: versions, commit, devices.
    final: "stage/metric" -> number at the end; empty until the run is finished.
    seconds: that the run took; None until it is finished.
    curves: (metric, split) -> step -> number.
    error: why it failed, in one sentence; else "".
    notes: what could not be read, a sentence each.
  """

  name: str
  status: str
  overrides: dict[str, Any] | None
  config: dict[str, Any] | None
  environment: dict[str, Any]
  final: dict[str, float]
  seconds: float | None
  curves: Curves
  error: str
  notes: tuple[str, ...]


class Sweep(NamedTuple):
  """The runs of a folder; ``single`` if the folder is itself a run."""

  folder: pathlib.Path
  config_file: str
  sweeps: tuple[str, ...]
  arms: tuple[Arm, ...]
  single: bool
  notes: tuple[str, ...]


def load(folder: pathlib.Path) -> Sweep:
  """The run, or the runs, that a folder holds.

  Args:
    folder: of a run, of a sweep, or one whose direct children are runs.

  Raises:
    ConfigError: there is no such folder, or no run in it.
  """
  if not folder.is_dir():
    raise ConfigError(f"--workdir: there is no folder {folder}.")
  if (folder / "config.json").exists():
    arms = [_arm(folder, folder.absolute().name, None)]
    return Sweep(folder, _config_file(arms), (), tuple(arms), True, ())
  said: list[str] = []
  plan = _mapping(folder / "sweep.json", said)
  parent = folder / "arms" if plan or (folder / "arms").is_dir() else folder
  planned = dict(_planned(plan, said))
  found = [path.parent.name for path in sorted(parent.glob("*/config.json"))]
  names = dict.fromkeys([*planned, *found])
  if not names:
    raise ConfigError(
      f"--workdir: {folder} holds no run: it has no config.json, and neither has a "
      f"folder in {parent}."
    )
  arms = [_arm(parent / name, name, planned.get(name)) for name in names]
  sweeps = plan.get("sweeps") or ()
  return Sweep(
    folder,
    str(plan.get("config") or _config_file(arms)),
    tuple(map(str, sweeps)) if isinstance(sweeps, list) else (),
    tuple(arms),
    False,
    tuple(said),
  )


def _planned(
  plan: Mapping[str, Any], said: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  entries = plan.get("arms") or []
  for entry in entries if isinstance(entries, list) else []:
    try:
      yield str(entry["name"]), dict(entry["overrides"])
    except (KeyError, TypeError, ValueError):
      said.append("sweep.json has an arm without name or overrides.")


def _arm(folder: pathlib.Path, name: str, overrides: dict[str, Any] | None) -> Arm:
  notes: list[str] = []
  config = _mapping(folder / "config.json", notes)
  environment = _mapping(folder / "environment.json", notes)
  result = _mapping(folder / "result.json", notes)
  final = dict(_final(result.get("metrics")))
  if result and not final:
    notes.append("result.json has no metrics.")
  failed = (folder / "error.json").exists() and not result
  error = ""
  if failed:
    stored = _mapping(folder / "error.json", notes)
    error = str(stored.get("error") or "no reason is stored.")
  if result:
    status = "finished"
  elif failed:
    status = "failed"
  else:
    status = "unfinished" if (folder / "config.json").exists() else "waiting"
  seconds = result.get("seconds")
  return Arm(
    name,
    status,
    overrides,
    config or None,
    environment,
    final,
    float(seconds) if _is_number(seconds) else None,
    _curves(folder / "metrics.jsonl", notes),
    error,
    tuple(notes),
  )


def _mapping(path: pathlib.Path, notes: list[str]) -> dict[str, Any]:
  """What a JSON file holds; {} if it is missing or, with a note, damaged."""
  try:
    value = json.loads(path.read_bytes())
  except FileNotFoundError:
    return {}
  except (OSError, ValueError):
    notes.append(f"{path.name} cannot be read.")
    return {}
  if not isinstance(value, dict):
    notes.append(f"{path.name} is not a mapping.")
    return {}
  return value


def _curves(path: pathlib.Path, notes: list[str]) -> Curves:
  curves: Curves = {}
  try:
    records = metrics.read(path)
    lines = path.read_bytes().count(b"\n")
  except FileNotFoundError:
    return curves
  except OSError:
    notes.append(f"{path.name} cannot be read.")
    return curves
  if lines > len(records):
    notes.append(f"{path.name} has {lines - len(records)} damaged lines, left out.")
  for record in records:
    split = str(record.get("split", ""))
    for name, value in record.items():
      if name not in ("step", "split") and _is_number(value):
        curves.setdefault((name, split), {})[int(record["step"])] = float(value)
  return curves


def _final(stages: Any) -> Iterator[tuple[str, float]]:
  for stage, found in stages.items() if isinstance(stages, dict) else ():
    for name, value in found.items() if isinstance(found, dict) else ():
      if _is_number(value) or value in ("nan", "inf", "-inf"):
        yield f"{stage}/{name}", float(value)


def _is_number(value: Any) -> TypeGuard[float]:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _config_file(arms: list[Arm]) -> str:
  """The file that the command line names."""
  for arm in arms:
    try:
      command = shlex.split(str(arm.environment.get("command", "")))
    except ValueError:
      continue
    for word in command:
      if word.startswith("--config="):
        return word.removeprefix("--config=")
  return ""
