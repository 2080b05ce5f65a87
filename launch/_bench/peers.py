"""Update rules beside those of PyTorch, on the same numbers."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gradlab import catalog
from gradlab.launch._bench import report
from gradlab.launch._bench import torch as torch_
from gradlab.launch._bench.projection import NEVER
from gradlab.launch._bench.rules import RANK
from gradlab.launch._bench.tree import Sizes, count, parameters
from gradlab.launch._bench.updates import Stepper
from gradlab.types import ConfigError, Params

TARGET = 1.0
RATE = 1e-3
COMPARED_STEPS = 3
# Of the learning rate, about the length of one step. optax computes 1 - b2^t in
# float32, where 1 - 0.999 keeps four digits, of which the root halves the error.
TOLERANCE = 2e-4
# diffGrad of pytorch_optimizer adds 1e-15 under the root of the second moment: for
# gradients of this size and more that is less than float32 can hold.
SMALLEST_GRADIENT = 1e-2

Optimizer = Any


class Peer(NamedTuple):
  """PyTorch's version of a rule.

  Attributes:
    module: where it is; ``name``: its class there.
    variants: how it may be run -> its arguments.
    given: arguments that make it gradlab's rule; ``ours``: the same for gradlab's.
    projected: what its group of projected matrices is given besides, if it has one.
    tolerance: of the difference of a parameter, in units of the learning rate.
  """

  module: str
  name: str
  variants: Mapping[str, Mapping[str, Any]]
  given: Mapping[str, Any] = {}
  ours: Mapping[str, Any] = {}
  projected: Mapping[str, Any] = {}
  tolerance: float = TOLERANCE

  def build(self, variant: str, tensors: Mapping[str, torch_.Tensor]) -> Optimizer:
    """The optimiser of these tensors by path."""
    optimizer = getattr(torch_.load(self.module), self.name)
    groups: Any = list(tensors.values())
    if self.projected:
      chosen = {p for p, t in tensors.items() if t.ndim == 2 and "embedding" not in p}
      groups = [
        {"params": [t for p, t in tensors.items() if p not in chosen]},
        {"params": [tensors[p] for p in sorted(chosen)], **self.projected},
      ]
    return optimizer(groups, lr=RATE, **self.given, **self.variants[variant])


FOREACH = {"foreach": {"foreach": True}, "one by one": {"foreach": False}}
# torch.compile is left out: pytorch_optimizer counts steps in Python numbers, so that
# every step would be compiled anew.
PEERS = {
  "adamw": Peer(
    "torch.optim",
    "AdamW",
    {"fused": {"fused": True}, **FOREACH},
    given={"weight_decay": 1e-2},
    ours={"weight_decay": 1e-2},
  ),
  "adan": Peer("pytorch_optimizer", "Adan", FOREACH),
  "diffgrad": Peer("pytorch_optimizer", "DiffGrad", FOREACH),
  # Plain GaLore, and the steps between two decompositions.
  "q_galore": Peer(
    "pytorch_optimizer",
    "GaLore",
    FOREACH,
    given={"eps": 1e-8},
    ours={
      "rank": RANK,
      "update_proj_gap": NEVER,
      "seed_key": 0,
      "lazy": False,
      "quantize_projector": False,
      "quantize_moments": False,
      "quantize_weights": False,
    },
    projected={
      "rank": RANK,
      "update_proj_gap": NEVER,
      "scale": 0.25,
      "projection_type": "std",
    },
    # Neighbouring singular values of random gradients are close: float32 finds the
    # plane of the last ones to about three digits.
    tolerance=2e-3,
  ),
}


def gradients(sizes: Sizes, seed: int) -> Params:
  """Random gradients, none of them close to zero."""

  def away(g: jax.Array) -> np.ndarray[Any, Any]:
    values = np.asarray(g)
    return values + np.copysign(np.float32(SMALLEST_GRADIENT), values)

  return jax.tree.map(away, parameters(sizes, seed))


class Torch:
  """A PyTorch optimiser with the parameters that it steps."""

  def __init__(self, peer: Peer, variant: str, params: Params) -> None:
    with torch_.quiet():
      named = {
        jax.tree_util.keystr(path): torch_.tensor(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      }
      self._leaves = list(named.values())
      self._optimizer = peer.build(variant, named)
    self._given: int | None = None

  def run(self, grads: Params, steps: int) -> list[torch_.Tensor]:
    """Takes ``steps`` steps and returns the leaves of the parameters."""
    if self._given != id(grads):
      for leaf, grad in zip(self._leaves, jax.tree.leaves(grads), strict=True):
        leaf.grad = torch_.tensor(grad)
      self._given = id(grads)
    with torch_.quiet():
      for _ in range(steps):
        self._optimizer.step()
    return self._leaves


def difference(found: Params, expected: Sequence[torch_.Tensor]) -> float:
  """The largest difference of a parameter."""
  pairs = zip(jax.tree.leaves(found), expected, strict=True)
  return max(float(np.abs(np.asarray(a) - b.cpu().numpy()).max()) for a, b in pairs)


class Measured(NamedTuple):
  """One rule and its peer: milliseconds per step, the peer in its fastest variant."""

  name: str
  peer: Peer
  variant: str
  difference: float
  milliseconds: list[float]
  baseline: list[float]


def measure_rule(
  name: str, params: Params, grads: Sequence[Params], *, runs: int, steps: int
) -> Measured:
  """Compares the numbers, finds the peer's fastest variant, and times both in turn.

  Raises:
    ConfigError: the two do not compute the same.
  """
  peer = PEERS[name]
  rule: optax.GradientTransformation = catalog.methods()[name].factory(
    RATE, **peer.ours
  )
  ours, worst = Stepper(rule, params), 0.0
  for each in grads:
    stepped = ours.run(each, 1)
  # Copies: the next step overwrites what this one returned.
  after_steps = jax.tree.map(np.array, stepped)
  speeds: dict[str, float] = {}
  theirs = {}
  for variant in peer.variants:
    theirs[variant] = Torch(peer, variant, params)
    for each in grads:
      leaves = theirs[variant].run(each, 1)
    found = difference(after_steps, leaves)
    if not found <= peer.tolerance * RATE:
      raise ConfigError(
        f"peers: {name} and {peer.module}.{peer.name} ({variant}) differ by "
        f"{found:.1e} after {len(grads)} steps; the benchmark compares the versions "
        "that the extra 'bench' names."
      )
    worst = max(worst, found)
    run = functools.partial(theirs[variant].run, grads[0], steps)
    speeds[variant] = min(torch_.timed(run) for _ in range(2))
  fastest = min(speeds, key=speeds.__getitem__)

  def own() -> float:
    return 1e3 * report.timed(lambda: ours.run(device_grads, steps)) / steps

  def other() -> float:
    return 1e3 * torch_.timed(lambda: theirs[fastest].run(grads[0], steps)) / steps

  device_grads = jax.device_put(grads[0])
  own()
  before, after = report.interleaved(runs, other, own)
  return Measured(name, peer, fastest, worst, after, before)


def measure(runs: int, sizes: Sizes | None = None, steps: int = 4) -> report.Section:
  """Every rule that has a peer.

  Raises:
    ConfigError: PyTorch is not installed, or does not compute the same.
  """
  torch_.need("peers")
  sizes = sizes or Sizes()
  params = parameters(sizes)
  grads = [gradients(sizes, 1 + seed) for seed in range(COMPARED_STEPS)]
  found = [measure_rule(name, params, grads, runs=runs, steps=steps) for name in PEERS]
  return section(found, count(params), torch_.versions())


def section(
  found: Sequence[Measured], parameters: int, versions: str
) -> report.Section:
  """The table of rules.

  Args:
    found: what was measured.
    parameters: their number.
    versions: of what was compared with.
  """
  rows, records, checks = [], [], []
  for rule in found:
    ratios = report.pairwise(rule.baseline, rule.milliseconds)
    check = report.Check(report.summary(ratios).median, TARGET, at_least=True)
    rows.append(
      (
        rule.name,
        report.show(rule.milliseconds, ".1f"),
        report.show(rule.baseline, ".1f"),
        f"{rule.peer.name}, {rule.variant} ({rule.peer.module})",
        f"{rule.difference:.0e}",
        report.show(ratios, ".2f"),
        str(check),
      )
    )
    records.append(
      {
        "name": rule.name,
        "unit": "ms",
        "gradlab": report.numbers(rule.milliseconds),
        "torch": report.numbers(rule.baseline),
        "peer": f"{rule.peer.module}.{rule.peer.name}",
        "variant": rule.variant,
        "difference": rule.difference,
        "ratio": report.numbers(ratios),
      }
    )
    checks.append(check)
  rules = (m.name for m in catalog.methods().values() if m.family == "updates")
  alone = [name for name in rules if name not in PEERS]
  return report.Section(
    name="peers",
    says=f"One step of {parameters / 1e6:.1f} million float32 parameters, the same "
    "numbers in both: gradlab's rule and PyTorch's in its fastest variant; speed is "
    f"how many times faster gradlab is. Difference: the largest one of a parameter "
    f"after {COMPARED_STEPS} steps at a rate of {RATE:g}. {versions}.",
    columns=(
      "rule",
      "gradlab ms",
      "PyTorch ms",
      "PyTorch's",
      "difference",
      "speed",
      "target",
    ),
    rows=rows,
    records=records,
    checks=checks,
    notes=[f"without a peer: {', '.join(alone)}."] if alone else [],
  )
