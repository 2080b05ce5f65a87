"""A run of several processes on this machine, as a cluster would start it.

Each process has its own virtual devices; they talk through gloo.
"""

import re
import socket
from collections.abc import Sequence
from typing import Any

from gradlab.data import Dataset
from tests.launch import programs, sources

_GLOO = re.compile(
  r"\[Gloo\] Rank|is connected to|Expected number of connected|peer ranks|is :|"
  r"[\d.]+|\s+"
)


class _Records:
  """A split that is read on the host, record by record."""

  def __init__(self, split: dict[str, Any]) -> None:
    self._split = split

  def __len__(self) -> int:
    return len(self._split["inputs"])

  def __getitem__(self, row: int) -> dict[str, Any]:
    return {name: values[row] for name, values in self._split.items()}


def records() -> Dataset:
  """``sources.linear``, with a training split that is streamed."""
  held = sources.linear()
  return Dataset(_Records(held.train), held.validation, held.test, held.info)


def free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return int(server.getsockname()[1])


def flags(count: int, index: int, port: int, timeout: int = 60) -> list[str]:
  """What process ``index`` of ``count`` is told."""
  return [
    "--distributed",
    f"--distributed_timeout={timeout}",
    f"--coordinator=localhost:{port}",
    f"--num_processes={count}",
    f"--process_id={index}",
  ]


def start(
  server: programs.Server,
  run: Sequence[str],
  count: int,
  devices: int = 2,
  keep: bool = True,
) -> list[programs.Running]:
  """Starts ``count`` processes of the run, of ``devices`` each."""
  port = free_port()
  return [
    server.start(*run, *flags(count, index, port), devices=devices, keep=keep)
    for index in range(count)
  ]


def finish(running: Sequence[programs.Running]) -> list[programs.Finished]:
  """Waits for all of them."""
  return [each.finish() for each in running]


def said(done: programs.Finished) -> list[str]:
  """The lines that are the program's own and not gloo's.

  Gloo writes from several threads at once, so its lines may be torn and mixed.
  """
  return [line for line in done.out.splitlines() if _GLOO.sub("", line)]


def run(
  server: programs.Server, run: Sequence[str], count: int, devices: int = 2
) -> list[programs.Finished]:
  """Runs it to its end, which must be a good one, told by process 0 alone."""
  done = finish(start(server, run, count, devices))
  assert [each.code for each in done] == [0] * count, done
  assert [each.err for each in done] == [""] * count, done
  assert said(done[0])
  assert not any(map(said, done[1:])), done
  return done
