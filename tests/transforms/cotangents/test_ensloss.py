"""``ensloss``: random derivatives, sorted by margin, as the backward pass."""

import functools
import importlib

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.arguments import load_object
from gradlab.transforms.cotangents import (
  ensloss,
  ensloss_derivatives,
  ensloss_objective,
  sample_box_cox,
)
from tests.oracles import ensloss as oracle

quick = hypothesis.settings(max_examples=20, deadline=None)
# As an attribute of the package the name is the function.
method = importlib.import_module("gradlab.transforms.cotangents.ensloss")
floats = st.floats(-6, 6, width=32)
vectors = hnp.arrays(np.float32, 9, elements=floats)
seeds = st.integers(0, 2**31 - 1)
shapes = st.sampled_from((-1.0, -0.5, 0.0, 0.25, 1.0, 2.0))
derivatives = jax.jit(ensloss_derivatives)
value_and_grad = jax.jit(
  jax.value_and_grad(ensloss, argnums=1), static_argnames="zero_one_labels"
)


def normals(seed, size):
  return np.asarray(jax.random.normal(jax.random.key(seed), (size,)), np.float64)


def test_worked_example():
  z, margins = jnp.float32([-1, 0.5, -2]), jnp.float32([0.5, -1, 3])
  g = method._derivatives(z, margins, jnp.float32(0), jnp.float32(1e-6))
  # The numbers are printed to eight decimals; float32 resolves 6e-8 near one.
  np.testing.assert_allclose(g, [-0.36788044, -1.000001, -0.04511276], atol=7e-8)
  np.testing.assert_allclose(jnp.mean(g * margins), 0.22690750, atol=3e-8)
  np.testing.assert_allclose(g / 3, [-0.12262681, -0.33333367, -0.01503759], atol=3e-8)
  value, gradient = oracle.loss_and_gradient(z.tolist(), margins.tolist(), [1, 1, 1])
  np.testing.assert_allclose(value, 0.22690750, atol=1e-8)
  np.testing.assert_allclose(gradient, g / 3, rtol=1e-6)


