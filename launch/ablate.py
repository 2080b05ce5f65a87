"""Compares methods: ``python -m gradlab.launch.ablate --config=FILE --workdir=DIR``.

The config file has ``METHODS``, ``get_config(method)``, ``sweep_learning_rate(method)``
and ``sweep_seed()``. Each method's rates and seeds run as one compiled program; the
rate is chosen on the validation split and the test split is read at that rate only.
A method whose folder is finished is not run again.
"""

import importlib.util
import json
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
)
from rich.table import Table

from gradlab import arms, config, runfolder
from gradlab.launch import _figures, _main
from gradlab.types import ConfigError

CONFIG = flags.DEFINE_string("config", "", "The ablation's Python file.")
WORKDIR = flags.DEFINE_string("workdir", "", "The ablation's folder.")

Result = dict[str, Any]


def load(path: str) -> types.ModuleType:
  """The ablation's file as a module, with the names that it must have."""
  spec = importlib.util.spec_from_file_location("ablation", path)
  if spec is None or spec.loader is None or not pathlib.Path(path).is_file():
    raise ConfigError(f"--config: {path} is not a Python file.")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for name in ("METHODS", "get_config", "sweep_learning_rate", "sweep_seed"):
    if not hasattr(module, name):
      raise ConfigError(f"--config: {path} has no {name}.")
  return module


def run_method(
  module: types.ModuleType, method: str, folder: pathlib.Path, progress: Progress
) -> Result:
  """All rates and seeds of one method; its numbers, also kept in ``result.json``."""
  settings = module.get_config(method)
  rates, seeds = module.sweep_learning_rate(method), module.sweep_seed()
  runs = [{**rate, **seed} for rate in rates for seed in seeds]
  resolved = config.resolve(settings)
  runfolder.open_run(folder, {"experiment": resolved, "arms": runs}, ())
  bar = progress.add_task(method, total=None)
  finished = folder / "result.json"
  if finished.exists():
    progress.update(bar, total=1, completed=1, description=f"{method} (finished)")
    return dict(json.loads(finished.read_text()))
  found = arms.run_arms(
    settings,
    runs,
    progress=lambda step, steps: progress.update(bar, total=steps, completed=step),
  )
  shape = (len(rates), len(seeds))
  validation = found.final["validation"]["accuracy"].reshape(shape).mean(axis=1)
  best = int(np.argmax(validation))

  def at_best(values: np.ndarray) -> Any:
    return values.reshape(*shape, *values.shape[1:])[best]

  result = {
    "best_rate": next(iter(rates[best].values())),
    "test_accuracy": at_best(found.final["test"]["accuracy"]),
    "steps": found.steps,
    "train_loss": at_best(found.curves["train"]["loss"]),
    "validation_accuracy": at_best(found.curves["validation"]["accuracy"]),
    "arms": [
      {**run, "validation_accuracy": v, "test_accuracy": t}
      for run, v, t in zip(
        runs,
        found.final["validation"]["accuracy"],
        found.final["test"]["accuracy"],
        strict=True,
      )
    ],
    "compile_seconds": found.compile_seconds,
    "seconds": found.seconds,
  }
  runfolder.write_result(folder, result)
  return dict(json.loads(finished.read_text()))


def rows(results: dict[str, Result]) -> list[tuple[str, str, str, str]]:
  """Method, best rate, test accuracy in per cent (mean ± std over seeds), seconds."""
  table = []
  for method, result in results.items():
    percent = 100 * np.asarray(result["test_accuracy"])
    accuracy = f"{percent.mean():.2f} ± {percent.std(ddof=1):.2f}"
    seconds = f"{result['seconds']:.1f}"
    table.append((method, f"{result['best_rate']:g}", accuracy, seconds))
  return table


def main(argv: Sequence[str]) -> None:
  """Runs the ablation and prints its table, its picture's path and its folder."""
  del argv
  console = Console(highlight=False)
  module, folder = load(CONFIG.value), pathlib.Path(WORKDIR.value)
  columns = (
    TextColumn("{task.description:<22}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
  )
  results: dict[str, Result] = {}
  with Progress(*columns, console=console) as progress:
    for method in module.METHODS:
      results[method] = run_method(module, method, folder / method, progress)
  names = ("method", "best rate", "test accuracy (%)", "seconds")
  table = Table(*names, title=(module.__doc__ or "").strip().splitlines()[0])
  lines = [" | ".join(names), " | ".join("---" for _ in names)]
  for row in rows(results):
    table.add_row(*row)
    lines.append(" | ".join(row))
  console.print(table)
  markdown = "".join(f"| {line} |\n" for line in lines)
  runfolder.write_atomic(folder / "table.md", markdown)
  _figures.learning_curves(results, folder / "curves.png")
  console.print(f"curves: {folder / 'curves.png'}", soft_wrap=True)
  console.print(f"run folder: {folder}", soft_wrap=True)


def run() -> None:
  """The console entry point."""
  _main.run(main, required=("config", "workdir"))


if __name__ == "__main__":
  run()
