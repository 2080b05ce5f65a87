import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.models import cnn
from tests.models.drawn import drawn
from tests.oracles import cnn as oracle

KEY = jax.random.key(0)


def applied(model, *args, train=False):
  return jax.jit(model.apply, static_argnames="train")(*args, train=train)


def images(*shape):
  return np.asarray(jax.random.normal(jax.random.key(1), shape))


def float64(tree):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize(
  ("shape", "kernel_size"), [((2, 8, 8, 1), 3), ((2, 5, 7, 3), 3), ((2, 1, 2, 1), 5)]
)
def test_outputs_match_float64(shape, kernel_size):
  model = cnn((4, 6), 3, kernel_size, activation="tanh")
  x = images(*shape)
  params, state = drawn(model, x)
  outputs, _ = applied(model, params, state, x)
  expected, _ = oracle.forward(float64(params), x.astype(np.float64), np.tanh)
  # float32 sums of at most 200 terms below one
  np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
  assert state == {}


def test_batch_norm_uses_the_batch_and_updates_the_state_in_training():
  model = cnn((4,), 3, activation="tanh", batch_norm=True)
  x = images(5, 6, 6, 2)
  params, state = drawn(model, x)
  outputs, after = applied(model, params, state, x, train=True)
  expected, [(mean, var)] = oracle.forward(
    float64(params), x.astype(np.float64), np.tanh, batch_norm=True
  )
  # float32 moments of 180 numbers
  np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
  moments = after["batch_stats"]["norm_0"]
  # running statistics start at (0, 1) and move by 1 %
  np.testing.assert_allclose(moments["mean"], 0.01 * mean, rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(moments["var"], 0.99 + 0.01 * var, rtol=1e-5)
  assert jax.tree.structure(after) == jax.tree.structure(state)


def test_batch_norm_in_evaluation_uses_and_keeps_the_state():
  model = cnn((4,), 3, batch_norm=True)
  x = images(5, 6, 6)
  params, state = drawn(model, x)
  _, state = applied(model, params, state, x, train=True)
  whole, after = applied(model, params, state, x)
  alone, _ = applied(model, params, state, x[:1])
  # one image's numbers do not depend on its neighbours; summation order may
  np.testing.assert_allclose(alone, whole[:1], rtol=1e-5, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_three_forms_of_input_are_one():
  x = images(3, 4, 6)
  plain = cnn((4,), 3)
  flat, shaped = cnn((4,), 3, image_shape=(4, 6)), cnn((4,), 3, image_shape=(4, 6, 1))
  params, state = drawn(plain, x)
  expected, _ = applied(plain, params, state, x)
  for model, inputs in [
    (plain, x[..., None]),
    (flat, x.reshape(3, 24)),
    (shaped, x.reshape(3, 24)),
    (flat, x),
  ]:
    np.testing.assert_array_equal(applied(model, params, state, inputs)[0], expected)


def test_forward_over_reverse_equals_reverse_over_reverse():
  x = images(2, 5, 5)
  model = cnn((3,), 2, activation="tanh")
  params, state = drawn(model, x)

  def loss(z):
    return jnp.sum(applied(model, params, state, z)[0] ** 2)

  direction = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
  forward = jax.jit(lambda z: jax.jvp(jax.grad(loss), (z,), (direction,))[1])(x)
  reverse = jax.jit(jax.grad(lambda z: jnp.vdot(jax.grad(loss)(z), direction)))(x)
  # two orders of the same float32 sums
  np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-6)
  assert float(jnp.abs(forward).max()) > 1e-3


def test_bfloat16_with_batch_norm_stays_near_float32():
  x = images(4, 8, 8)
  low, exact = (cnn(batch_norm=True, dtype=name) for name in ("bfloat16", "float32"))
  params, state = drawn(low, x)
  outputs, after = applied(low, params, state, x, train=True)
  reference, _ = applied(exact, params, state, x, train=True)
  assert outputs.dtype == jnp.float32
  assert {z.dtype for z in jax.tree.leaves(after)} == {jnp.dtype("float32")}
  # 8 bits of mantissa through three layers with outputs of order one
  np.testing.assert_allclose(outputs, reference, atol=0.1)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"channels": ()}, "at least one convolution"),
    ({"channels": (0,)}, "channels must hold positive integers"),
    ({"kernel_size": 0}, "kernel_size must hold positive integers"),
    ({"image_shape": (64,)}, r"image_shape must be \(H, W\)"),
    ({"activation": "relu6"}, "activation must be one of"),
    ({"dropout": -0.1}, "dropout must lie in"),
  ],
)
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    cnn(**kwargs)


@pytest.mark.parametrize(
  ("image_shape", "shape", "message"),
  [
    (None, (2, 64), r"image_shape be given, got \(2, 64\)"),
    ((8, 8), (2, 63), r"\(2, 63\) hold no images of shape \(8, 8\)"),
  ],
)
def test_inputs_that_are_not_images(image_shape, shape, message):
  with pytest.raises(ValueError, match=message):
    cnn(image_shape=image_shape).init(KEY, jnp.ones(shape))
