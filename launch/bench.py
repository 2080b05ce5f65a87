"""The benchmark: ``python -m gradlab.launch.bench [--only=loop,startup,updates]``.

``loop``: the training loop beside a bare scan. ``startup``: from the start of a process
to the first step. ``updates``: every update rule beside ``optax.adamw``. Every number
is the median of several runs, with the smallest and the largest; every ratio compares
neighbouring runs. The folder gets ``bench.json`` and ``bench.md``.
"""

import pathlib
from collections.abc import Callable, Sequence

from absl import flags
from rich.console import Console

from gradlab import catalog
from gradlab.launch import _bench_loop, _bench_startup, _bench_updates, _main
from gradlab.launch import _bench_report as report
from gradlab.types import ConfigError

SECTIONS: dict[str, Callable[[int], report.Section]] = {
  "loop": _bench_loop.measure,
  "startup": _bench_startup.measure,
  "updates": _bench_updates.measure,
}
ONLY = flags.DEFINE_list("only", list(SECTIONS), "The sections to run.")
RUNS = flags.DEFINE_integer("runs", 5, "Runs of each measurement.", lower_bound=5)
OUT = flags.DEFINE_string("out", "runs/bench", "The folder of the results.")


def main(argv: Sequence[str]) -> None:
  """Measures, prints the tables and writes them."""
  del argv
  for name in ONLY.value:
    if name not in SECTIONS:
      near = catalog.nearest(name, tuple(SECTIONS))
      raise ConfigError(f"--only: unknown section {name!r}.{near}")
  if not ONLY.value:
    raise ConfigError(f"--only: name at least one of {', '.join(SECTIONS)}.")
  folder = pathlib.Path(OUT.value)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"--out: {folder}: {error.strerror}.") from error
  console, host = Console(highlight=False), report.machine()
  console.print(report.describe(host))
  found = []
  for name in dict.fromkeys(ONLY.value):
    with console.status(f"{name}: {RUNS.value} runs"):
      found.append(SECTIONS[name](RUNS.value))
    console.print(report.table(found[-1]))
  report.write(folder, host, RUNS.value, found)
  checks = [check for section in found for check in section.checks]
  met = sum(check.met for check in checks)
  console.print(f"{met} of {len(checks)} targets met")
  console.print(f"results: {folder / 'bench.md'}, {folder / 'bench.json'}")


def run() -> None:
  """The console entry point."""
  _main.run(main)


if __name__ == "__main__":
  run()
