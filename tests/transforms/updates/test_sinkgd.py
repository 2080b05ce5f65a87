import functools

import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from gradlab.transforms.updates import (
  col_l2,
  frobenius,
  multi_normalize,
  row_l2,
  scale_by_multi_norm,
  scale_by_sinkgd,
  scale_by_swan,
  sign,
  sinkgd,
  spectral,
  sr_sinkhorn,
)
from tests.oracles import sinkgd as oracle
from tests.transforms.updates.trajectories import noise

G = np.array([[3.0, 4.0], [1.0, -2.0]], np.float32)
# float32 sums and roots against float64, ten of them in a row.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
quick = hypothesis.settings(max_examples=20, deadline=None)
# Entries well away from zero: dense matrices balance at the rate of their spread.
entries = st.floats(0.125, 4, width=32).flatmap(lambda x: st.sampled_from([x, -x]))
dense = hnp.arrays(np.float32, (3, 4), elements=entries)
positive = st.floats(2**-10, 2**10, width=32)
sinkhorn = jax.jit(sr_sinkhorn, static_argnums=1)


def apply(transform, g):
  return jax.jit(transform.update)(g, transform.init(g))[0]


@pytest.mark.parametrize(
  ("num_iters", "expected"),
  [
    (1, [[1.13389342, 0.94280904], [0.84515425, -1.05409255]]),
    (2, [[1.09703618, 0.89637796], [0.89247500, -1.09384942]]),
    (40, [[1.09544512, 0.89442719], [0.89442719, -1.09544512]]),
  ],
)
def test_worked_example(num_iters, expected):
  # Numbers near one after a few float32 roundings each.
  np.testing.assert_allclose(sinkhorn(G, num_iters), expected, rtol=5e-7)
  np.testing.assert_allclose(oracle.sr_sinkhorn(G, num_iters), expected, rtol=1e-8)


def test_worked_swan():
  expected = [[1.08576491, 0.90615372], [0.90615372, -1.08576491]]
  np.testing.assert_allclose(apply(scale_by_swan(), G), expected, rtol=1e-6)
  np.testing.assert_allclose(oracle.swan(G), expected, rtol=1e-8)


@pytest.mark.parametrize("num_iters", [1, 5, 9])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 4), (7, 3), (3, 20)])
def test_follows_the_oracle(shape, num_iters):
  g = noise(*shape)
  np.testing.assert_allclose(
    sinkhorn(g, num_iters), oracle.sr_sinkhorn(g, num_iters), **CLOSE
  )


@pytest.mark.parametrize("eps", [0.5, 3.0, 1e-3])
def test_eps_floors_every_norm(eps):
  g = noise(4, 6) * np.array([[1e-4], [1e-2], [1], [10]], np.float32)
  np.testing.assert_allclose(
    sr_sinkhorn(g, 3, eps), oracle.sr_sinkhorn(g, 3, eps), **CLOSE
  )


@quick
@hypothesis.given(dense)
def test_columns_are_balanced_and_squares_are_sinkhorn_knopp(g):
  m, n = g.shape
  x = np.asarray(sinkhorn(g, 5))
  np.testing.assert_allclose(np.linalg.norm(x, axis=0), np.sqrt(m), rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(x), np.sqrt(m * n), rtol=1e-5)
  knopp = oracle.sinkhorn_knopp(g.astype(np.float64) ** 2, 5, n, m)
  np.testing.assert_allclose(x**2, knopp, rtol=1e-4)
  limit = np.asarray(sinkhorn(g, 400))
  np.testing.assert_allclose(np.linalg.norm(limit, axis=1), np.sqrt(n), rtol=1e-4)


@quick
@hypothesis.given(
  dense,
  hnp.arrays(np.float32, (3, 1), elements=positive),
  hnp.arrays(np.float32, (1, 4), elements=positive),
)
def test_diagonal_scaling_is_forgotten(g, left, right):
  # Scaling from the left by the first pass, from both sides in the limit; tolerances
  # are the roundings of the scaled entries, carried through the passes.
  np.testing.assert_allclose(sinkhorn(left * g, 5), sinkhorn(g, 5), rtol=1e-4)
  both = sinkhorn(left * g * right, 400)
  np.testing.assert_allclose(both, sinkhorn(g, 400), rtol=1e-3)


