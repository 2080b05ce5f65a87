"""next_token against loops in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.transforms.objectives import next_token
from tests.oracles import next_token as oracle

objective = jax.jit(next_token, static_argnames=("tokens", "label_smoothing"))


def random_batch(rows=3, length=5, vocabulary=7, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 2, (rows, length, vocabulary)).astype(np.float32)
  return logits, rng.integers(0, vocabulary, (rows, length))


MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]], np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("mask", [None, MASK])
def test_equals_the_oracle(smoothing, mask):
  logits, ids = random_batch()
  batch = {"inputs": jnp.asarray(ids)}
  if mask is not None:
    batch["mask"] = jnp.asarray(mask)
  loss, aux = objective(jnp.asarray(logits), batch, label_smoothing=smoothing)
  want = oracle.metrics(logits, ids, smoothing, mask)
  # float32 log-softmax against float64.
  got = (loss, aux["bits_per_token"], aux["accuracy"])
  np.testing.assert_allclose(got, want, rtol=2e-6)
  assert set(aux) == {"accuracy", "bits_per_token"}
  assert all(value.dtype == jnp.float32 for value in (loss, *aux.values()))


def test_a_mask_of_rows():
  logits, ids = random_batch()
  rows = np.array([1.0, 0.0, 2.0], np.float32)
  batch = {"inputs": jnp.asarray(ids), "mask": jnp.asarray(rows)}
  loss, _ = objective(jnp.asarray(logits), batch)
  want = oracle.metrics(logits, ids, mask=np.repeat(rows[:, None], 5, 1))[0]
  np.testing.assert_allclose(loss, want, rtol=2e-6)  # float32 against float64


def test_the_last_position_and_the_first_token_are_not_used():
  logits, ids = random_batch()
  grad = jax.grad(lambda z: objective(z, {"inputs": jnp.asarray(ids)})[0])(
    jnp.asarray(logits)
  )
  assert not np.any(grad[:, -1])
  assert np.all(np.any(grad[:, :-1], axis=-1))
  other = jnp.asarray(ids).at[:, 0].add(-1) % 7
  loss = objective(jnp.asarray(logits), {"inputs": jnp.asarray(ids)})[0]
  assert objective(jnp.asarray(logits), {"inputs": other})[0] == loss


def test_a_perfect_prediction_of_the_following_token():
  ids = jnp.array([[2, 0, 1, 2]])
  logits = 100.0 * jax.nn.one_hot(jnp.roll(ids, -1, axis=1), 3)
  loss, aux = objective(logits, {"inputs": ids})
  assert float(loss) == float(aux["bits_per_token"]) == 0.0
  assert float(aux["accuracy"]) == 1.0


def test_equal_shards_average_to_the_whole():
  logits, ids = random_batch(rows=4)
  whole, aux = objective(jnp.asarray(logits), {"inputs": jnp.asarray(ids)})
  parts = [
    objective(jnp.asarray(logits[i : i + 2]), {"inputs": jnp.asarray(ids[i : i + 2])})
    for i in (0, 2)
  ]
  # Means of means against one mean in float32.
  np.testing.assert_allclose(np.mean([p[0] for p in parts]), whole, rtol=1e-6)
  for name in aux:
    np.testing.assert_allclose(
      np.mean([p[1][name] for p in parts]), aux[name], rtol=1e-6
    )


def test_bfloat16_logits_are_computed_in_float32():
  logits, ids = random_batch()
  logits = jnp.asarray(logits, jnp.bfloat16)
  loss, _ = objective(logits, {"inputs": jnp.asarray(ids)})
  want = oracle.metrics(np.asarray(logits, np.float64), ids)[0]
  assert loss.dtype == jnp.float32
  # The rounded logits are exact in float32: only float32 rounding is left.
  np.testing.assert_allclose(loss, want, rtol=2e-6)


def test_label_smoothing_may_be_traced():
  logits, ids = random_batch()
  batch = {"bytes": jnp.asarray(ids, jnp.uint8)}
  losses = jax.vmap(
    lambda a: next_token(jnp.asarray(logits), batch, tokens="bytes", label_smoothing=a)[
      0
    ]
  )(jnp.array([0.0, 0.2]))
  want = [oracle.metrics(logits, ids, a)[0] for a in (0.0, 0.2)]
  np.testing.assert_allclose(losses, want, rtol=2e-6)  # float32 against float64


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    ({"label": jnp.zeros((2, 3), int)}, "no field 'inputs'; its fields are label"),
    ({"inputs": jnp.zeros((2, 3))}, "must hold integer tokens, got float32"),
    ({"inputs": jnp.zeros((2, 4), int)}, r"outputs must be \[B, T, V\]"),
    ({"inputs": jnp.zeros(2, int)}, r"outputs must be \[B, T, V\]"),
    ({"inputs": jnp.zeros((2, 3), int), "mask": jnp.ones((2, 2))}, "mask has shape"),
  ],
)
def test_bad_batches_raise(batch, message):
  with pytest.raises(ValueError, match=message):
    next_token(jnp.zeros((2, 3, 4)), batch)


def test_one_token_has_no_next():
  with pytest.raises(ValueError, match="T at least 2"):
    next_token(jnp.zeros((2, 1, 4)), {"inputs": jnp.zeros((2, 1), int)})


def test_label_smoothing_outside_its_range_raises():
  with pytest.raises(ValueError, match="label_smoothing must lie"):
    next_token(
      jnp.zeros((1, 2, 3)), {"inputs": jnp.zeros((1, 2), int)}, label_smoothing=-0.1
    )
