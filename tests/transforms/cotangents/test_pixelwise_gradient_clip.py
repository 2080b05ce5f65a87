"""``pixelwise_gradient_clip``: identity forward, pixels cut to length backward."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.cotangents import clip_pixels, pixelwise_gradient_clip
from tests.oracles import pixelwise_gradient_clip as oracle

quick = hypothesis.settings(max_examples=20, deadline=None)
values = st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 1e-4 else x)
images = hnp.arrays(np.float32, (3, 4, 3), elements=values)
bounds = st.floats(0.015625, 4, width=32)
kinds = pytest.mark.parametrize(
  ("ord", "mode"), [("inf", "hard"), (2, "hard"), ("inf", "soft"), (2, "soft")]
)
jitted = jax.jit(clip_pixels, static_argnames=("axis", "ord", "mode"))
EXAMPLE = np.float32([[0.3, -0.4, 0], [0.02, 0.01, -0.05], [0, 0, 0]])
ULP = 4e-7  # a few roundings of float32


def norms(g, ord):
  if ord == 2:
    return np.sqrt(np.sum(np.square(np.asarray(g, np.float64)), axis=-1))
  return np.max(np.abs(g), axis=-1)


def pulled(g, max_norm, x=None, **options):
  x = jnp.zeros_like(g) if x is None else x
  return jax.vjp(lambda x: pixelwise_gradient_clip(x, max_norm, **options), x)[1](g)[0]


@pytest.mark.parametrize(
  ("ord", "first"), [("inf", (0.075, -0.1, 0)), (2, (0.06, -0.08, 0))]
)
def test_worked_example(ord, first):
  for out in (clip_pixels(EXAMPLE, 0.1, ord=ord), pulled(EXAMPLE, 0.1, ord=ord)):
    np.testing.assert_allclose(out[0], first, rtol=ULP)
    np.testing.assert_array_equal(out[1:], EXAMPLE[1:])


@kinds
@pytest.mark.parametrize(
  ("shape", "axis"), [((5, 3), -1), ((2, 3, 4), 1), ((2, 3, 2, 4), (1, -1)), ((6,), 0)]
)
@pytest.mark.parametrize("c", [0.3, 1.5, 100.0])
def test_follows_the_oracle_over_steps_of_descent(ord, mode, shape, axis, c):
  """Several steps on an image, the clipped gradient of each taken at the last."""
  rng = np.random.default_rng(0)
  weights = rng.normal(size=shape) ** 3
  image = rng.normal(size=shape)
  ours = jnp.asarray(image, jnp.float32)

  @jax.jit
  def step(x, c):
    def loss(x):
      seen = pixelwise_gradient_clip(x, c, axis=axis, ord=ord, mode=mode)
      return jnp.sum(jnp.asarray(weights, jnp.float32) * seen**3) / 3

    return x - 0.1 * jax.grad(loss)(x)

  axes = axis if isinstance(axis, tuple) else (axis,)
  for _ in range(4):
    ours = step(ours, c)
    image = image - 0.1 * oracle.clip(weights * image**2, c, axes, ord, mode)
  # float32 against float64 over four steps.
  np.testing.assert_allclose(ours, image, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_forward_is_the_same_bits(dtype):
  x = jnp.array([[0.0, -0.0, jnp.nan], [jnp.inf, -jnp.inf, 1 / 3]], dtype)
  for f in (pixelwise_gradient_clip, jax.jit(pixelwise_gradient_clip)):
    out = f(x, 0.1)
    assert out.dtype == dtype
    assert np.asarray(out).tobytes() == np.asarray(x).tobytes()


@kinds
@quick
@hypothesis.given(images, bounds)
def test_bound_direction_and_pixels_within_it(ord, mode, g, c):
  out = np.asarray(jitted(g, c, ord=ord, mode=mode))
  np.testing.assert_allclose(out, oracle.clip(g, c, (-1,), ord, mode), rtol=2e-6)
  before, after = norms(g, ord), norms(out, ord)
  assert (after <= c * (1 + ULP)).all()
  # A non-negative multiple: the ratio to the pixel's norm is kept channel by channel.
  ratio = np.where(before > 0, after / np.where(before > 0, before, 1), 1)
  np.testing.assert_allclose(out, ratio[..., None] * g, rtol=2e-6, atol=1e-10)
  assert (np.sign(out) == np.sign(g)).all()
  if mode == "hard":
    inside = before <= c * (1 - ULP)
    np.testing.assert_array_equal(out[inside], g[inside])
    np.testing.assert_allclose(
      jitted(out, c, ord=ord, mode=mode), out, rtol=ULP, atol=0
    )
  if ord == 2:
    assert np.sqrt(np.sum(out.astype(np.float64) ** 2)) <= c * np.sqrt(12) * (1 + ULP)


@kinds
@quick
@hypothesis.given(images, bounds, st.floats(0.015625, 128, width=32))
def test_homogeneous(ord, mode, g, c, scale):
  """The rule of loss scaling."""
  scale = np.float32(scale)
  out = jitted(scale * g, scale * np.float32(c), ord=ord, mode=mode)
  np.testing.assert_allclose(out, scale * jitted(g, c, ord=ord, mode=mode), rtol=2e-6)


@kinds
@quick
@hypothesis.given(images, st.permutations(range(4)), st.permutations(range(3)))
def test_pixels_are_independent_and_channels_alike(ord, mode, g, pixels, channels):
  clip = functools.partial(jitted, max_norm=0.7, ord=ord, mode=mode)
  out = clip(g)
  np.testing.assert_array_equal(clip(g[:, pixels]), out[:, pixels])
  # The sum of squares runs in another order.
  np.testing.assert_allclose(clip(g[..., channels]), out[..., channels], rtol=ULP)
  np.testing.assert_array_equal(jax.vmap(clip)(g), out)


@quick
@hypothesis.given(images, st.floats(0, 6.25))
def test_the_2_norm_commutes_with_rotations_of_the_channels(g, angle):
  cos, sin = np.cos(angle), np.sin(angle)
  turn = np.float32([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
  clip = functools.partial(jitted, max_norm=0.7, ord=2)
  np.testing.assert_allclose(clip(g @ turn), clip(g) @ turn, rtol=1e-5, atol=2e-6)


def test_the_max_norm_does_not_commute_with_rotations():
  turn = np.float32([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
  half = np.float32([[1, -1, 0], [1, 1, 0], [0, 0, 2**0.5]]) / np.float32(2**0.5)
  g = np.float32([[1, 0, 0]])
  np.testing.assert_array_equal(clip_pixels(g @ turn, 0.5), clip_pixels(g, 0.5) @ turn)
  gap = clip_pixels(g @ half, 0.5) - clip_pixels(g, 0.5) @ half
  assert np.abs(gap).max() > 0.1


@quick
@hypothesis.given(images, bounds)
def test_one_channel_is_the_elementwise_clip(g, c):
  for ord in ("inf", 2):
    out = jitted(g[..., None], c, ord=ord)[..., 0]
    np.testing.assert_allclose(out, np.clip(g, -np.float32(c), np.float32(c)), rtol=ULP)


@kinds
def test_an_infinite_bound_is_the_identity(ord, mode):
  g = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  np.testing.assert_array_equal(clip_pixels(g, np.inf, ord=ord, mode=mode), g)


@kinds
def test_zero_nan_and_infinite_pixels(ord, mode):
  g = np.float32(
    [[0, 0, 0], [1, np.nan, 0], [np.inf, 1, 0], [0, 0, -np.inf], [0.1, 0, 0]]
  )
  out = pulled(g, 1.0, ord=ord, mode=mode)
  np.testing.assert_array_equal(out[0], 0)
  assert np.isnan(out[1:4]).all()
  expected = g[4] if mode == "hard" else g[4] / np.float32(1.1)
  np.testing.assert_allclose(out[4], expected, rtol=ULP)


def test_the_2_norm_neither_overflows_nor_vanishes():
  g = np.float32([[3e25, 4e25], [3e-25, 4e-25]])
  out = clip_pixels(g, 1.0, ord=2)
  np.testing.assert_allclose(out[0], [0.6, 0.8], rtol=ULP)
  np.testing.assert_array_equal(out[1], g[1])
  small = clip_pixels(g[1], 1e-26, ord=2)
  np.testing.assert_allclose(small, [6e-27, 8e-27], rtol=ULP)


def test_max_norm_may_be_traced_and_has_no_gradient():
  g = jnp.asarray(EXAMPLE)

  def loss(c, x):
    return jnp.sum(g * pixelwise_gradient_clip(x, c))

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32(0.1), g)
  assert grads[0] == 0.0
  np.testing.assert_array_equal(grads[1], pulled(g, 0.1))
  assert jax.grad(loss)(jnp.bfloat16(0.1), g) == 0.0
  sweep = jax.vmap(lambda c: jax.grad(loss, argnums=1)(c, g))(jnp.array([0.1, 0.2]))
  for row, c in zip(sweep, (0.1, 0.2), strict=True):
    np.testing.assert_array_equal(row, pulled(g, c))


@pytest.mark.parametrize("ord", ["inf", 2])
def test_bfloat16_is_measured_in_float32(ord):
  g = jnp.asarray(np.random.default_rng(1).normal(size=(40, 3)), jnp.bfloat16)
  out = pulled(g, jnp.float32(0.3), ord=ord)
  assert out.dtype == jnp.bfloat16
  wide = clip_pixels(g.astype(jnp.float32), 0.3, ord=ord)
  np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))


def test_float64_is_exact_to_float64():
  with jax.enable_x64(True):
    g = np.random.default_rng(1).normal(size=(40, 3))
    out = pulled(jnp.asarray(g), 0.3, ord=2)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, oracle.clip(g, 0.3, (-1,), 2), rtol=1e-14)


def test_is_a_stateless_transformation_of_parameters_that_are_images():
  transform = optax.stateless(
    lambda u, params: jax.tree.map(lambda g: clip_pixels(g, 0.1), u)
  )
  chain = optax.chain(transform, optax.sgd(1.0))
  grads = {"texture": jnp.asarray(EXAMPLE)}
  updates, _ = chain.update(grads, chain.init(grads))
  np.testing.assert_array_equal(updates["texture"], -clip_pixels(EXAMPLE, 0.1))


def test_empty_images_pass():
  assert clip_pixels(jnp.zeros((0, 3)), 1.0, ord=2).shape == (0, 3)
  assert pulled(jnp.zeros((4, 0)), 1.0).shape == (4, 0)


@pytest.mark.parametrize("function", [clip_pixels, pixelwise_gradient_clip])
def test_bad_arguments(function):
  x = jnp.ones((2, 3))
  for c in (0.0, -1.0, np.nan):
    with pytest.raises(ValueError, match="max_norm must lie in"):
      function(x, c)
  with pytest.raises(ValueError, match="max_norm must be a scalar"):
    function(x, jnp.ones(3))
  with pytest.raises(TypeError, match="needs a floating-point image, got int32"):
    function(jnp.ones((2, 3), jnp.int32), 1.0)
  with pytest.raises(ValueError, match="axis must name axes"):
    function(jnp.float32(1), 1.0)
  for axis in (2, -3, (), (0, 5)):
    with pytest.raises(ValueError, match="axis must name axes"):
      function(x, 1.0, axis=axis)
  with pytest.raises(ValueError, match="axis must not name an axis twice"):
    function(x, 1.0, axis=(1, -1))
  with pytest.raises(ValueError, match="ord must be 'inf' or 2, got 1"):
    function(x, 1.0, ord=1)
  with pytest.raises(ValueError, match="mode must be 'hard' or 'soft'"):
    function(x, 1.0, mode="firm")


def test_forward_mode_is_refused():
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda x: pixelwise_gradient_clip(x, 1.0), (jnp.ones(3),), (jnp.ones(3),))