def test_any_float32_scale():
  g = noise(4, 5)
  expected = np.asarray(sinkhorn(g, 5))
  for scale in (1e-28, 1e-20, 1e20, 1e37):
    x = sinkhorn(np.float32(scale) * g, 5)
    np.testing.assert_allclose(x, expected, rtol=1e-5)
  rows = np.array([[1e-14], [1], [1e14], [1e-6]], np.float32)
  np.testing.assert_allclose(sinkhorn(rows * g, 5), expected, rtol=1e-5)
  columns = np.array([[1e-25, 1, 1e-15, 1, 1e-28]], np.float32)
  scaled = (columns * g).astype(np.float32)
  np.testing.assert_allclose(
    sinkhorn(scaled, 5), oracle.sr_sinkhorn(scaled, 5), rtol=1e-4
  )
  # A row of no more than 1e-38 of the rest is lost, the others are not.
  rows = np.array([[1e-25], [1e13], [1e25], [1e13]], np.float32)
  x = np.asarray(sinkhorn(rows * g, 5))
  np.testing.assert_allclose(
    x[1:], oracle.sr_sinkhorn(np.array([[0], [1], [1], [1]]) * g, 5)[1:], rtol=1e-5
  )
  assert np.abs(x[0]).max() < 1e-10


sparse = hnp.arrays(
  np.float32, (4, 3), elements=st.one_of(st.just(np.float32(0)), entries)
)


@quick
@hypothesis.given(sparse)
def test_signs_and_zeros_are_kept(g):
  x = np.asarray(sinkhorn(g, 5))
  np.testing.assert_array_equal(np.sign(x), np.sign(g))
  norms = np.linalg.norm(x, axis=0)
  np.testing.assert_allclose(norms[g.any(0)], 2.0, rtol=1e-5)  # sqrt(m)
  assert (g * x).sum() > 0 or not g.any()


@quick
@hypothesis.given(dense, st.permutations(range(3)), st.permutations(range(4)))
def test_odd_and_permutation_equivariant(g, rows, columns):
  x = np.asarray(sinkhorn(g, 5))
  np.testing.assert_array_equal(sinkhorn(-g, 5), -x)
  permuted = sinkhorn(g[rows][:, columns], 5)
  np.testing.assert_allclose(permuted, x[rows][:, columns], rtol=1e-5)


