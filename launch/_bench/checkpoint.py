"""What an asynchronous save costs the training loop, beside one that it waits for."""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradlab.checkpoint import Checkpoints
from gradlab.launch._bench import report
from gradlab.launch._bench.tree import tree_bytes
from gradlab.transforms.updates import adamw

TARGET = 0.1
MEGABYTES = 200.0
LEAVES = 16
FEWEST_STEPS = 10


class Run(NamedTuple):
  """Seconds of one round.

  Attributes:
    blocking: of a save that the loop waits for.
    held: until an asynchronous save has returned.
    slowed: what the steps beside it, and the rest of the wait, took longer than the
      same number of steps alone.
  """

  blocking: float
  held: float
  slowed: float


class Loop:
  """AdamW on the parameters of a given size, state included."""

  def __init__(self, megabytes: float) -> None:
    # Parameters and two moments, float32.
    size = math.ceil(megabytes * 1e6 / 12 / LEAVES)
    params = {f"kernel_{i}": jnp.full(size, 0.01, jnp.float32) for i in range(LEAVES)}
    rule = adamw(1e-3)
    self.state = (params, jax.jit(rule.init)(params))

    def step(state: Any) -> Any:
      params, moments = state
      updates, moments = rule.update(params, moments, params)
      return jax.tree.map(jnp.add, params, updates), moments

    self._step = jax.jit(step, donate_argnums=0)

  def run(self, steps: int) -> Any:
    """Takes steps; the state is donated to each of them."""
    for _ in range(steps):
      self.state = self._step(self.state)
    return self.state


def measure_run(loop: Loop, checkpoints: Checkpoints, first: int, steps: int) -> Run:
  """A blocking save, then an asynchronous one with ``steps`` steps beside it.

  Args:
    loop: at rest.
    checkpoints: gets two more.
    first: the number of the first one.
    steps: as many as outlast a save.
  """
  alone = report.timed(lambda: loop.run(steps))
  begun = time.perf_counter()
  checkpoints.save(first, loop.state)
  checkpoints.wait()
  blocking = time.perf_counter() - begun
  begun = time.perf_counter()
  checkpoints.save(first + 1, loop.state)
  held = time.perf_counter() - begun
  beside = report.timed(lambda: loop.run(steps))
  begun = time.perf_counter()
  checkpoints.wait()
  rest = time.perf_counter() - begun
  return Run(blocking, held, beside + rest - alone)


def measure(runs: int, megabytes: float = MEGABYTES) -> report.Section:
  """The two kinds of save in turn."""
  loop = Loop(megabytes)
  jax.block_until_ready(loop.run(2))
  with (
    tempfile.TemporaryDirectory() as folder,
    Checkpoints(Path(folder) / "checkpoints") as checkpoints,
  ):
    step = report.timed(lambda: loop.run(4)) / 4
    checkpoints.save(0, loop.state)
    checkpoints.wait()
    begun = time.perf_counter()
    checkpoints.save(1, loop.state)
    checkpoints.wait()
    steps = max(FEWEST_STEPS, math.ceil(2 * (time.perf_counter() - begun) / step))
    found = [
      measure_run(loop, checkpoints, 2 + 2 * index, steps) for index in range(runs)
    ]
  return section(found, size=tree_bytes(loop.state) / 1e6, step=step, steps=steps)


def section(
  found: Sequence[Run], *, size: float, step: float, steps: int
) -> report.Section:
  """The table of stalls.

  Args:
    found: the rounds.
    size: of the state in megabytes.
    step: seconds of one step alone.
    steps: that were taken beside each asynchronous save.
  """
  rows, records, checks = [], [], []
  stalls = {
    "save() holds the loop": [run.held for run in found],
    "and slows its steps": [run.held + run.slowed for run in found],
  }
  blocking = [run.blocking for run in found]
  for name, seconds in stalls.items():
    ratios = report.pairwise(seconds, blocking)
    check = report.Check(report.summary(ratios).median, TARGET)
    cells = [report.show([1e3 * s for s in of], ".0f") for of in (seconds, blocking)]
    rows.append((name, *cells, report.show(ratios, ".2f"), str(check)))
    records.append(
      {
        "name": name,
        "unit": "s",
        "stall": report.numbers(seconds),
        "blocking": report.numbers(blocking),
        "ratio": report.numbers(ratios),
        "megabytes": size,
        "step_seconds": step,
        "steps": steps,
      }
    )
    checks.append(check)
  return report.Section(
    name="checkpoint",
    says=f"Time that the loop loses to an asynchronous save of {size:.0f} MB, beside a "
    "save that it waits for: until save() returns, and that plus what the "
    f"{steps} steps of {1e3 * step:.1f} ms beside it took longer than alone. On a CPU "
    "the first of them copies the state, which the save still reads.",
    columns=("stall", "asynchronous ms", "blocking ms", "ratio", "target"),
    rows=rows,
    records=records,
    checks=checks,
  )
