"""What a sweep's worker does with the job that it is given."""

import os
from collections.abc import Callable
from pathlib import Path

import jax

from gradlab import arms, pipeline, runfolder
from gradlab.arms import Arm
from gradlab.launch import _cache, _config_flag
from gradlab.launch._sweep.executors import Job
from gradlab.types import ConfigError, NonFiniteError

_DEVICES = "xla_force_host_platform_device_count"


def run(job: Job, should_stop: Callable[[], bool], *, cores: int = 1) -> None:
  """Runs a job's arms that are not finished; a failed arm does not keep the others.

  Args:
    job: the arms; each leaves ``result.json`` or ``error.json`` in its folder.
    should_stop: asked between dispatches.
    cores: of this process; on a CPU, vmapped arms are divided over as many devices.

  Raises:
    Interrupted: ``should_stop`` said so; the state is saved.
  """
  # a number of devices that the user has set stays
  if job.vmapped and _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", max(cores, 1))
  _cache.use()
  _config_flag.load(job.config)  # for the methods that the file defines
  folder = Path(job.folder)
  overrides = job.overrides or ((),) * len(job.arms)
  known = [
    Arm(name, folder / "arms" / name, config, changed)
    for name, config, changed in zip(job.arms, job.configs, overrides, strict=True)
  ]
  if not job.vmapped:
    for arm in known:
      _alone(arm, should_stop)
    return
  try:
    arms.run(known, folder / "batches", memory=job.memory, should_stop=should_stop)
  except ConfigError as error:
    for arm in known:
      if runfolder.status(arm.folder) == "open":
        runfolder.write_error(arm.folder, error)


def _alone(arm: Arm, should_stop: Callable[[], bool]) -> None:
  if runfolder.status(arm.folder) != "open":
    return
  try:
    pipeline.run(
      arm.config, arm.folder, overrides=arm.overrides, should_stop=should_stop
    )
  except (ConfigError, NonFiniteError) as error:
    runfolder.write_error(arm.folder, error)
