"""The pictures that the programs leave in their folders."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def learning_curves(
  results: Mapping[str, Mapping[str, Any]], path: pathlib.Path
) -> None:
  """Training loss and validation accuracy by method: mean over seeds, and their range.

  Args:
    results: method -> ``steps`` [E], ``train_loss`` and ``validation_accuracy``
      [seeds, E], ``best_rate``.
    path: of the PNG.
  """
  # Imported here: a program's first step does not wait for matplotlib.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9.6, 3.8), layout="constrained")
  axes = figure.subplots(1, 2)
  panels = (
    ("train_loss", "training loss", "log"),
    ("validation_accuracy", "validation accuracy", "linear"),
  )
  for axis, (name, title, scale) in zip(axes, panels, strict=True):
    for method, result in results.items():
      steps, curves = np.asarray(result["steps"]), np.asarray(result[name])
      label = f"{method}, rate {result['best_rate']:g}"
      (line,) = axis.plot(steps, curves.mean(axis=0), label=label, linewidth=1.6)
      low, high = curves.min(axis=0), curves.max(axis=0)
      axis.fill_between(
        steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0
      )
    axis.set(title=title, xlabel="step", yscale=scale)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  axes[1].set_ylim(0.8, 1.0)
  axes[1].legend(frameon=False, loc="lower right")
  temporary = path.with_suffix(".tmp.png")
  figure.savefig(temporary, dpi=150)
  temporary.replace(path)
