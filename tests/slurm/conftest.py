"""Tests on a Slurm cluster of one node, started for them: ``make test-slurm``."""

from collections.abc import Iterator

import pytest

from tests.launch import programs
from tests.slurm import cluster


def pytest_sessionstart() -> None:
  # Called only where this folder is what pytest was asked to run.
  if missing := cluster.missing():
    raise pytest.UsageError(
      f"{missing[0]} is not installed: apt-get install {cluster.PACKAGES}"
    )


@pytest.fixture(scope="session")
def _slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  with pytest.MonkeyPatch.context() as patch:
    for name, value in programs.variables(1).items():
      patch.setenv(name, value)
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    with cluster.start():
      yield


@pytest.fixture(autouse=True)
def _empty_queue(_slurm: None) -> Iterator[None]:
  yield
  cluster.clear()
