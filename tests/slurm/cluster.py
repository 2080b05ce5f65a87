"""A Slurm cluster of one node, in a temporary folder and on ports of its own."""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PACKAGES = "slurm-wlm munge"
# A requeued job waits for the life of its credential: 5 seconds is the shortest.
CONFIGURATION = """\
ClusterName=gradlab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=20
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000
PartitionName=main Nodes=node Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=node PriorityTier=2 PreemptMode=OFF
"""


class ClusterError(RuntimeError):
  """The cluster did not come up; the message holds the daemons' logs."""


def missing() -> list[str]:
  """The programs that the cluster needs and this machine lacks."""
  return [name for name in PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def start(grace: int = 10) -> Iterator[Path]:
  """Starts the cluster; ends all of its processes and removes it afterwards.

  Args:
    grace: seconds between the SIGTERM and the end of a preempted job.

  Yields:
    Its ``slurm.conf``, which ``SLURM_CONF`` names meanwhile.

  Raises:
    ClusterError: the node was not ready in time.
  """
  # A socket's path is short, and munged wants a folder that others may enter.
  folder = Path(tempfile.mkdtemp(prefix="gradlab-slurm-", dir="/tmp"))
  folder.chmod(0o755)
  # It ends the cluster when its input does, in whatever way this process ends.
  guard = subprocess.Popen(
    [sys.executable, "-m", __name__, str(folder)],
    stdin=subprocess.PIPE,
    start_new_session=True,
    cwd=Path(__file__).parents[2],
  )
  before = os.environ.get("SLURM_CONF")
  os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
  daemons: list[subprocess.Popen[bytes]] = []
  try:
    _configure(folder, grace)
    _launch(folder, daemons)
    yield folder / "slurm.conf"
  finally:
    del os.environ["SLURM_CONF"]
    if before is not None:
      os.environ["SLURM_CONF"] = before
    guard.communicate()
    for daemon in daemons:
      daemon.wait()
  assert guard.returncode == 0


def wait(what: str, condition: Callable[[], bool], seconds: float = 60.0) -> None:
  """Polls until the condition holds; fails with ``what`` after ``seconds``."""
  deadline = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > deadline:
      raise TimeoutError(f"not within {seconds:g} s: {what}")
    time.sleep(0.1)


def run(*command: str) -> str:
  """What one of Slurm's commands prints; it must not fail."""
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return done.stdout


def clear() -> None:
  """Ends all jobs, now."""
  user = f"--user={os.getuid()}"

  def cleared() -> bool:
    for signals in (["--signal=KILL"], []):
      subprocess.run(["scancel", *signals, user], capture_output=True, timeout=60)
    return not _output("squeue", "--noheader", user)

  wait("an empty queue", cleared)


def _configure(folder: Path, grace: int) -> None:
  (folder / "munge.key").write_bytes(secrets.token_bytes(128))
  (folder / "munge.key").chmod(0o600)
  for name in ("state", "spool"):
    (folder / name).mkdir()
  with socket.socket() as one, socket.socket() as two:
    one.bind(("127.0.0.1", 0))
    two.bind(("127.0.0.1", 0))
    ports = one.getsockname()[1], two.getsockname()[1]
  text = CONFIGURATION.format(
    folder=folder,
    host=socket.gethostname().split(".")[0],
    user=pwd.getpwuid(os.getuid()).pw_name,
    controller=ports[0],
    node=ports[1],
    grace=grace,
  )
  (folder / "slurm.conf").write_text(text)


def _launch(folder: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
  socket_path = folder / "munge.socket"
  munged = ["munged", "--foreground", "--force", f"--socket={socket_path}"]
  munged += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid")]
  daemons.append(_daemon(folder, [*munged, f"--seed-file={folder}/munge.seed"]))
  with _logs_on_failure(folder):
    wait("munged's socket", socket_path.exists)
    for name in ("slurmctld", "slurmd"):
      daemons.append(_daemon(folder, [name, "-D"]))
    wait("an idle node", lambda: _output("sinfo", "-h", "-o", "%T") == {"idle"})


def _daemon(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
  with (folder / f"{command[0]}.out").open("ab") as out:
    return subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=out,
      stderr=out,
      # Ctrl-C is not for them
      start_new_session=True,
    )


def _output(*command: str) -> set[str]:
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  return set(done.stdout.split())


@contextlib.contextmanager
def _logs_on_failure(folder: Path) -> Iterator[None]:
  try:
    yield
  except TimeoutError as error:
    files = [*folder.glob("*.log"), *folder.glob("*.out")]
    logs = "\n".join(f"== {file.name}\n{file.read_text()[-4000:]}" for file in files)
    raise ClusterError(f"{error}\n{logs}") from error


def _processes(folder: Path) -> list[int]:
  """The daemons, and all that came from them: they carry its ``SLURM_CONF``."""
  mark = f"SLURM_CONF={folder / 'slurm.conf'}\0".encode()
  found = []
  for path in Path("/proc").glob("[0-9]*/environ"):
    # a process may end meanwhile, or belong to somebody else
    with contextlib.suppress(OSError):
      if mark in path.read_bytes() + b"\0":
        found.append(int(path.parent.name))
  return [pid for pid in found if pid != os.getpid()]


def _stop(folder: Path) -> None:
  """Kills all of the cluster's processes and removes its folder."""

  def ended() -> bool:
    for pid in _processes(folder):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return not _processes(folder)

  wait("the end of the cluster's processes", ended)
  shutil.rmtree(folder)


if __name__ == "__main__":
  sys.stdin.read()
  _stop(Path(sys.argv[1]))
