"""Seconds from the start of a process to the demo's first step."""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import gradlab
from gradlab.launch import _bench_report as report

PACKAGE = Path(gradlab.__file__).absolute().parent
CONFIG = PACKAGE / "experiments" / "digits_ablation.py"
COLD_TARGET, WARM_TARGET = 10.0, 6.0
# What any JAX program pays before its first step.
IMPORTS = """
import time
import flax.linen, jax, optax
jax.block_until_ready(jax.jit(lambda x: x + 1)(0.0))
print(time.monotonic())
"""


def seconds_until(arguments: list[str], cache: Path) -> float:
  """Starts Python and waits; the program's last line is the time it stopped at."""
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
  # The package that this process runs, also when it was found by the current folder.
  paths = [str(PACKAGE.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
  environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
  begun = time.monotonic()
  done = subprocess.run(
    [sys.executable, *arguments],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
  return float(done.stdout.split()[-1]) - begun


def first_step(config: Path, cache: Path) -> float:
  """Seconds until the first dispatch of ``config``'s first method has ended."""
  with TemporaryDirectory() as workdir:
    program = "gradlab.launch._bench_first_step"
    return seconds_until(
      ["-m", program, f"--config={config}", f"--workdir={workdir}"], cache
    )


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
    says="From the start of the process to the end of the first dispatch of "
    "experiments/digits_ablation.py (20 steps of 15 arms and their evaluation), beside "
    "a process that imports jax, flax and optax and jits one addition.",
    columns=("start", "first step (s)", "imports (s)", "ratio", "target (s)"),
    rows=rows,
    records=records,
    checks=checks,
  )
