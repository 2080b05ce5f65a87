"""cross_entropy against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.transforms.objectives import cross_entropy
from tests.oracles import cross_entropy as oracle

objective = jax.jit(cross_entropy, static_argnames=("label", "label_smoothing"))
objective_and_grad = jax.jit(
  jax.value_and_grad(cross_entropy, has_aux=True), static_argnames="label_smoothing"
)


def random_batch(shape, classes, seed=0):
  rng = np.random.default_rng(seed)
  z = rng.normal(0, 3, (*shape, classes)).astype(np.float32)
  return (
    z,
    rng.integers(0, classes, shape),
    rng.integers(0, 2, shape).astype(np.float32),
  )


@pytest.mark.parametrize("shape", [(), (6,), (3, 4)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_oracle(shape, smoothing, masked):
  z, y, mask = random_batch(shape, 5)
  mask.flat[0] = 1
  batch = {"label": jnp.asarray(y)} | ({"mask": jnp.asarray(mask)} if masked else {})
  weights = mask if masked else None
  (loss, aux), grad = objective_and_grad(
    jnp.asarray(z), batch, label_smoothing=smoothing
  )
  # float32 log-softmax of logits up to about 10 against float64.
  np.testing.assert_allclose(loss, oracle.loss(z, y, smoothing, weights), rtol=2e-6)
  np.testing.assert_allclose(
    grad, oracle.gradient(z, y, smoothing, weights), rtol=1e-5, atol=3e-7
  )
  np.testing.assert_allclose(aux["accuracy"], oracle.accuracy(z, y, weights), rtol=1e-6)
  assert set(aux) == {"accuracy"}
  assert loss.dtype == aux["accuracy"].dtype == jnp.float32
  assert loss.shape == aux["accuracy"].shape == ()


def test_weights_of_whole_rows():
  z, y, _ = random_batch((3, 4), 5)
  rows = np.array([0.5, 0.0, 2.0], np.float32)
  loss, _ = objective(
    jnp.asarray(z), {"label": jnp.asarray(y), "mask": jnp.asarray(rows)}
  )
  want = oracle.loss(z, y, weights=np.repeat(rows, 4).reshape(3, 4))
  np.testing.assert_allclose(loss, want, rtol=2e-6)  # float32 against float64


def test_equal_shards_average_to_the_whole():
  z, y, _ = random_batch((8,), 3)
  whole, whole_aux = objective(jnp.asarray(z), {"label": jnp.asarray(y)})
  parts = [
    objective(jnp.asarray(z[i : i + 2]), {"label": jnp.asarray(y[i : i + 2])})
    for i in range(0, 8, 2)
  ]
  # Means of two, then of four, against one mean of eight in float32.
  np.testing.assert_allclose(np.mean([p[0] for p in parts]), whole, rtol=1e-6)
  np.testing.assert_allclose(
    np.mean([p[1]["accuracy"] for p in parts]), whole_aux["accuracy"], rtol=1e-6
  )


def test_bfloat16_logits_are_computed_in_float32():
  z, y, _ = random_batch((6,), 5)
  z = jnp.asarray(z, jnp.bfloat16)
  batch = {"label": jnp.asarray(y)}
  (loss, _), grad = objective_and_grad(z, batch)
  assert loss.dtype == jnp.float32
  assert grad.dtype == jnp.bfloat16
  # The rounded logits are exact in float32: only float32 rounding is left.
  np.testing.assert_allclose(loss, oracle.loss(np.asarray(z, np.float64), y), rtol=2e-6)


def test_minus_infinity_rules_a_class_out():
  z = jnp.array([[0.0, 0.0, -jnp.inf]])
  loss, _ = objective(z, {"label": jnp.array([1])})
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)  # float32 against float64


def test_padding_may_hold_any_label_and_an_empty_batch_gives_zero():
  z, y, _ = random_batch((4,), 3)
  mask = jnp.array([1, 1, 0, 0])
  padded = {"label": jnp.asarray(y).at[2:].set(jnp.array([-1, 255])), "mask": mask}
  (loss, aux), grad = objective_and_grad(jnp.asarray(z), padded)
  np.testing.assert_allclose(loss, oracle.loss(z[:2], y[:2]), rtol=2e-6)  # float32
  np.testing.assert_allclose(aux["accuracy"], oracle.accuracy(z[:2], y[:2]))
  assert not np.any(grad[2:])
  loss, aux = objective(jnp.asarray(z), {**padded, "mask": jnp.zeros(4, bool)})
  assert float(loss) == float(aux["accuracy"]) == 0.0


def test_label_smoothing_may_be_traced():
  z, y, _ = random_batch((6,), 5)
  batch = {"label": jnp.asarray(y)}
  smoothing = jnp.array([0.0, 0.2])
  losses = jax.vmap(
    lambda a: cross_entropy(jnp.asarray(z), batch, label_smoothing=a)[0]
  )(smoothing)
  # float32 against float64.
  np.testing.assert_allclose(
    losses, [oracle.loss(z, y, a) for a in (0.0, 0.2)], rtol=2e-6
  )


def test_another_label_field_and_small_integers():
  z, y, _ = random_batch((6,), 5)
  loss, _ = objective(
    jnp.asarray(z), {"digit": jnp.asarray(y, jnp.uint8)}, label="digit"
  )
  np.testing.assert_allclose(loss, oracle.loss(z, y), rtol=2e-6)  # float32


@pytest.mark.parametrize(
  ("batch", "options", "message"),
  [
    ({"inputs": jnp.zeros(2)}, {}, "no field 'label'; its fields are inputs"),
    ({"label": jnp.zeros(2)}, {}, "must hold integer classes, got float32"),
    ({"label": jnp.zeros((2, 1), int)}, {}, r"outputs must be \[..., classes\]"),
    ({"label": jnp.zeros(2, int), "mask": jnp.ones(3)}, {}, r"mask has shape \(3,\)"),
    (
      {"label": jnp.zeros(2, int)},
      {"label_smoothing": 1.5},
      "label_smoothing must lie",
    ),
  ],
)
def test_bad_arguments_raise(batch, options, message):
  with pytest.raises(ValueError, match=message):
    cross_entropy(jnp.zeros((2, 3)), batch, **options)
