"""Time and memory of every update rule, beside ``optax.adamw``."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab import catalog
from gradlab.launch import _bench_report as report
from gradlab.types import Method, Params, PyTree, State, Update

TARGET = 1.25
BASELINE = "optax.adamw"
GIVEN = {"learning_rate": 1e-3, "key": 0}


class Sizes(NamedTuple):
  """A decoder's: with the default ones it has 20 million parameters."""

  layers: int = 5
  width: int = 512
  vocabulary: int = 8192


def parameters(sizes: Sizes, seed: int = 0) -> Params:
  """Float32 leaves shaped and named as a decoder's parameters, drawn at random."""
  width, rng = sizes.width, np.random.default_rng(seed)

  def dense(fan_in: int, fan_out: int) -> dict[str, jax.Array]:
    return {"kernel": draw(fan_in, fan_out), "bias": draw(fan_out)}

  def draw(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(0.0, 0.02, shape).astype(np.float32))

  def layer() -> dict[str, dict[str, jax.Array]]:
    return {
      "attention_norm": {"scale": draw(width)},
      "query_key_value": dense(width, 3 * width),
      "attention_out": dense(width, width),
      "mlp_norm": {"scale": draw(width)},
      "mlp_in": dense(width, 4 * width),
      "mlp_out": dense(4 * width, width),
    }

  return {
    "embedding": draw(sizes.vocabulary, width),
    **{f"layer_{index}": layer() for index in range(sizes.layers)},
    "norm": {"scale": draw(width)},
  }


def tree_bytes(tree: PyTree) -> int:
  """Bytes of the arrays in a tree."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def moved_bytes(params: Params, state: State) -> int:
  """What one step must move: reads gradients, params, state; writes params, state."""
  return 3 * tree_bytes(params) + 2 * tree_bytes(state)


def build(method: Method) -> Update:
  """The rule with its defaults.

  Raises:
    ValueError: it needs an argument that this benchmark has no value for.
  """
  needed = [
    name
    for name, parameter in inspect.signature(method.factory).parameters.items()
    if parameter.default is inspect.Parameter.empty
  ]
  missing = [name for name in needed if name not in GIVEN]
  if missing:
    raise ValueError(
      f"{method.name} needs {', '.join(missing)}; the benchmark gives "
      f"{', '.join(GIVEN)} only."
    )
  rule: Update = method.factory(**{name: GIVEN[name] for name in needed})
  return rule


class Stepper:
  """One rule, compiled, with the params and the state that it steps."""

  def __init__(self, rule: optax.GradientTransformation, params: Params) -> None:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: State, grads: Params) -> tuple[Params, State]:
      updates, state = rule.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    self._params = jax.tree.map(jnp.copy, params)
    self._state = jax.jit(rule.init)(params)
    self._step: Callable[..., tuple[Params, State]] = step
    self.state_bytes = tree_bytes(self._state)
    self.moved_bytes = moved_bytes(self._params, self._state)

  def run(self, grads: Params, steps: int) -> Params:
    """Takes ``steps`` steps and returns the params of the last one."""
    for _ in range(steps):
      self._params, self._state = self._step(self._params, self._state, grads)
    return self._params


class Measured(NamedTuple):
  """One rule: milliseconds per step of it and of the baseline, bytes of both."""

  name: str
  milliseconds: list[float]
  baseline: list[float]
  byte_ratio: float
  state_bytes: float


def measure_rule(
  name: str,
  rule: optax.GradientTransformation,
  baseline: Stepper,
  params: Params,
  grads: Params,
  *,
  runs: int,
  steps: int,
) -> Measured:
  """Steps the baseline and the rule in turn."""
  stepper = Stepper(rule, params)

  def milliseconds(stepper: Stepper) -> float:
    return 1e3 * report.timed(lambda: stepper.run(grads, steps)) / steps

  milliseconds(baseline), milliseconds(stepper)
  before, own = report.interleaved(
    runs, lambda: milliseconds(baseline), lambda: milliseconds(stepper)
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  ratio = stepper.moved_bytes / baseline.moved_bytes
  return Measured(name, own, before, ratio, stepper.state_bytes / count)


def measure(runs: int, sizes: Sizes | None = None, steps: int = 4) -> report.Section:
  """Every update rule of the catalogue, with its defaults."""
  params = parameters(sizes or Sizes(), seed=0)
  grads = parameters(sizes or Sizes(), seed=1)
  baseline = Stepper(optax.adamw(GIVEN["learning_rate"]), params)
  found = [
    measure_rule(name, build(method), baseline, params, grads, runs=runs, steps=steps)
    for name, method in catalog.methods().items()
    if method.family == "updates"
  ]
  return section(found, sum(leaf.size for leaf in jax.tree.leaves(params)))


def section(found: list[Measured], count: int) -> report.Section:
  """The table of rules."""
  rows, records, checks = [], [], []
  for rule in found:
    ratios = report.pairwise(rule.milliseconds, rule.baseline)
    check = report.Check(report.summary(ratios).median / rule.byte_ratio, TARGET)
    rows.append(
      (
        rule.name,
        report.show(rule.milliseconds, ".0f"),
        report.show(ratios, ".2f"),
        f"{rule.byte_ratio:.2f}",
        f"{check.value:.2f}",
        f"{rule.state_bytes:.2f}",
        str(check),
      )
    )
    records.append(
      {
        "name": rule.name,
        "unit": "ms",
        "step": report.numbers(rule.milliseconds),
        BASELINE: report.numbers(rule.baseline),
        "ratio": report.numbers(ratios),
        "byte_ratio": rule.byte_ratio,
        "time_over_bytes": check.value,
        "state_bytes_per_parameter": rule.state_bytes,
      }
    )
    checks.append(check)
  return report.Section(
    name="updates",
    says=f"update + apply_updates of {count / 1e6:.1f} million float32 parameters, as "
    f"ratios to {BASELINE}: time, and the bytes of gradients, parameters and state "
    "that one step must read and write. The target holds for time over bytes.",
    columns=(
      "rule",
      "ms",
      "time",
      "bytes",
      "time / bytes",
      "state B/param",
      "target",
    ),
    rows=rows,
    records=records,
    checks=checks,
  )
