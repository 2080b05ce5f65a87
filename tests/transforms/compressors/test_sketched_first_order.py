"""Sketches against explicit matrices, their moments, and the federated round."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlab.transforms.compressors import (
  DPNoise,
  SketchedState,
  compressed,
  desketch,
  desketch_tree,
  make_sketch,
  message_bytes,
  sketch,
  sketch_tree,
  sketched_first_order,
  sketched_fl_round,
)
from gradlab.transforms.compressors import _sketches as sketches
from tests.oracles import sketched_first_order as oracle

KINDS = ("gaussian", "srht", "ams", "countsketch")
SEEDS = st.integers(0, 2**31 - 1)


def _normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _matrix(sk) -> np.ndarray:
  """R, column by column."""
  return np.asarray(sketch(sk, jnp.eye(sk.d))).T


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _matrices(kind, key, d, s):
  sk = make_sketch(kind, key, d, s)
  return sketch(sk, jnp.eye(d)).T, desketch(sk, jnp.eye(s))


@functools.partial(jax.jit, static_argnums=0)
def _through(kind, key, g, m):
  sk = make_sketch(kind, key, g.shape[-1], m.shape[-1])
  return sketch(sk, g), desketch(sk, m), desketch(sk, 0 * m)


def test_worked_countsketch():
  sk = make_sketch("countsketch", 0, 4, 2)
  sk = type(sk)(
    None, jnp.array([1, 1, -1, 1], jnp.int8), jnp.array([0, 1, 0, 1]), sk.kind, 4, 2
  )
  message = sketch(sk, jnp.array([1.0, 2.0, 3.0, 4.0]))
  assert message.tolist() == [-2.0, 6.0]
  assert desketch(sk, message).tolist() == [-2.0, 6.0, 2.0, 6.0]


def test_worked_srht():
  sk = make_sketch("srht", 0, 2, 2)
  sk = type(sk)(None, jnp.array([1, -1], jnp.int8), jnp.array([0, 1]), sk.kind, 2, 2)
  half = np.sqrt(0.5)
  # One float32 division by sqrt 2.
  np.testing.assert_allclose(_matrix(sk), [[half, -half], [half, half]], rtol=1e-6)
  out = desketch(sk, sketch(sk, jnp.array([3.0, 1.0])))
  np.testing.assert_allclose(out, [3.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize(("d", "s"), [(1, 1), (2, 1), (11, 5), (33, 64)])
def test_structured_sketches_match_their_matrices(d, s):
  g, m = _normal(d, 3, d), _normal(s, 3, s)
  srht = make_sketch("srht", d, d, s)
  counts = make_sketch("countsketch", d, d, s)
  assert len(set(srht.index.tolist())) == s
  for sk, matrix in [
    (srht, oracle.srht_matrix(srht.signs, srht.index)),
    (counts, oracle.countsketch_matrix(counts.signs, counts.index, s)),
  ]:
    assert set(sk.signs.tolist()) <= {-1, 1}
    assert sk.key is None
    # At most 64 float32 terms of order one.
    np.testing.assert_allclose(sketch(sk, jnp.asarray(g)), g @ matrix.T, atol=2e-5)
    np.testing.assert_allclose(desketch(sk, jnp.asarray(m)), m @ matrix, atol=2e-5)


@pytest.mark.parametrize("kind", ["gaussian", "ams"])
@pytest.mark.parametrize("block", [2**20, 24])
def test_dense_sketches_are_one_matrix_however_they_are_blocked(
  kind, block, monkeypatch
):
  monkeypatch.setattr(sketches, "_BLOCK", block)
  sketches._project.clear_cache()
  sketches._lift.clear_cache()
  sk = make_sketch(kind, 1, 8, 7)
  matrix = _matrix(sk)
  np.testing.assert_array_equal(desketch(sk, jnp.eye(7)), matrix)
  assert len(np.unique(matrix, axis=0)) == 7
  if kind == "ams":
    # One float32 division by sqrt s.
    np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(7), rtol=1e-6)
  g = _normal(0, 8)
  np.testing.assert_allclose(sketch(sk, jnp.asarray(g)), matrix @ g, atol=1e-5)


def test_gaussian_entries_have_variance_one_over_s():
  matrix = _matrix(make_sketch("gaussian", 0, 256, 64))
  # 16384 entries: the variance's standard error is sqrt(2 / 16384) = 1.1 %.
  assert abs(matrix.var() * 64 - 1) < 0.05
  assert abs(matrix.mean() * 8) < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_second_moment_over_keys(kind):
  d, s, draws = 16, 4, 4000
  g = jnp.asarray(_normal(3, d))
  keys = jax.random.split(jax.random.key(0), draws)

  @jax.jit
  @jax.vmap
  def estimate(key):
    sk = make_sketch(kind, key, d, s)
    return desketch(sk, sketch(sk, g))

  estimates = np.asarray(estimate(keys), np.float64)
  # Five standard errors of what was drawn.
  error = estimates.std(0) / np.sqrt(draws)
  assert np.all(np.abs(estimates.mean(0) - g) < 5 * error)
  ratios = (estimates**2).sum(1) / float(g @ g)
  error = max(ratios.std() / np.sqrt(draws), 1e-6)
  assert abs(ratios.mean() - oracle.second_moment(kind, d, s)) < 5 * error


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_adjoint_linear_and_in_the_row_space(kind, seed):
  matrix, transposed = _matrices(kind, seed, 6, 3)
  # R and its transpose are computed separately; they differ by rounding at most.
  np.testing.assert_allclose(transposed, matrix, atol=1e-6)
  g, m = _normal(seed, 2, 6), _normal(seed + 1, 3)
  batch = np.stack([g[0], g[1], g.mean(0), 0 * g[0], 4 * g[0]])
  messages, out, zero = _through(kind, seed, batch, m)
  # Adjoint pair and linearity: float32 sums of six numbers of order one.
  np.testing.assert_allclose(messages[0] @ m, g[0] @ out, atol=1e-4)
  np.testing.assert_allclose(messages[2], messages[:2].mean(0), rtol=1e-4, atol=1e-5)
  assert messages[3].tolist() == [0.0] * 3
  assert messages[4].tolist() == (4 * messages[0]).tolist()
  assert zero.tolist() == [0.0] * 6
  rows = np.asarray(matrix, np.float64)
  solution = np.linalg.lstsq(rows.T, out, rcond=1e-6)[0]
  np.testing.assert_allclose(rows.T @ solution, out, atol=1e-4)


@pytest.mark.parametrize("d", [1, 5, 16])
def test_srht_of_full_size_is_orthogonal(d):
  padded = 1 << (d - 1).bit_length()
  g = jnp.asarray(_normal(d, d))
  sk = make_sketch("srht", 5, d, padded)
  # Two float32 transforms of at most 16 numbers.
  np.testing.assert_allclose(desketch(sk, sketch(sk, g)), g, atol=1e-5)
  partial = _matrix(make_sketch("srht", 5, padded, max(1, padded // 2)))
  scale = padded / len(partial)
  np.testing.assert_allclose(
    partial @ partial.T, scale * np.eye(len(partial)), atol=1e-5
  )


def test_countsketch_with_distinct_buckets_is_exact():
  sk = make_sketch("countsketch", 0, 3, 8)
  sk = type(sk)(None, sk.signs, jnp.array([7, 0, 4]), sk.kind, 3, 8)
  g = jnp.array([1.5, -2.0, 0.25])
  assert desketch(sk, sketch(sk, g)).tolist() == g.tolist()


def test_a_sketch_is_small_and_a_pytree():
  for kind in KINDS:
    sk = jax.eval_shape(lambda kind=kind: make_sketch(kind, 0, 4096, 64))
    assert (sk.kind, sk.d, sk.s) == (kind, 4096, 64)
    assert message_bytes(sk) <= 5 * 4096
  keys = jax.random.split(jax.random.key(0), 3)
  many = jax.vmap(lambda key: make_sketch("srht", key, 8, 2))(keys)
  assert many.index.shape == (3, 2)


def test_bf16_is_summed_in_float32():
  sk = make_sketch("countsketch", 0, 4096, 1)
  signs = np.asarray(sk.signs, np.float64)
  message = sketch(sk, jnp.asarray(signs, jnp.bfloat16))
  # A sum of 4096 ones would stall at 256.
  assert message.dtype == jnp.float32
  assert message.tolist() == [4096.0]


@pytest.mark.parametrize("kind", ["gaussian", "ams", "srht"])
def test_a_non_finite_entry_spoils_a_dense_message(kind):
  g = jnp.ones(8).at[3].set(jnp.nan)
  assert np.isnan(sketch(make_sketch(kind, 0, 8, 3), g)).all()
  counts = sketch(make_sketch("countsketch", 0, 8, 3), g)
  assert np.isnan(counts).sum() == 1


def _params():
  return {
    "w": jnp.asarray(_normal(1, 4, 5)),
    "nested": (None, optax.MaskedNode(), jnp.asarray(_normal(2, 7), jnp.bfloat16)),
    "scalar": jnp.float32(2.0),
    "empty": jnp.zeros((0, 2)),
  }


@pytest.mark.parametrize("kind", ["gaussian", "srht"])
def test_leaf_scope_sketches_every_leaf_with_its_own_key(kind):
  tree = _params() | {"v": _params()["w"]}
  message = jax.jit(lambda tree: sketch_tree(kind, 0, tree, 0.2))(tree)
  assert jax.tree.structure(message) == jax.tree.structure(tree)
  assert {leaf.dtype for leaf in jax.tree.leaves(message)} == {jnp.dtype("float32")}
  assert message["w"].shape == (4,)
  assert message["nested"][2].shape == (1,)
  assert message["scalar"].tolist() == [2.0]
  assert message["empty"].shape == (0,)
  assert message["w"].tolist() != message["v"].tolist()
  out = desketch_tree(kind, 0, message, 0.2, tree)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), out)
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)
  alone = sketch_tree(kind, 0, {"w": tree["w"]}, 0.2)
  assert alone["w"].tolist() == message["w"].tolist()


def test_global_scope_sketches_the_flattened_tree():
  tree = _params()
  flat = np.concatenate(
    [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)]
  )
  message = sketch_tree("srht", 3, tree, 0.25, scope="global")
  sk = make_sketch("srht", jax.random.key(3), 28, 7)
  assert message.tolist() == sketch(sk, jnp.asarray(flat)).tolist()
  out = desketch_tree("srht", 3, message, 0.25, tree, scope="global")
  assert jax.tree.structure(out) == jax.tree.structure(tree)
  expected = desketch(sk, message)
  assert out["w"].ravel().tolist() == expected[8:].tolist()
  assert out["nested"][2].dtype == jnp.bfloat16


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_vectors_no_longer_than_s_and_empty_trees_travel_whole(scope):
  tree = _params()
  message = sketch_tree("srht", 0, tree, None, s=28, scope=scope)
  out = desketch_tree("srht", 0, message, None, tree, s=28, scope=scope)
  jax.tree.map(np.testing.assert_array_equal, out, tree)
  message = sketch_tree("ams", 0, {}, 0.5, scope=scope)
  assert message_bytes(message) == 0
  assert desketch_tree("ams", 0, message, 0.5, {}, scope=scope) == {}


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_compressor_draws_a_fresh_shared_projection_every_step(scope):
  g = {"a": jnp.asarray(_normal(0, 40)), "b": jnp.asarray(_normal(1, 3, 8))}
  compressor = sketched_first_order("countsketch", 0.25, 7, scope=scope)
  other = sketched_first_order("countsketch", 0.25, jax.random.key(7), scope=scope)
  state, remote, seen = compressor.init(g), other.init(g), []
  compress = jax.jit(compressor.compress)
  for t in range(3):
    key = jax.random.fold_in(jax.random.key(7), t)
    expected = sketch_tree("countsketch", key, g, 0.25, scope=scope)
    message, after = compress(g, state)
    jax.tree.map(np.testing.assert_array_equal, message, expected)
    received = other.decompress(message, remote, g)
    own = compressor.decompress(message, state, g)
    jax.tree.map(np.testing.assert_array_equal, received, own)
    seen.append(str(jax.tree.leaves(message)))
    _, remote = other.compress(g, remote)
    state = after
  assert len(set(seen)) == 3
  assert (int(state.count), state.count.dtype) == (3, jnp.int32)


def test_a_fixed_projection_must_be_requested():
  g = jnp.asarray(_normal(0, 32))
  compressor = sketched_first_order("ams", 0.25, 0, fresh=False)
  first, state = compressor.compress(g, compressor.init(g))
  second, _ = compressor.compress(g, state)
  assert first.tolist() == second.tolist()


def test_as_a_transformation_it_returns_the_projected_gradient():
  g = jnp.asarray(_normal(0, 32), jnp.bfloat16)
  transform = compressed(sketched_first_order("srht", 0.25, 0))
  update, state = jax.jit(transform.update), transform.init(g)
  for t in range(2):
    out, state = update(g, state)
    key = jax.random.fold_in(jax.random.key(0), t)
    message = sketch_tree("srht", key, g, 0.25)
    expected = desketch_tree("srht", key, message, 0.25, g)
    assert out.dtype == jnp.bfloat16
    # jit may round a bf16 result the other way.
    np.testing.assert_allclose(
      np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2**-7
    )


def test_bad_arguments():
  g = jnp.ones(8)
  with pytest.raises(ValueError, match=r"kind must be .*, got 'fourier'"):
    make_sketch("fourier", 0, 4, 2)
  with pytest.raises(ValueError, match=r"kind must be .*, got 'fourier'"):
    sketched_first_order("fourier")
  with pytest.raises(ValueError, match="sketch larger than the padded dimension"):
    make_sketch("srht", 0, 5, 9)
  with pytest.raises(ValueError, match=r"s must lie in \[1, inf"):
    make_sketch("ams", 0, 5, 0)
  with pytest.raises(ValueError, match=r"d must lie in \[1, inf"):
    make_sketch("ams", 0, 0, 1)
  with pytest.raises(ValueError, match=r"s must be a whole number, got 2.5"):
    sketched_first_order(s=2.5)
  with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\]"):
    sketched_first_order(ratio=1.5)
  with pytest.raises(ValueError, match="scope must be 'leaf' or 'global'"):
    sketched_first_order(scope="all")
  with pytest.raises(ValueError, match="ratio sets the message's shape"):
    jax.jit(lambda r: sketch_tree("ams", 0, g, r))(0.5)
  with pytest.raises(ValueError, match=r"last axis of g must have length d = 4"):
    sketch(make_sketch("ams", 0, 4, 2), g)
  with pytest.raises(ValueError, match=r"last axis of m must have length s = 2"):
    desketch(make_sketch("ams", 0, 4, 2), g)
  with pytest.raises(ValueError, match=r"must have shape \(8,\), got \(3,\)"):
    desketch_tree("ams", 0, jnp.ones(3), 1.0, g)
  with pytest.raises(ValueError, match=r"floating-point .* is int32"):
    sketch_tree("ams", 0, jnp.ones(3, jnp.int32), 1.0)
  state = SketchedState(jnp.int32(0), jax.random.key(0))
  with pytest.raises(ValueError, match="local_steps must lie in"):
    sketched_fl_round(g, g, lambda w, x: x, state, 0, 0.1, 0.1)
  for noise, name in [
    (DPNoise(0.0, 1.0, 0), "clip_norm"),
    (DPNoise(1.0, -1.0, 0), "n"),
  ]:
    with pytest.raises(ValueError, match=f"^{name}.* must lie in"):
      sketched_fl_round(g, g, lambda w, x: x, state, 1, 0.1, 0.1, noise)


CLIENTS, BATCH, SIZE = 3, 4, 8


def _least_squares(w, batch):
  inputs, targets = batch
  return 0.5 * jnp.mean((inputs @ w - targets) ** 2)


def _client_data(seed: int, *lead: int) -> tuple[np.ndarray, np.ndarray]:
  return _normal(seed, *lead, BATCH, SIZE), _normal(seed + 1, *lead, BATCH)


def _per_example(w: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
  x = inputs.astype(np.float64)
  return (x @ w - targets)[:, None] * x


def _round_matrix(kind: str, t: int, s: int) -> np.ndarray:
  if s == SIZE:
    return np.eye(SIZE)
  key = jax.random.fold_in(jax.random.key(5), t)
  columns = jax.jit(jax.vmap(lambda g: sketch_tree(kind, key, g, None, s=s)))
  return np.asarray(columns(jnp.eye(SIZE)), np.float64).T


@pytest.mark.parametrize(
  ("kind", "s", "local_steps"),
  [("srht", 3, 1), ("srht", 8, 4), ("countsketch", 4, 3), ("gaussian", 2, 2)],
)
def test_round_matches_the_oracle(kind, s, local_steps):
  data = _client_data(0, CLIENTS)
  gradients = [
    lambda u, c=c: _per_example(u, data[0][c], data[1][c]).mean(0)
    for c in range(CLIENTS)
  ]
  w = jnp.asarray(_normal(9, SIZE))
  expected = np.asarray(w, np.float64)
  state = sketched_first_order(kind, None, 5, s=s).init(w)
  step = jax.jit(
    lambda w, state, rate: sketched_fl_round(
      w, data, _least_squares, state, local_steps, 0.1, rate, kind=kind, ratio=None, s=s
    )
  )
  for t in range(3):
    w, state = step(w, state, 0.5)
    matrix = _round_matrix(kind, t, s)
    expected = oracle.fl_round(expected, gradients, matrix, local_steps, 0.1, 0.5)
    # Three rounds of float32 against float64.
    np.testing.assert_allclose(w, expected, rtol=1e-4, atol=1e-5)
  assert int(state.count) == 3


def test_own_batches_for_every_local_step():
  data = _client_data(4, CLIENTS, 2)
  w = jnp.asarray(_normal(9, SIZE))
  state = sketched_first_order().init(w)
  out, _ = jax.jit(
    lambda w: sketched_fl_round(
      w, data, _least_squares, state, 2, 0.1, 1.0, ratio=1.0, per_step_batches=True
    )
  )(w)
  moves = []
  for c in range(CLIENTS):
    u = np.asarray(w, np.float64)
    for k in range(2):
      u = u - 0.1 * _per_example(u, data[0][c, k], data[1][c, k]).mean(0)
    moves.append(u)
  # ratio 1 is local SGD averaging; float32 against float64.
  np.testing.assert_allclose(out, np.mean(moves, 0), rtol=1e-5, atol=1e-5)


def test_clipping_without_noise_matches_the_oracle():
  data = _client_data(2, CLIENTS)
  w = jnp.asarray(_normal(9, SIZE))
  state = sketched_first_order("srht", None, 5, s=3).init(w)
  gradients = [
    lambda u, c=c: oracle.clipped_mean(_per_example(u, data[0][c], data[1][c]), 1.5)
    for c in range(CLIENTS)
  ]
  out, _ = jax.jit(
    lambda noise: sketched_fl_round(
      w, data, _least_squares, state, 3, 0.1, 0.5, noise, ratio=None, s=3
    )
  )(DPNoise(1.5, 0.0, jax.random.key(1)))
  expected = oracle.fl_round(w, gradients, _round_matrix("srht", 0, 3), 3, 0.1, 0.5)
  # float32 against float64.
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_noise_has_the_stated_size_and_is_private_to_client_and_round():
  w = jnp.zeros((100, 100))
  batches = jnp.zeros((2, BATCH))
  flat_loss = lambda w, x: jnp.sum(0.0 * w) + jnp.sum(0.0 * x)  # noqa: E731

  @jax.jit
  def moved(count, clients, multiplier):
    state = SketchedState(count, jax.random.key(0))
    noise = DPNoise(2.0, multiplier, 7)
    out, _ = sketched_fl_round(
      w, clients, flat_loss, state, 3, 0.1, 1.0, noise, ratio=1.0
    )
    return out

  both = np.asarray(moved(jnp.int32(0), batches, 1.5))
  # lr sigma C / B per step, over 3 steps and 2 clients; 10000 entries give 0.7 %.
  expected = 0.1 * 1.5 * 2.0 / BATCH * np.sqrt(3 / 2)
  assert abs(both.std() / expected - 1) < 0.04
  assert abs(both.mean()) < 5 * expected / 100
  later = np.asarray(moved(jnp.int32(1), batches, 1.5))
  assert abs(np.corrcoef(both.ravel(), later.ravel())[0, 1]) < 0.05
  first = np.asarray(moved(jnp.int32(0), batches[:1], 1.5))
  assert abs(np.corrcoef(first.ravel(), (2 * both - first).ravel())[0, 1]) < 0.05


def test_rounds_converge_to_the_optimum_that_all_clients_share():
  inputs, _ = _client_data(6, 4 * CLIENTS)
  optimum = _normal(8, SIZE)
  data = (inputs, inputs @ optimum)

  @jax.jit
  def run(w):
    def step(carry, _):
      return sketched_fl_round(
        carry[0], data, _least_squares, carry[1], 2, 0.1, 0.25, ratio=0.25
      ), None

    start = (w, sketched_first_order(ratio=0.25).init(w))
    return jax.lax.scan(step, start, length=800)[0][0]

  # An interpolated problem: the noise of the sketch vanishes with the gradient.
  np.testing.assert_allclose(run(jnp.zeros(SIZE)), optimum, atol=1e-3)


def test_round_keeps_dtypes_and_trees_and_takes_traced_rates():
  params = {"w": jnp.ones(SIZE, jnp.bfloat16), "b": (jnp.float32(0.0), None)}
  batches = jnp.asarray(_normal(0, CLIENTS, BATCH, SIZE))

  def loss_fn(params, x):
    w = params["w"].astype(jnp.float32)
    return jnp.mean((x @ w + params["b"][0]) ** 2)

  state = sketched_first_order().init(params)
  rates = jnp.array([0.1, 0.2])
  round_ = lambda lr, noise: sketched_fl_round(  # noqa: E731
    params, batches, loss_fn, state, 2, lr, lr, DPNoise(1.0, noise, 3)
  )
  out, after = jax.jit(jax.vmap(round_))(rates, rates)
  assert jax.tree.structure(out) == jax.tree.structure(params)
  assert out["w"].dtype == jnp.bfloat16
  assert out["b"][0].dtype == jnp.float32
  assert after.count.tolist() == [1, 1]
  one, _ = jax.jit(round_)(0.2, 0.2)
  # vmap may order float32 sums differently.
  np.testing.assert_allclose(out["b"][0][1], one["b"][0], rtol=1e-5)
