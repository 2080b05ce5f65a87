"""What each transform is measured on, and what it is measured beside.

A new method needs one line in ``CASES``; one without a line is reported by name.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradlab.launch._bench.tree import tree_bytes
from gradlab.launch._bench.work import Work
from gradlab.transforms import (
  aggregators,
  compressors,
  cotangents,
  estimators,
  inputs,
  objectives,
  params,
  scores,
)
from gradlab.types import Aggregator, Compressor, Estimator, Params

Function = Callable[..., Any]


class Case(NamedTuple):
  """A method beside what it replaces.

  Attributes:
    ours: the method; ``baseline``: of the same arguments.
    arguments: of both.
    against: what the baseline is.
    times: how many baselines the method stands for.
    message: bytes that travel, as a share of the gradient's.
  """

  ours: Function
  baseline: Function
  arguments: tuple[Any, ...]
  against: str
  times: int = 1
  message: float | None = None


def _copy(tree: Any) -> Any:
  return jax.tree.map(jnp.copy, tree)


def _estimator(work: Work, made: Estimator, baseline: Function, against: str) -> Case:
  def ours(params: Params, other: Params, batch: Any) -> Any:
    del other

    def loss_fn(params: Params) -> Any:
      return work.loss(params, batch), {}

    return made.estimate(loss_fn, params, made.init(params))[:2]

  return Case(ours, baseline, (*work.mlp, work.batch), against)


def _backprop(work: Work) -> Case:
  def baseline(params: Params, other: Params, batch: Any) -> Any:
    del other
    return jax.value_and_grad(work.loss)(params, batch)

  return _estimator(work, estimators.backprop(), baseline, "jax.value_and_grad")


def _mezo(work: Work) -> Case:
  # Two sets of parameters: XLA would compute the same pass once.
  def baseline(params: Params, other: Params, batch: Any) -> Any:
    return work.loss(params, batch), work.loss(other, batch)

  return _estimator(work, estimators.mezo(0), baseline, "2 forward passes")


def _aggregator(work: Work, made: Aggregator) -> Case:
  def ours(stack: Params, like: Params) -> Any:
    return made.update(stack, made.init(like), like)[0]

  def baseline(stack: Params, like: Params) -> Any:
    del like
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), stack)

  given = (work.stack, work.tree)
  return Case(ours, baseline, given, f"jnp.mean of {work.scale.sources}")


def _compressor(work: Work, made: Compressor) -> Case:
  def ours(grads: Params) -> Any:
    state = made.init(grads)
    message, _ = made.compress(grads, state)
    return made.decompress(message, state, grads)

  message = jax.eval_shape(lambda g: made.compress(g, made.init(g))[0], work.grads)
  sent = compressors.message_bytes(message) / tree_bytes(work.grads)
  return Case(ours, _copy, (work.grads,), "a copy", message=sent)


def _on_tree(work: Work, function: Function) -> Case:
  return Case(function, _copy, (work.tree,), "a copy")


def _snip(work: Work) -> Case:
  def ours(params: Params, batch: Any) -> Any:
    return scores.snip(work.loss, params, batch)

  given = (work.mlp[0], work.batch)
  return Case(ours, jax.grad(work.loss), given, "one gradient")


def _search(work: Work, function: Function, steps: int) -> Case:
  def loss_fn(x: jax.Array, label: jax.Array, params: Params) -> jax.Array:
    return work.loss(params, {"inputs": x, "label": label})

  def ours(x: jax.Array, label: jax.Array, params: Params) -> Any:
    return function(lambda x, y: loss_fn(x, y, params), x, label)

  given = (work.batch["inputs"], work.batch["label"], work.mlp[0])
  what = "1 input gradient" if steps == 1 else f"{steps} input gradients"
  return Case(ours, jax.grad(loss_fn), given, what, times=steps)


def _reversal(work: Work) -> Case:
  def baseline(x: jax.Array) -> Any:
    return jax.grad(lambda x: jnp.sum(jnp.square(x)))(x)

  def ours(x: jax.Array) -> Any:
    reverse = cotangents.gradient_reversal
    return jax.grad(lambda x: jnp.sum(jnp.square(reverse(x))))(x)

  return Case(ours, baseline, (work.logits,), "the same without it")


def _objective(work: Work, function: Function, loss: Function) -> Case:
  def ours(outputs: jax.Array, ids: jax.Array) -> Any:
    batch = {"inputs": ids, "label": ids}
    return jax.value_and_grad(function, has_aux=True)(outputs, batch)

  def baseline(outputs: jax.Array, ids: jax.Array) -> Any:
    return jax.value_and_grad(lambda o: jnp.mean(loss(o, ids)))(outputs)

  return Case(ours, baseline, (work.logits, work.ids), "optax.losses")


def _squared_error(outputs: jax.Array, batch: Any) -> Any:
  return objectives.squared_error(outputs[..., 0], {"label": batch["label"]})


_xent = optax.losses.softmax_cross_entropy_with_integer_labels
_prune = functools.partial(params.magnitude_prune, sparsity=0.5)
_fgsm = functools.partial(inputs.fgsm, eps=0.1)

CASES: dict[str, Callable[[Work], Case]] = {
  "backprop": _backprop,
  "mezo": _mezo,
  "mean": lambda work: _aggregator(work, aggregators.mean()),
  "pcgrad": lambda work: _aggregator(work, aggregators.pcgrad(0)),
  "top_k": lambda work: _compressor(work, compressors.top_k()),
  "sketched_first_order": lambda work: _compressor(
    work, compressors.sketched_first_order()
  ),
  "gradient_reversal": _reversal,
  "magnitude": lambda work: _on_tree(work, scores.magnitude),
  "snip": _snip,
  "magnitude_prune": lambda work: _on_tree(work, _prune),
  "fgsm": lambda work: _search(work, _fgsm, 1),
  "pgd": lambda work: _search(
    work,
    functools.partial(
      inputs.pgd, key=0, eps=0.1, step_size=0.02, num_steps=work.scale.search_steps
    ),
    work.scale.search_steps,
  ),
  "cross_entropy": lambda work: _objective(work, objectives.cross_entropy, _xent),
  "next_token": lambda work: _objective(
    work, objectives.next_token, lambda o, ids: _xent(o[:, :-1], ids[:, 1:])
  ),
  "squared_error": lambda work: _objective(
    work,
    _squared_error,
    lambda o, ids: optax.losses.squared_error(o[..., 0], ids.astype(jnp.float32)),
  ),
}