@quick
@hypothesis.given(hnp.arrays(np.float32, (3, 3), elements=entries))
def test_transposes_in_the_limit(g):
  np.testing.assert_allclose(sinkhorn(g.T, 400), sinkhorn(g, 400).T, rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_vectors_become_signs(shape):
  g = noise(*shape)
  g[0, 2:3] = 0  # a zero leaves the other columns alone, not the other rows
  np.testing.assert_allclose(sinkhorn(g, 2), np.sign(g), rtol=1e-6)


def test_hadamard_is_a_fixed_point():
  h = np.array([[1, 1], [1, -1]], np.float32)
  h = np.kron(h, h)
  np.testing.assert_allclose(sinkhorn(h, 5), h, rtol=1e-6)


def test_zeros_triangles_and_nan():
  np.testing.assert_array_equal(sinkhorn(np.zeros((3, 4), np.float32), 5), 0)
  g = noise(4, 4)
  g[1] = 0
  g[:, 2] = 0
  x = np.asarray(sinkhorn(g, 50))
  np.testing.assert_array_equal(x[1], 0)
  np.testing.assert_array_equal(x[:, 2], 0)
  np.testing.assert_allclose(x, oracle.sr_sinkhorn(g, 50), **CLOSE)
  triangle = np.tril(noise(5, 5))
  x = np.asarray(sinkhorn(triangle, 50))
  np.testing.assert_allclose(np.linalg.norm(x, axis=0), np.sqrt(5), rtol=1e-5)
  np.testing.assert_array_equal(np.sign(x), np.sign(triangle))
  g[0, 0] = np.nan
  x = np.asarray(sinkhorn(g, 5))
  assert np.isnan(x[np.ix_([0, 2, 3], [0, 1, 3])]).all()


def test_batches_vmap_and_dtypes():
  g = noise(2, 3, 4, 5)
  x = sinkhorn(g, 5)
  mapped = jax.vmap(jax.vmap(sr_sinkhorn))(g)
  np.testing.assert_allclose(mapped, x, rtol=1e-6)
  np.testing.assert_allclose(x[1, 2], oracle.sr_sinkhorn(g[1, 2]), **CLOSE)
  half = jnp.asarray(g[0, 0]).astype(jnp.bfloat16)
  x = sr_sinkhorn(half)
  assert x.dtype == jnp.bfloat16
  wide = sr_sinkhorn(half.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(x, wide)
  assert sr_sinkhorn(jnp.zeros((0, 3))).shape == (0, 3)


def test_projections():
  g = noise(3, 5)
  norm = functools.partial(np.linalg.norm, keepdims=True)
  size = np.sqrt(15)
  u, _, vt = np.linalg.svd(g, full_matrices=False)
  for project, expected in (
    (row_l2, np.sqrt(5) * g / norm(g, axis=1)),
    (col_l2, np.sqrt(3) * g / norm(g, axis=0)),
    (frobenius, size * g / norm(g)),
    (sign, np.sign(g)),
    (spectral, np.sqrt(5) * u @ vt),
  ):
    z = project(g)
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6)
    # One Euclidean norm for all, and no point of the sphere is steeper than z.
    np.testing.assert_allclose(norm(z), size, rtol=1e-5)
    other = project(noise(3, 5, seed=1))
    assert (g * np.asarray(z)).sum() > (g * np.asarray(other)).sum()
    np.testing.assert_array_equal(project(np.zeros((3, 5), np.float32)), 0)
    extreme = project(np.float32(1e37) * g)
    np.testing.assert_allclose(extreme, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(row_l2(g, 1e3), np.sqrt(5) * g / 1e3, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 4, 4)])
def test_newton_schulz_approaches_the_svd(shape):
  g = noise(*shape)
  exact = spectral(g)
  # Singular values above a hundredth of the largest: orthogonal to float32 rounding.
  np.testing.assert_allclose(spectral(g, method="newton_schulz"), exact, atol=1e-3)
  np.testing.assert_array_equal(spectral(method="svd")(g), exact)


def test_spectral_leaves_the_null_space_alone():
  g = np.outer([1.0, 2.0, 0.0], [1.0, 1.0, 1.0, -1.0]).astype(np.float32)
  expected = 2 * g / np.linalg.norm(g)  # sqrt(max(m, n)) u v^T
  np.testing.assert_allclose(spectral(g), expected, atol=1e-6)


def test_multi_normalize_is_the_general_scheme():
  g = noise(4, 6)
  balanced = multi_normalize(g, (row_l2, col_l2), 5)
  np.testing.assert_allclose(balanced, sr_sinkhorn(g), rtol=1e-5)
  np.testing.assert_array_equal(multi_normalize(g, (sign,), 3), np.sign(g))
  transform = scale_by_multi_norm((row_l2, spectral), 2)
  assert transform.init({"w": g}) == optax.EmptyState()
  twice = oracle.swan(oracle.swan(g))
  np.testing.assert_allclose(apply(transform, {"w": g})["w"], twice, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize("center", [False, True])
def test_swan_follows_the_oracle(shape, center):
  g = noise(*shape)
  x = apply(scale_by_swan(center=center), g)
  if center and shape[0] > shape[1]:
    # Centred rows lie in a plane, so that X^T X is singular: compare the kept part.
    rows = g - g.mean(1, keepdims=True)
    u, _, vt = np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    expected = np.sqrt(max(shape)) * u[:, :2] @ vt[:2]
  else:
    expected = oracle.swan(g, center)
  np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_swan_fixed_point():
  q, _ = np.linalg.qr(noise(8, 8))
  hadamard = np.kron(*[np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]])] * 2)[:4]
  x = apply(scale_by_swan(), hadamard.astype(np.float32))
  np.testing.assert_allclose(x, hadamard, rtol=1e-5)
  values = np.linalg.svd(spectral(q @ noise(8, 8, seed=1)), compute_uv=False)
  np.testing.assert_allclose(values, np.sqrt(8), rtol=1e-5)


