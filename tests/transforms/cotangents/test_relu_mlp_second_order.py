"""``relu_mlp_second_order``: double backpropagation without double backpropagation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlab.transforms.cotangents import (
  eikonal_loss,
  level_mask,
  relu_mlp_second_order,
  relu_mlp_value_and_input_grad,
)
from tests.oracles import relu_mlp_second_order as oracle

NETWORKS = [
  ((3, 4, 1), True, 0),
  ((2, 5, 4, 1), False, 0),
  ((3, 4, 5, 3), True, 1),
  ((2, 4, 2), False, 1),
  ((3, 1), True, 0),
  ((3, 2), False, 1),
]


def network(widths, biases, seed=0, rows=5):
  """Float64 params, inputs and cotangents, with every kink at a distance."""
  for attempt in range(100):
    rng = np.random.default_rng([seed, attempt])
    params = [
      (rng.normal(size=(m, k)), rng.normal(size=m) if biases else None)
      for k, m in itertools.pairwise(widths)
    ]
    x = rng.normal(size=(rows, widths[0]))
    if oracle.smallest_preactivation(params, x) > 1e-3:
      break
  y_bar, v = rng.normal(size=(rows, widths[-1])), rng.normal(size=x.shape)
  return params, x, y_bar, v


def cast(tree, dtype=jnp.float32):
  return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


@functools.partial(jax.jit, static_argnums=4)
def pulled(params, x, y_bar, v, channel):
  out, pull = jax.vjp(
    lambda params, x: relu_mlp_second_order(params, x, channel), params, x
  )
  return out, pull((y_bar, v))


@functools.partial(jax.jit, static_argnums=4)
def generic(params, x, y_bar, v, channel):
  """What jax makes of a plain network, differentiated twice."""

  def value(row, params):
    for index, (w, b) in enumerate(params):
      row = w @ (jax.nn.relu(row) if index else row)
      row = row if b is None else row + b
    return row[channel], row

  def both(params, x):
    grads = jax.vmap(jax.grad(value, has_aux=True), (0, None))
    dy_dx, y = grads(x, params)
    return y, dy_dx

  out, pull = jax.vjp(both, params, x)
  return out, pull((y_bar, v))


def assert_trees_close(actual, expected, **tolerance):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for left, right in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(left, right, **tolerance)


@pytest.mark.parametrize(("widths", "biases", "channel"), NETWORKS)
def test_values_and_gradients_match_float64(widths, biases, channel):
  params, x, y_bar, v = network(widths, biases)
  out, grads = pulled(*cast((params, x, y_bar, v)), channel)
  expected = oracle.evaluate(params, x, channel)
  # float32 against float64
  assert_trees_close(out, expected, rtol=1e-5, atol=1e-5)
  # and 1e-9 of truncation in the central differences
  wanted = oracle.gradients(params, x, y_bar, v, channel)
  assert_trees_close(grads, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("widths", "biases", "channel"), NETWORKS)
def test_equals_double_backpropagation_in_float64(widths, biases, channel):
  with jax.enable_x64(True):
    args = cast(network(widths, biases, seed=3, rows=7), jnp.float64)
    actual, expected = pulled(*args, channel), generic(*args, channel)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype("float64")}
    # two orders of the same float64 sums
    assert_trees_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_worked_example():
  params = [
    (jnp.array([[1.0, -1.0], [0.5, 2.0]]), jnp.array([0.0, -10.0])),
    (jnp.array([[2.0, 3.0]]), jnp.array([0.0])),
  ]
  x, y_bar, v = jnp.array([[3.0, 1.0]]), jnp.zeros((1, 1)), jnp.array([[0.5, -1.0]])
  (y, dy_dx), (layers, x_bar) = pulled(params, x, y_bar, v, 0)
  np.testing.assert_array_equal(y, [[4.0]])
  np.testing.assert_array_equal(dy_dx, [[2.0, -2.0]])
  np.testing.assert_array_equal(layers[0][0], [[1.0, -2.0], [0.0, 0.0]])
  np.testing.assert_array_equal(layers[1][0], [[1.5, 0.0]])
  for zero in (layers[0][1], layers[1][1], x_bar):
    np.testing.assert_array_equal(zero, jnp.zeros_like(zero))
  for (w, _), (dw, _) in zip(params, layers, strict=True):
    assert float(jnp.sum(w * dw)) == 3.0


@pytest.mark.parametrize(("widths", "biases", "channel"), NETWORKS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(-2.0, 2.0, width=32))
def test_linear_in_both_cotangents(widths, biases, channel, seed, scale):
  args = cast(network(widths, biases, seed))
  params, x, y_bar, v = args
  zero_y, zero_v = jnp.zeros_like(y_bar), jnp.zeros_like(v)
  grads = {
    name: pulled(params, x, *pair, channel)[1]
    for name, pair in {
      "both": (y_bar, scale * v),
      "first": (y_bar, zero_v),
      "second": (zero_y, v),
    }.items()
  }
  mixed = jax.tree.map(lambda a, b: a + scale * b, grads["first"], grads["second"])
  # float32 sums in two orders; numbers of up to a hundred
  assert_trees_close(grads["both"], mixed, rtol=1e-4, atol=1e-3)
  # V alone reaches neither biases nor inputs, exactly.
  layers, x_bar = grads["second"]
  for zero in (x_bar, *(b for _, b in layers if b is not None)):
    np.testing.assert_array_equal(zero, jnp.zeros_like(zero))
  # Euler: every layer sees the same <V, dy_dx>, which is linear in it.
  (_, dy_dx), _ = pulled(params, x, zero_y, v, channel)
  total = float(jnp.sum(v * dy_dx))
  for (w, _), (dw, _) in zip(params, layers, strict=True):
    # float32 sums with cancellation between numbers of up to a hundred
    np.testing.assert_allclose(jnp.sum(w * dw), total, rtol=1e-4, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(0.25, 4.0, width=32))
def test_without_biases_the_network_is_homogeneous(seed, factor):
  params, x, _, _ = cast(network((3, 4, 5, 2), False, seed))
  y, dy_dx = jax.jit(relu_mlp_second_order)(params, x)
  # float32 sums of numbers of up to a hundred
  np.testing.assert_allclose(jnp.sum(dy_dx * x, 1), y[:, 0], rtol=1e-4, atol=1e-4)
  scaled = [(factor * w, b) if index == 1 else (w, b) for index, (w, b) in
            enumerate(params)]  # fmt: skip
  _, slope = jax.jit(relu_mlp_second_order)(scaled, x)
  np.testing.assert_allclose(slope, factor * dy_dx, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [(3, 4, 5, 1), (3, 4, 2)])
def test_vmap_and_order_of_examples(widths):
  params, x, y_bar, v = cast(network(widths, True))

  def one(row, row_y, row_v):
    out, grads = pulled(params, row[None], row_y[None], row_v[None], 0)
    return out, grads

  (y, dy_dx), (layers, x_bar) = pulled(params, x, y_bar, v, 0)
  (each_y, each_slope), (each_layers, each_x) = jax.vmap(one)(x, y_bar, v)
  # matrix products of one row against those of several
  np.testing.assert_allclose(each_y[:, 0], y, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(each_slope[:, 0], dy_dx, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(each_x[:, 0], x_bar, rtol=1e-5, atol=1e-5)
  summed = jax.tree.map(lambda a: jnp.sum(a, axis=0), each_layers)
  assert_trees_close(summed, layers, rtol=1e-4, atol=1e-4)
  flipped, _ = pulled(params, x[::-1], y_bar[::-1], v[::-1], 0)[1]
  assert_trees_close(flipped, layers, rtol=1e-4, atol=1e-4)


def test_slope_is_zero_where_a_preactivation_is_exactly_zero():
  params = [(jnp.array([[1.0], [-1.0]]), None), (jnp.array([[1.0, 1.0]]), None)]
  x, one = jnp.array([[0.0]]), jnp.ones((1, 1))
  (y, dy_dx), (layers, x_bar) = pulled(params, x, one, one, 0)
  assert float(y[0, 0]) == float(dy_dx[0, 0]) == float(x_bar[0, 0]) == 0.0
  for w, _ in layers:
    np.testing.assert_array_equal(w, jnp.zeros_like(w))
  assert_trees_close(((y, dy_dx), (layers, x_bar)), generic(params, x, one, one, 0))


@pytest.mark.parametrize("widths", [(3, 4, 5, 1), (3, 4, 2)])
def test_no_bias_and_zero_bias_agree(widths):
  params, *rest = cast(network(widths, False))
  with_zeros = [(w, jnp.zeros(len(w))) for w, _ in params]
  without, zeros = pulled(params, *rest, 0), pulled(with_zeros, *rest, 0)
  assert_trees_close(without[0], zeros[0], rtol=0)
  for (w, b), (same, _) in zip(without[1][0], zeros[1][0], strict=True):
    assert b is None
    # the same products, fused in another way
    np.testing.assert_allclose(w, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", [(3, 4, 1), (3, 4, 2), (3, 1)])
def test_empty_batch_has_zero_gradients(widths):
  params, x, y_bar, v = cast(network(widths, True))
  (y, dy_dx), (layers, x_bar) = pulled(params, x[:0], y_bar[:0], v[:0], 0)
  assert (y.shape, dy_dx.shape, x_bar.shape) == ((0, widths[-1]), (0, 3), (0, 3))
  for leaf, like in zip(jax.tree.leaves(layers), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(leaf, jnp.zeros_like(like))
  assert float(eikonal_loss(params, x[:0])) == 0.0


def test_bfloat16_sums_over_the_batch_in_float32():
  # 4096 addends of one: bfloat16 accumulation would stop at 256.
  params = [(jnp.ones((1, 1), jnp.bfloat16), None)] * 2
  ones = jnp.ones((4096, 1), jnp.bfloat16)
  (y, dy_dx), (layers, x_bar) = pulled(params, ones, ones, ones, 0)
  assert {a.dtype for a in jax.tree.leaves((y, dy_dx, layers, x_bar))} == {
    jnp.dtype("bfloat16")
  }
  for w, _ in layers:
    assert float(w[0, 0]) == 8192.0


@pytest.mark.parametrize("widths", [(3, 6, 5, 1), (3, 6, 2)])
def test_mixed_precision_keeps_each_dtype(widths):
  params, x, y_bar, v = cast(network(widths, True))
  exact = pulled(params, x.astype(jnp.bfloat16).astype(jnp.float32), y_bar, v, 0)
  low = x.astype(jnp.bfloat16), y_bar, v.astype(jnp.bfloat16)
  (y, dy_dx), (layers, x_bar) = pulled(params, *low, 0)
  assert (y.dtype, dy_dx.dtype, x_bar.dtype) == (
    jnp.float32,
    jnp.bfloat16,
    jnp.bfloat16,
  )
  np.testing.assert_allclose(y, exact[0][0], rtol=1e-5, atol=1e-5)
  # V was rounded to 8 bits
  assert_trees_close(layers, exact[1][0], rtol=0.02, atol=0.1)


def test_losses_of_any_form_and_repeated_reverse_mode():
  params, x, _, v = cast(network((3, 5, 4, 1), True))

  def plain(params, x):
    def value(row):
      for index, (w, b) in enumerate(params):
        row = w @ (jax.nn.relu(row) if index else row) + b
      return row[0]

    return jax.vmap(jax.value_and_grad(value))(x)

  def loss(both, params, x):
    y, slope = both(params, x)
    return jnp.sum(jnp.tanh(y) ** 2) + jnp.mean((jnp.sum(slope**2, 1) - 1) ** 2)

  def third(both, x):
    inner = jax.grad(lambda p: loss(both, p, x))(params)
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(inner))

  def rule(params, x):
    y, slope = relu_mlp_second_order(params, x)
    return y[:, 0], slope

  for function in (loss, lambda both, p, x: third(both, x)):
    actual, expected = (
      jax.jit(jax.grad(functools.partial(function, both), argnums=(0, 1)))(params, x)
      for both in (rule, plain)
    )
    # float32 sums in two orders
    assert_trees_close(actual, expected, rtol=1e-3, atol=1e-4)
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda x: relu_mlp_second_order(params, x), (x,), (v,))


def test_both_names_are_one_function():
  assert relu_mlp_value_and_input_grad is relu_mlp_second_order


def test_saves_work_against_double_backpropagation():
  params, x, y_bar, v = cast(network((8, 32, 32, 1), False, rows=256))
  rule, double = (
    jax.jit(lambda *args, f=f: f(*args, 0)[1]).lower(params, x, y_bar, v).compile()
    for f in (pulled, generic)
  )
  assert rule.cost_analysis()["flops"] < 0.9 * double.cost_analysis()["flops"]


def test_eikonal_loss():
  params, x, _, _ = network((3, 6, 1), True)
  _, slope = oracle.evaluate(params, x)
  value, grads = jax.value_and_grad(eikonal_loss)(*cast((params, x)))
  # float32 against float64
  expected = np.mean((np.linalg.norm(slope, axis=1) - 1) ** 2)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  flat = [(jnp.zeros((1, 2)), None)]
  value, grads = jax.value_and_grad(eikonal_loss)(flat, jnp.ones((4, 2)))
  # |dy_dx| = 0 reads as 1e-6
  np.testing.assert_allclose(value, 1.0, rtol=1e-5)
  np.testing.assert_array_equal(grads[0][0], [[0.0, 0.0]])


@settings(max_examples=60, deadline=None)
@given(
  step=st.integers(-3, 1200),
  num_levels=st.integers(1, 20),
  kind=st.sampled_from([(0.2, 0.02, 100), (0.5, 0.01, 100), (0.0, 0.25, 7)]),
)
def test_level_mask_matches_the_schedule(step, num_levels, kind):
  base, rate, start = kind
  exact = base * num_levels + rate * max(0, step - start)
  mask = np.asarray(level_mask(step, num_levels, base, rate, start))
  assert mask.dtype == bool
  assert mask.shape == (num_levels,)
  count = int(mask.sum())
  assert mask[:count].all()
  assert count >= 1
  # The ceiling of an integer depends on the rounding of the sum.
  if abs(exact - round(exact)) > 1e-4 or exact == 0.0:
    assert count == oracle.active_levels(step, num_levels, base, rate, start)
  if step >= 1:
    assert count <= int(level_mask(step + 1, num_levels, base, rate, start).sum())


def test_level_mask_of_the_released_schedule():
  counts = jax.jit(jax.vmap(lambda step: level_mask(step, 14).sum()))
  steps = jnp.array([-1, 0, 1, 105, 125, 555, 590, 10_000])
  assert counts(steps).tolist() == [14, 14, 4, 4, 5, 13, 14, 14]


@pytest.mark.parametrize(
  ("params", "shape", "channel", "message"),
  [
    ([], (2, 3), 0, "at least one layer"),
    ([((4, 2), None)], (2, 3), 0, r"W of layer 1 must be \[units, 3\]"),
    ([((4, 3), None), ((1, 5), None)], (2, 3), 0, "W of layer 2 must be"),
    ([((4, 3), (3,))], (2, 3), 0, r"b of layer 1 must be None or \[4\]"),
    ([((4, 3), None)], (2, 3), 4, r"channel must lie in \[0, 4\), got 4"),
    ([((4, 3), None)], (2, 3), -1, "channel must lie in"),
    ([((4, 3), None)], (3,), 0, r"x must be floating \[n, d_0\]"),
  ],
)
def test_bad_arguments(params, shape, channel, message):
  layers = [(jnp.ones(w), None if b is None else jnp.ones(b)) for w, b in params]
  with pytest.raises(ValueError, match=message):
    relu_mlp_second_order(layers, jnp.ones(shape), channel)


def test_bad_inputs_and_schedules():
  with pytest.raises(ValueError, match="x must be floating"):
    relu_mlp_second_order([(jnp.ones((1, 2)), None)], jnp.ones((3, 2), jnp.int32))
  for name in ("base", "rate"):
    with pytest.raises(ValueError, match=f"{name} must lie in"):
      level_mask(1, 4, **{name: -0.1})
  with pytest.raises(ValueError, match="num_levels must lie in"):
    level_mask(1, 0)
