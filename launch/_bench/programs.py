"""Starts the programs of ``launch`` in processes of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import gradlab

PACKAGE = Path(gradlab.__file__).absolute().parent


def variables(cache: Path) -> dict[str, str]:
  """This process's variables, but for the folder of the compilation cache."""
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
  # The package that this process runs, also when it was found by the current folder.
  paths = [str(PACKAGE.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
  environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
  return environment


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
  """Starts Python, waits, and returns what it printed.

  Raises:
    RuntimeError: the program failed; its last words are in the message.
  """
  done = subprocess.run(
    [sys.executable, *arguments],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
  return done.stdout


def seconds_until(arguments: Sequence[str], cache: Path) -> float:
  """Starts Python and waits; the program's last line is the time it stopped at."""
  environment = variables(cache)
  begun = time.monotonic()
  return float(run(arguments, environment).split()[-1]) - begun
