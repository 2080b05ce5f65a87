"""Contracts of estimators: they take the place of ``jax.value_and_grad``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.contract.checks import (
  assert_same_type,
  build,
  each,
  find,
  numbers,
  program,
  start,
  trajectory,
)
from tests.contract.examples import batch, loss, loss_and_aux, masked, tree


@each("estimators")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_like_params(name, index, dtype):
  built = build(name, index)
  state = jax.eval_shape(built.init, tree(100, dtype))
  _, outputs = jax.eval_shape(built.step, state, built.inputs(0, dtype))
  value, aux = outputs["value"]
  assert_same_type(outputs["grads"], jax.eval_shape(lambda: tree(100, dtype)))
  assert (value.shape, value.dtype) == ((), jnp.float32)
  assert jax.tree.structure(aux) == jax.tree.structure({"double": 0})


@each("estimators", first=True)
def test_unknown_arguments_are_swallowed(name, index):
  built = build(name, index)
  args = start(built), built.inputs(0, jnp.float32)
  more = functools.partial(built.step, unexpected=None)
  assert program(more, *args) == program(built.step, *args)


@each("estimators")
def test_loss_is_near_the_true_loss(name, index):
  """Estimators may evaluate near the parameters, so the bound is a tenth."""
  inputs = build(name, index).inputs(0, jnp.float32)
  value, aux = trajectory(name, index)[0][1]["value"]
  expected = numbers(loss(inputs["params"], inputs["batch"]))
  np.testing.assert_allclose(value, expected, rtol=0.1)
  # The auxiliary output comes from an evaluation of the same loss.
  np.testing.assert_allclose(aux["double"], 2 * expected, rtol=0.2)


@each("estimators")
def test_masked_nodes_survive(name, index):
  """They are no leaves: the program is the one without them."""
  built = build(name, index)
  state, inputs = start(built), built.inputs(0, jnp.float32)
  hidden = {**inputs, "params": masked(inputs["params"])}
  _, outputs = jax.eval_shape(built.step, state, hidden)
  assert outputs["grads"]["pair"][1] == optax.MaskedNode()
  assert program(built.step, state, hidden) == program(built.step, state, inputs)


@each("estimators")
def test_gradients_descend(name, index):
  """Two hundred steps of plain descent take the loss below nine tenths."""
  method, case = find(name, index)
  estimator = method.factory(**case.kwargs)
  params, data = tree(100), batch()

  def step(carry, _):
    params, state = carry
    (value, _), grads, state = estimator.estimate(
      lambda p: loss_and_aux(p, data), params, state
    )
    params = jax.tree.map(lambda p, g: p - 3e-3 * g, params, grads)
    return (params, state), value

  (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200))(
    (params, estimator.init(params))
  )
  assert loss(params, data) < 0.9 * loss(tree(100), data)
