"""Contracts of the families that are plain functions: what comes out is typed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.contract.checks import (
  FUNCTIONS,
  assert_same_type,
  build,
  compiled,
  each,
  program,
)
from tests.contract.examples import EXAMPLES, masked, tree

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def _types(name, index, dtype):
  """Inputs and output types of one call."""
  built = build(name, index)
  inputs = built.inputs(0, dtype)
  _, outputs = jax.eval_shape(built.step, (), inputs)
  return inputs, outputs


@each("params")
@DTYPES
def test_params_keep_types(name, index, dtype):
  inputs, outputs = _types(name, index, dtype)
  assert_same_type(outputs, jax.eval_shape(lambda: inputs[0]))


@each("inputs")
@DTYPES
def test_inputs_keep_types(name, index, dtype):
  inputs, outputs = _types(name, index, dtype)
  assert_same_type(outputs, jax.eval_shape(lambda: inputs[0]))


@each("scores")
@DTYPES
def test_scores_are_float32_like_params_or_one_per_example(name, index, dtype):
  """A leaf that is not scored is masked or keeps its shape."""
  inputs, outputs = _types(name, index, dtype)
  if isinstance(outputs, jax.ShapeDtypeStruct):
    assert (outputs.shape, outputs.dtype) == ((EXAMPLES,), jnp.dtype(jnp.float32))
    return
  scored = {
    jax.tree_util.keystr(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs)
  }
  shapes = {
    jax.tree_util.keystr(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs[0])
  }
  assert scored
  assert scored.items() <= shapes.items()
  assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.float32)}


@each("objectives")
@DTYPES
def test_objectives_are_float32_scalars(name, index, dtype):
  _, (loss, aux) = _types(name, index, dtype)
  assert isinstance(aux, dict)
  for leaf in (loss, *jax.tree.leaves(aux)):
    assert (leaf.shape, leaf.dtype, leaf.weak_type) == ((), jnp.float32, False)


@each("objectives")
@DTYPES
def test_objectives_have_finite_gradients_like_outputs(name, index, dtype):
  built = build(name, index)
  outputs, data = built.inputs(0, dtype)
  grads = jax.jit(jax.grad(lambda x: built.step((), (x, data))[1][0]))(outputs)
  assert_same_type(grads, outputs)
  assert jnp.isfinite(grads).all()
  assert grads.any()


@each("objectives")
def test_objectives_do_not_depend_on_the_order_of_examples(name, index):
  built = build(name, index)
  inputs = built.inputs(0, jnp.float32)
  flipped = jax.tree.map(lambda leaf: leaf[::-1], inputs)
  step, _ = compiled(name, index)
  (loss, _), (same, _) = (step((), rows)[1] for rows in (inputs, flipped))
  # The sum runs the other way round: the last places of float32.
  np.testing.assert_allclose(loss, same, rtol=1e-6)


@each("cotangents")
@DTYPES
def test_cotangents_are_like_inputs_both_ways(name, index, dtype):
  """A rule that is the backward pass of a loss has a float32 scalar forward."""
  inputs, outputs = _types(name, index, dtype)
  expected = jax.eval_shape(lambda: inputs[0])
  assert_same_type(outputs["backward"], expected)
  forward = outputs["forward"]
  loss = isinstance(forward, jax.ShapeDtypeStruct) and forward.shape == ()
  assert_same_type(forward, jax.ShapeDtypeStruct((), jnp.float32) if loss else expected)


@each("params")
def test_masked_nodes_survive(name, index):
  """They are no leaves: the program is the one without them."""
  built = build(name, index)
  params, *rest = built.inputs(0, jnp.float32)
  _, outputs = jax.eval_shape(built.step, (), (masked(params), *rest))
  assert outputs["pair"][1] == optax.MaskedNode()
  assert program(built.step, (), (masked(params), *rest)) == program(
    built.step, (), (params, *rest)
  )


@each("inputs")
def test_inputs_vmap_over_examples(name, index):
  """A search inside ``vmap`` is a search per slice (keys excepted)."""
  built = build(name, index)
  x, y, *key = built.inputs(0, jnp.float32)
  pairs = jnp.stack([x, x[::-1]]), jnp.stack([y, y[::-1]])
  swept = jax.jit(jax.vmap(lambda a, b: built.step((), (a, b, *key))[1]))(*pairs)
  step, _ = compiled(name, index)
  for k, rows in enumerate(zip(*pairs, strict=True)):
    _, alone = step((), (*rows, *key))
    # Signs of gradients decide the moves, so nothing but rounding can differ.
    np.testing.assert_allclose(swept[k], alone, rtol=1e-5, atol=1e-6)


def test_every_function_family_is_covered():
  assert set(FUNCTIONS) == {"cotangents", "scores", "params", "inputs", "objectives"}


def test_example_tree_has_every_odd_node():
  leaves = jax.tree.leaves(tree(0))
  assert {leaf.ndim for leaf in leaves} == {0, 1, 2}
  assert any(not leaf.size for leaf in leaves)
  assert jax.tree.structure(tree(0)) != jax.tree.structure(
    {**tree(0), "pair": (tree(0)["pair"][0],)}
  )
