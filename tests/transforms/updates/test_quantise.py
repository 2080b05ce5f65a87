import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.checkpoint import Checkpoints
from gradlab.transforms.updates import (
  QTensor,
  affine_dequantize,
  affine_quantize,
  blockwise_dequantize,
  blockwise_quantize,
  dynamic_map,
  pack_int4,
  unpack_int4,
)
from tests.oracles import quantise as oracle
from tests.transforms.updates.trajectories import noise

quick = hypothesis.settings(max_examples=20, deadline=None)
floats = st.floats(-4, 4, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
vectors = hnp.arrays(np.float32, 24, elements=floats)
EXAMPLE = (-0.3, -0.1, 0, 0.25, 0.6, 0.45, -0.2, 0.05)

affine = jax.jit(
  affine_quantize, static_argnums=(1, 2), static_argnames=("zero_in_range", "strict")
)
deaffine = jax.jit(affine_dequantize)


@functools.partial(jax.jit, static_argnums=(1, 2))
def blockwise(x, signed, block, key=None):
  """(codes, absmax, round trip) with the dynamic map."""
  entries = dynamic_map(signed)
  codes, absmax = blockwise_quantize(x, entries, block, key=key)
  return codes, absmax, blockwise_dequantize(codes, absmax, entries, block)


def codes_of(q):
  return unpack_int4(q.codes, q.shape) if q.bits <= 4 else q.codes


def test_affine_worked_example(monkeypatch):
  # In float64: 0.45 / 0.06 is a tie, and in float32 it is 7.4999995.
  with jax.enable_x64(True):
    w = np.array(EXAMPLE)
    q = affine_quantize(w, 4, 8)
    np.testing.assert_allclose(q.scale, 0.06, rtol=1e-12)
    assert q.zero == 5
    assert codes_of(q).tolist() == [0, 3, 5, 9, 15, 13, 2, 6]
    expected = (-0.30, -0.12, 0, 0.24, 0.60, 0.48, -0.18, 0.06)
    np.testing.assert_allclose(affine_dequantize(q), expected, rtol=1e-12)
  single = affine(np.float32(w), 4, 8)
  assert codes_of(single).tolist() == [0, 3, 5, 9, 15, 12, 2, 6]
  np.testing.assert_allclose(single.scale, 0.06, rtol=1e-6)
  uniform = jnp.array((0.1, 0.9, 0.5, 0.3, 0.2, 0.99, 0, 0.6))
  monkeypatch.setattr(jax.random, "uniform", lambda *args, **kwargs: uniform)
  dithered = affine_quantize(jnp.array(EXAMPLE), 4, 8, key=0)
  assert codes_of(dithered).tolist() == [0, 3, 5, 9, 15, 12, 2, 6]


@pytest.mark.parametrize(
  ("shape", "bits", "group_size"),
  [((), 8, 4), ((5,), 4, 2), ((3, 4), 8, 4), ((2, 3, 5), 4, 7), ((6, 8), 2, 48)]
  + [((40,), bits, 16) for bits in range(2, 9)],
)
def test_affine_follows_the_oracle(shape, bits, group_size):
  w = noise(*shape, seed=bits)
  q = affine(w, bits, group_size)
  codes, scale, zero, out = oracle.affine(w, bits, group_size)
  np.testing.assert_array_equal(codes_of(q), codes)
  np.testing.assert_allclose(q.scale, scale, rtol=1e-6)  # float32
  np.testing.assert_array_equal(q.zero, zero)
  np.testing.assert_allclose(deaffine(q), out, rtol=1e-6, atol=1e-7)
  assert q.codes.dtype == jnp.uint8
  assert q.codes.nbytes == (w.size if bits > 4 else (w.size + 1) // 2)
  assert q.shape == deaffine(q).shape == shape


@pytest.mark.parametrize("bits", [4, 8])
def test_affine_with_a_key_follows_the_oracle(bits):
  w, key = noise(3, 16), jax.random.key(7)
  q = affine(w, bits, 16, key=key)
  uniform = jax.random.uniform(key, w.shape)
  codes, *_ = oracle.affine(w, bits, 16, uniform=uniform)
  np.testing.assert_array_equal(codes_of(q), codes)


@quick
@hypothesis.given(vectors, st.sampled_from((2, 4, 8)))
def test_affine_error_is_half_a_step_and_zero_stays(w, bits):
  for key, share in ((None, 0.5), (jax.random.key(3), 1.0)):
    q = affine(w, bits, 8, key=key)
    out = np.asarray(deaffine(q))
    step = np.repeat(np.asarray(q.scale), 8)
    # Rounding of w / s and of the product, relative to the largest entry.
    assert np.all(np.abs(out - w) <= share * step * (1 + 1e-4) + 1e-6)
    np.testing.assert_array_equal(out[w == 0], 0)
    if key is None:
      again = deaffine(affine(out, bits, 8))
      np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-6)


@quick
@hypothesis.given(vectors)
def test_zero_in_range_changes_nothing_where_a_group_straddles_zero(w):
  w = w.reshape(3, 8)
  w[:, 0], w[:, 1] = -abs(w[:, 0]) - 1, abs(w[:, 1]) + 1
  within, plain = (affine(w, 8, 8, zero_in_range=flag) for flag in (True, False))
  jax.tree.map(np.testing.assert_array_equal, within, plain)


def test_without_zero_in_range_a_group_of_one_sign_is_clipped():
  w = jnp.linspace(0.5, 1.0, 8)
  np.testing.assert_allclose(
    deaffine(affine(w, 4, 8, zero_in_range=False)), 0.5, rtol=1e-6
  )
  # Half a step of 1/15.
  np.testing.assert_allclose(deaffine(affine(w, 4, 8)), w, atol=1 / 30 + 1e-6)


def mean_and_error(draw, keys):
  """The mean over keys and its standard error, from the draws themselves."""
  many = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), keys))
  out = np.asarray(many, np.float64)
  return out.mean(axis=0), out.std(axis=0) / np.sqrt(keys)


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_affine_is_unbiased(bits):
  w = jnp.array(EXAMPLE)
  mean, error = mean_and_error(
    lambda key: affine_dequantize(affine_quantize(w, bits, 8, key=key)), 10_000
  )
  assert np.all(np.abs(mean - np.asarray(w)) <= 5 * error + 1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_blockwise_is_unbiased(signed):
  x = jnp.array((1.0, 0.6, 0.031, 4e-4, 2e-7, 0.0, -0.6, -0.031, -2e-7))
  x = x if signed else jnp.abs(x)

  def draw(key):
    return blockwise(x, signed, 16, key)[2]

  mean, error = mean_and_error(draw, 10_000)
  assert np.all(np.abs(mean - np.asarray(x)) <= 5 * error + 1e-9)
  # Between its two neighbours in the map.
  once = np.asarray(draw(jax.random.key(1)))
  entries = dynamic_map(signed)
  at = np.searchsorted(entries, np.asarray(x), side="right") - 1
  high = entries[np.minimum(at + 1, 255)]
  assert np.all((once >= entries[at] - 1e-9) & (once <= high + 1e-9))


def test_dynamic_maps():
  signed, unsigned = dynamic_map(True), dynamic_map(False)
  for entries in (signed, unsigned):
    assert entries.shape == (256,)
    assert entries.dtype == np.float32
    assert np.all(np.diff(entries) > 0)
    assert 0 in entries
    assert entries[-1] == 1
  np.testing.assert_allclose(signed[0], -0.99297, rtol=1e-5)
  np.testing.assert_allclose(signed[127:129], (0, 5.5e-7), rtol=1e-6)
  for bits in range(2, 9):
    for flag in (True, False):
      entries = dynamic_map(flag, bits)
      assert entries.shape == (2**bits,)
      np.testing.assert_allclose(entries, oracle.dynamic_map(flag, bits), rtol=1e-6)


def test_blockwise_worked_example():
  codes, absmax, out = blockwise(jnp.array([0.5, -1, 0.003, 0]), True, 256)
  assert codes.tolist() == [219, 0, 146, 127]
  assert absmax == 1
  np.testing.assert_allclose(out, (0.5008, -0.9930, 0.0030, 0), atol=5e-5)


def spread(*shape, seed=0):
  """Numbers over eight decades, of both signs."""
  rng = np.random.default_rng(seed)
  size = 10.0 ** rng.uniform(-8, 0, shape) * rng.choice((-1, 1), shape)
  return size.astype(np.float32)


@pytest.mark.parametrize(
  ("shape", "block"), [((), 256), ((300,), 64), ((3, 40), 256), ((4, 5, 6), 7)]
)
@pytest.mark.parametrize("signed", [True, False])
def test_blockwise_follows_the_oracle(shape, block, signed):
  x = spread(*shape)
  x = x if signed else np.abs(x)
  codes, absmax, out = blockwise(x, signed, block)
  expected = oracle.blockwise(x, oracle.dynamic_map(signed), block)
  np.testing.assert_array_equal(codes, expected[0])
  np.testing.assert_allclose(absmax, expected[1], rtol=1e-6)
  np.testing.assert_allclose(out, expected[2], rtol=1e-6)  # float32 map and product
  assert codes.dtype == jnp.uint8
  assert codes.shape == shape


@pytest.mark.parametrize(
  "entries",
  [
    dynamic_map(True, 4),
    dynamic_map(False)[1:],
    (np.arange(16) + 1) / 16,
    np.linspace(-1, 1, 255),
    np.array([0.0, 1.0]),
    np.array([-1.0, -0.5, 1e-3, 1.1e-3, 1.0]),
  ],
  ids=["dynamic4", "without_zero", "linear", "symmetric", "bit", "uneven"],
)
def test_fast_lookup_is_a_comparison_with_every_entry(entries):
  entries = np.asarray(entries, np.float32)
  middles = ((entries[1:].astype(np.float64) + entries[:-1]) / 2).astype(np.float32)
  sides = [np.nextafter(middles, np.float32(to)) for to in (-2, 2)]
  x = np.concatenate([[1.0, -1.0, 0.0, -0.0, 1e-40], entries, *sides, spread(2000)])
  x = x.astype(np.float32)
  found = jax.jit(lambda x: blockwise_quantize(x, entries, x.size)[0])(x)
  # Midpoints in float32 themselves decide, so that neighbours of them are no ties.
  np.testing.assert_array_equal(found, np.searchsorted(middles, x, side="left"))
  traced = jax.jit(lambda x, entries: blockwise_quantize(x, entries, x.size)[0])
  np.testing.assert_array_equal(traced(x, entries), found)


@quick
@hypothesis.given(vectors, st.booleans())
def test_blockwise_error_is_half_the_spacing_and_signs_stay(x, signed):
  x = x if signed else np.abs(x)
  _, absmax, out = blockwise(x, signed, 8)
  out, scale = np.asarray(out), np.repeat(np.asarray(absmax), 8)
  entries = np.concatenate([[-1.0] if signed else [], dynamic_map(signed)])
  unit = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
  at = np.clip(np.searchsorted(entries, unit, side="right"), 1, len(entries) - 1)
  gap = entries[at] - entries[at - 1]
  # Below the smallest entry there is no -1: the last gap counts in full.
  share = np.where(unit < dynamic_map(signed)[0], 1.0, 0.5)
  assert np.all(np.abs(out - x) <= share * gap * scale * (1 + 1e-4) + 1e-7)
  assert np.all((np.sign(out) == np.sign(x)) | (out == 0))
  np.testing.assert_array_equal(out[x == 0], 0)
  again = blockwise(out, signed, 8)[2]
  whole = np.abs(out).reshape(-1, 8).max(axis=1) == np.asarray(absmax)
  kept = np.repeat(whole, 8)
  np.testing.assert_allclose(np.asarray(again)[kept], out[kept], rtol=1e-6)


def test_constant_positive_and_zero_blocks_are_exact():
  x = jnp.concatenate([jnp.full(8, 0.3), jnp.zeros(8), jnp.full(3, 1e-30)])
  for signed in (True, False):
    codes, absmax, out = blockwise(x, signed, 8)
    np.testing.assert_array_equal(out, x)
    assert absmax[1] == 0
    assert np.all(codes[8:16] == (127 if signed else 0))


def test_what_is_not_finite_spoils_its_block_only():
  for bad in (jnp.nan, jnp.inf, -jnp.inf):
    x = jnp.ones(24).at[9].set(bad)
    for out in (blockwise(x, True, 8)[2], deaffine(affine(x, 8, 8))):
      assert not np.isfinite(out[8:16]).all()
      np.testing.assert_allclose(np.delete(out, slice(8, 16)), 1, rtol=1e-6)


@pytest.mark.parametrize(
  "shape", [(), (1,), (7,), (8,), (3, 4), (4, 3), (2, 0), (0, 4)]
)
def test_packing_is_undone(shape):
  codes = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
  packed = pack_int4(jnp.asarray(codes))
  assert packed.dtype == jnp.uint8
  assert packed.size == (codes.size + 1) // 2
  if shape and not shape[-1] % 2:
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
  np.testing.assert_array_equal(unpack_int4(packed, shape), codes)


def test_packing_puts_the_first_code_low():
  assert pack_int4(jnp.array([1, 2, 15, 0], jnp.uint8)).tolist() == [0x21, 0x0F]


def test_bfloat16_and_empty_arrays():
  x = jnp.asarray(noise(6), jnp.bfloat16)
  for out in (deaffine(affine(x, 8, 4)), blockwise(x, True, 4)[2]):
    assert out.dtype == jnp.float32
    wide = np.asarray(x, np.float32)
    np.testing.assert_allclose(out, wide, atol=0.03 * np.abs(wide).max())
  empty = jnp.zeros((0, 3))
  assert deaffine(affine(empty, 4, 8)).shape == (0, 3)
  assert affine(empty, 4, 8, key=0).scale.shape == (0,)
  codes, absmax, out = blockwise(empty, True, 8)
  assert (codes.shape, absmax.shape, out.shape) == ((0, 3), (0,), (0, 3))


def test_float64_stays_float64():
  with jax.enable_x64(True):
    w = np.random.default_rng(0).normal(size=20)
    q = affine_quantize(w, 8, 8)
    np.testing.assert_allclose(
      affine_dequantize(q), oracle.affine(w, 8, 8)[3], rtol=1e-14
    )
    _, absmax = blockwise_quantize(w, dynamic_map(True), 8)
    assert absmax.dtype == q.scale.dtype == np.float64
    np.testing.assert_array_equal(absmax, oracle.blockwise(w, np.ones(2), 8)[1])


def test_a_quantised_tensor_is_a_pytree_of_arrays(tmp_path):
  w = jnp.asarray(noise(4, 6, 8))
  one = affine(w[0], 4, 16)
  assert [leaf.dtype for leaf in jax.tree.leaves(one)] == [
    jnp.uint8,
    jnp.float32,
    jnp.float32,
  ]
  many = jax.jit(jax.vmap(lambda x: affine_quantize(x, 4, 16)))(w)
  assert isinstance(many, QTensor)
  assert many.shape == (6, 8)  # of one
  out = jax.vmap(affine_dequantize)(many)
  np.testing.assert_allclose(out[0], deaffine(one), rtol=1e-6)

  def step(q, x):
    out = affine_dequantize(q)
    return affine_quantize(x, 4, 16), out

  last, outs = jax.jit(lambda q, w: jax.lax.scan(step, q, w))(one, w[1:])
  np.testing.assert_allclose(outs, out[:3], rtol=1e-6)
  assert jax.tree.structure(last) == jax.tree.structure(one)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"q": one})
    _, saved = checkpoints.restore({"q": jax.eval_shape(lambda: one)})
  jax.tree.map(np.testing.assert_array_equal, saved["q"], one)


