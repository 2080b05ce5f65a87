"""The experiments whose runs are broken off, and what a run folder came to."""

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab import execution, metrics, pipeline
from gradlab.checkpoint import Checkpoints
from tests.launch import programs

LOSS = {"name": "squared_error"}
RATE = {
  "name": "warmup_cosine",
  "peak_value": 1e-2,
  "warmup_steps": 20,
  "decay_steps": 240,
}
# Windows of 7 steps end between checkpoints; dispatches of 8 end within windows.
TRAIN = {
  "batch_size": 8,
  "objective": LOSS,
  "steps_per_dispatch": 8,
  "log_every": 7,
  "checkpoint_every": 24,
}
CONFIG: dict[str, Any] = {
  "seed": 1,
  "data": {"name": "tests.launch.sources:linear"},
  "model": {"name": "mlp", "features": (16,), "outputs": 1, "dropout": 0.1},
  "stages": {
    "train": {
      **TRAIN,
      "steps": 240,
      "eval_every": 60,
      "compressor": {"name": "top_k", "ratio": 0.5, "error_feedback": True},
      "update": {"adan": {"learning_rate": RATE}},
    },
    "prune": {"kind": "edit", "method": {"name": "magnitude_prune", "sparsity": 0.5}},
    "tune": {**TRAIN, "steps": 120, "update": {"adamw": {"learning_rate": 1e-3}}},
    "test": {"kind": "evaluate", "objective": LOSS},
  },
}
STEPS = 360
ON_ONE = {"mode": "jit", "mesh": {"data": 1}, "rules": ()}


def write(folder: Path, config: Mapping[str, Any], workdir: str = "run") -> list[str]:
  """Writes the config; returns the program's flags for ``folder / workdir``."""
  file = programs.write_config(folder / f"{workdir}.py", config)
  return [f"--config={file}", f"--workdir={folder / workdir}"]


def step_of(folder: Path) -> int:
  """The last step that the metrics have, 0 without any."""
  path = folder / "metrics.jsonl"
  return max((r["step"] for r in metrics.read(path)), default=0) if path.exists() else 0


@functools.lru_cache
def _targets(resolved: str) -> dict[str, Any]:
  """Train stage -> its state's shapes, of a ``config.json``; placed on one device."""
  built = pipeline.build({**json.loads(resolved), "parallel": ON_ONE})
  inputs = execution.example_inputs(built.dataset.train)
  targets = {}
  for name, program in built.programs.items():
    state = jax.eval_shape(program.init, jax.random.key(0), inputs)
    if name == "tune":
      masks = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, bool), state.params)
      state = state._replace(masks=masks)
    targets[name] = state
  return targets


def states(folder: Path) -> dict[str, tuple[int, Any]]:
  """Train stage -> step and state of its newest checkpoint."""
  found = {}
  for name, target in _targets((folder / "config.json").read_text()).items():
    with Checkpoints(folder / "checkpoints" / name) as checkpoints:
      restored = checkpoints.restore(target)
    assert restored is not None, name
    found[name] = restored
  return found


def outcome(folder: Path) -> dict[str, Any]:
  """All numbers that a run left behind, bit for bit."""

  def bits(leaf: jax.Array) -> bytes:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

  return {
    "states": {
      stage: (step, {jax.tree_util.keystr(path): bits(leaf) for path, leaf in leaves})
      for stage, (step, state) in states(folder).items()
      for leaves in [jax.tree_util.tree_leaves_with_path(state)]
    },
    "records": (folder / "metrics.jsonl").read_text().splitlines(),
    "table": (folder / "metrics.csv").read_text().splitlines(),
    "metrics": json.loads((folder / "result.json").read_text())["metrics"],
  }


def largest_file(folder: Path) -> Path:
  """The file of a checkpoint that holds its arrays."""
  files = (path for path in folder.rglob("*") if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def copy(folder: Path, target: Path) -> Path:
  return Path(shutil.copytree(folder, target))