@pytest.mark.parametrize("box_cox", [-1.0, -0.3, 0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("n", [1, 2, 17])
def test_follows_the_oracle_along_a_trajectory(n, box_cox):
  """Logistic weights trained for some steps, a fresh key at each."""
  rng = np.random.default_rng(n)
  x, labels = rng.normal(size=(n, 3)), rng.choice([-1, 1], n)
  w = rng.normal(size=3)
  ours, inputs = jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)

  @jax.jit
  def step(w, key):
    def loss(w):
      return ensloss(key, inputs @ w, labels, box_cox=box_cox, floor=1e-3)

    value, grad = jax.value_and_grad(loss)(w)
    return w - 0.7 * grad, value

  for seed in range(5):
    ours, value = step(ours, jax.random.key(seed))
    expected, gradient = oracle.loss_and_gradient(
      normals(seed, n), (x @ w).tolist(), labels, box_cox=box_cox, floor=1e-3
    )
    w = w - 0.7 * np.asarray(gradient) @ x
    # float32 against float64, a power of a float32 number among it.
    np.testing.assert_allclose(value, expected, rtol=5e-5, atol=5e-6)
  np.testing.assert_allclose(ours, w, rtol=5e-5, atol=5e-6)


@quick
@hypothesis.given(seeds, vectors, shapes, st.sampled_from((1e-6, 0.125)))
def test_bounded_negative_and_increasing(seed, margins, box_cox, floor):
  g = np.asarray(derivatives(seed, margins, box_cox=box_cox, floor=floor))
  floor = np.float32(floor)
  assert (g < 0).all()
  assert (g >= -1 - floor).all()
  assert (g <= -floor).all()
  for i, s in enumerate(margins):
    assert all(g[i] <= g[j] for j, t in enumerate(margins) if s < t)


@quick
@hypothesis.given(seeds, vectors, st.permutations(range(9)))
def test_follows_the_order_of_the_margins_only(seed, margins, order):
  margins = margins + np.arange(9, dtype=np.float32) * 16  # no ties
  g = derivatives(seed, margins)
  np.testing.assert_array_equal(derivatives(seed, margins[order]), g[jnp.array(order)])
  low = np.tanh(margins / 100)
  small = derivatives(seed, low)
  np.testing.assert_array_equal(derivatives(seed, low**3), small)
  # At or below one there is no tail: the multiset is the key's.
  np.testing.assert_array_equal(
    jnp.sort(small), jnp.sort(derivatives(seed, np.zeros(9, np.float32)))
  )
  tail = np.where(margins > 1, margins, 1).astype(np.float32)
  before = np.sort((np.asarray(g) + np.float32(1e-6)) * tail)
  # The floor is added and taken off again, then scaled by margins up to 150.
  np.testing.assert_allclose(before, np.sort(small) + 1e-6, atol=2e-5)


@quick
@hypothesis.given(seeds, vectors, hnp.arrays(np.bool_, 9))
def test_gradient_is_label_times_derivative(seed, logits, positive):
  labels = np.where(positive, 1, -1)
  value, gradient = value_and_grad(seed, logits, labels)
  g = derivatives(seed, logits * labels.astype(np.float32))
  np.testing.assert_allclose(gradient, labels * np.asarray(g) / 9, rtol=2e-7)
  np.testing.assert_allclose(
    value, np.mean(np.asarray(g, np.float64) * labels * logits), rtol=1e-5, atol=1e-6
  )
  turned = value_and_grad(seed, -logits, -labels)
  np.testing.assert_array_equal(turned[0], value)
  np.testing.assert_array_equal(turned[1], -gradient)
  zero_one = value_and_grad(seed, logits, positive.astype(int), zero_one_labels=True)
  np.testing.assert_array_equal(zero_one[1], gradient)


def test_hessian_is_zero():
  """Neither the sort nor the tail lets a gradient through."""
  logits, labels = jnp.array([0.5, -1.0, 3.0]), jnp.array([1, -1, 1])
  hessian = jax.jit(jax.hessian(lambda f: ensloss(0, f, labels)))(logits)
  np.testing.assert_array_equal(hessian, jnp.zeros((3, 3)))


@pytest.mark.parametrize("box_cox", [-1.0, -0.5, 0.0, 1.0])
def test_one_example(box_cox):
  for seed in range(4):
    (z,) = normals(seed, 1)
    if box_cox == 0:
      v = np.exp(z)
    else:
      base = max(1 + box_cox * z, 0)
      v = base ** (1 / box_cox) if base or box_cox > 0 else np.inf
    for margin in (-2.0, 0.5, 4.0):
      expected = max(-v, -1) / max(margin, 1) - 1e-6
      g = derivatives(seed, jnp.float32([margin]), box_cox=box_cox)
      np.testing.assert_allclose(g, [expected], rtol=1e-5)


@quick
@hypothesis.given(seeds)
def test_box_cox_one_is_linear_and_tends_to_the_exponential(seed):
  margins, z = jnp.zeros(9), normals(seed, 9)
  linear = np.sort(np.maximum(-np.maximum(1 + z, 0), -1)) - 1e-6
  np.testing.assert_allclose(
    derivatives(seed, margins, box_cox=1.0), linear, rtol=1e-5, atol=1e-6
  )
  zero = derivatives(seed, margins, box_cox=0.0)
  for tiny in (1e-6, -1e-6):
    near = derivatives(seed, margins, box_cox=tiny)
    np.testing.assert_allclose(near, zero, rtol=3e-5)  # e^z (1 - tiny z^2 / 2)


def test_keys_are_fresh_losses():
  margins = jnp.linspace(-2.0, 2.0, 9)
  one, same, other = (derivatives(seed, margins) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)


def test_empty_batch():
  value, gradient = jax.value_and_grad(ensloss, argnums=1)(
    0, jnp.zeros(0), jnp.zeros(0)
  )
  assert value == 0
  assert gradient.shape == ensloss_derivatives(0, jnp.zeros(0)).shape == (0,)


def test_ties_are_ranked_by_position():
  z, margins = np.float32([-1, -4, -2, -3]), np.float32([0.0, -1.0, -0.0, 0.0])
  g = method._derivatives(z, margins, jnp.float32(0), jnp.float32(1e-6))
  # Sorted draws go to the second example first, then to the ties in order.
  expected = -np.exp(np.float32([-2, -1, -3, -4])) - np.float32(1e-6)
  np.testing.assert_allclose(g, expected, rtol=1e-6)


@pytest.mark.parametrize("zero", [False, True])
def test_nan_margins_rank_last_and_propagate(zero):
  logits = jnp.array([0.5, jnp.nan, -1.0])
  value, gradient = jax.value_and_grad(
    functools.partial(ensloss, zero_nan_gradients=zero), argnums=1
  )(0, logits, jnp.ones(3))
  assert jnp.isnan(value)
  assert (gradient[1] == 0) if zero else jnp.isnan(gradient[1])
  full = derivatives(0, jnp.array([0.5, 9.0, -1.0]))
  np.testing.assert_array_equal(gradient[jnp.array([0, 2])], full[::2] / 3)


def test_tail_never_divides_by_small_margins():
  margins = jnp.array([0.0, -0.0, 1e-38, -3.0, 1.0, jnp.inf, -jnp.inf])
  g = derivatives(0, margins)
  assert jnp.isfinite(g).all()
  assert g[5] == -jnp.float32(1e-6)


def test_trailing_axis_and_bfloat16():
  logits, labels = jnp.array([0.5, -1.0, 3.0], jnp.bfloat16), jnp.array([1, -1, 1])
  value, gradient = value_and_grad(0, logits, labels)
  wide = value_and_grad(0, logits.astype(jnp.float32), labels)
  assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
  np.testing.assert_array_equal(value, wide[0])
  np.testing.assert_array_equal(gradient, wide[1].astype(jnp.bfloat16))
  column = value_and_grad(0, logits[:, None], labels[:, None])
  np.testing.assert_array_equal(column[0], value)
  np.testing.assert_array_equal(column[1], gradient[:, None])


def test_float64_is_exact_to_float64():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=9), rng.choice([-1, 1], 9)
    z = np.asarray(jax.random.normal(jax.random.key(0), (9,)))
    value, gradient = value_and_grad(0, jnp.asarray(logits), labels, box_cox=0.5)
    expected = oracle.loss_and_gradient(z, logits, labels, box_cox=0.5)
    assert value.dtype == gradient.dtype == jnp.float64
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-12)


