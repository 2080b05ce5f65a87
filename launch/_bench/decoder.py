"""A language model's train step beside the same one in PyTorch."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradlab import data, execution
from gradlab.experiment import Pipeline, build, evaluator
from gradlab.launch._bench import report
from gradlab.launch._bench import torch as torch_
from gradlab.launch._bench import torch_decoder as peer
from gradlab.launch._bench.tree import count
from gradlab.types import ConfigError, Params

TARGET = 1.0
# Of the losses in float32: sums of thousands of terms, in another order.
TOLERANCE = 1e-4
ADAMW = {"learning_rate": 1e-3, "weight_decay": 1e-2}


class Sizes(NamedTuple):
  """Of the model, the batch, and the steps of one run."""

  layers: int = 6
  width: int = 384
  heads: int = 6
  context: int = 256
  batch: int = 64
  steps: int = 50
  dtype: str = "bfloat16"


# What a CPU does in seconds; only when it is asked to.
SMALL = Sizes(2, 64, 4, context=64, batch=8, steps=10, dtype="float32")


def missing() -> str:
  """Why the section is left out unless it is asked for, or ""."""
  if jax.default_backend() != "gpu":
    return "meant for a GPU; --only=decoder runs it with small sizes."
  return torch_.missing()


def pipeline(sizes: Sizes, dtype: str) -> Pipeline:
  """gradlab's side: a decoder on the text of the standard library."""
  return build(
    {
      "seed": 0,
      "data": {"name": "stdlib_bytes", "context": sizes.context},
      "model": {
        "name": "decoder",
        "num_layers": sizes.layers,
        "width": sizes.width,
        "num_heads": sizes.heads,
        "dtype": dtype,
      },
      "stages": {
        "train": {
          "steps": sizes.steps,
          "batch_size": sizes.batch,
          "objective": {"name": "cross_entropy"},
          "update": {"adamw": ADAMW},
        }
      },
    }
  )


class Torch:
  """PyTorch's side: the model, fused AdamW, and the same text where it computes."""

  def __init__(
    self, params: Params, train: Any, sizes: Sizes, *, compiled: bool
  ) -> None:
    torch = torch_.load("torch")
    self.weights = peer.weights(params)
    self._fields = {name: torch_.tensor(train[name]).long() for name in train}
    self._rows = torch_.tensor(
      data.index_block(0, 0, sizes.steps, data.num_examples(train), sizes.batch)
    ).long()
    loss = functools.partial(peer.loss, num_layers=sizes.layers, num_heads=sizes.heads)
    self._exact = functools.partial(loss, dtype=torch.float32)
    fast = functools.partial(loss, dtype=getattr(torch, sizes.dtype))
    self._loss = torch.compile(fast) if compiled else fast
    self._optimizer = torch.optim.AdamW(
      list(self.weights.values()),
      lr=ADAMW["learning_rate"],
      weight_decay=ADAMW["weight_decay"],
      fused=True,
    )

  def _batch(self, step: int) -> dict[str, torch_.Tensor]:
    return {name: array[self._rows[step]] for name, array in self._fields.items()}

  def first_loss(self) -> float:
    """Of the first batch in float32, before any step."""
    with torch_.load("torch").no_grad():
      return float(self._exact(self.weights, self._batch(0)))

  def run(self) -> torch_.Tensor:
    """Takes the steps and returns the last loss."""
    for step in range(len(self._rows)):
      loss = self._loss(self.weights, self._batch(step))
      loss.backward()
      self._optimizer.step()
      self._optimizer.zero_grad()
    return loss.detach()


def first_loss(pipeline: Pipeline, params: Params, batch_size: int) -> float:
  """gradlab's loss of the first batch, in float32."""
  train = pipeline.dataset.train
  rows = data.index_block(0, 0, 1, data.num_examples(train), batch_size)[0]
  batch = {"mask": jnp.ones(len(rows), jnp.float32)}
  batch |= {name: jnp.asarray(x) for name, x in data.take(train, rows).items()}
  with jax.default_matmul_precision("highest"):
    sums = evaluator(pipeline, "train")(params, {}, batch)
  return float(sums["loss"] / sums["weight"])


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
  """How PyTorch multiplies float32 matrices; "high" is what XLA does by default."""
  torch = torch_.load("torch")
  before = torch.get_float32_matmul_precision()
  torch.set_float32_matmul_precision(name)
  try:
    yield
  finally:
    torch.set_float32_matmul_precision(before)


