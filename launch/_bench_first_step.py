"""``gradlab.launch.ablate`` up to the first step, then prints when that was.

The time is the machine's monotonic clock, which the process that started this one
reads as well.
"""

import pathlib
import time
from collections.abc import Sequence
from typing import Any

from rich.progress import Progress, TaskID

from gradlab.launch import _main, ablate


class _FirstStep(Progress):
  """The ablation's progress bar, which ends the program when something is done."""

  def update(self, task_id: TaskID, **fields: Any) -> None:
    if fields.get("completed"):
      print(time.monotonic())
      raise SystemExit(0)
    super().update(task_id, **fields)


def main(argv: Sequence[str]) -> None:
  """Runs the ablation's first method until its first dispatch has ended."""
  del argv
  module = ablate.load(ablate.CONFIG.value)
  method = module.METHODS[0]
  folder = pathlib.Path(ablate.WORKDIR.value) / method
  ablate.run_method(module, method, folder, _FirstStep())


if __name__ == "__main__":
  _main.run(main, required=("config", "workdir"))
