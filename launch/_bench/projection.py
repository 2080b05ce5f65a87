"""Where the time of a low-rank rule goes: projecting, refreshing bases, stepping."""

from typing import NamedTuple

import optax

from gradlab.launch._bench import report
from gradlab.launch._bench.rules import KEY, RANK, RATE
from gradlab.launch._bench.tree import Sizes, count, parameters
from gradlab.launch._bench.updates import Stepper
from gradlab.transforms import updates
from gradlab.types import Params

SIZES = Sizes(layers=1, width=512, vocabulary=1024)
NEVER = 2**30
BASELINE = "optax.adamw"


class Part(NamedTuple):
  """Milliseconds of one step: of what, and the baseline's beside it."""

  name: str
  milliseconds: list[float]
  baseline: list[float]


def _rules(rank: int) -> dict[str, optax.GradientTransformation]:
  def galore(gap: int, quantised: bool) -> optax.GradientTransformation:
    return updates.q_galore(
      RATE,
      rank=rank,
      update_proj_gap=gap,
      seed_key=KEY,
      lazy=False,
      quantize_projector=quantised,
      quantize_moments=quantised,
      quantize_weights=quantised,
    )

  identity = optax.identity()
  return {
    "projection alone": updates.low_rank_projection(
      rank, update_proj_gap=NEVER, inner=identity
    ),
    "step, all in floats": galore(NEVER, False),
    "step, all quantised": galore(NEVER, True),
    "step with a refresh, in floats": galore(1, False),
    "step with a refresh, quantised": galore(1, True),
  }


def measure(
  runs: int, sizes: Sizes = SIZES, rank: int = RANK, steps: int = 2
) -> report.Section:
  """Q-GaLore's parts on the matrices of one layer, beside ``optax.adamw``."""
  params, grads = parameters(sizes, seed=0), parameters(sizes, seed=1)
  baseline = Stepper(optax.adamw(RATE), params)
  found = [
    _measure(name, Stepper(rule, params), baseline, grads, runs, steps)
    for name, rule in _rules(rank).items()
  ]
  rows = [
    (
      part.name,
      report.show(part.milliseconds, ".1f"),
      report.show(report.pairwise(part.milliseconds, part.baseline), ".2f"),
      "",
    )
    for part in found
  ]
  records = [
    {
      "name": part.name,
      "unit": "ms",
      "step": report.numbers(part.milliseconds),
      BASELINE: report.numbers(part.baseline),
      "ratio": report.numbers(report.pairwise(part.milliseconds, part.baseline)),
    }
    for part in found
  ]
  return report.Section(
    name="projection",
    says=f"One step of q_galore at rank {rank} on a layer of {count(params) / 1e6:.1f} "
    f"million parameters, part by part, beside {BASELINE}. A step with a refresh "
    "decomposes every matrix; one without never does, since the decomposition stands "
    "in a branch.",
    columns=("part", "ms", "ratio", "target"),
    rows=rows,
    records=records,
    checks=[None] * len(rows),
  )


def _measure(
  name: str, stepper: Stepper, baseline: Stepper, grads: Params, runs: int, steps: int
) -> Part:
  def milliseconds(stepper: Stepper) -> float:
    return 1e3 * report.timed(lambda: stepper.run(grads, steps)) / steps

  # The first step makes the bases.
  milliseconds(baseline), milliseconds(stepper)
  before, own = report.interleaved(
    runs, lambda: milliseconds(baseline), lambda: milliseconds(stepper)
  )
  return Part(name, own, before)
