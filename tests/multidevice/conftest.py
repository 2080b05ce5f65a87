"""Tests that need 8 devices: ``tests/gradlab/test_sharding.py`` runs each file."""

import jax
import pytest

DEVICES = 8

collect_ignore_glob = [] if jax.device_count() >= DEVICES else ["test_*.py"]


def pytest_sessionstart() -> None:
  # Called only where this folder is what pytest was asked to run.
  if jax.device_count() < DEVICES:
    raise pytest.UsageError(
      f"tests/multidevice needs {DEVICES} devices, but there are "
      f"{jax.device_count()}; set JAX_PLATFORMS=cpu and "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES}."
    )
