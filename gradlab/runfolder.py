"""The folder of one run: what was asked for, where it ran, and what came out."""

import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import gradlab
from gradlab._disk import write_atomic as write_atomic
from gradlab.types import ConfigError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_MOST_DIFFERENCES = 4


def jsonable(value: Any, path: str = "") -> Any:
  """The value as strict JSON reads it back: lists for tuples, no NaN, plain numbers.

  Args:
    value: nested mappings and sequences of numbers, strings, booleans, None, paths
      and NumPy or JAX arrays. NaN and infinities become "nan", "inf" and "-inf",
      which ``float`` reads.
    path: dotted name of the value, for the error.

  Returns:
    The same nested structure of dicts, lists, strings, finite numbers and None.

  Raises:
    ConfigError: a value that JSON cannot hold, such as a function.

  Examples:
    >>> from gradlab.runfolder import jsonable
    >>> jsonable({"betas": (0.9, 0.999), "clip": float("inf")})
    {'betas': [0.9, 0.999], 'clip': 'inf'}
  """
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else str(value)
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, Mapping):
    return {str(k): jsonable(v, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
  if isinstance(value, Sequence):
    return [jsonable(v, f"{path}.{i}".lstrip(".")) for i, v in enumerate(value)]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return jsonable(np.asarray(value).tolist(), path)
  raise ConfigError(
    f"{path or 'the value'} must be a number, string, sequence or mapping, "
    f"got {type(value).__name__}."
  )


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes ``value`` as JSON; a reader sees the old file or the new one, never half.

  Args:
    path: the file; its folder exists.
    value: anything that ``jsonable`` accepts; the order of mappings is kept.

  Raises:
    ConfigError: a value that JSON cannot hold.
    OSError: the folder is missing or cannot be written; it names ``path``.
  """
  write_atomic(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def open_run(
  workdir: str | os.PathLike[str],
  config_dict: Mapping[str, Any],
  overrides: Sequence[str],
  *,
  resume: bool = True,
) -> Path:
  """Makes the run's folder, or recognises it as the same run's.

  Writes ``config.json``, ``overrides.txt`` (one per line) and ``environment.json``.
  A resumed run keeps its ``config.json``; the environments of the earlier starts
  move into the list ``earlier`` of ``environment.json``. The field ``parallel`` says
  where a run happens and not which run it is: it may differ, and stands in
  ``environment.json`` for every start. Under ``jax.distributed`` every process checks
  and only process 0 writes.

  Args:
    workdir: the folder; made, with its parents, when it is missing.
    config_dict: the resolved config, in the order in which it will be written.
    overrides: the command line's changes to the config, as given.
    resume: whether a folder that holds a run of the same config is accepted.

  Returns:
    The folder.

  Raises:
    ConfigError: the folder holds a run of another config (or of any, without
      ``resume``), cannot be made or cannot be written. Nothing is changed then.
  """
  known = check_run(workdir, config_dict, resume=resume)
  folder = Path(workdir).absolute()
  if jax.process_index() != 0:
    return folder
  now = environment()
  config = jsonable(config_dict)
  if "parallel" in config:
    now["parallel"] = config["parallel"]
  there = folder.exists()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if known is None:
      write_json(folder / "config.json", config)
    else:
      now["earlier"] = _earlier(folder / "environment.json")
    write_json(folder / "environment.json", now)
    write_atomic(folder / "overrides.txt", "".join(f"{o}\n" for o in overrides))
  except OSError as error:
    if not there:
      shutil.rmtree(folder, ignore_errors=True)
    raise ConfigError(
      f"cannot write the run folder {folder}: {error.strerror or error}."
    ) from error
  return folder


def check_run(
  workdir: str | os.PathLike[str],
  config_dict: Mapping[str, Any],
  *,
  resume: bool = True,
) -> Any:
  """Checks what ``open_run`` checks; returns the stored config, or None.

  Raises:
    ConfigError: the folder holds a run of another config (or of any, without
      ``resume``).
  """
  folder = Path(workdir).absolute()
  known = _stored_config(folder)
  if known is not None and not resume:
    raise ConfigError(f"{folder} already holds a run; choose another folder.")
  if known is not None:
    _check_same(folder, known, jsonable(config_dict))
  return known


def write_result(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
  """Writes ``result.json`` atomically; its presence says that the run is done."""
  if jax.process_index() == 0:
    write_json(Path(folder) / "result.json", result)


def write_error(folder: str | os.PathLike[str], error: Exception | str) -> None:
  """Writes ``error.json`` atomically; its presence says that the run has failed.

  The folder is made if it is missing: a run may fail before it has one.
  """
  Path(folder).mkdir(parents=True, exist_ok=True)
  named = isinstance(error, Exception)
  said = " ".join(str(error).split())
  kind = type(error).__name__ if named else "Lost"
  write_json(Path(folder) / "error.json", {"error": said, "type": kind})


def status(folder: str | os.PathLike[str]) -> Literal["finished", "failed", "open"]:
  """Whether a run is done, has failed, or is to be started or gone on with."""
  if (Path(folder) / "result.json").exists():
    return "finished"
  return "failed" if (Path(folder) / "error.json").exists() else "open"


def environment() -> dict[str, Any]:
  """Versions, commit, devices, host and command line of this process."""
  versions = {name: _version(name) for name in _PACKAGES}
  return {
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": shlex.join([sys.executable, *sys.argv]),
    "hostname": socket.gethostname(),
    "platform": platform.platform(),
    "python": platform.python_version(),
    "versions": {"gradlab": gradlab.__version__, **versions},
    "commit": _own_commit(),
    "backend": jax.default_backend(),
    "processes": jax.process_count(),
    "devices": dict(Counter(device.device_kind for device in jax.devices())),
  }


@functools.cache
def _own_commit() -> str | None:
  """Asked once: the arms of a sweep all write it."""
  return git_commit(Path(gradlab.__file__).parent)


def git_commit(folder: Path) -> str | None:
  """The commit of the checkout that tracks ``folder``'s files, "-dirty" if changed."""
  # An install inside somebody's repository must not report that repository's commit.
  tracked = ("ls-files", "--error-unmatch", "__init__.py")
  describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
  commit = None
  for arguments in (tracked, describe):
    try:
      done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
      )
    except (OSError, subprocess.SubprocessError):
      return None
    commit = done.stdout.strip()
  return commit


@functools.cache
def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _earlier(path: Path) -> list[Any]:
  try:
    last = json.loads(path.read_text())
  except (OSError, ValueError):
    return []
  return [*last.pop("earlier", []), last]


def _stored_config(folder: Path) -> Any:
  path = folder / "config.json"
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except OSError as error:
    raise ConfigError(
      f"cannot use {folder} as a run folder: {error.strerror or error}."
    ) from error
  except ValueError as error:
    raise ConfigError(f"{path} is not valid JSON; restore or remove it.") from error


def _check_same(folder: Path, stored: Any, config: Any) -> None:
  there, here = dict(flat(stored)), dict(flat(config))
  differing = [
    name
    for name in {**there, **here}
    if name.split(".")[0] != "parallel"
    and (name not in there or name not in here or not _equal(there[name], here[name]))
  ]
  if not differing:
    return
  shown = "; ".join(
    f"{name} is {json.dumps(there[name]) if name in there else 'absent'} there and "
    f"{json.dumps(here[name]) if name in here else 'absent'} here"
    for name in differing[:_MOST_DIFFERENCES]
  )
  more = len(differing) - _MOST_DIFFERENCES
  raise ConfigError(
    f"{folder} holds a run of another config: {shown}"
    + (f"; and {more} more fields differ." if more > 0 else ".")
  )


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Path and value of every field of nested dicts; an empty dict is a value.

  Examples:
    >>> from gradlab.runfolder import flat
    >>> list(flat({"seed": 0, "data": {"name": "digits"}}))
    [('seed', 0), ('data.name', 'digits')]
  """
  if not isinstance(value, dict) or not value:
    yield path, value
    return
  for name, child in value.items():
    yield from flat(child, f"{path}.{name}".lstrip("."))


def _equal(a: Any, b: Any) -> bool:
  # 1 and 1.0 are the same setting; 1 and True are not.
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(_equal, a, b))
  return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
