"""Contracts of controllers: a float32 scalar per step, from array state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.checks import (
  STEPS,
  assert_close,
  assert_same_type,
  build,
  each,
  find,
  trajectory,
)

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def _controller(name, index):
  method, case = find(name, index)
  return method.factory(**case.kwargs)


@each("controllers")
def test_values_are_float32_scalars(name, index):
  controller = _controller(name, index)
  value, state = controller.init()
  metrics = build(name, index).inputs(0, jnp.float32)
  assert_same_type(jax.eval_shape(lambda: controller.init()[0]), SCALAR)
  assert_same_type(jax.eval_shape(controller.update, metrics, state)[0], SCALAR)
  assert isinstance(value, jax.Array)


@each("controllers")
def test_values_are_finite(name, index):
  values = [value for _, value in trajectory(name, index)]
  assert len(values) == STEPS
  assert np.isfinite(values).all()


@each("controllers")
@pytest.mark.parametrize("extra", [{}, {"accuracy": 0.5, "unexpected": 1.0}])
def test_unknown_metrics_are_ignored(name, index, extra):
  controller, built = _controller(name, index), build(name, index)
  update, (_, state) = jax.jit(controller.update), controller.init()
  for i, (_, expected) in enumerate(trajectory(name, index)):
    metrics = {k: jnp.float32(v) for k, v in extra.items()}
    value, state = update({**metrics, **built.inputs(i, jnp.float32)}, state)
    assert_close(value, expected, rtol=1e-6, atol=1e-7)
