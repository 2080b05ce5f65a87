"""A disk that is full: the run stops with one line, and goes on when there is room."""

import contextlib
import copy
import csv
import errno
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gradlab import _manifest, checkpoint, metrics
from gradlab.checkpoint import Checkpoints
from tests.launch import programs, runs

SAYS = re.compile(
  r"error: cannot write (.*): No space left on device; what was written before is "
  r"kept, and the same command goes on from there when the disk can be written\.\n"
)


class Disk:
  """A file system of a given size."""

  def __init__(self, folder: Path) -> None:
    folder.mkdir()
    self.folder = folder

  def mount(self, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")

  def fill(self) -> Path:
    """Takes all the room that there is."""
    path = self.folder / "fill"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
      while file.write(bytes(4096)):
        pass
    return path

  def resize(self, size: str) -> None:
    self.mount(f"remount,size={size}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
  disk = Disk(tmp_path / "disk")
  disk.mount("size=64m")
  yield disk
  subprocess.run(["umount", str(disk.folder)], check=True)


def config(**tune: Any) -> dict[str, Any]:
  """Few steps of training, then ``tune``, which fills the disk."""
  changed = copy.deepcopy(runs.CONFIG)
  changed["stages"]["train"]["steps"] = 48
  changed["stages"]["tune"] |= tune
  return changed


# Small states and a record for each step: mostly records fill the disk.
RECORDS = config(steps=400, log_every=1, checkpoint_every=0)
# A checkpoint takes 3 MB, of which Orbax has the kernel of 1 MiB and its moments.
LARGE = config(steps=72)
LARGE["model"]["features"] = (512, 512)
# Every size stops the run somewhere else.
SMALL = config(log_every=1, checkpoint_every=4)


def check_kept(folder: Path) -> None:
  """All that a stopped run left is whole."""
  checkpoints = list((folder / "checkpoints").glob("*/*"))
  assert checkpoints
  assert [_manifest.fault(path) for path in checkpoints] == [None] * len(checkpoints)
  assert not list(folder.rglob("*.tmp"))
  assert not (folder / "result.json").exists()
  data = (folder / "metrics.jsonl").read_bytes()
  records = metrics.read(folder / "metrics.jsonl")
  assert len(data.splitlines()) == len(records)
  assert data.endswith(b"\n")
  with (folder / "metrics.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert 0 <= len(records) - len(rows) <= 1
  for row, record in zip(rows, records, strict=False):
    assert {n: v for n, v in row.items() if v} == {n: str(v) for n, v in record.items()}


@pytest.mark.parametrize(
  ("settings", "sizes", "full"),
  [
    pytest.param(RECORDS, ["112k"], r"metrics\.|events\.", id="records"),
    pytest.param(LARGE, ["9m"], r"checkpoints/\w+/\d+$", id="large"),
    pytest.param(SMALL, ["76k", "88k"], "", id="small"),
  ],
)
def test_a_disk_that_runs_full(
  settings: dict[str, Any],
  sizes: list[str],
  full: str,
  disk: Disk,
  tmp_path: Path,
  server: programs.Server,
) -> None:
  done = server.run(*runs.write(tmp_path, settings))
  assert (done.code, done.err) == (0, ""), done
  folder = disk.folder / "run"
  flags = f"--config={tmp_path / 'run.py'}", f"--workdir={folder}"
  for size in sizes:
    disk.resize(size)
    done = server.run(*flags)
    said = SAYS.fullmatch(done.err)
    assert done.code == 2
    assert said, done.err
    assert re.match(full, str(Path(said[1]).relative_to(folder)))
    check_kept(folder)
  disk.resize("64m")
  done = server.run(*flags)
  assert (done.code, done.err) == (0, ""), done
  assert runs.outcome(folder) == runs.outcome(tmp_path / "run")


def test_a_disk_that_is_full_at_the_start(
  disk: Disk, tmp_path: Path, server: programs.Server
) -> None:
  folder = disk.folder / "run"
  flags = runs.write(tmp_path, RECORDS)[0], f"--workdir={folder}"
  fill = disk.fill()
  done = server.run(*flags)
  said = f"error: cannot write the run folder {folder}: No space left on device.\n"
  assert (done.code, done.err) == (2, said)
  assert list(disk.folder.iterdir()) == [fill]
  fill.unlink()
  done = server.run(*flags)
  assert (done.code, done.err) == (0, ""), done


def test_a_disk_that_others_fill_while_orbax_writes(
  disk: Disk, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
  def state(step: int) -> dict[str, jax.Array]:
    return {
      str(i): jax.random.normal(jax.random.key(step + i), (512, 1024)) for i in range(8)
    }

  disk.resize("24m")
  # Asked before the save, the disk still had the room.
  monkeypatch.setattr(checkpoint, "check_room", lambda folder, needed: None)
  with Checkpoints(disk.folder) as checkpoints:
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    with pytest.raises(OSError, match="No space left on device") as raised:
      checkpoints.wait()
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(disk.folder / "2" / "large")
    assert checkpoints.steps() == [1]
    disk.resize("64m")
    checkpoints.save(2, state(2))
    step, restored = checkpoints.restore(jax.eval_shape(lambda: state(2))) or (0, {})
    assert (step, checkpoints.steps()) == (2, [1, 2])
    for name, value in state(2).items():
      np.testing.assert_array_equal(restored[name], value)
  assert capfd.readouterr().err == ""
