"""The manifest of a checkpoint: the digests of its files and the form of its leaves.

A folder without a manifest is an unfinished save; one whose files do not have the
digests of its manifest is damaged. The manifest holds a digest of itself.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradlab.runfolder import write_json
from gradlab.types import ConfigError

_NAME = "manifest.json"


def exists(folder: Path) -> bool:
  """Whether the checkpoint was finished."""
  return (folder / _NAME).exists()


def write(folder: Path, leaves: Mapping[str, str]) -> None:
  """Finishes a checkpoint: reads all its files once and writes the manifest.

  Args:
    folder: the checkpoint, which nobody writes to any more.
    leaves: dtype and shape of every leaf, by its path in the state.
  """
  paths = sorted(path for path in folder.rglob("*") if path.is_file())
  files = {path.relative_to(folder).as_posix(): _file_digest(path) for path in paths}
  content = {"leaves": dict(leaves), "files": files}
  write_json(folder / _NAME, {**content, "sha256": _digest(content)})


def fault(folder: Path) -> str | None:
  """What is wrong with the files of a checkpoint; None if nothing is."""
  try:
    manifest = json.loads((folder / _NAME).read_text())
    if manifest.pop("sha256") != _digest(manifest):
      return f"{_NAME} was altered"
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return f"{_NAME} cannot be read"
  for name, digest in manifest["files"].items():
    try:
      if _file_digest(folder / name) != digest:
        return f"{name} was altered"
    except OSError:
      return f"{name} cannot be read"
  return None


def check_leaves(folder: Path, wanted: Mapping[str, str]) -> None:
  """Raises ConfigError when the checkpoint's state has other leaves than ``wanted``."""
  stored = json.loads((folder / _NAME).read_text())["leaves"]
  differing = [n for n in {**stored, **wanted} if stored.get(n) != wanted.get(n)]
  if differing:
    name = differing[0]
    raise ConfigError(
      f"checkpoint {folder} is one of another state: {len(differing)} leaves differ, "
      f"the first being {name}, {stored.get(name, 'absent')} there and "
      f"{wanted.get(name, 'absent')} here."
    )


def remove(folder: Path) -> None:
  """Removes a checkpoint, finished or not."""
  # The manifest goes first: what a kill leaves behind is unfinished, not damaged.
  (folder / _NAME).unlink(missing_ok=True)
  shutil.rmtree(folder)


def _file_digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Any) -> str:
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()
