"""``backprop``: the exact gradient, with parameters of any kind in the tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.estimators.backprop import backprop
from tests.oracles import backprop as oracle


def _problem(batch, width, hidden):
  rng = np.random.default_rng(batch + 10 * width + 100 * hidden)
  params = {
    "w": rng.normal(size=(width, hidden)),
    "b": rng.normal(size=(hidden,)),
    "v": rng.normal(size=(hidden,)),
  }
  return params, rng.normal(size=(batch, width)), rng.normal(size=(batch,))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 4), (16, 2, 7)])
def test_loss_and_gradients_match_hand_written_backpropagation(shape):
  params, inputs, targets = _problem(*shape)
  estimator = backprop()
  x, t = jnp.asarray(inputs, jnp.float32), jnp.asarray(targets, jnp.float32)

  def loss_fn(p):
    out = jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]
    return 0.5 * jnp.mean((out - t) ** 2), {"out": out}

  tree = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  state = estimator.init(tree)
  for _ in range(3):
    (loss, aux), grads, state = estimator.estimate(loss_fn, tree, state)
    expected_loss, expected = oracle.loss_and_grads(params, inputs, targets)
    # float32 forward and backward against float64: a few 1e-7 per operation.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for name in params:
      np.testing.assert_allclose(grads[name], expected[name], rtol=2e-5, atol=2e-6)
    assert aux["out"].shape == targets.shape
    params = {name: params[name] - 0.1 * expected[name] for name in params}
    tree = jax.tree.map(lambda p, g: p - 0.1 * g, tree, grads)


def test_integer_and_boolean_leaves_get_zeros_of_their_own_dtype():
  params = {
    "w": jnp.array([1.0, 2.0]),
    "index": jnp.array([1, 0], jnp.int32),
    "flag": jnp.array(True),
  }

  def loss_fn(p):
    picked = p["w"][p["index"]]
    return jnp.where(p["flag"], jnp.sum(picked**2), 0.0), {}

  estimator = backprop()
  estimate = jax.jit(lambda p: estimator.estimate(loss_fn, p, estimator.init(p)))
  (loss, _), grads, state = estimate(params)
  assert loss == 5.0
  np.testing.assert_array_equal(grads["w"], [2.0, 4.0])
  np.testing.assert_array_equal(grads["index"], [0, 0])
  assert grads["index"].dtype == jnp.int32
  assert not grads["flag"]
  assert grads["flag"].dtype == jnp.bool_
  assert state == optax.EmptyState()


def test_odd_trees_and_dtypes_survive():
  params = {
    "scalar": jnp.array(2.0),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    "masked": optax.MaskedNode(),
    "half": (jnp.ones(2, jnp.bfloat16),),
  }

  def loss_fn(p):
    half = jnp.sum(p["half"][0].astype(jnp.float32))
    return p["scalar"] ** 2 + jnp.sum(p["empty"]) + half, None

  estimator = backprop()
  (loss, aux), grads, _ = estimator.estimate(loss_fn, params, estimator.init(params))
  assert loss == 6.0
  assert aux is None
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(
    lambda x: x.dtype, params
  )
  assert grads["scalar"] == 4.0


def test_unknown_extra_arguments_are_swallowed():
  estimator = backprop()
  w = jnp.array(3.0)
  _, grads, _ = estimator.estimate(
    lambda p: (p**2, {}), w, estimator.init(w), batch={"inputs": w}, key=1
  )
  assert grads == 6.0


def test_a_loss_that_is_not_scalar_is_refused():
  estimator = backprop()
  w = jnp.ones(2)
  with pytest.raises(TypeError, match="scalar"):
    estimator.estimate(lambda p: (p, {}), w, estimator.init(w))
