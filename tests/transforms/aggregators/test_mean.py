"""The plain average: float32 sums, tree handling, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from gradlab.transforms.aggregators import mean
from tests.oracles import mean as oracle


def _stack(seed: int, count: int) -> dict[str, jax.Array]:
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    "w": jax.random.normal(keys[0], (count, 3, 2)),
    "b": jax.random.normal(keys[1], (count,)),
    "empty": jax.random.normal(keys[2], (count, 0)),
  }


@pytest.mark.parametrize("count", [1, 2, 7])
def test_matches_the_oracle(count):
  stacked = _stack(count, count)
  aggregator = mean()
  grad, state = jax.jit(aggregator.update)(stacked, aggregator.init(stacked))
  assert state == optax.EmptyState()
  for name, leaf in stacked.items():
    # float32 sums of at most seven numbers of order one.
    np.testing.assert_allclose(grad[name], oracle.mean(leaf), rtol=1e-6, atol=1e-6)


def test_is_an_optax_aggregator():
  stacked = _stack(0, 4)
  aggregator = mean()
  assert isinstance(aggregator, aggregating.Aggregator)
  optimizer = aggregating.process(optax.identity(), aggregator, optax.sgd(0.5))
  params = jax.tree.map(lambda leaf: leaf[0], stacked)
  updates, _ = optimizer.update(stacked, optimizer.init(params), params)
  np.testing.assert_allclose(
    updates["w"], -0.5 * oracle.mean(stacked["w"]), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_stacks_are_summed_in_float32(dtype):
  # A sum of 4096 ones stalls at 256 in bf16 and at 2048 in float16.
  grad, _ = mean().update(jnp.ones((4096, 2), dtype), optax.EmptyState())
  assert grad.dtype == dtype
  assert grad.tolist() == [1.0, 1.0]


def test_float16_sum_beyond_the_largest_float16_does_not_overflow():
  grad, _ = mean().update(jnp.full((4, 1), 6e4, jnp.float16), optax.EmptyState())
  assert grad.tolist() == [float(jnp.float16(6e4))]


def test_unknown_keywords_are_swallowed():
  stacked = jnp.array([[1.0], [3.0]])
  grad, _ = mean().update(
    stacked, optax.EmptyState(), None, orders=None, batch={}, value=1.0
  )
  assert grad.tolist() == [2.0]


def test_empty_and_masked_nodes_survive():
  stacked = {"a": (None, optax.MaskedNode()), "b": jnp.array([2.0, 4.0])}
  grad, _ = mean().update(stacked, optax.EmptyState())
  assert grad == {"a": (None, optax.MaskedNode()), "b": jnp.float32(3.0)}
  assert mean().update({}, optax.EmptyState()) == ({}, optax.EmptyState())


@pytest.mark.parametrize(
  ("stacked", "message"),
  [
    ({"w": jnp.zeros((0, 2))}, r"\['w'\] has shape \(0, 2\)"),
    ({"w": jnp.zeros(())}, r"\['w'\] has shape \(\)"),
    ({"a": jnp.zeros((2, 1)), "w": jnp.zeros((3, 1))}, r"\['w'\] has 3 .* leaf 2"),
    ({"w": jnp.zeros((2, 1), jnp.int32)}, r"\['w'\] is int32"),
  ],
)
def test_bad_stacks_are_named(stacked, message):
  with pytest.raises(ValueError, match=message):
    mean().update(stacked, optax.EmptyState())
