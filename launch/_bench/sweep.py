"""An ablation by one sweep, beside as many separate runs on the same cores."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gradlab import sweeps
from gradlab.launch._bench import programs, report

TARGET = 12.0
PARALLEL = 2
# One takes minutes.
SEPARATE_RUNS = 1
RATE = "stages.train.update.adamw.learning_rate"

CONFIG = '''"""experiments/digits.py, {rates} rates x {seeds} seeds."""

from gradlab import sweeps
from gradlab.experiments import digits


def get_config():
  config = digits.get_config()
  config.stages.train.steps = {steps}
  return config


def sweep_learning_rate():
  return sweeps.log_uniform("{path}", {low}, {high}, {rates})


def sweep_seed():
  return sweeps.seeds({seeds})
'''


class Sizes(NamedTuple):
  """Arms, and the steps of each."""

  rates: int = 16
  seeds: int = 4
  steps: int = 500
  low: float = 1e-4
  high: float = 1e-1

  def arms(self) -> list[sweeps.Arm]:
    """What the config file's two sweeps mean together."""
    rates = sweeps.log_uniform(RATE, self.low, self.high, self.rates)
    return sweeps.product(rates, sweeps.seeds(self.seeds))


class Bench:
  """A folder with the config, the compilation cache and the folders of the runs."""

  def __init__(self, folder: Path, sizes: Sizes) -> None:
    self._folder, self._sizes = folder, sizes
    self._cache = folder / "cache"
    self._config = folder / "ablation.py"
    self._config.write_text(CONFIG.format(path=RATE, **sizes._asdict()))
    self._count = 0

  def _new(self) -> Path:
    self._count += 1
    return self._folder / f"run_{self._count}"

  def _check(self, folders: Iterator[Path], count: int) -> None:
    finished = sum((folder / "result.json").exists() for folder in folders)
    if finished != count:
      raise RuntimeError(f"{finished} of {count} arms finished.")

  def sweep(self) -> float:
    """Seconds from the command to its end, the finished report included."""
    workdir = self._new()
    command = (
      *("-m", "gradlab.launch.sweep", f"--config={self._config}"),
      *(f"--workdir={workdir}", "--sweep=learning_rate,seed"),
      f"--max_parallel={PARALLEL}",
    )
    seconds = self._seconds([command])
    self._check((workdir / "arms").iterdir(), len(self._sizes.arms()))
    return seconds

  def separate(self, arms: Sequence[sweeps.Arm]) -> float:
    """Seconds of one process per arm, ``PARALLEL`` at a time."""
    folders = [self._new() for _ in arms]
    commands = [
      (
        *("-m", "gradlab.launch.train", f"--config={self._config}"),
        *(f"--config.{path}={value}" for path, value in arm.items()),
        f"--workdir={folder}",
      )
      for arm, folder in zip(arms, folders, strict=True)
    ]
    seconds = self._seconds(commands)
    self._check(iter(folders), len(arms))
    return seconds

  def _seconds(self, commands: Sequence[Sequence[str]]) -> float:
    environment = programs.variables(self._cache)
    begun = time.monotonic()
    with ThreadPoolExecutor(PARALLEL) as pool:
      list(pool.map(lambda command: programs.run(command, environment), commands))
    return time.monotonic() - begun


def measure(runs: int, sizes: Sizes | None = None) -> report.Section:
  """A cold sweep, warm ones, and the separate runs, warm as well."""
  sizes = sizes or Sizes()
  arms = sizes.arms()
  with tempfile.TemporaryDirectory() as folder:
    bench = Bench(Path(folder), sizes)
    cold = [bench.sweep()]
    warm = [bench.sweep() for _ in range(runs)]
    bench.separate(arms[:1])
    separate = [bench.separate(arms) for _ in range(SEPARATE_RUNS)]
  return section(cold, warm, separate, sizes)


def section(
  cold: Sequence[float], warm: Sequence[float], separate: Sequence[float], sizes: Sizes
) -> report.Section:
  """The table of wall clocks."""
  rows, records, checks = [], [], []
  alone = report.summary(separate).median
  for name, seconds, limit in (
    ("warm compilation cache", warm, TARGET),
    ("empty compilation cache", cold, None),
  ):
    ratios = [alone / each for each in seconds]
    median = report.summary(ratios).median
    check = None if limit is None else report.Check(median, limit, at_least=True)
    cells = (report.show(seconds, ".1f"), f"{len(seconds)}", f"{alone:.0f}")
    rows.append((name, *cells, report.show(ratios, ".1f"), str(check or "")))
    records.append(
      {
        "name": name,
        "unit": "s",
        "sweep": report.numbers(seconds),
        "separate": report.numbers(separate),
        "ratio": report.numbers(ratios),
      }
    )
    checks.append(check)
  count = len(sizes.arms())
  return report.Section(
    name="sweep",
    says=f"{count} arms ({sizes.rates} rates x {sizes.seeds} seeds) of "
    f"experiments/digits.py, {sizes.steps} steps each: from the command "
    f"`gradlab.launch.sweep --max_parallel={PARALLEL}` to its finished report, beside "
    f"{count} processes of `gradlab.launch.train`, {PARALLEL} at a time, which run "
    f"{len(separate)} time(s) with a warm compilation cache.",
    columns=("sweep", "sweep s", "runs", "separate s", "speed", "target"),
    rows=rows,
    records=records,
    checks=checks,
    notes=[
      "all use one persistent compilation cache in a folder of its own: the first "
      "sweep finds it empty; one train run that is not counted warms it for the others."
    ],
  )
