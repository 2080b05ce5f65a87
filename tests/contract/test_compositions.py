"""Updates compose with optax: the wrapped rule is the rule."""

import inspect

import jax
import jax.numpy as jnp
import optax

from tests.contract.checks import (
  STEPS,
  assert_close,
  assert_equal,
  build,
  each,
  find,
  numbers,
  trajectory,
)
from tests.contract.examples import tree
from tests.contract.machines import floats


def _factory(name, index):
  method, case = find(name, index)
  return method.factory(**case.kwargs)


def _step(update, extra):
  """The update, jitted, with the extra arguments of its case."""

  def step(grads, state, params):
    return update.update(grads, state, params, **extra(params))

  return jax.jit(step)


def _updates(update, inputs):
  """The updates of each step, and the last state."""
  state, trace = update.init(tree(100)), []
  step = _step(update, inputs[0]["extra"])
  for item in inputs:
    updates, state = step(item["updates"], state, item["params"])
    trace.append(numbers(updates))
  return trace, state


def _inputs(name, index, steps=STEPS):
  extra = find(name, index)[1].extra
  return [
    {**build(name, index).inputs(i, jnp.float32), "extra": extra} for i in range(steps)
  ]


def _expected(name, index):
  return [updates for _, updates in trajectory(name, index)]


def _only(values, key):
  """The tree with every other branch masked, as ``optax.masked`` shows it."""
  return {
    branch: below
    if branch == key
    else jax.tree.map(lambda _: optax.MaskedNode(), below)
    for branch, below in values.items()
  }


def _labels(values, key, yes, no):
  return {
    branch: jax.tree.map(lambda _, branch=branch: yes if branch == key else no, below)
    for branch, below in values.items()
  }


@each("updates")
def test_masked(name, index):
  inner, inputs = _factory(name, index), _inputs(name, index)
  mask = _labels(tree(100), "dense", True, False)
  actual, _ = _updates(optax.masked(inner, mask), inputs)
  step = _step(inner, inputs[0]["extra"])
  state = inner.init(_only(tree(100), "dense"))
  for item, updates in zip(inputs, actual, strict=True):
    grads, params = (_only(item[which], "dense") for which in ("updates", "params"))
    expected, state = step(grads, state, params)
    assert_equal(updates["dense"], expected["dense"])
    rest = [branch for branch in updates if branch != "dense"]
    assert_equal([updates[b] for b in rest], [item["updates"][b] for b in rest])


@each("updates", first=True)
def test_partition(name, index):
  inner, inputs = _factory(name, index), _inputs(name, index)
  labels = _labels(tree(100), "dense", "method", "sgd")
  transforms = {"method": inner, "sgd": optax.sgd(0.5)}
  actual, _ = _updates(optax.partition(transforms, labels), inputs)
  mask = _labels(tree(100), "dense", True, False)
  expected, _ = _updates(optax.masked(inner, mask), inputs)
  for item, updates, reference in zip(inputs, actual, expected, strict=True):
    assert_equal(updates["dense"], reference["dense"])
    assert_equal(updates["scale"], -0.5 * item["updates"]["scale"])
    assert_equal(updates["pair"][0], -0.5 * item["updates"]["pair"][0])


@each("updates")
def test_inject_hyperparams(name, index):
  method, case = find(name, index)
  numbers_of_case = floats(method, case)
  static = set(inspect.signature(method.factory).parameters) - set(numbers_of_case)
  injected = optax.inject_hyperparams(method.factory, static_args=static)
  actual, state = _updates(injected(**case.kwargs), _inputs(name, index))
  # Hyperparameters become float32: a decay of 0.999 loses half a unit of 1 in 1 - b.
  assert_close(actual, _expected(name, index), rtol=2e-4, atol=2e-6)
  assert set(state.hyperparams) == set(numbers_of_case)


@each("updates", first=True)
def test_multi_steps(name, index):
  """Two half steps: nothing at first, then the update of the mean gradient."""
  inner, inputs = _factory(name, index), _inputs(name, index, 2)
  wrapped = optax.MultiSteps(inner, every_k_schedule=2)
  with jax.numpy_dtype_promotion("standard"):  # MultiSteps itself multiplies by a bool.
    actual, _ = _updates(wrapped, inputs)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *(item["updates"] for item in inputs))
  expected, _ = _updates(inner, [{**inputs[1], "updates": mean}])
  assert all(not leaf.any() for leaf in jax.tree.leaves(actual[0]))
  # The mean is accumulated as g1 + (g2 - g1) / 2: the last place of float32.
  assert_close(actual[1], expected[0], rtol=1e-4, atol=1e-6)


@each("updates", first=True)
def test_chains(name, index):
  inner, inputs = _factory(name, index), _inputs(name, index)
  # Powers of two, so that scaling is exact.
  half = jax.tree.map(lambda leaf: 0.5 * leaf, _expected(name, index))
  plain, _ = _updates(optax.chain(inner, optax.scale(0.5)), inputs)
  assert_close(plain, half, rtol=2e-5, atol=2e-6)
  named, state = _updates(
    optax.named_chain(("method", inner), ("half", optax.scale(0.5))), inputs
  )
  assert_equal(named, plain)
  assert list(state) == ["method", "half"]


@each("updates", first=True)
def test_apply_if_finite(name, index):
  """A bad gradient changes neither parameters nor state."""
  inner, inputs = _factory(name, index), _inputs(name, index)
  bad = jax.tree.map(lambda leaf: leaf * jnp.nan, inputs[0]["updates"])
  inputs.insert(1, {**inputs[0], "updates": bad})
  wrapped = optax.apply_if_finite(inner, max_consecutive_errors=3)
  actual, state = _updates(wrapped, inputs)
  assert int(state.total_notfinite) == 1
  assert all(not leaf.any() for leaf in jax.tree.leaves(actual.pop(1)))
  assert_close(actual, _expected(name, index), rtol=2e-5, atol=2e-6)


@each("updates", first=True)
def test_map_params_finds_what_belongs_to_params(name, index):
  """Every state leaf with a parameter's shape is reached, and no counter of steps is.

  A record that a rule keeps for each parameter may hold counters of its own.
  """
  inner = _factory(name, index)
  state = inner.init(tree(100))
  assert_equal(optax.tree.map_params(inner, lambda leaf: leaf, state), state)
  reached = optax.tree.map_params(
    inner,
    lambda _: True,
    state,
    transform_non_params=lambda _: False,
  )
  shapes = {leaf.shape for leaf in jax.tree.leaves(tree(100)) if leaf.ndim}
  owners = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree(100))]
  for (path, leaf), found in zip(
    jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(reached), strict=True
  ):
    if leaf.shape in shapes:
      assert found
    if leaf.dtype == jnp.int32 and not any(_within(path, owner) for owner in owners):
      assert not found


def _within(path, owner):
  starts = range(len(path) - len(owner) + 1)
  return any(path[start : start + len(owner)] == owner for start in starts)