def test_leaves_with_more_axes():
  g = noise(2, 3, 4)
  stacked = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
  swapped = MuonDimensionNumbers(reduction_axis=(2,), output_axis=(0, 1))
  flat = sinkhorn(g.reshape(6, 4)).reshape(2, 3, 4)
  layers = np.stack([sinkhorn(layer) for layer in g])
  turned = sinkhorn(g.transpose(2, 0, 1).reshape(4, 6))
  turned = turned.reshape(4, 2, 3).transpose(1, 2, 0)
  for numbers, expected in (
    (None, flat),
    ({"a": {"b": None}}, flat),
    (stacked, layers),
    ({"a": {"b": stacked}}, layers),
    (lambda updates: {"a": {"b": swapped}}, turned),
  ):
    x = apply(scale_by_sinkgd(dimension_numbers=numbers), {"a": {"b": g}})
    np.testing.assert_allclose(x["a"]["b"], expected, rtol=1e-5)
  repeated = MuonDimensionNumbers(0, (0, 1))
  with pytest.raises(ValueError, match="different axes"):
    apply(scale_by_sinkgd(dimension_numbers=repeated), g)


class Net(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(7, 4)(tokens)
    x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
    x = nn.LayerNorm()(nn.Dense(4)(x))
    return nn.Dense(3, name="lm_head")(x)


def test_hidden_matrices_of_a_flax_model():
  net_init = jax.jit(Net().init)
  params = net_init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]
  grads = jax.tree.map(lambda p: jnp.asarray(noise(*p.shape)), params)
  transform = sinkgd(0.1)
  u, state = jax.jit(transform.update)(grads, transform.init(params), params)
  with jax.numpy_dtype_promotion("standard"):  # optax mixes counters with floats
    adam = apply(optax.adam(0.1), grads)
  kernel = grads["Dense_0"]["kernel"]
  np.testing.assert_allclose(
    u["Dense_0"]["kernel"], -0.1 * 0.05 * sr_sinkhorn(kernel), rtol=1e-6
  )
  for name in ("Embed_0", "lm_head", "LayerNorm_0"):
    jax.tree.map(np.testing.assert_array_equal, u[name], adam[name])
  np.testing.assert_array_equal(u["Dense_0"]["bias"], adam["Dense_0"]["bias"])
  attention = "MultiHeadDotProductAttention_0"
  query = grads[attention]["query"]["kernel"]  # (4, 2, 2): rows merge to (8, 2)
  expected = -0.1 * 0.05 * sr_sinkhorn(query.reshape(8, 2)).reshape(4, 2, 2)
  np.testing.assert_allclose(u[attention]["query"]["kernel"], expected, rtol=1e-6)
  moments = state.inner_states["other"].inner_state[0].mu
  assert isinstance(moments["Dense_0"]["kernel"], optax.MaskedNode)
  assert state.inner_states["matrix"].inner_state.count == 1


@pytest.mark.parametrize(
  ("name", "hidden"),
  [
    ("token_embedding", False),
    ("Embed_0", False),
    ("head", False),
    ("lm_head", False),
    ("LMHead_0", False),
    ("heads", False),
    ("head_1", False),
    ("MultiHeadAttention_0", True),
    ("multi_head_attention", True),
    ("header", True),
    ("Dense_0", True),
  ],
)
def test_default_labels(name, hidden):
  params = {name: {"kernel": jnp.asarray(noise(2, 2))}}
  state = sinkgd(0.1).init(params)
  mu = state.inner_states["other"].inner_state[0].mu
  assert isinstance(mu[name]["kernel"], optax.MaskedNode) == hidden


