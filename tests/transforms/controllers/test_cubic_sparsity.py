"""cubic_sparsity against the formula in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.transforms.controllers import cubic_sparsity, cubic_sparsity_schedule
from tests.oracles import cubic_sparsity as oracle

SETTINGS = st.tuples(
  st.floats(0.01, 0.999),
  st.integers(1, 20),
  st.integers(1, 7),
  st.floats(0, 1),
  st.integers(0, 30),
).map(lambda s: (s[0], s[1], s[2], s[0] * s[3], s[4]))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(settings=SETTINGS)
def test_equals_the_oracle_and_never_falls(settings):
  steps = np.arange(175)
  values = np.asarray(cubic_sparsity_schedule(*settings)(jnp.asarray(steps)))
  # A few float32 operations on values below 1.
  np.testing.assert_allclose(
    values, [oracle.value(t, *settings) for t in steps], rtol=1e-5, atol=3e-7
  )
  assert np.all(np.diff(values) >= -1.2e-7)


def test_ends_are_exact():
  schedule = cubic_sparsity_schedule(0.9, 10, 5, start_step=100)
  values = [schedule(t) for t in (0, 100, 150, 10_000_000)]
  np.testing.assert_array_equal(values, np.float32([0, 0, 0.9, 0.9]))


def test_half_way_seven_eighths_are_done():
  # (1 - 1/2)^3 = 1/8 of the way is left.
  assert float(cubic_sparsity_schedule(0.8, 4, 25)(50)) == pytest.approx(0.7, abs=1e-6)


def test_controller_follows_the_schedule():
  settings = {
    "num_updates": 3,
    "interval": 2,
    "initial_sparsity": 0.25,
    "start_step": 2,
  }
  schedule = cubic_sparsity_schedule(0.75, **settings)
  controller = cubic_sparsity(0.75, **settings)
  value, state = controller.init()
  values = [value]
  for step in range(1, 11):
    value, state = controller.update({"step": jnp.int32(step)}, state)
    values.append(value)
  np.testing.assert_array_equal(values, [schedule(t) for t in range(11)])


def test_sparsities_may_be_traced():
  def at(final, initial):
    controller = cubic_sparsity(final, 2, 5, initial)
    return controller.update({"step": jnp.int32(4)}, controller.init()[1])[0]

  values = jax.vmap(at)(jnp.array([0.5, 0.9]), jnp.array([0.0, 0.3]))
  want = [oracle.value(4, 0.5, 2, 5), oracle.value(4, 0.9, 2, 5, 0.3)]
  # A few float32 operations on values below 1.
  np.testing.assert_allclose(values, want, rtol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((1.0, 2, 2), "final_sparsity must lie in"),
    ((-0.1, 2, 2), "final_sparsity must lie in"),
    ((0.5, 2, 2, -0.1), "initial_sparsity must lie in"),
    ((0.5, 2, 2, 0.6), "initial_sparsity must lie in"),
    ((0.5, 0, 2), "num_updates must be 1 or more"),
    ((0.5, 2, 0), "interval must be 1 or more"),
    ((0.5, 2, 2, 0.0, -1), "start_step must be 0 or more"),
  ],
)
def test_bad_arguments_raise(arguments, message):
  with pytest.raises(ValueError, match=message):
    cubic_sparsity(*arguments)
