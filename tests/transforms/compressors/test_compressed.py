"""The wrapper: error feedback against its recursion, extras, sizes of messages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlab.transforms.compressors import (
  compressed,
  message_bytes,
  sketched_first_order,
  top_k,
)
from gradlab.types import Compressor
from tests.oracles import error_feedback as oracle
from tests.oracles import top_k as top_k_oracle

SHAPES = [(), (9,), (4, 5)]


def _sequence(seed: int, shape: tuple[int, ...], steps: int = 6) -> np.ndarray:
  draws = np.random.default_rng(seed).normal(size=(steps, *shape))
  return draws.astype(np.float32)


def _scanned(transform, grads):
  def step(state, g):
    out, state = transform.update(g, state)
    return state, out

  return jax.lax.scan(step, transform.init(grads[0]), jnp.asarray(grads))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 4])
def test_error_feedback_matches_the_recursion(shape, k):
  grads = _sequence(k, shape)
  state, received = _scanned(compressed(top_k(k=k), error_feedback=True), grads)
  size = min(k, grads[0].size)
  expected, residual = oracle.error_feedback(
    lambda p: top_k_oracle.top_k(p, size), grads
  )
  # Sums of six float32 numbers of order one.
  np.testing.assert_allclose(received, np.stack(expected), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(state.residual, residual, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_nothing_is_lost(seed):
  grads = _sequence(seed, (9,))
  state, received = _lossless_scan(grads)
  # Telescoping sum: only float32 rounding is left.
  np.testing.assert_allclose(
    np.sum(received, 0) + state.residual, grads.sum(0), rtol=1e-5, atol=1e-5
  )


_lossless_scan = jax.jit(
  lambda grads: _scanned(compressed(top_k(k=2), error_feedback=True), grads)
)


def test_without_feedback_it_is_the_plain_round_trip():
  grads = _sequence(0, (9,))
  state, received = _scanned(compressed(top_k(k=2)), grads)
  assert state.residual is None
  expected = [top_k_oracle.top_k(g, 2) for g in grads]
  assert np.asarray(received).tolist() == np.stack(expected).tolist()


def test_a_lossless_compressor_leaves_no_residual():
  grads = _sequence(1, (9,))
  state, received = _scanned(compressed(top_k(1.0), error_feedback=True), grads)
  assert np.asarray(received).tolist() == grads.tolist()
  assert state.residual.tolist() == [0.0] * 9


def test_bf16_updates_keep_a_float32_residual_and_a_bf16_message():
  transform = compressed(top_k(k=1), error_feedback=True)
  state = transform.init(jnp.zeros(2, jnp.bfloat16))
  step = jnp.array([1.0, 2.0**-10], jnp.bfloat16)
  # 8 bits of mantissa could not hold 1 + 2**-10, and a residual has to.
  for count in range(1, 4):
    out, state = transform.update(step, state)
    assert out.dtype == jnp.bfloat16
    assert out.tolist() == [1.0, 0.0]
    assert state.residual.dtype == jnp.float32
    assert state.residual.tolist() == [0.0, count * 2.0**-10]


def test_rounding_of_the_message_stays_in_the_residual():
  transform = compressed(top_k(1.0), error_feedback=True)
  state = transform.init(jnp.zeros(1, jnp.bfloat16))
  state = state._replace(residual=jnp.array([2.0**-10]))
  out, state = transform.update(jnp.ones(1, jnp.bfloat16), state)
  assert out.tolist() == [1.0]
  assert state.residual.tolist() == [2.0**-10]


def test_the_receiver_uses_the_state_that_the_sender_had():
  g = jax.random.normal(jax.random.key(0), (16,))
  inner = sketched_first_order("countsketch", 0.25, 3)
  transform = compressed(inner)
  state, shared = transform.init(g), inner.init(g)
  for _ in range(3):
    out, state = transform.update(g, state)
    message, after = inner.compress(g, shared)
    assert out.tolist() == inner.decompress(message, shared, g).tolist()
    shared = after
    assert int(state.compressor.count) == int(shared.count)


@pytest.mark.parametrize("error_feedback", [False, True])
def test_keywords_and_params_reach_both_halves(error_feedback):
  def compress(updates, state, params=None, *, value, **extra):
    assert extra == {"batch": "b"}
    return updates * value + params, state

  def decompress(message, state, like, *, params, value, **extra):
    assert extra == {"batch": "b"}
    return (message - params) / value + 0 * like

  transform = compressed(
    Compressor(lambda params: (), compress, decompress), error_feedback
  )
  g, params = jnp.array([1.0, 2.0]), jnp.array([4.0, 8.0])
  out, state = transform.update(g, transform.init(params), params, value=2.0, batch="b")
  assert out.tolist() == [1.0, 2.0]
  if error_feedback:
    assert state.residual.tolist() == [0.0, 0.0]


def test_composes_with_optax_and_odd_trees():
  params = {"w": jnp.ones(4), "frozen": jnp.ones(2), "none": None, "e": jnp.ones((0,))}
  mask = {"w": True, "frozen": False, "none": None, "e": True}
  transform = optax.chain(
    optax.masked(compressed(top_k(k=1), error_feedback=True), mask), optax.sgd(1.0)
  )
  grads = {"w": jnp.arange(4.0), "frozen": jnp.ones(2), "none": None, "e": params["e"]}
  updates, _ = transform.update(grads, transform.init(params), params, value=1.0)
  assert updates["w"].tolist() == [0.0, 0.0, 0.0, -3.0]
  assert updates["frozen"].tolist() == [-1.0, -1.0]
  assert updates["none"] is None


def test_error_feedback_restores_convergence():
  # Descent on a quadratic whose largest gradient entry is a constant disturbance that
  # changes sign: without memory the small coordinate is never sent.
  def final(error_feedback):
    transform = compressed(top_k(k=1), error_feedback)

    def step(carry, i):
      w, state = carry
      noise = jnp.where(i % 2 == 0, 5.0, -5.0)
      out, state = transform.update(jnp.stack([noise, w]), state)
      return (w - 0.1 * out[1], state), None

    start = (jnp.float32(1.0), transform.init(jnp.zeros(2)))
    return float(jax.lax.scan(step, start, jnp.arange(200))[0][0])

  assert final(False) == 1.0
  assert abs(final(True)) < 0.5


def test_integer_updates_are_refused_with_feedback():
  transform = compressed(top_k(), error_feedback=True)
  with pytest.raises(ValueError, match=r"error feedback needs .* is int32"):
    transform.update(jnp.ones(2, jnp.int32), transform.init(jnp.ones(2)))


@pytest.mark.parametrize(
  ("message", "size"),
  [
    ({}, 0),
    ((jnp.zeros((3, 2)), None, jnp.zeros(5, jnp.bfloat16)), 34),
    (jnp.zeros(9, bool), 9),
    (jnp.zeros(9, jnp.int4), 5),
    (jax.ShapeDtypeStruct((7,), jnp.int8), 7),
    (jax.random.key(0), 8),
    (np.zeros((0, 4)), 0),
  ],
)
def test_message_bytes(message, size):
  assert message_bytes(message) == size


def test_message_bytes_refuses_what_is_not_an_array():
  with pytest.raises(ValueError, match=r"tree of arrays, but \['n'\] is 3"):
    message_bytes({"n": 3})