def test_label_fn_other_and_decay():
  params = {"Dense_0": jnp.asarray(noise(3, 3)), "Dense_1": jnp.asarray(noise(3, 2))}
  grads = jax.tree.map(lambda p: p + 1, params)
  transform = sinkgd(
    lambda count: 0.1 / (1 + count),
    num_iters=2,
    matrix_lr_scale=0.5,
    other=optax.sgd,
    label_fn=lambda _: {"Dense_0": "matrix", "Dense_1": "other"},
    weight_decay=0.3,
  )
  state, update = transform.init(params), jax.jit(transform.update)
  for rate in (0.1, 0.05):
    u, state = update(grads, state, params)
    direction = sr_sinkhorn(grads["Dense_0"], 2) + 0.3 * params["Dense_0"]
    np.testing.assert_allclose(u["Dense_0"], -0.5 * rate * direction, rtol=1e-5)
    np.testing.assert_allclose(u["Dense_1"], -rate * grads["Dense_1"], rtol=1e-6)
  with pytest.raises(ValueError, match="needs params"):
    transform.update(grads, state)
  with pytest.raises(ValueError, match="vector"):
    sinkgd(0.1, label_fn=lambda _: "vector").init(params)


def test_bfloat16_with_traced_hyperparameters():
  params = {
    "w": jnp.asarray(noise(3, 4)).astype(jnp.bfloat16),
    "b": jnp.ones(4, jnp.bfloat16),
  }

  def run(rate, scale, decay):
    transform = sinkgd(rate, matrix_lr_scale=scale, weight_decay=decay)

    def step(carry, _):
      params, state = carry
      u, state = transform.update(params, state, params)
      return (optax.apply_updates(params, u), state), u

    return jax.lax.scan(step, (params, transform.init(params)), length=2)

  grid = jnp.array([[0.1, 0.05, 0.0], [0.2, 0.1, 0.1]])
  (_, state), updates = jax.vmap(run)(*grid.T)
  assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
  moments = jax.tree.leaves(state.inner_states["other"].inner_state[0].mu)
  assert [m.dtype for m in moments] == [jnp.float32]
  for i, row in enumerate(np.asarray(grid, float)):
    _, single = run(*map(float, row))
    for swept, alone in zip(
      jax.tree.leaves(updates), jax.tree.leaves(single), strict=True
    ):
      # At most one bfloat16 rounding apart.
      np.testing.assert_allclose(
        swept[i].astype(jnp.float32), alone.astype(jnp.float32), rtol=2**-7
      )


def test_odd_trees_survive():
  tree = {
    "scalar": jnp.float32(2),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    "masked": optax.MaskedNode(),
    "pair": (jnp.ones((2, 2)), {}),
  }
  transform = sinkgd(0.1, weight_decay=0.1)
  u, _ = transform.update(tree, transform.init(tree), tree, value=1.0)
  assert jax.tree.structure(u) == jax.tree.structure(tree)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: sr_sinkhorn(G, 0), "num_iters"),
    (lambda: sr_sinkhorn(G, eps=0.0), "eps"),
    (lambda: sr_sinkhorn(G[0]), "at least two axes"),
    (lambda: scale_by_sinkgd(num_iters=0), "num_iters"),
    (lambda: multi_normalize(G, (), 1), "at least one projection"),
    (lambda: scale_by_multi_norm((), 1), "at least one projection"),
    (lambda: scale_by_multi_norm((sign,), 0), "num_iters"),
    (lambda: spectral(G, method="qr"), "newton_schulz"),
    (lambda: scale_by_swan(method="qr"), "newton_schulz"),
    (lambda: sinkgd(-1.0), "learning_rate"),
    (lambda: sinkgd(0.1, num_iters=0), "num_iters"),
    (lambda: sinkgd(0.1, matrix_lr_scale=0.0), "matrix_lr_scale"),
    (lambda: sinkgd(0.1, weight_decay=-1.0), "weight_decay"),
    (lambda: apply(scale_by_sinkgd(), {"b": G[0]}), "SinkGD needs matrices; route"),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
