"""squared_error against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.transforms.objectives import squared_error
from tests.oracles import squared_error as oracle

BOTH = jax.jit(jax.value_and_grad(squared_error, has_aux=True))


@pytest.mark.parametrize("shape", [(6,), (3, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_oracle(shape, masked):
  rng = np.random.default_rng(0)
  o, y = rng.standard_normal((2, *shape)).astype(np.float32)
  mask = rng.integers(0, 3, shape).astype(np.float32)
  batch = {"label": jnp.asarray(y)} | ({"mask": jnp.asarray(mask)} if masked else {})
  weights = mask if masked else None
  (loss, aux), grad = BOTH(jnp.asarray(o), batch)
  # Means of at most 12 float32 terms against float64.
  np.testing.assert_allclose(loss, oracle.loss(o, y, weights), rtol=1e-6)
  np.testing.assert_allclose(aux["mae"], oracle.mae(o, y, weights), rtol=1e-6)
  np.testing.assert_allclose(grad, oracle.gradient(o, y, weights), rtol=1e-5, atol=1e-7)
  assert set(aux) == {"mae"}
  assert loss.dtype == aux["mae"].dtype == jnp.float32


@pytest.mark.parametrize(("out", "label"), [((4, 1), (4,)), ((4,), (4, 1))])
def test_a_last_axis_of_length_one_does_not_broadcast(out, label):
  o, y = np.arange(4.0), np.array([1.0, -1.0, 0.5, 2.0])
  batch = {"label": jnp.asarray(y, jnp.float32).reshape(label)}
  loss, _ = squared_error(jnp.asarray(o, jnp.float32).reshape(out), batch)
  assert float(loss) == oracle.loss(o, y)


def test_equal_shards_average_to_the_whole():
  rng = np.random.default_rng(1)
  o, y = jnp.asarray(rng.standard_normal((2, 8)), jnp.float32)
  whole, aux = squared_error(o, {"label": y})
  parts = [squared_error(o[i : i + 4], {"label": y[i : i + 4]}) for i in (0, 4)]
  # Means of four, then of two, against one mean of eight in float32.
  np.testing.assert_allclose(np.mean([p[0] for p in parts]), whole, rtol=1e-6)
  np.testing.assert_allclose(
    np.mean([p[1]["mae"] for p in parts]), aux["mae"], rtol=1e-6
  )


def test_bfloat16_and_integer_targets_are_computed_in_float32():
  o = jnp.array([256.0, 1.0], jnp.bfloat16)
  (loss, _), grad = BOTH(o, {"label": jnp.array([1, 0], jnp.int32)})
  assert loss.dtype == jnp.float32
  assert grad.dtype == jnp.bfloat16
  # 255 squared, plus 1, halved: no rounding in float32, much in bfloat16.
  assert float(loss) == (255**2 + 1) / 2


def test_missing_targets_behind_the_mask_do_no_harm():
  batch = {"label": jnp.array([1.0, jnp.nan]), "mask": jnp.array([True, False])}
  (loss, aux), grad = BOTH(jnp.array([3.0, 5.0]), batch)
  assert (float(loss), float(aux["mae"])) == (4.0, 2.0)
  assert grad.tolist() == [4.0, 0.0]
  loss, aux = squared_error(jnp.ones(2), {**batch, "mask": jnp.zeros(2)})
  assert float(loss) == float(aux["mae"]) == 0.0


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    ({"y": jnp.zeros(2)}, "no field 'label'; its fields are y"),
    ({"label": jnp.zeros(3)}, r"same shape, got \(2,\) and \(3,\)"),
    ({"label": jnp.zeros((1, 2))}, "same shape"),
    ({"label": jnp.zeros(2), "mask": jnp.ones((2, 1))}, r"mask has shape \(2, 1\)"),
  ],
)
def test_bad_arguments_raise(batch, message):
  with pytest.raises(ValueError, match=message):
    squared_error(jnp.zeros(2), batch)


def test_another_label_field():
  assert float(squared_error(jnp.ones(2), {"y": jnp.zeros(2)}, label="y")[0]) == 1.0
