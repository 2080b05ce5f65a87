"""What a user can get wrong in a config or in flags, and what the program answers."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

LOSS = {"name": "cross_entropy"}
RATE = {"learning_rate": 1e-3}
CONFIG: dict[str, Any] = {
  "seed": 0,
  "data": {"name": "digits"},
  "model": {"name": "mlp", "features": (8,)},
  "parallel": {},
  "stages": {
    "train": {
      "steps": 4,
      "batch_size": 8,
      "objective": LOSS,
      "update": {"adamw": RATE},
    },
    "test": {"kind": "evaluate", "objective": LOSS},
  },
}
RISE = {"name": "warmup_cosine", "warmup_steps": 1, "decay_steps": 4}
PEAK = {**RISE, "peak_value": 1e-3}
PRUNE = {"name": "magnitude_prune", "sparsity": 0.5}
HEADS = {"model.outputs": (("a", 10), ("b", 10)), "train.objective": None}

ADAMW = "train.update.adamw"
EDIT = "train.edits.magnitude_prune"


class Mistake(NamedTuple):
  """A mistake and its answer.

  Attributes:
    name: of the case.
    changes: path in ``CONFIG`` -> value; "train" and "test" stand for the stages'
      paths, and the mappings on the way are made.
    says: what the error says, from the path on.
    flags: what is given on the command line beside the config and the folder.
  """

  name: str
  changes: Mapping[str, Any]
  says: str
  flags: tuple[str, ...] = ()


def config(changes: Mapping[str, Any]) -> dict[str, Any]:
  """``CONFIG`` with the changes made."""
  changed = copy.deepcopy(CONFIG)
  for path, value in changes.items():
    names = path.split(".")
    at = changed if names[0] in (*CONFIG, "sed") else changed["stages"]
    for name in names[:-1]:
      at = at.setdefault(name, {})
    at[names[-1]] = value
  return changed
