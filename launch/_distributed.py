"""The flags with which a program runs on several processes, and how they meet and end.

On a TPU pod or under Slurm ``--distributed`` is enough. Anywhere else each process is
told where the first one is, how many there are, and which one it is.
"""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import jax
from absl import flags
from jax.experimental import multihost_utils

from gradlab.launch import _roll_call
from gradlab.types import ConfigError, Interrupted, NonFiniteError

DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Connect to the other processes that run this command."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0; found by itself on TPU pods and Slurm."
)
NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes run this command.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this one is, from 0.", lower_bound=0
)
TIMEOUT = flags.DEFINE_integer(
  "distributed_timeout", 300, "Seconds to wait for the others.", lower_bound=1
)

# A process that sends no heartbeat for so long is dead, and the others end.
_HEARTBEAT_SECONDS = 30
# JAX's own timeout would end the process with a stack trace: ours comes first.
_MARGIN_SECONDS = 60
# A process that fails alone would wait at its end for the others.
_FAREWELL_SECONDS = 10.0
_ANOTHER_ENDED = (
  "If another process of this run ended first, its own message says why. The same "
  "command on all hosts goes on from the last checkpoint."
)


class _Found(NamedTuple):
  place: _roll_call.Place
  local_devices: Sequence[int] | None


def _explicit() -> _Found | None:
  """What the flags say; None when they leave it to the cluster."""
  address, count, index = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
  values = {"coordinator": address, "num_processes": count, "process_id": index}
  given = [f"--{name}" for name, value in values.items() if value is not None]
  if given and not DISTRIBUTED.value:
    raise ConfigError(f"flags: {given[0]} needs --distributed.")
  if not given:
    return None
  if address is None or count is None or index is None:
    absent = [f"--{name}" for name, value in values.items() if value is None]
    raise ConfigError(f"flags: {given[0]} needs {' and '.join(absent)} too.")
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ConfigError(f"--coordinator: must be HOST:PORT, got {address!r}.")
  if index >= count:
    raise ConfigError(
      f"--process_id: must lie in [0, --num_processes = {count}), got {index}."
    )
  return _Found(_roll_call.Place(address, index, count), None)


def _detected(seconds: int) -> _Found:
  """What JAX finds out about the cluster that this process is in."""
  from jax._src.clusters import ClusterEnv  # JAX shows it only by connecting

  try:
    address, count, index, local = ClusterEnv.auto_detect_unset_distributed_params(
      os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, seconds
    )
  except RuntimeError as error:
    raise ConfigError(f"--distributed: {error}.") from error
  if address is None or count is None or index is None:
    raise ConfigError(
      "--distributed: this is no cluster that JAX knows (a TPU pod, Slurm, Open MPI); "
      "give --coordinator=HOST:PORT, --num_processes and --process_id."
    )
  return _Found(_roll_call.Place(address, index, count), local)


def _connect(found: _Found, seconds: int) -> None:
  """``jax.distributed.initialize``, which ends a process that waits in vain."""
  start = time.monotonic()
  _roll_call.answer(found.place, seconds)
  left = max(seconds - (time.monotonic() - start), _HEARTBEAT_SECONDS)
  said = f"error: --distributed: no connection to JAX at {found.place.address}."
  guard = threading.Timer(left, _leave, (2, said))
  guard.daemon = True
  guard.start()
  jax.config.update("jax_enable_preemption_service", True)
  try:
    jax.distributed.initialize(
      found.place.address,
      found.place.processes,
      found.place.process,
      local_device_ids=found.local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=int(left) + _MARGIN_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except RuntimeError as error:
    raise ConfigError(f"--distributed: {error}") from error
  finally:
    guard.cancel()


def _leave(code: int, said: str = "") -> None:
  if said:
    print(said, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


class Processes:
  """The processes of a run, connected by ``with``; one process without the flag.

  Whatever ends one of them ends all: the others within the heartbeat's timeout.

  Attributes:
    first: whether this process is the one that speaks.
    should_stop: whether any process got SIGTERM; called equally often in each, it
      answers the same in each.
  """

  first: bool
  should_stop: Callable[[], bool]

  def __enter__(self) -> Self:
    found = _explicit()
    self.first = True
    if DISTRIBUTED.value:
      _connect(found or _detected(TIMEOUT.value), TIMEOUT.value)
      self.first = jax.process_index() == 0
      self.should_stop = _stop_of_all()
    else:
      self.should_stop = _stop_of_one()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if kind is None or not DISTRIBUTED.value:
      return
    if issubclass(kind, Interrupted):
      if not self.first:
        raise SystemExit(0)  # the first one says it
      return
    if error is not None and issubclass(kind, jax.errors.JaxRuntimeError):
      error.add_note(_ANOTHER_ENDED)
    code = 2 if issubclass(kind, (ConfigError, NonFiniteError, OSError)) else 1
    farewell = threading.Timer(_FAREWELL_SECONDS, _leave, (code,))
    farewell.daemon = True
    farewell.start()


def _stop_of_one() -> Callable[[], bool]:
  asked: list[int] = []
  signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
  return lambda: bool(asked)


def _stop_of_all() -> Callable[[], bool]:
  """JAX catches SIGTERM, and all processes agree on the call that is the last."""
  calls, stopped = itertools.count(), [False]

  def should_stop() -> bool:
    reached = multihost_utils.reached_preemption_sync_point
    stopped[0] = stopped[0] or reached(next(calls))
    return stopped[0]

  return should_stop
