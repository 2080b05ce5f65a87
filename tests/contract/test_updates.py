"""Contracts of updates: types, extra arguments, schedules and descent."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.contract.checks import (
  assert_close,
  assert_same_type,
  build,
  each,
  find,
  program,
  start,
  trajectory,
)
from tests.contract.examples import masked, tree


@each("updates")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_are_like_gradients(name, index, dtype):
  built = build(name, index)
  state = jax.eval_shape(built.init, tree(100, dtype))
  _, updates = jax.eval_shape(built.step, state, built.inputs(0, dtype))
  assert_same_type(updates, jax.eval_shape(lambda: tree(1, dtype)))


@each("updates", first=True)
def test_takes_and_swallows_extra_arguments(name, index):
  method, case = find(name, index)
  update, built = method.factory(**case.kwargs), build(name, index)
  assert isinstance(update, optax.GradientTransformationExtraArgs)
  args = start(built), built.inputs(0, jnp.float32)
  extra = {"value": jnp.float32(1), "unexpected": None}
  # What the method needs stays as the case gives it.
  unused = {name: extra[name] for name in extra if name not in case.extra(tree(100))}
  more = functools.partial(built.step, **unused)
  assert program(more, *args) == program(built.step, *args)


@each("updates", first=True)
def test_constant_schedule_equals_number(name, index):
  method, case = find(name, index)
  parameters = inspect.signature(method.factory, eval_str=True).parameters
  scheduled = {
    which: optax.constant_schedule(case.kwargs[which])
    for which, parameter in parameters.items()
    if parameter.annotation == optax.ScalarOrSchedule and which in case.kwargs
  }
  assert ("learning_rate" in scheduled) == ("learning_rate" in parameters)
  built = build(name, index, **scheduled)
  state = start(built)
  step = jax.jit(built.step)
  for i, (_, expected) in enumerate(trajectory(name, index)):
    state, updates = step(state, built.inputs(i, jnp.float32))
    # A scheduled rate is a float32 array, a number is folded in by the compiler.
    assert_close(updates, expected, rtol=2e-5, atol=2e-6)


@each("updates", first=True)
def test_learning_rate_is_read_step_by_step(name, index):
  """A schedule that is zero at first and one rate later: no update, then some."""
  _, case = find(name, index)
  if "learning_rate" not in case.kwargs:
    return
  rate = case.kwargs["learning_rate"]
  built = build(name, index, learning_rate=lambda count: jnp.where(count, rate, 0.0))
  step = jax.jit(built.step)
  state, first = step(start(built), built.inputs(0, jnp.float32))
  _, second = step(state, built.inputs(1, jnp.float32))
  assert all(not leaf.any() for leaf in jax.tree.leaves(first))
  assert_close(second, trajectory(name, index)[1][1], rtol=2e-5, atol=2e-6)


@each("updates")
def test_masked_nodes_survive(name, index):
  """They are no leaves: the program is the one without them."""
  method, case = find(name, index)
  update = method.factory(**case.kwargs)

  def step(grads, params):
    return update.update(grads, update.init(params), params, **case.extra(params))[0]

  updates = jax.eval_shape(step, masked(tree(1)), masked(tree(100)))
  assert updates["pair"][1] == optax.MaskedNode()
  assert program(step, masked(tree(1)), masked(tree(100))) == program(
    step, tree(1), tree(100)
  )


@each("updates", first=True)
def test_empty_tree_is_returned(name, index):
  method, case = find(name, index)
  update = method.factory(**case.kwargs)
  updates, _ = update.update({}, update.init({}), {}, **case.extra({}))
  assert updates == {}


@each("updates")
def test_descends_a_quadratic(name, index):
  """A thousand steps, with a rate that falls to zero, leave under 1% of the loss."""
  method, case = find(name, index)
  if "learning_rate" not in case.kwargs:  # a piece of a chain
    return
  rate = 30 * case.kwargs["learning_rate"]

  def schedule(count):
    return rate * (1.0 - count.astype(jnp.float32) / 1000.0)

  update = method.factory(**{**case.kwargs, "learning_rate": schedule})
  # Every leaf of the target is away from zero; a penalty alone can't get there.
  target = jax.tree.map(lambda leaf: leaf + 3.0 * jnp.sign(leaf), tree(7))
  params = tree(100)

  def distance(params):
    squares = jax.tree.map(lambda p, t: jnp.sum(jnp.square(p - t)), params, target)
    return jnp.asarray(sum(jax.tree.leaves(squares)))

  def step(carry, _):
    params, state = carry
    given = case.extra(params)
    updates, state = update.update(jax.grad(distance)(params), state, params, **given)
    return (optax.apply_updates(params, updates), state), None

  (last, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=1000))(
    (params, update.init(params))
  )
  if case.prunes:  # what it holds at zero cannot reach the target
    zeros = sum(int(jnp.sum(leaf == 0)) for leaf in jax.tree.leaves(last))
    assert 0 < zeros < 0.3 * sum(leaf.size for leaf in jax.tree.leaves(last))
    last = jax.tree.map(lambda p, t: jnp.where(p == 0, t, p), last, target)
  assert np.isfinite(distance(last))
  assert distance(last) < 0.01 * distance(params)
