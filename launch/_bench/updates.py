"""Time, memory and compilation of every update rule, beside ``optax.adamw``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradlab.launch._bench import compile as bench_compile
from gradlab.launch._bench import report, rules
from gradlab.launch._bench.rules import Rule
from gradlab.launch._bench.tree import Sizes, count, parameters, tree_bytes
from gradlab.types import Params, State

TARGET = 1.25
BASELINE = "optax.adamw"


def moved_bytes(params: Params, state: State) -> int:
  """What one step must move: reads gradients, params, state; writes params, state."""
  return 3 * tree_bytes(params) + 2 * tree_bytes(state)


class Stepper:
  """One rule, compiled, with the params and the state that it steps."""

  def __init__(self, rule: optax.GradientTransformation, params: Params) -> None:
    self._rule = rule
    self._params = jax.tree.map(jnp.copy, params)
    self._state = jax.jit(rule.init)(params)
    self._built = self.build()
    self.state_bytes = tree_bytes(self._state)
    self.moved_bytes = moved_bytes(self._params, self._state)
    self.peak_bytes = self._built.peak_bytes

  def build(self) -> bench_compile.Built:
    """Compiles the step, without taking it."""

    def step(params: Params, state: State, grads: Params) -> tuple[Params, State]:
      updates, state = self._rule.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    given = (self._params, self._state, self._params)
    return bench_compile.build(step, given, donate=(0, 1))

  def run(self, grads: Params, steps: int) -> Params:
    """Takes ``steps`` steps and returns the params of the last one."""
    for _ in range(steps):
      self._params, self._state = self._built.run(self._params, self._state, grads)
    return self._params


class Measured(NamedTuple):
  """One rule beside the baseline.

  Attributes:
    rule: what it is.
    milliseconds: per step of the rule; ``baseline``: of the baseline.
    byte_ratio: bytes that a step must move, as a ratio.
    state_bytes: of the rule, per parameter.
    compilation: seconds to compile the rule; ``baseline_compilation``: the baseline.
    memory_ratio: peak memory, as a ratio.
    peak_bytes: peak memory of the rule.
  """

  rule: Rule
  milliseconds: list[float]
  baseline: list[float]
  byte_ratio: float
  state_bytes: float
  compilation: list[float]
  baseline_compilation: list[float]
  memory_ratio: float
  peak_bytes: int


def measure_rule(
  rule: Rule,
  baseline: Stepper,
  params: Params,
  grads: Params,
  *,
  runs: int,
  steps: int,
) -> Measured:
  """Steps and compiles the baseline and the rule in turn."""
  stepper = Stepper(rule.build(params), params)

  def milliseconds(stepper: Stepper) -> float:
    return 1e3 * report.timed(lambda: stepper.run(grads, steps)) / steps

  milliseconds(baseline), milliseconds(stepper)
  before, own = report.interleaved(
    runs, lambda: milliseconds(baseline), lambda: milliseconds(stepper)
  )
  compiled_before, compiled = report.interleaved(
    runs, lambda: baseline.build().seconds, lambda: stepper.build().seconds
  )
  return Measured(
    rule,
    own,
    before,
    stepper.moved_bytes / baseline.moved_bytes,
    stepper.state_bytes / count(params),
    compiled,
    compiled_before,
    stepper.peak_bytes / baseline.peak_bytes,
    stepper.peak_bytes,
  )


def measure(runs: int, sizes: Sizes | None = None, steps: int = 4) -> report.Section:
  """Every update rule of the catalogue."""
  params = parameters(sizes or Sizes(), seed=0)
  grads = parameters(sizes or Sizes(), seed=1)
  baseline = Stepper(optax.adamw(rules.RATE), params)
  found = [
    measure_rule(rule, baseline, params, grads, runs=runs, steps=steps)
    for rule in rules.rules().values()
  ]
  return section(found, count(params))


def section(found: list[Measured], parameters: int) -> report.Section:
  """The table of rules."""
  rows, records, checks = [], [], []
  for each in found:
    ratios = report.pairwise(each.milliseconds, each.baseline)
    compiled = report.pairwise(each.compilation, each.baseline_compilation)
    over_bytes = report.summary(ratios).median / each.byte_ratio
    held = each.rule.kind == "element-wise"
    check = report.Check(over_bytes, TARGET) if held else None
    rows.append(
      (
        each.rule.shown,
        report.show(each.milliseconds, ".0f"),
        report.show(ratios, ".2f"),
        f"{each.byte_ratio:.2f}",
        f"{over_bytes:.2f}",
        f"{each.memory_ratio:.2f}",
        f"{each.state_bytes:.2f}",
        report.show(each.compilation, ".2f"),
        report.show(compiled, ".2f"),
        str(check) if check else each.rule.kind,
      )
    )
    records.append(
      {
        "name": each.rule.shown,
        "kind": each.rule.kind,
        "unit": "ms",
        "step": report.numbers(each.milliseconds),
        BASELINE: report.numbers(each.baseline),
        "ratio": report.numbers(ratios),
        "byte_ratio": each.byte_ratio,
        "time_over_bytes": over_bytes,
        "state_bytes_per_parameter": each.state_bytes,
        "peak_bytes": each.peak_bytes,
        "memory_ratio": each.memory_ratio,
        "compile_seconds": report.numbers(each.compilation),
        f"{BASELINE}_compile_seconds": report.numbers(each.baseline_compilation),
        "compile_ratio": report.numbers(compiled),
      }
    )
    checks.append(check)
  return report.Section(
    name="updates",
    says=f"update + apply_updates of {parameters / 1e6:.1f} million float32 "
    f"parameters, as ratios to {BASELINE}: time; the bytes of gradients, parameters "
    "and state that one step must read and write; peak memory (arguments, results and "
    "temporaries); the seconds to lower and compile it. The target is for time over "
    "bytes of element-wise rules.",
    columns=(
      "rule",
      "ms",
      "time",
      "bytes",
      "time / bytes",
      "memory",
      "state B/param",
      "compile s",
      "compile",
      "target",
    ),
    rows=rows,
    records=records,
    checks=checks,
    notes=rules.left_out(),
  )
