"""Seconds from the start of a process to the demo's first step."""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from gradlab.launch._bench import report
from gradlab.launch._bench.programs import PACKAGE, seconds_until, variables

CONFIG = PACKAGE / "experiments" / "digits_ablation.py"
SWEEPS = "rule,seed"
POLL_SECONDS = 0.01
COLD_TARGET, WARM_TARGET = 10.0, 6.0
# What any JAX program pays before its first step.
IMPORTS = """
import time
import flax.linen, jax, optax
jax.block_until_ready(jax.jit(lambda x: x + 1)(0.0))
print(time.monotonic())
"""


def first_step(config: Path, cache: Path) -> float:
  """Seconds from a sweep's command until its first arm has written its metrics.

  Raises:
    RuntimeError: the sweep ended before that.
  """
  with TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
    workdir = Path(folder) / "sweep"
    program = ("-m", "gradlab.launch.sweep", f"--config={config}")
    begun = time.monotonic()
    process = subprocess.Popen(
      [sys.executable, *program, f"--workdir={workdir}", f"--sweep={SWEEPS}"],
      env=variables(cache),
      stdout=log,
      stderr=log,
    )
    try:
      while not _written(workdir):
        if process.poll() is not None:
          log.seek(0)
          raise RuntimeError(f"{config} took no step:\n{log.read()}")
        time.sleep(POLL_SECONDS)
      return time.monotonic() - begun
    finally:
      process.terminate()
      process.wait()


def _written(workdir: Path) -> bool:
  return any(file.stat().st_size for file in workdir.glob("arms/*/metrics.jsonl"))


def measure(runs: int, config: Path = CONFIG) -> report.Section:
  """Cold and warm starts in turn: each warm one has the cache of the cold before it."""
  cold, warm, imports = [], [], []
  for _ in range(runs):
    with TemporaryDirectory() as cache:
      imports.append(seconds_until(["-c", IMPORTS], Path(cache)))
      cold.append(first_step(config, Path(cache)))
      warm.append(first_step(config, Path(cache)))
  return section(cold, warm, imports)


def section(
  cold: list[float], warm: list[float], imports: list[float]
) -> report.Section:
  """The table of starts."""
  rows, records, checks = [], [], []
  for name, seconds, limit in (
    ("empty compilation cache", cold, COLD_TARGET),
    ("warm compilation cache", warm, WARM_TARGET),
  ):
    ratios = report.pairwise(seconds, imports)
    check = report.Check(report.summary(seconds).median, limit)
    cells = (report.show(seconds, ".2f"), report.show(imports, ".2f"))
    rows.append((name, *cells, report.show(ratios, ".1f"), str(check)))
    records.append(
      {
        "name": name,
        "unit": "s",
        "first_step": report.numbers(seconds),
        "imports": report.numbers(imports),
        "ratio": report.numbers(ratios),
      }
    )
    checks.append(check)
  return report.Section(
    name="startup",
    says="From the command that sweeps experiments/digits_ablation.py to the first "
    "metrics on disk (20 steps of 15 arms and their evaluation), beside a process that "
    "imports jax, flax and optax and jits one addition.",
    columns=("start", "first step (s)", "imports (s)", "ratio", "target (s)"),
    rows=rows,
    records=records,
    checks=checks,
  )
