"""Runs a program of ``gradlab.launch`` as a user does: in a process of its own.

``run`` starts a new Python. A ``Server`` forks the program from a process that has
imported all of it and started none of it, which saves the seconds of the imports;
what happens from there on is the same, signals and the exit included.
"""

import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "gradlab.launch.train"
# What the program imports, late imports included.
PRELOAD = (
  "gradlab.pipeline",
  "gradlab.catalog",
  "gradlab.launch._config_flag",
  "gradlab.launch._main",
  "rich.progress",
  "sklearn.datasets",
  "tensorboardX",
)


class Finished(NamedTuple):
  """How a program ended: its exit code (minus the signal's number) and its output."""

  code: int
  out: str
  err: str


def variables(devices: int, keep: bool = True) -> dict[str, str]:
  """The variables of a program's process.

  Args:
    devices: number of virtual devices.
    keep: whether what it compiles is kept for the other programs. JAX would leave
      half a file in the cache if the program were killed at that moment.
  """
  return {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if keep else "1e9",
    "JAX_PLATFORMS": "cpu",
    # NumPy's threads would not survive the fork.
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }


def run(
  *flags: str, devices: int = 1, program: str = PROGRAM, **environment: str
) -> Finished:
  """Runs the program to its end in a new Python."""
  done = subprocess.run(
    [sys.executable, "-m", program, *flags],
    cwd=ROOT,
    env={**os.environ, **variables(devices), **environment},
    capture_output=True,
    text=True,
    timeout=300,
  )
  return Finished(done.returncode, done.stdout, done.stderr)


class Server:
  """Forks programs from one process that has imported what they need."""

  def __init__(self, folder: Path) -> None:
    """Keeps what the programs print in ``folder``."""
    self._folder = folder
    self._count = 0
    self._process = subprocess.Popen(
      [sys.executable, "-m", __name__],
      cwd=ROOT,
      env={**os.environ, **variables(1)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def start(
    self, *flags: str, devices: int = 1, keep: bool = True, program: str = PROGRAM
  ) -> "Running":
    self._count += 1
    out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
    request = {"program": program, "flags": flags, "out": str(out), "err": str(err)}
    pid = self.ask({**request, "env": variables(devices, keep)})
    return Running(self, pid, out, err)

  def run(self, *flags: str, devices: int = 1, program: str = PROGRAM) -> Finished:
    return self.start(*flags, devices=devices, program=program).finish()

  def ask(self, request: Mapping[str, Any]) -> int:
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    print(json.dumps(request), file=self._process.stdin, flush=True)
    return int(self._process.stdout.readline())

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._process.communicate()


class Running:
  """A program that a ``Server`` started."""

  def __init__(self, server: Server, pid: int, out: Path, err: Path) -> None:
    self._server, self._pid = server, pid
    self._out, self._err = out, err
    self._handle = os.pidfd_open(pid)

  def wait(self, seconds: float) -> bool:
    """Whether the program ends within ``seconds``."""
    return bool(select.select([self._handle], [], [], seconds)[0])

  @property
  def pid(self) -> int:
    return self._pid

  def signal(self, number: int) -> None:
    os.kill(self._pid, number)

  def finish(self) -> Finished:
    """Waits for the end."""
    assert self.wait(300.0), f"still running: {self._err.read_text()}"
    os.close(self._handle)
    code = self._server.ask({"wait": self._pid})
    return Finished(code, self._out.read_text(), self._err.read_text())


def serve() -> None:
  """Answers requests: a program's pid when it has started, its code when it ended."""
  for name in PRELOAD:
    importlib.import_module(name)
  # else every collection of a fork copies the pages of all that is imported
  gc.collect()
  gc.freeze()
  for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
      answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    else:
      answer = os.fork()
    if answer == 0 and "flags" in request:
      return become(**request)
    print(answer, flush=True)


def become(
  program: str, flags: list[str], env: Mapping[str, str], out: str, err: str
) -> None:
  """Turns this process into the program, with its flags, variables and output."""
  for number, path in enumerate((os.devnull, out, err)):
    opened = os.open(path, os.O_RDWR | os.O_CREAT)
    os.dup2(opened, number)
    os.close(opened)
  os.environ.update(env)
  sys.argv = [program, *flags]
  runpy.run_module(program, run_name="__main__", alter_sys=True)


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
  """A config file whose ``get_config()`` returns ``config``."""
  path.write_text(
    "from ml_collections import ConfigDict\n\n\n"
    f"def get_config():\n  return ConfigDict({config!r})\n"
  )
  return path


if __name__ == "__main__":
  serve()