def stepper(pipeline: Pipeline, steps: int) -> tuple[Params, Callable[[], Any]]:
  """The initial parameters, and a function that takes the steps in one dispatch."""
  stage = pipeline.config["stages"]["train"]
  compiled = execution.compile_stage(
    pipeline.programs["train"],
    pipeline.dataset.train,
    seed=pipeline.config["seed"],
    batch_size=stage["batch_size"],
    parallel=pipeline.config["parallel"],
    path="stages.train",
  )
  kept = [compiled.init()]
  params = jax.tree.map(np.asarray, compiled.local(kept[0]).params)

  def run() -> Any:
    kept[0], metrics = compiled.dispatch(kept[0], 0, steps)
    return metrics

  return params, run


def measure(
  runs: int, sizes: Sizes | None = None, *, compiled: bool = True
) -> report.Section:
  """Compares the losses, then times both in turn.

  Args:
    runs: of each side.
    sizes: by default those of a GPU, or small ones elsewhere.
    compiled: whether ``torch.compile`` is used.

  Raises:
    ConfigError: PyTorch is not installed, or computes another loss.
  """
  torch_.need("decoder")
  sizes = sizes or (Sizes() if jax.default_backend() == "gpu" else SMALL)
  ours = pipeline(sizes, sizes.dtype)
  params, run = stepper(ours, sizes.steps)
  with torch_.quiet():
    theirs = Torch(params, ours.dataset.train, sizes, compiled=compiled)
    with _precision("highest"):
      expected = theirs.first_loss()
    found = first_loss(pipeline(sizes, "float32"), params, sizes.batch)
    if not abs(found - expected) <= TOLERANCE:
      raise ConfigError(
        f"decoder: the losses differ, {found:.6f} in gradlab and {expected:.6f} in "
        "PyTorch; the benchmark compares the versions that the extra 'bench' names."
      )
    tokens = sizes.steps * sizes.batch * sizes.context
    with _precision("high"):
      report.timed(run), torch_.timed(theirs.run)
      before, own = report.interleaved(
        runs,
        lambda: tokens / torch_.timed(theirs.run),
        lambda: tokens / report.timed(run),
      )
  return section(own, before, sizes, count(params), abs(found - expected))


def section(
  ours: Sequence[float],
  theirs: Sequence[float],
  sizes: Sizes,
  parameters: int,
  difference: float,
) -> report.Section:
  """The table of tokens per second."""
  ratios = report.pairwise(ours, theirs)
  check = report.Check(report.summary(ratios).median, TARGET, at_least=True)
  cells = (report.show(ours, ",.0f"), report.show(theirs, ",.0f"))
  record = {
    "name": "decoder",
    "unit": "tokens/s",
    "sizes": sizes._asdict(),
    "gradlab": report.numbers(ours),
    "torch": report.numbers(theirs),
    "loss_difference": difference,
    "ratio": report.numbers(ratios),
  }
  return report.Section(
    name="decoder",
    says=f"Train steps of a decoder with {parameters / 1e6:.1f} million parameters in "
    f"{sizes.dtype}, AdamW, {sizes.batch} x {sizes.context} tokens, {sizes.steps} "
    "steps per run: gradlab's compiled step beside torch.compile with fused AdamW and "
    "fused attention. With the same weights and batch their float32 losses differ by "
    f"{difference:.0e}.",
    columns=("model", "gradlab tokens/s", "PyTorch tokens/s", "speed", "target"),
    rows=[("decoder", *cells, report.show(ratios, ".2f"), str(check))],
    records=[record],
    checks=[check],
  )
