"""Steps per second of the training loop, beside a scan written by hand."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradlab.experiment import build
from gradlab.experiments import digits
from gradlab.launch._bench import report
from gradlab.launch._bench.loops import bare_loop, gradlab_loop

TARGET, STEP_TARGET = 0.95, 0.97
# checkpoint_every -> the row's name; 0 leaves the one at the end.
CHECKPOINTS = {0: "at the end", 1000: "every 1000 steps"}
STEP_MILLISECONDS = 10.0
STEP_CHECKPOINT = 100


class Row(NamedTuple):
  """One comparison of the two loops."""

  name: str
  config: Any
  target: float

  @property
  def steps(self) -> int:
    """Steps of one run."""
    return int(self.config.stages.train.steps)


def digits_config(steps: int, checkpoint_every: int) -> Any:
  """``experiments/digits.py``, but for the number of steps and of checkpoints."""
  config = digits.get_config()
  config.stages.train.steps = steps
  config.stages.train.checkpoint_every = checkpoint_every
  return config


def wide_config(width: int, steps: int, batch_size: int) -> Any:
  """The digits with wider layers: as much work per step as wanted."""
  config = digits_config(steps, STEP_CHECKPOINT)
  config.model.features = (width, width)
  config.stages.train.batch_size = batch_size
  return config


def step_config(
  steps: int,
  milliseconds: float = STEP_MILLISECONDS,
  batch_size: int = 1024,
  widest: int = 4096,
) -> tuple[Any, float]:
  """The width at which a bare step takes about ``milliseconds`` on this machine.

  Args:
    steps: of the config that is returned.
    milliseconds: wanted.
    batch_size: rows of a step.
    widest: limit of the width, which a fast device reaches before that time.

  Returns:
    The config, and the milliseconds that its step was measured to take.
  """
  width, tried = 256, 20
  for _ in range(4):
    pipeline = build(wide_config(width, tried, batch_size))
    run = bare_loop(pipeline)
    run()
    found = 1e3 * min(report.timed(run) for _ in range(3)) / tried
    scaled = round(width * (milliseconds / found) ** 0.5 / 32) * 32
    wanted = min(max(scaled, 32), widest)
    if wanted == width or abs(found / milliseconds - 1) < 0.1:
      break
    width = wanted
  return wide_config(width, steps, batch_size), found


def measure(runs: int, steps: int = 20_000, wide_steps: int = 1000) -> report.Section:
  """Steps per second of the loops, compilation excluded.

  Args:
    runs: of each loop.
    steps: of one run on the digits.
    wide_steps: of one run with steps of about ``STEP_MILLISECONDS``.
  """
  rows = [
    Row(f"digits: {name}", digits_config(steps, every), TARGET)
    for every, name in CHECKPOINTS.items()
  ]
  config, milliseconds = step_config(wide_steps)
  width, batch = config.model.features[0], config.stages.train.batch_size
  name = f"{milliseconds:.1f} ms steps: every {STEP_CHECKPOINT} steps"
  rows.append(Row(name, config, STEP_TARGET))
  with tempfile.TemporaryDirectory() as folder:
    rates = [_rates(row, runs, Path(folder)) for row in rows]
  note = (
    f"the steps of {milliseconds:.1f} ms are those of an MLP of 2 x {width} units on "
    f"batches of {batch}, so sized that a bare step takes about "
    f"{STEP_MILLISECONDS:g} ms here."
  )
  return section(rows, rates, note)


def _rates(row: Row, runs: int, folder: Path) -> tuple[list[float], ...]:
  pipeline = build(row.config)
  ours, bare = gradlab_loop(pipeline, folder), bare_loop(pipeline)
  ours(), bare()

  def rate(function: Callable[[], Any]) -> Callable[[], float]:
    return lambda: row.steps / report.timed(function)

  return report.interleaved(runs, rate(ours), rate(bare))


def section(
  rows: Sequence[Row], rates: Sequence[tuple[list[float], ...]], note: str
) -> report.Section:
  """The table of steps per second.

  Args:
    rows: the comparisons.
    rates: per row the runs of gradlab's loop and of the bare one.
    note: on the sizes.
  """
  cells, records, checks = [], [], []
  for row, (ours, bare) in zip(rows, rates, strict=True):
    ratios = report.pairwise(ours, bare)
    target = row.target
    check = report.Check(report.summary(ratios).median, target, at_least=True)
    form = ",.0f" if report.summary(ours).median > 1000 else ",.1f"
    shown = (report.show(ours, form), report.show(bare, form))
    cells.append((row.name, *shown, report.show(ratios, ".3f"), str(check)))
    records.append(
      {
        "name": row.name,
        "unit": "steps/s",
        "steps": row.steps,
        "gradlab": report.numbers(ours),
        "bare": report.numbers(bare),
        "ratio": report.numbers(ratios),
      }
    )
    checks.append(check)
  return report.Section(
    name="loop",
    says="gradlab's loop from its start to its end, with metrics every 50 steps, "
    "asynchronous checkpoints and the final evaluation, beside the same steps as a "
    f"bare lax.scan: {rows[0].steps} steps of experiments/digits.py, and "
    f"{rows[-1].steps} longer ones.",
    columns=("checkpoints", "gradlab steps/s", "bare steps/s", "ratio", "target"),
    rows=cells,
    records=records,
    checks=checks,
    notes=[note],
  )