def test_int_and_typed_keys_are_keys():
  w = jnp.asarray(noise(16))
  for draw in (
    lambda key: affine(w, 4, 8, key=key),
    lambda key: blockwise_quantize(w, dynamic_map(True), 8, key=key),
  ):
    forms = [draw(key) for key in (3, jax.random.key(3), jax.random.PRNGKey(3))]
    for form in forms[1:]:
      jax.tree.map(np.testing.assert_array_equal, form, forms[0])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda w: affine_quantize(w, 1, 4), "bits must be from 2 to 8"),
    (lambda w: affine_quantize(w, 9, 4), "bits must be from 2 to 8"),
    (lambda w: affine_quantize(w, 8, 0), "group_size must be at least 1"),
    (lambda w: affine_quantize(w, 8, 4, strict=True), "group_size 4 must divide"),
    (lambda w: affine_quantize(w, 8, 4, zero_in_range=False), "must divide"),
    (lambda w: blockwise_quantize(w, dynamic_map(True), 0), "block must be at least 1"),
    (lambda w: blockwise_quantize(w, np.zeros((2, 2)), 4), "map must be one axis"),
    (lambda w: blockwise_quantize(w, np.zeros(257), 4), "map must be one axis"),
    (lambda w: dynamic_map(True, 9), "bits must be from 2 to 8"),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.ones(6))
