"""from_schedule."""

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms.controllers import from_schedule


def test_follows_the_step_of_the_metrics():
  controller = from_schedule(optax.exponential_decay(1.0, 1, 0.5))
  value, state = controller.init()
  assert float(value) == 1.0
  assert value.dtype == jnp.float32
  value, state = controller.update({"step": jnp.int32(3), "loss": jnp.ones(())}, state)
  assert float(value) == 0.125
  assert jax.tree.leaves(state) == []


def test_values_are_a_fixed_type_that_a_scan_can_carry():
  controller = from_schedule(lambda step: 3)

  def body(carry, step):
    return controller.update({"step": step}, carry[1]), carry[0]

  _, values = jax.lax.scan(body, controller.init(), jnp.arange(4))
  assert values.dtype == jnp.float32
  assert not jax.eval_shape(lambda: controller.init()[0]).weak_type
  assert values.tolist() == [3.0] * 4
