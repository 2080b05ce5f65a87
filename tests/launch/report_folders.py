"""Folders of runs and sweeps for reports: every file that a program would have left."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Overrides = Mapping[str, Any]
ENVIRONMENT = {
  "started": "2026-01-02T03:04:05+00:00",
  "command": "python -m gradlab.launch.train --config=experiments/digits.py",
  "versions": {"gradlab": "0.1.0", "jax": "0.10.2"},
  "commit": "0123456789abcdef0123456789abcdef01234567",
  "devices": {"cpu": 1},
}


def config(overrides: Overrides, update: str = "adamw") -> dict[str, Any]:
  """A resolved config with the overrides in it."""
  found: dict[str, Any] = {
    "seed": 0,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "features": [128, 128]},
    "stages": {
      "train": {
        "kind": "train",
        "steps": 500,
        "batch_size": 128,
        "objective": {"name": "cross_entropy"},
        "compressor": None,
        "update": {update: {"learning_rate": 1e-3}},
      },
      "test": {"kind": "evaluate", "split": "test"},
    },
  }
  for path, value in overrides.items():
    at = found
    *parents, last = path.split(".")
    for key in parents:
      at = at.setdefault(key, {})
    at[last] = value
  return found


def write_run(
  folder: Path,
  settings: Mapping[str, Any],
  *,
  result: Mapping[str, Mapping[str, Any]] | None = None,
  curves: Mapping[str, Iterable[tuple[int, Mapping[str, Any]]]] | None = None,
  error: str = "",
) -> Path:
  """A run's folder.

  Args:
    folder: made here.
    settings: its config.
    result: stage -> metric -> number; None for a run that is not finished.
    curves: split -> (step, metric -> number or "nan") of each record.
    error: why it failed.
  """
  folder.mkdir(parents=True)
  _json(folder / "config.json", settings)
  _json(folder / "environment.json", ENVIRONMENT)
  (folder / "overrides.txt").write_text("")
  records = [
    {"step": step, "split": split, **values}
    for split, rows in (curves or {}).items()
    for step, values in rows
  ]
  lines = (json.dumps(record) + "\n" for record in records)
  (folder / "metrics.jsonl").write_text("".join(lines))
  if result is not None:
    _json(folder / "result.json", {"metrics": result, "seconds": 12.5})
  if error:
    _json(folder / "error.json", {"error": error, "type": "NonFiniteError"})
  return folder


def _json(path: Path, value: Any) -> None:
  path.write_text(json.dumps(value))


def name_of(overrides: Overrides) -> str:
  parts = []
  for path, value in overrides.items():
    said = "+".join(value) if isinstance(value, Mapping) else value
    parts.append(f"{path.split('.')[-1]}={said}")
  return ",".join(parts)


def write_plan(folder: Path, arms: Iterable[Overrides], file: str = "x.py") -> None:
  """``sweep.json``."""
  folder.mkdir(parents=True, exist_ok=True)
  listed = [{"name": name_of(arm), "overrides": dict(arm)} for arm in arms]
  plan = {"config": file, "sweeps": ["learning_rate", "seed"], "arms": listed}
  _json(folder / "sweep.json", plan)


def measured(skill: float, seed: int, points: int) -> dict[str, Any]:
  """``result`` and ``curves`` of a run that learns as far as ``skill`` in (0, 1)."""
  noise = np.random.default_rng(seed).normal(size=(4, points + 1))
  steps = np.linspace(10, 500, points).astype(int)
  level = 2.3 * np.exp(-skill * steps / 60.0) + 0.25 * (1 - skill)
  rows: dict[str, list[tuple[int, dict[str, float]]]] = {}
  for split, (gap, of) in {"train": (0.0, 0), "validation": (0.06, 2)}.items():
    loss = (level + gap) * np.exp(0.04 * noise[of, :-1])
    accuracy = 1 - 0.39 * level - gap / 2 + 0.004 * noise[of + 1, :-1]
    rows[split] = [
      (int(step), {"loss": float(a), "accuracy": float(min(b, 1.0))})
      for step, a, b in zip(steps, loss, accuracy, strict=True)
    ]
  last = rows["validation"][-1][1]
  test = last["accuracy"] - 0.01 + 0.003 * float(noise[0, -1])
  loss = last["loss"] + 0.02
  result = {"train": last, "test": {"accuracy": test, "loss": loss}}
  return {"result": result, "curves": rows}


def write_sweep(
  folder: Path, arms: Iterable[tuple[Overrides, float]], *, points: int = 25
) -> Path:
  """A finished sweep.

  Args:
    folder: of the sweep.
    arms: overrides of each arm, and how well it learns, in (0, 1).
    points: per curve.
  """
  arms = list(arms)
  write_plan(folder, [overrides for overrides, _ in arms])
  for number, (overrides, skill) in enumerate(arms):
    write_run(
      folder / "arms" / name_of(overrides),
      config(overrides),
      **measured(skill, number, points),
    )
  return folder
