"""One server for the programs of all tests."""

from collections.abc import Iterator

import pytest

from tests.launch import programs


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[programs.Server]:
  with programs.Server(tmp_path_factory.mktemp("server")) as server:
    yield server
