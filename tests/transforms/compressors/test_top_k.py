"""Top-k: values, positions and sizes of the message, and the contraction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlab.transforms.compressors import message_bytes, top_k
from tests.oracles import top_k as oracle


def _through(compressor, g):
  state = compressor.init(g)
  message, after = compressor.compress(g, state)
  assert after == state == optax.EmptyState()
  return message, compressor.decompress(message, state, g)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_matches_the_oracle(shape, ratio):
  g = jax.random.normal(jax.random.key(len(shape)), shape)
  k = max(1, round(ratio * g.size))
  message, out = _through(top_k(ratio), g)
  assert message.indices.tolist() == oracle.kept(g, k).tolist()
  assert message.values.tolist() == np.ravel(g)[oracle.kept(g, k)].tolist()
  # Entries are moved, never changed.
  assert np.asarray(out).tolist() == oracle.top_k(g, k).tolist()


@settings(max_examples=20, deadline=None)
@given(
  g=st.lists(st.integers(-3, 3).map(float), min_size=8, max_size=8),
  k=st.sampled_from([1, 3, 8, 20]),
)
def test_ties_keep_the_earlier_entry_and_the_error_is_a_contraction(g, k):
  _, out = _through(top_k(k=k), jnp.array(g))
  expected = oracle.top_k(np.array(g), min(k, 8))
  assert out.tolist() == expected.tolist()
  lost = float(np.sum((np.array(g) - expected) ** 2))
  assert lost <= (1 - min(k, 8) / 8) * float(np.sum(np.square(g))) + 1e-12


def test_message_has_the_size_that_travels():
  tree = {"w": jnp.ones((10, 20), jnp.bfloat16), "b": jnp.ones(7)}
  compressor = top_k(0.05)
  message, _ = jax.eval_shape(compressor.compress, tree, compressor.init(tree))
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), message) == (
    {"w": ((10,), "bfloat16"), "b": ((1,), "float32")},
    {"w": ((10,), "int32"), "b": ((1,), "int32")},
  )
  assert message_bytes(message) == 10 * (2 + 4) + 1 * (4 + 4)


def test_k_takes_the_place_of_ratio_and_stops_at_the_leaf():
  message, out = _through(top_k(ratio=None, k=5), jnp.array([2.0, -1.0]))
  assert message.values.tolist() == [2.0, -1.0]
  assert out.tolist() == [2.0, -1.0]
  message, _ = _through(top_k(0.5, k=1), jnp.arange(8.0))
  assert message.indices.tolist() == [7]


def test_odd_trees_survive():
  tree = {"a": (None, optax.MaskedNode()), "s": jnp.float32(-2), "e": jnp.ones((0, 3))}
  message, out = _through(top_k(0.1), tree)
  assert message.values["e"].shape == (0,)
  assert jax.tree.structure(out) == jax.tree.structure(tree)
  assert float(out["s"]) == -2.0
  assert out["e"].shape == (0, 3)
  assert _through(top_k(0.1), {})[1] == {}


def test_decompress_needs_only_shapes_and_dtypes():
  g = jnp.array([[1.0, -4.0], [0.0, 3.0]])
  compressor = top_k(k=2)
  message, state = compressor.compress(g, compressor.init(g), None, value=1.0)
  like = jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)
  out = compressor.decompress(message, state, like, value=1.0)
  assert out.dtype == jnp.bfloat16
  assert out.tolist() == [[0.0, -4.0], [0.0, 3.0]]


def test_nan_is_sent():
  _, out = _through(top_k(k=1), jnp.array([1.0, jnp.nan, 5.0]))
  assert np.isnan(out).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["ratio", "k"])
def test_a_traced_size_is_refused(name):
  with pytest.raises(ValueError, match=f"{name} sets the message's shape"):
    jax.jit(lambda v: top_k(**{name: v}).compress(jnp.ones(3), optax.EmptyState()))(1)


def test_bad_arguments():
  for ratio in (0.0, 1.5, -1.0):
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\]"):
      top_k(ratio)
  with pytest.raises(ValueError, match="k must lie in"):
    top_k(k=0)
  with pytest.raises(ValueError, match=r"ratio sets the message's shape.* got None"):
    top_k(ratio=None)
  with pytest.raises(ValueError, match=r"top_k needs floating.*\['n'\] is int32"):
    top_k().compress({"n": jnp.ones(3, jnp.int32)}, optax.EmptyState())
