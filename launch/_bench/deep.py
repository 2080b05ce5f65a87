"""Seconds to compile every update rule for a decoder of many layers."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax

from gradlab.launch._bench import compile as bench_compile
from gradlab.launch._bench import report, rules
from gradlab.launch._bench.rules import Rule
from gradlab.launch._bench.tree import Sizes, parameters
from gradlab.types import Params

SIZES = Sizes(layers=24, width=64, vocabulary=512)
BASELINE = "optax.adamw"
RATIO_TARGET = 2.0
SECONDS_TARGET = 20.0


class Measured(NamedTuple):
  """Seconds to lower and compile one rule's update, and the baseline's beside it."""

  rule: Rule
  seconds: list[float]
  baseline: list[float]


def seconds(rule: optax.GradientTransformation, params: Params) -> float:
  """To trace, lower and compile ``rule.update``, without any cache."""
  shapes = jax.eval_shape(lambda: params)
  state = jax.eval_shape(rule.init, shapes)
  return bench_compile.build(rule.update, (shapes, state, shapes)).seconds


def measure(runs: int, sizes: Sizes = SIZES) -> report.Section:
  """Every update rule beside ``optax.adamw``."""
  params = parameters(sizes)
  baseline = optax.adamw(rules.RATE)
  found = []
  for rule in rules.rules().values():
    built = rule.build(params)
    before, own = report.interleaved(
      runs,
      lambda: seconds(baseline, params),
      lambda built=built: seconds(built, params),  # type: ignore[misc]
    )
    found.append(Measured(rule, own, before))
  return section(found, sizes.layers)


def section(found: Sequence[Measured], layers: int) -> report.Section:
  """The table of rules."""
  rows, records, checks = [], [], []
  for each in found:
    ratios = report.pairwise(each.seconds, each.baseline)
    if each.rule.kind == "matrix":
      check = report.Check(report.summary(each.seconds).median, SECONDS_TARGET)
    else:
      check = report.Check(report.summary(ratios).median, RATIO_TARGET)
    held = each.rule.kind != "other"
    rows.append(
      (
        each.rule.shown,
        report.show(each.seconds, ".2f"),
        report.show(each.baseline, ".2f"),
        report.show(ratios, ".2f"),
        (str(check) + (" s" if each.rule.kind == "matrix" else "")) if held else "",
      )
    )
    records.append(
      {
        "name": each.rule.shown,
        "kind": each.rule.kind,
        "unit": "s",
        "compile": report.numbers(each.seconds),
        BASELINE: report.numbers(each.baseline),
        "ratio": report.numbers(ratios),
      }
    )
    checks.append(check if held else None)
  return report.Section(
    name="deep",
    says=f"Seconds to trace, lower and compile one update of a decoder with {layers} "
    f"layers, beside {BASELINE}: element-wise rules are held to {RATIO_TARGET:g} times "
    f"its seconds, matrix rules to {SECONDS_TARGET:g} s.",
    columns=("rule", "compile s", f"{BASELINE} s", "ratio", "target"),
    rows=rows,
    records=records,
    checks=checks,
    notes=rules.left_out(),
  )
