"""Asynchronous checkpoints of a whole train state, restored bit for bit.

Each checkpoint is a folder named after its step. The small leaves are one file, the
large ones are Orbax's; when all is written, a manifest of the files is added, and the
checkpoint is complete.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from gradlab import _leaves, _manifest
from gradlab._disk import check_room, naming
from gradlab._orbax import Arrays
from gradlab._processes import by_the_first
from gradlab.types import ConfigError, PyTree

_NAME = re.compile(r"(\d+)(\.replaced)?")
_SMALL, _LARGE = "small.msgpack", "large"
_NONE, _DAMAGED = -1, -2


class Checkpoints:
  """The checkpoints of one run, newest kept.

  ``close`` it, or use ``with``: what is in progress at the interpreter's end is lost.
  Every process of a ``jax.distributed`` run makes the same calls on one shared
  folder; process 0 alone writes manifests, deletes, and decides what is usable.
  """

  def __init__(self, folder: str | os.PathLike[str], *, max_to_keep: int = 3) -> None:
    """Opens a folder of checkpoints; nothing is made or removed before a save.

    Args:
      folder: where the checkpoints are; made by the first save.
      max_to_keep: how many complete checkpoints stay; at least 1.

    Raises:
      ValueError: ``max_to_keep`` below 1.
    """
    if max_to_keep < 1:
      raise ValueError(f"max_to_keep must be at least 1, got {max_to_keep}.")
    self._folder = Path(folder).absolute()
    self._max_to_keep = max_to_keep
    self._arrays: Arrays | None = None
    self._executor = ThreadPoolExecutor(1, "checkpoint")
    self._pending: Future[None] | None = None
    self._checked: tuple[Path | None] | None = None

  def save(self, step: int, state: PyTree) -> None:
    """Starts saving ``state`` and returns; the caller may donate it right away.

    Waits for the save before it, and raises what went wrong in that one.

    Args:
      step: number of steps done; a checkpoint of the same step is replaced.
      state: a pytree of JAX or NumPy arrays, typed keys included.

    Raises:
      ValueError: a leaf that is not an array.
      OSError: the disk could not be written; earlier checkpoints are as they were.
    """
    self.wait()
    self._checked = None
    leaves = _leaves.named(state)
    arrays = {name: _leaves.stored(leaf) for name, leaf in leaves.items() if leaf.size}
    small, large = _leaves.split(arrays)
    described = {name: _leaves.describe(leaf) for name, leaf in leaves.items()}
    target = self._folder / str(int(step))
    packed = b""
    if jax.process_index() == 0:
      packed = _leaves.pack(small)
    needed = sum(array.nbytes for array in large.values())
    by_the_first(lambda: self._make_way(target, needed))
    with _undone_if_it_fails(target):
      if large:
        self._orbax().save(target / _LARGE, large)
    self._pending = self._executor.submit(
      self._finish, target, described, packed, bool(large)
    )

  def steps(self) -> list[int]:
    """The steps with a complete checkpoint, ascending."""
    return sorted({s for s, path in self._folders() if _manifest.exists(path)})

  def check(self, target: PyTree) -> None:
    """Looks for what the next ``restore(target)`` takes, which then does not look.

    Raises:
      ConfigError: as ``restore``.
    """
    self.wait()
    folder = self._choose(None)
    if folder is not None:
      _check(folder, target)
    self._checked = (folder,)

  def restore(
    self, target: PyTree, step: int | None = None
  ) -> tuple[int, PyTree] | None:
    """The newest checkpoint whose files are as they were written.

    Args:
      target: a pytree like the saved one, of ``jax.ShapeDtypeStruct`` or arrays.
        Leaves come back in its shardings (of any mesh; one device where it has
        none), NumPy leaves as NumPy arrays, weakly typed scalars weakly typed.
      step: the one step to restore; None for the newest usable one, where each
        damaged checkpoint is reported by a line in the log and passed over.

    Returns:
      (step, state), or None when there is no complete checkpoint.

    Raises:
      ConfigError: all checkpoints (or that of ``step``) are damaged or missing, or
        the checkpoint is one of a state with other leaves.
    """
    self.wait()
    checked, self._checked = self._checked, None
    folder = checked[0] if checked and step is None else self._choose(step)
    if folder is None:
      return None
    leaves = _check(folder, target)
    arrays: dict[str, Any] = _leaves.unpack((folder / _SMALL).read_bytes())
    large = {
      name: _leaves.stored_form(leaf)
      for name, leaf in leaves.items()
      if leaf.size and name not in arrays
    }
    if large:
      arrays.update(self._orbax().restore(folder / _LARGE, large))
    state = [_leaves.restored(leaf, arrays.get(name)) for name, leaf in leaves.items()]
    return int(folder.stem), jax.tree.unflatten(jax.tree.structure(target), state)

  def delete_after(self, step: int) -> None:
    """Removes the checkpoints of later steps, complete or not."""
    self.wait()
    self._checked = None
    if jax.process_index() == 0:
      for found, path in self._folders():
        if found > step:
          _manifest.remove(path)

  def wait(self) -> None:
    """Waits for the save in progress and raises what went wrong in it.

    Raises:
      OSError: the disk could not be written; earlier checkpoints are as they were.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def close(self) -> None:
    """Waits for the save in progress and ends the background threads."""
    try:
      self.wait()
    finally:
      self._executor.shutdown()
      if self._arrays is not None:
        self._arrays.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _orbax(self) -> Arrays:
    self._arrays = self._arrays or Arrays()
    return self._arrays

  def _make_way(self, target: Path, needed: int) -> None:
    """Makes the folder of a new checkpoint, and removes what was left unfinished."""
    self._folder.mkdir(parents=True, exist_ok=True)
    for _, path in self._folders():
      if not _manifest.exists(path):
        _manifest.remove(path)
    # A write of Orbax that breaks off would leave others going on behind its back.
    with naming(target):
      check_room(self._folder, needed)
    if target.exists():
      # It may be the only good one: it stays until the new one is complete.
      replaced = target.with_suffix(".replaced")
      if replaced.exists():
        _manifest.remove(target)
      else:
        target.rename(replaced)
    with naming(target):
      target.mkdir()

  def _finish(
    self, target: Path, leaves: dict[str, str], packed: bytes, has_large: bool
  ) -> None:
    """Writes what is left to write, and removes the checkpoints that are too many."""
    with _undone_if_it_fails(target):
      if has_large:
        self._orbax().wait(target / _LARGE)
      if jax.process_index() != 0:
        return
      with naming(target / _SMALL):
        (target / _SMALL).write_bytes(packed)
      _manifest.write(target, leaves)
    # Later steps belong to a time line that was left; they must not push this one out.
    past = [step for step in self.steps() if step <= int(target.name)]
    kept = {str(step) for step in past[-self._max_to_keep :]}
    for step, path in self._folders():
      if step <= int(target.name) and path.name not in kept:
        _manifest.remove(path)

  def _folders(self) -> list[tuple[int, Path]]:
    """Steps and folders, ascending; a replaced checkpoint before its replacement."""
    paths = self._folder.iterdir() if self._folder.is_dir() else ()
    named = [(_NAME.fullmatch(path.name), path) for path in paths]
    found = [(int(match[1]), path) for match, path in named if match and path.is_dir()]
    return sorted(found, key=lambda item: (item[0], -len(item[1].name)))

  def _choose(self, step: int | None) -> Path | None:
    choice = self._inspect(step) if jax.process_index() == 0 else (_NONE, 0)
    if jax.process_count() > 1:
      told = multihost_utils.broadcast_one_to_all(np.array(choice, np.int32))
      choice = (int(told[0]), int(told[1]))
    found, replaced = choice
    if found >= 0:
      return self._folder / f"{found}{'.replaced' if replaced else ''}"
    which = "" if step is None else f" of step {step}"
    if found == _DAMAGED:
      where = f"every checkpoint{which} in {self._folder}"
      raise ConfigError(f"{where} is damaged; the log says how.")
    if step is None:
      return None
    raise ConfigError(f"{self._folder} has no checkpoint{which}, only {self.steps()}.")

  def _inspect(self, wanted: int | None) -> tuple[int, int]:
    result = _NONE
    for step, path in reversed(self._folders()):
      if wanted not in (None, step):
        continue
      if not _manifest.exists(path):
        logging.warning("checkpoint %s is unfinished and passed over.", path)
        continue
      fault = _manifest.fault(path)
      if fault is None:
        return step, int(path.suffix == ".replaced")
      logging.warning("checkpoint %s is damaged and passed over: %s.", path, fault)
      result = _DAMAGED
    return result, 0


def _check(folder: Path, target: PyTree) -> dict[str, Any]:
  """The target's leaves by name, when they are those of the checkpoint."""
  leaves = _leaves.named(target)
  described = {name: _leaves.describe(leaf) for name, leaf in leaves.items()}
  _manifest.check_leaves(folder, described)
  return leaves


@contextlib.contextmanager
def _undone_if_it_fails(target: Path) -> Iterator[None]:
  """Frees the room of a checkpoint that cannot be finished."""
  with contextlib.ExitStack() as failed:
    if jax.process_index() == 0:
      failed.callback(shutil.rmtree, target, ignore_errors=True)
    yield
    failed.pop_all()
