"""Windows of metrics that are open at a checkpoint: the steps of a mean to come.

``metrics_open.json`` has them by the step of the checkpoint. It is there only for a
run whose checkpoints and windows do not end together.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gradlab.runfolder import write_json

# split -> its window's pieces: the last step, and name -> the values of the steps
Windows = dict[str, list[tuple[int, dict[str, np.ndarray]]]]
_NAME = "metrics_open.json"
# More than the checkpoints that a run may go back to.
_MOST_KEPT = 8


def keep(folder: Path, step: int, windows: Windows) -> None:
  """Stores the windows that are open after ``step``, if any is."""
  if any(windows.values()):
    earlier = [item for item in _read(folder).items() if int(item[0]) < step]
    kept = [*earlier[1 - _MOST_KEPT :], (str(step), windows)]
    write_json(folder / _NAME, dict(kept))


def load(folder: Path, step: int) -> Windows:
  """The windows that were open after ``step``, as they were."""
  return {
    # JSON holds what is not finite as a string
    split: [
      (last, {name: np.array([*map(float, values)]) for name, values in piece.items()})
      for last, piece in pieces
    ]
    for split, pieces in _read(folder).get(str(step), {}).items()
  }


def _read(folder: Path) -> dict[str, Any]:
  path = folder / _NAME
  return dict(json.loads(path.read_text())) if path.exists() else {}
