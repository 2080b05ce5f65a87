"""Who of a run's processes is there, asked on the coordinator's port before JAX is.

JAX ends a process with a C++ stack trace when another one does not come, and does not
say which. Here process 0 listens until all have told it their number and host; then
the port is JAX's.
"""

import json
import select
import socket
import time
from typing import Any, NamedTuple

from gradlab.types import ConfigError

_RETRY_SECONDS = 0.2
_LINE_SECONDS = 5.0


class Place(NamedTuple):
  """A process among those of a run.

  Attributes:
    address: the coordinator's "host:port".
    process: this process's number, from 0.
    processes: how many there are.
  """

  address: str
  process: int
  processes: int


def answer(place: Place, seconds: float) -> None:
  """Returns when all processes are there; process 0 keeps the list.

  Args:
    place: this process.
    seconds: how long to wait for the others.

  Raises:
    ConfigError: one sentence with the processes that did not come, the address that
      did not answer, or the flags that contradict each other.
  """
  deadline = time.monotonic() + seconds
  if place.process:
    _report(place, deadline, seconds)
  elif place.processes > 1:
    _collect(place, deadline, seconds)


class _Guest(NamedTuple):
  connection: socket.socket
  host: str


def _collect(place: Place, deadline: float, seconds: float) -> None:
  port = int(place.address.rpartition(":")[2])
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
  except OSError as error:
    raise ConfigError(
      f"--coordinator: process 0 cannot listen at {place.address}: {error.strerror}."
    ) from error
  guests: dict[int, _Guest] = {}
  with server:
    try:
      while missing := _tell_missing(place, guests):
        server.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
          _welcome(server.accept()[0], place, guests)
        except TimeoutError:
          came = {0: socket.gethostname()} | {i: g.host for i, g in guests.items()}
          raise ConfigError(_absent(missing, place, seconds, came)) from None
    except ConfigError as error:
      _tell(guests, {"error": str(error)})
      raise
    finally:
      # The others hang up first, so that no connection of ours holds the port.
      for guest in guests.values():
        guest.connection.settimeout(_LINE_SECONDS)
        _line(guest.connection)
        guest.connection.close()


def _welcome(
  connection: socket.socket, place: Place, guests: dict[int, _Guest]
) -> None:
  connection.settimeout(_LINE_SECONDS)
  said = _line(connection)
  if said is None or not {"index", "count", "host"} <= said.keys():
    connection.close()  # not one of ours
    return
  index, host = said["index"], said["host"]
  known = guests.get(index)
  guests[index] = _Guest(connection, host)
  if said["count"] != place.processes:
    raise ConfigError(
      f"--num_processes: process {index} on {host} was given {said['count']}, process "
      f"0 {place.processes}."
    )
  if known is not None and not _gone(known):
    _tell({index: known}, {"error": f"--process_id: {index} was given twice."})
    known.connection.close()
    raise ConfigError(
      f"--process_id: {index} was given to two processes, on {known.host} and {host}."
    )


def _gone(guest: _Guest) -> bool:
  """Whether the other end is closed; it says nothing after its first line."""
  return bool(select.select([guest.connection], [], [], 0)[0])


def _tell_missing(place: Place, guests: dict[int, _Guest]) -> list[int]:
  for index in [index for index, guest in guests.items() if _gone(guest)]:
    guests.pop(index).connection.close()
  missing = [index for index in range(1, place.processes) if index not in guests]
  _tell(guests, {"missing": missing})
  return missing


def _tell(guests: dict[int, _Guest], message: dict[str, Any]) -> None:
  for guest in guests.values():
    try:
      guest.connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
      continue  # it has gone, and will be found missing


def _report(place: Place, deadline: float, seconds: float) -> None:
  host, _, port = place.address.rpartition(":")
  me = {"index": place.process, "count": place.processes, "host": socket.gethostname()}
  why, missing = "", list[int]()
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host.strip("[]"), int(port)), left) as connection:
        connection.sendall(json.dumps(me).encode() + b"\n")
        why = "what answers there is not process 0 of this run"
        while True:
          connection.settimeout(max(deadline - time.monotonic(), 1e-3))
          said = _line(connection)
          if said is None:
            break
          if "error" in said:
            raise ConfigError(said["error"])
          missing = said["missing"]
          if not missing:
            return
    except OSError as error:
      why, missing = error.strerror or str(error), []
    time.sleep(_RETRY_SECONDS)
  if missing:
    raise ConfigError(_absent(missing, place, seconds, {}))
  raise ConfigError(
    f"--coordinator: process {place.process} did not reach {place.address} within "
    f"{seconds:g} seconds ({why}); process 0 must run there, and the port be open."
  )


def _absent(
  missing: list[int], place: Place, seconds: float, came: dict[int, str]
) -> str:
  which = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing))}"
  said = (
    f"--distributed: {which} of {place.processes} did not come to {place.address} "
    f"within {seconds:g} seconds"
  )
  here = ", ".join(f"{index} on {host}" for index, host in sorted(came.items()))
  return f"{said}; there were {here}." if here else f"{said}."


def _line(connection: socket.socket) -> dict[str, Any] | None:
  """The next line, or None when there is none or not one of ours."""
  data = b""
  try:
    while not data.endswith(b"\n"):
      byte = connection.recv(1)
      if not byte:
        return None
      data += byte
    said = json.loads(data)
  except (OSError, ValueError):
    return None
  return said if isinstance(said, dict) else None
