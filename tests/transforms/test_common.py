"""Decompositions that no vmap turns into batches on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.transforms._common import one_by_one

DECOMPOSITION = one_by_one(lambda x: jnp.linalg.svd(x, full_matrices=False))


def _stack(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_stacks_are_decomposed_matrix_by_matrix():
  x = _stack(3, 2, 5, 4)
  u, s, vt = jax.jit(DECOMPOSITION)(x)
  assert (u.shape, s.shape, vt.shape) == ((3, 2, 5, 4), (3, 2, 4), (3, 2, 4, 4))
  # float32
  np.testing.assert_allclose(u * s[..., None, :] @ vt, x, rtol=1e-4, atol=1e-5)
  for i in range(3):
    np.testing.assert_array_equal(jax.jit(DECOMPOSITION)(x[i])[1], s[i])


def test_no_batch_reaches_the_thread_pool_under_vmap():
  """As many batches at once as the pool has threads would wait for ever."""
  x = _stack(3, 2, 5, 4)

  def two(x):
    return DECOMPOSITION(x)[1] + DECOMPOSITION(x + 1)[1]

  compiled = jax.jit(jax.vmap(two)).lower(x).compile().as_text()
  calls = re.findall(r"= \((f32\[[\d,]+\])[^\n]*custom-call\([^\n]*gesdd", compiled)
  assert calls == ["f32[5,4]"] * len(calls)
  assert calls
  np.testing.assert_allclose(jax.vmap(two)(x), two(x), rtol=1e-4, atol=1e-5)
