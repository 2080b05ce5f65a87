"""Runs Python on several virtual CPU devices, which must exist before jax does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_on_devices(*arguments: str, devices: int = 8, timeout: float = 1800.0) -> str:
  """Runs ``python *arguments`` at the root, with that many virtual CPU devices.

  Args:
    *arguments: what follows ``python``: ``"-c", code`` or ``"-m", "pytest", path``.
    devices: number of virtual devices.
    timeout: seconds after which the process is killed.

  Returns:
    The standard output. A process that fails, fails the test and shows its output.
  """
  flags = [
    flag
    for flag in os.environ.get("XLA_FLAGS", "").split()
    if "xla_force_host_platform_device_count" not in flag
  ]
  flags.append(f"--xla_force_host_platform_device_count={devices}")
  # An outer pytest's (or its workers') settings are not the inner process's.
  inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
  process = subprocess.run(
    [sys.executable, *arguments],
    cwd=ROOT,
    env={**inherited, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=timeout,
  )
  if process.returncode:
    pytest.fail(
      f"python {' '.join(arguments)} on {devices} devices exited with "
      f"{process.returncode}:\n{process.stdout}",
      pytrace=False,
    )
  return process.stdout
