"""warmup_cosine against float64 and against optax."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.controllers import warmup_cosine, warmup_cosine_schedule
from tests.oracles import warmup_cosine as oracle


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  peak=st.floats(0, 10),
  warmup=st.integers(0, 20),
  cosine=st.integers(1, 40),
  init=st.floats(0, 1),
  end=st.floats(0, 1),
)
def test_equals_the_oracle(peak, warmup, cosine, init, end):
  decay = warmup + cosine
  steps = np.arange(65)
  schedule = warmup_cosine_schedule(peak, warmup, decay, init, end)
  want = [oracle.value(t, peak, warmup, decay, init, end) for t in steps]
  # A few float32 operations on values up to 10.
  np.testing.assert_allclose(schedule(jnp.asarray(steps)), want, rtol=1e-5, atol=2e-6)


def test_equals_optax():
  steps = jnp.arange(60)
  ours = warmup_cosine_schedule(0.3, 10, 50, 0.01, 0.001)(steps)
  theirs = optax.warmup_cosine_decay_schedule(0.01, 0.3, 10, 50, 0.001)(
    steps.astype(jnp.float32)
  )
  # The same formula in another order of operations.
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_peak_and_end_are_exact():
  schedule = warmup_cosine_schedule(0.3, 4, 9, 0.1, 0.07)
  values = [schedule(t) for t in (4, 9, 10_000_000)]
  np.testing.assert_array_equal(values, np.float32([0.3, 0.07, 0.07]))


def test_no_warmup_starts_at_the_peak():
  assert float(warmup_cosine_schedule(0.5, 0, 10)(0)) == 0.5


def test_end_value_counts_when_the_peak_is_zero():
  assert float(warmup_cosine_schedule(0.0, 2, 4, 1.0, 0.25)(4)) == 0.25


def test_controller_follows_the_schedule():
  schedule = warmup_cosine_schedule(1.0, 3, 8, 0.2, 0.1)
  controller = warmup_cosine(
    1.0, warmup_steps=3, decay_steps=8, init_value=0.2, end_value=0.1
  )
  value, state = controller.init()
  values = [value]
  for step in range(1, 10):
    value, state = controller.update({"step": jnp.int32(step)}, state)
    values.append(value)
  np.testing.assert_array_equal(values, [schedule(t) for t in range(10)])


def test_values_may_be_traced():
  def at(peak, init, end):
    return warmup_cosine(peak, 4, 12, init, end).update({"step": jnp.int32(7)}, ())[0]

  peaks, inits, ends = (
    jnp.array([0.0, 0.5]),
    jnp.array([0.1, 0.2]),
    jnp.array([0.3, 0.0]),
  )
  values = jax.vmap(at)(peaks, inits, ends)
  want = [
    oracle.value(7, *map(float, (p,)), 4, 12, float(i), float(e))
    for p, i, e in zip(peaks, inits, ends, strict=True)
  ]
  # A few float32 operations on values below 1.
  np.testing.assert_allclose(values, want, rtol=1e-5)


@pytest.mark.parametrize(
  ("warmup", "decay", "message"),
  [(-1, 5, "warmup_steps must be 0 or more"), (5, 5, "more than warmup_steps")],
)
def test_bad_steps_raise(warmup, decay, message):
  with pytest.raises(ValueError, match=message):
    warmup_cosine(1.0, warmup, decay)