def test_hyperparameters_vmap():
  margins = jnp.linspace(-2.0, 2.0, 5)
  grid = np.float32([[0.0, 1e-3], [0.5, 1e-2], [-0.5, 1e-6]])
  swept = jax.jit(
    jax.vmap(lambda b, f: ensloss_derivatives(0, margins, box_cox=b, floor=f))
  )
  for row, (box_cox, floor) in zip(swept(grid[:, 0], grid[:, 1]), grid, strict=True):
    alone = derivatives(0, margins, box_cox=box_cox, floor=floor)
    np.testing.assert_allclose(row, alone, rtol=1e-6)


def test_sample_box_cox_is_uniform_on_minus_one_to_one():
  drawn = np.asarray(jax.vmap(sample_box_cox)(jax.random.split(jax.random.key(0), 999)))
  assert drawn.min() >= -1
  assert drawn.max() < 1
  # Of a uniform sample: mean 0 and variance 1/3, within five standard errors.
  assert abs(drawn.mean()) < 5 * (1 / 3 / 999) ** 0.5
  assert abs(drawn.var() - 1 / 3) < 5 * (4 / 45 / 999) ** 0.5
  assert sample_box_cox(3) == sample_box_cox(jax.random.key(3))


def test_objective_is_the_loss_with_an_accuracy():
  outputs = jnp.array([[0.5], [-1.0], [3.0], [-0.25]])
  batch = {"label": jnp.array([1, 0, 0, 1], jnp.int32)}
  loss, aux = ensloss_objective(outputs, batch, key=7, box_cox=0.5, floor=1e-3)
  expected = ensloss(
    7, outputs, batch["label"], box_cox=0.5, floor=1e-3, zero_one_labels=True
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert loss.dtype == aux["accuracy"].dtype == jnp.float32
  assert aux == {"accuracy": 0.5}
  np.testing.assert_array_equal(
    ensloss_objective(outputs, batch)[0], ensloss_objective(outputs, batch, key=0)[0]
  )
  named = {"clicked": batch["label"]}
  assert ensloss_objective(outputs, named, label="clicked")[1] == {"accuracy": 0.5}


def test_objective_leaves_out_what_the_mask_does():
  outputs = jnp.array([0.5, jnp.nan, -3.0])
  batch = {"label": jnp.array([1, 7, 0]), "mask": jnp.array([True, False, True])}
  (loss, aux), gradient = jax.jit(jax.value_and_grad(ensloss_objective, has_aux=True))(
    outputs, batch, key=0
  )
  g = derivatives(0, jnp.array([0.5, 9.0, 3.0]))
  order = derivatives(0, jnp.array([0.5, jnp.nan, 3.0]))
  np.testing.assert_allclose(loss, (order[0] * 0.5 + order[2] * 3) / 2, rtol=1e-6)
  assert g[0] == order[0]
  assert aux["accuracy"] == 1.0
  assert gradient[1] == 0
  np.testing.assert_allclose(
    gradient[jnp.array([0, 2])], jnp.array([order[0], -order[2]]) / 2, rtol=1e-6
  )


def test_a_config_finds_the_objective_behind_the_function_of_the_same_name():
  name = "gradlab.transforms.cotangents.ensloss:ensloss_objective"
  assert load_object(name, "objective") is ensloss_objective


def test_bad_arguments():
  logits, labels = jnp.zeros(3), jnp.array([1, -1, 1])
  with pytest.raises(ValueError, match="ensloss is binary"):
    ensloss(0, jnp.zeros((3, 2)), labels)
  with pytest.raises(ValueError, match="ensloss is binary"):
    ensloss(0, jnp.float32(1), labels)
  with pytest.raises(ValueError, match="logits must be floating point"):
    ensloss(0, labels, labels)
  with pytest.raises(ValueError, match=r"labels must be \[3\]"):
    ensloss(0, logits, labels[:2])
  with pytest.raises(ValueError, match="labels must be -1 or 1"):
    ensloss(0, logits, jnp.array([0, 1, 1]))
  with pytest.raises(ValueError, match="labels must be 0 or 1"):
    ensloss(0, logits, labels, zero_one_labels=True)
  for floor in (0.0, -1.0):
    with pytest.raises(ValueError, match="floor must lie in"):
      ensloss(0, logits, labels, floor=floor)
  with pytest.raises(ValueError, match="margins must be a floating-point vector"):
    ensloss_derivatives(0, jnp.zeros((3, 1)))
  with pytest.raises(ValueError, match="has no field 'label'"):
    ensloss_objective(logits, {"inputs": logits})
  with pytest.raises(ValueError, match="must hold integers 0 or 1"):
    ensloss_objective(logits, {"label": logits})
