"""``reloop2``: an error memory and its sketch against lists and dictionaries."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.transforms.scores import (
  compensate,
  error_memory_init,
  error_memory_read,
  error_memory_write,
  error_sketch_init,
  error_sketch_read,
  error_sketch_write,
  reloop2,
)
from tests.oracles import reloop2 as oracle

quick = hypothesis.settings(max_examples=20, deadline=None)
values = st.floats(-4, 4, width=32).map(lambda x: 0.0 if abs(x) < 0.05 else x)
features = hnp.arrays(np.float32, (6, 3), elements=values)
# XLA flushes subnormal numbers to zero
errors = hnp.arrays(
  np.float32, 6, elements=st.floats(-1, 1, width=32, allow_subnormal=False)
)
write = jax.jit(error_memory_write)
read = jax.jit(error_memory_read, static_argnames="k")
write_sketch, read_sketch = jax.jit(error_sketch_write), jax.jit(error_sketch_read)
log_read = jax.jit(reloop2, static_argnames=("capacity", "k"))
KEYS = np.float32([[1, 0], [0.6, 0.8], [0, 1]])
ERRORS = np.float32([0.5, -0.2, 0.3])
QUERY = np.float32([[0.8, 0.6]])
ULP = 1e-6  # a few roundings of float32


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(capacity=8, rows=6, dim=3, seed=0):
  mem = error_memory_init(capacity, dim)
  z, e = noise(rows, dim, seed=seed), np.tanh(noise(rows, seed=seed + 100))
  return write(mem, z, e), z, e


def test_worked_example():
  mem = write(error_memory_init(3, 2), KEYS, ERRORS)
  err = read(mem, QUERY, k=2, temperature=0.1)
  # The numbers are printed to eight decimals; exp((0.96 - 0.8) / 0.1) magnifies.
  np.testing.assert_allclose(err, [-0.08241287], atol=1e-6)
  p = compensate(jnp.float32([0.3]), err, scale=0.5)
  np.testing.assert_allclose(p, [0.25879357], atol=1e-6)
  np.testing.assert_array_equal(
    log_read(KEYS, ERRORS, QUERY, capacity=3, k=2), read(mem, QUERY, k=2)
  )


@pytest.mark.parametrize("capacity", [1, 5, 40])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (4, 0.5)])
def test_a_stream_of_blocks_follows_the_oracle(capacity, k, temperature):
  """Reads before every write, blocks smaller and larger than the ring."""
  k = min(k, capacity)
  mem, theirs = error_memory_init(capacity, 4), oracle.Memory(capacity)
  for seed, rows in enumerate((3, 7, 0, 12, 1)):
    queries = noise(5, 4, seed=50 + seed)
    err = read(mem, queries, k=k, temperature=temperature)
    # Similarities in float32, divided by the temperature.
    expected = theirs.read(queries, k, temperature)
    np.testing.assert_allclose(err, expected, rtol=1e-4, atol=5e-6)
    z, e = 3 * noise(rows, 4, seed=seed), noise(rows, seed=20 + seed)
    mem = write(mem, z, e)
    theirs.write(z, e)
    assert mem.pointer == theirs.pointer
    assert mem.size == sum(slot is not None for slot in theirs.slots)
  for key, error, slot in zip(mem.keys, mem.errors, theirs.slots, strict=True):
    if slot is not None:
      np.testing.assert_allclose(key, slot[0], rtol=ULP, atol=1e-7)
      assert error == np.float32(slot[1])


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_a_stream_into_the_sketch_follows_the_oracle(decay):
  sk = error_sketch_init(0, num_tables=5, num_bits=3, feature_dim=4)
  theirs = oracle.Sketch(sk.projections)
  for seed, rows in enumerate((6, 1, 0, 9)):
    z, e = noise(rows, 4, seed=seed), noise(rows, seed=20 + seed)
    sk = write_sketch(sk, z, e, decay=decay)
    if rows:
      theirs.write(z, e, decay)
    queries = noise(7, 4, seed=50 + seed)
    # float32 sums of a few errors.
    np.testing.assert_allclose(
      read_sketch(sk, queries), theirs.read(queries), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(jnp.sum(sk.count, axis=1), sk.count.sum(1)[0])
    assert sk.total.shape == sk.count.shape == (5, 8)
  for table, ours in zip(theirs.tables, sk.count, strict=True):
    for bucket, (_, count) in table.items():
      assert ours[bucket] == np.float32(count)


def test_many_tables_are_kernel_regression():
  z, e, queries = noise(5, 3), noise(5, seed=1), noise(4, 3, seed=2)
  sk = error_sketch_init(0, num_tables=4000, num_bits=3, feature_dim=3)
  err = read_sketch(write_sketch(sk, z, e), queries)
  expected = oracle.kernel_regression(z, e, queries, num_bits=3)
  # A mean over 4000 tables: standard errors of about 0.01.
  np.testing.assert_allclose(err, expected, atol=0.05)


def test_nothing_stored_or_no_scale_changes_nothing():
  p = jnp.linspace(0.0, 1.0, 7)
  queries = noise(7, 3)
  for err in (
    read(error_memory_init(4, 3), queries, k=2),
    read_sketch(error_sketch_init(0, 2, 3, 3), queries),
  ):
    np.testing.assert_array_equal(err, np.zeros(7))
    np.testing.assert_array_equal(compensate(p, err), p)
  np.testing.assert_array_equal(compensate(p, noise(7), scale=0.0), p)


@quick
@hypothesis.given(features, errors, features, st.floats(0.015625, 8, width=32))
def test_estimates_lie_between_the_stored_errors(z, e, queries, temperature):
  mem = write(error_memory_init(6, 3), z, e)
  sk = write_sketch(error_sketch_init(0, 4, 2, 3), z, e)
  empty = np.asarray(read_sketch(sk._replace(total=sk.count), queries)) == 0
  for err, free in (
    (read(mem, queries, k=4, temperature=temperature), False),
    (read_sketch(sk, queries), empty),
  ):
    inside = (np.asarray(err) >= e.min() - ULP) & (np.asarray(err) <= e.max() + ULP)
    assert (inside | free).all()
  constant = write(mem, z, np.full(6, e[0]))
  err = read(constant, queries, k=4, temperature=temperature)
  np.testing.assert_allclose(err, np.full(6, e[0]), rtol=ULP)


@quick
@hypothesis.given(features, errors, st.floats(2**-60, 2**60, width=32))
def test_features_count_by_their_direction(z, e, scale):
  scale = np.float32(2.0 ** np.round(np.log2(scale)))  # exact, so that ties stay ties
  mem, other = (write(error_memory_init(6, 3), rows, e) for rows in (z, scale * z))
  np.testing.assert_array_equal(mem.keys, other.keys)
  queries = z[::-1] + np.float32(0.5)
  np.testing.assert_array_equal(
    read(mem, queries, k=3, temperature=0.1),
    read(other, scale * queries, k=3, temperature=0.1),
  )
  sk = error_sketch_init(0, 4, 2, 3)
  sketches = [write_sketch(sk, rows, e) for rows in (z, scale * z)]
  jax.tree.map(np.testing.assert_array_equal, *sketches)


@quick
@hypothesis.given(features, errors, st.permutations(range(6)))
def test_order_of_writing_does_not_matter(z, e, order):
  queries = z + np.float32([0.3, -0.2, 0.1])
  turned = z[order], e[order]
  one, other = (
    write_sketch(error_sketch_init(0, 4, 2, 3), *rows) for rows in ((z, e), turned)
  )
  np.testing.assert_array_equal(one.count, other.count)
  np.testing.assert_allclose(one.total, other.total, atol=ULP)
  # All stored and all read: ties cannot matter, only the order of a sum.
  mem, shuffled = (write(error_memory_init(6, 3), *rows) for rows in ((z, e), turned))
  np.testing.assert_allclose(
    read(mem, queries, k=6, temperature=0.5),
    read(shuffled, queries, k=6, temperature=0.5),
    atol=ULP,
  )


def test_nearest_entry_alone_is_exact():
  mem, z, e = filled()
  np.testing.assert_array_equal(read(mem, z, k=1), e)
  np.testing.assert_array_equal(read(mem, mem.keys[:6], k=1), e)


def test_infinite_temperature_is_the_plain_mean():
  mem, _, _ = filled()
  query = noise(1, 3, seed=7)
  nearest = np.argsort(-np.asarray(mem.keys[:6] @ oracle.unit(query[0])))[:3]
  for temperature in (np.inf, 1e6):
    err = read(mem, query, k=3, temperature=temperature)
    np.testing.assert_allclose(err, [np.mean(mem.errors[nearest])], rtol=1e-5)


def test_ties_go_to_the_lowest_slot():
  same = np.ones((3, 2), np.float32)
  mem = write(error_memory_init(4, 2), same, ERRORS)
  assert read(mem, same[:1], k=1) == ERRORS[0]
  np.testing.assert_allclose(read(mem, same[:1], k=2), [0.15], rtol=1e-5)


def test_more_neighbours_than_entries_read_what_there_is():
  mem, z, _ = filled(capacity=12, rows=2)
  np.testing.assert_array_equal(read(mem, z, k=12), read(mem, z, k=2))


def test_what_is_overwritten_has_no_influence():
  old, _, _ = filled(capacity=5, rows=5, seed=1)
  fresh = error_memory_init(5, 3)
  z, e, queries = noise(5, 3, seed=3), noise(5, seed=4), noise(6, 3, seed=5)
  expected = read(write(fresh, z, e), queries, k=3)
  np.testing.assert_array_equal(read(write(old, z, e), queries, k=3), expected)
  long = np.concatenate([noise(9, 3, seed=6), z]), np.concatenate([noise(9), e])
  # One batch larger than the ring: the last five, in shifted slots.
  np.testing.assert_allclose(read(write(old, *long), queries, k=3), expected, rtol=ULP)
  one_by_one = old
  for row, error in zip(*long, strict=True):
    one_by_one = write(one_by_one, row[None], error[None])
  jax.tree.map(np.testing.assert_array_equal, write(old, *long), one_by_one)


def test_rows_that_are_not_finite_take_no_slot():
  z, e = noise(6, 3), noise(6, seed=1)
  z[1, 2], z[2, 0], e[4] = np.nan, np.inf, np.nan
  good = np.array([0, 3, 5])
  start, _, _ = filled(capacity=4, rows=3)
  jax.tree.map(
    np.testing.assert_array_equal, write(start, z, e), write(start, z[good], e[good])
  )
  sk = error_sketch_init(0, 3, 2, 3)
  jax.tree.map(
    np.testing.assert_array_equal,
    write_sketch(sk, z, e),
    write_sketch(sk, z[good], e[good]),
  )
  mem = write(start, np.full((2, 3), np.nan, np.float32), e[:2])
  jax.tree.map(np.testing.assert_array_equal, mem, start)


def test_queries_that_are_not_finite_read_zero():
  mem, z, e = filled()
  queries = np.float32([[np.nan, 1, 0], [np.inf, 0, 0], z[2]])
  np.testing.assert_array_equal(read(mem, queries, k=1), [0, 0, e[2]])
  sk = write_sketch(error_sketch_init(0, 3, 2, 3), z[2:3], e[2:3])
  np.testing.assert_allclose(read_sketch(sk, queries), [0, 0, e[2]], rtol=ULP)


def test_zero_features_are_valid():
  mem, z, e = filled(capacity=6)
  zero = np.zeros((1, 3), np.float32)
  np.testing.assert_allclose(read(mem, zero, k=6), [e.mean()], rtol=1e-5)
  stored = write(mem, zero, ERRORS[:1])
  np.testing.assert_array_equal(stored.keys[0], 0)
  assert jnp.isfinite(read(stored, z, k=3)).all()
  sk = write_sketch(error_sketch_init(0, 3, 2, 3), zero, ERRORS[:1])
  np.testing.assert_array_equal(sk.count[:, 0], 1)


def test_no_rows_change_nothing():
  mem, _, _ = filled()
  none = np.zeros((0, 3), np.float32), np.zeros(0, np.float32)
  jax.tree.map(np.testing.assert_array_equal, write(mem, *none), mem)
  assert read(mem, none[0], k=2).shape == (0,)
  sk = write_sketch(error_sketch_init(0, 3, 2, 3), noise(4, 3), noise(4))
  jax.tree.map(
    np.testing.assert_array_equal, write_sketch(sk, *none, decay=jnp.float32(0.5)), sk
  )


def test_extreme_features_keep_their_direction():
  z = np.float32([[3e37, 4e37], [3e-37, 4e-37], [1e30, 1e-30]])
  mem = write(error_memory_init(3, 2), z, ERRORS)
  np.testing.assert_allclose(mem.keys, [[0.6, 0.8], [0.6, 0.8], [1, 0]], rtol=ULP)


def test_no_gradient_flows():
  z, e, queries = (jnp.asarray(noise(*s)) for s in ((6, 3), (6,), (4, 3)))

  def exact(z, e, queries):
    return jnp.sum(reloop2(z, e, queries, capacity=6, k=3))

  def sketched(z, e, queries):
    sk = error_sketch_write(error_sketch_init(0, 3, 2, 3), z, e)
    return jnp.sum(error_sketch_read(sk, queries))

  for function in (exact, sketched):
    for grad in jax.jit(jax.grad(function, argnums=(0, 1, 2)))(z, e, queries):
      np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_compensate_clips_and_regression_does_not():
  p, err = jnp.float32([0.1, 0.9, 0.5]), jnp.float32([-0.4, 0.4, 0.25])
  np.testing.assert_allclose(compensate(p, err), [0, 1, 0.75], rtol=ULP)
  np.testing.assert_allclose(
    compensate(p, err, 0.5, 0.01, 0.99), [0.01, 0.99, 0.625], rtol=ULP
  )
  free = compensate(10 * p, err, low=-np.inf, high=np.inf)
  np.testing.assert_allclose(free, [0.6, 9.4, 5.25], rtol=ULP)
  half = compensate(p.astype(jnp.bfloat16), err, jnp.float32(0.5))
  assert half.dtype == jnp.bfloat16


def test_bfloat16_is_compared_in_float32():
  z, queries = (jnp.asarray(noise(n, 3, seed=n), jnp.bfloat16) for n in (6, 4))
  e = jnp.asarray(noise(6), jnp.bfloat16)
  err = log_read(z, e, queries, capacity=6, k=2)
  wide = (x.astype(jnp.float32) for x in (z, e, queries))
  assert err.dtype == jnp.float32
  np.testing.assert_array_equal(err, log_read(*wide, capacity=6, k=2))
  mem = error_memory_init(6, 3, jnp.bfloat16)
  assert (mem.keys.dtype, mem.errors.dtype) == (jnp.bfloat16, jnp.float32)
  stored = write(mem, z, e)
  assert stored.keys.dtype == jnp.bfloat16
  # Keys of eight bits: cosines to 2**-8, seen through the temperature.
  np.testing.assert_allclose(read(stored, queries, k=2), err, atol=0.1)


def test_float64_is_exact_to_float64():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    z, e, queries = rng.normal(size=(9, 4)), rng.normal(size=9), rng.normal(size=(5, 4))
    theirs = oracle.Memory(6)
    theirs.write(z, e)
    err = log_read(z, e, queries, capacity=6, k=3)
    assert err.dtype == jnp.float64
    np.testing.assert_allclose(err, theirs.read(queries, 3, 0.1), rtol=1e-12)
    sk = error_sketch_init(0, 3, 2, 4, jnp.float64)
    sk = write_sketch(write_sketch(sk, z, e), z, e, decay=0.3)
    pair = oracle.Sketch(sk.projections)
    pair.write(z, e)
    pair.write(z, e, 0.3)
    np.testing.assert_allclose(read_sketch(sk, queries), pair.read(queries), rtol=1e-12)


def test_states_are_scan_carries_and_floats_may_be_traced():
  z, e = noise(4, 3, 3), noise(4, 3, seed=1)
  mem, sk = error_memory_init(5, 3), error_sketch_init(0, 3, 2, 3)

  @jax.jit
  def stream(temperature, decay, scale):
    def block(carry, rows):
      mem, sk = carry
      exact = error_memory_read(mem, rows[0], 2, temperature)
      rough = error_sketch_read(sk, rows[0])
      p = compensate(jnp.full(3, 0.5), exact + rough, scale, 0.0, scale + 0.5)
      sk = error_sketch_write(sk, *rows, decay)
      return (error_memory_write(mem, *rows), sk), p

    return jax.lax.scan(block, (mem, sk), (jnp.asarray(z), jnp.asarray(e)))[1]

  arms = np.float32([[0.1, 1.0, 1.0], [0.2, 0.5, 0.25]])
  swept = jax.vmap(stream)(*arms.T)
  for row, arm in zip(swept, arms, strict=True):
    np.testing.assert_allclose(row, stream(*arm), rtol=1e-5, atol=1e-6)
  assert not np.allclose(swept[0], swept[1])


def test_bad_arguments():
  mem, z, e = filled(capacity=8)
  for k in (0, 9):
    with pytest.raises(ValueError, match="k must lie in"):
      error_memory_read(mem, z, k)
  for temperature in (0.0, -1.0):
    with pytest.raises(ValueError, match="temperature must lie in"):
      error_memory_read(mem, z, 2, temperature)
  with pytest.raises(ValueError, match="capacity must lie in"):
    error_memory_init(0, 3)
  with pytest.raises(ValueError, match="feature_dim must lie in"):
    error_memory_init(3, 0)
  with pytest.raises(ValueError, match="dtype must be floating"):
    error_memory_init(3, 3, jnp.int32)
  with pytest.raises(ValueError, match=r"features must be \[n, 3\]"):
    error_memory_write(mem, z[:, :2], e)
  with pytest.raises(ValueError, match="one per feature row"):
    error_memory_write(mem, z, e[:2])
  with pytest.raises(ValueError, match=r"features must be \[n, d\]"):
    reloop2(z[0], e, z)
  with pytest.raises(ValueError, match="num_bits must lie in"):
    error_sketch_init(0, 1, 25, 3)
  with pytest.raises(ValueError, match="num_tables must lie in"):
    error_sketch_init(0, 0, 2, 3)
  with pytest.raises(ValueError, match="decay must lie in"):
    error_sketch_write(error_sketch_init(0, 1, 2, 3), z, e, 1.5)
  with pytest.raises(ValueError, match="err must have shape"):
    compensate(e, e[:2])
  with pytest.raises(ValueError, match="low must not exceed high"):
    compensate(e, e, low=1.0, high=0.0)
