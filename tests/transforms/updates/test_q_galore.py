import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.models import decoder
from gradlab.transforms.updates import (
  dequantize_params,
  q_galore,
  q_galore_apply,
  quantize_params,
)
from tests.oracles import q_galore as oracle
from tests.transforms.updates.trajectories import follow, noise

OFF = {
  "quantize_projector": False,
  "lazy": False,
  "quantize_moments": False,
  "quantize_weights": False,
}
SMALL = {"proj_group_size": 8, "moment_block_size": 8, "min_8bit_size": 0}
GRIDS = {**SMALL, "weight_group_size": 8}
TWO = {"quantize_projector": True, "lazy": True}
ON = dict.fromkeys(OFF, True)
WORKED = jnp.array([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 1.0]])
quick = hypothesis.settings(max_examples=10, deadline=None)


def drifting(steps, m, n, seed=0):
  """Gradients whose leading singular vector stays for most of the time."""
  rng = np.random.default_rng(seed)
  u, v = rng.normal(size=m), rng.normal(size=n)
  return np.outer(u, v) + 0.5 * rng.normal(size=(steps, m, n))


def signed_basis(gradient, rank, side):
  """The oracle's basis: every vector has its largest entry positive."""
  u, _, vt = jnp.linalg.svd(gradient, full_matrices=False)
  rows = vt[:rank] if side == "right" else u[:, :rank].T
  largest = jnp.take_along_axis(rows, jnp.abs(rows).argmax(1)[:, None], 1)
  rows = rows * jnp.sign(largest)
  return rows if side == "right" else rows.T


def run(transform, w, gradients):
  """W_1, W_2, ... of one matrix and the states, in one scan."""

  def step(carry, g):
    w, state = carry
    u, state = transform.update(g, state, w)
    return (w + u, state), (w + u, state._replace(key=None))

  carry = w, transform.init(w)
  return jax.jit(lambda c, g: jax.lax.scan(step, c, g)[1])(carry, gradients)


@pytest.mark.parametrize(
  ("shape", "options", "stochastic"),
  [
    ((4, 10), {**OFF, "weight_decay": 0.3, "eps": 1e-3}, False),
    ((6, 4), {**OFF, "side": "large", "b2": 0.95}, False),
    ((6, 4), {**OFF, "lazy": True, "abs_cosine": False}, False),
    ((6, 4), {**OFF, **SMALL, "quantize_projector": True}, False),
    ((6, 4), {**OFF, **SMALL, **TWO, "zero_in_range": False}, False),
    ((4, 10), {**OFF, **SMALL, "quantize_moments": True}, False),
    ((6, 4), {**OFF, **GRIDS, "quantize_weights": True, "weight_decay": 0.3}, False),
    ((6, 4), {**OFF, **GRIDS, "quantize_weights": True}, True),
    ((5, 7), {**ON, **GRIDS, "gamma_proj": 1.5, "proj_bits": 5}, False),
    ((8, 4), {**ON, **GRIDS, "side": "left", "weight_bits": 6}, True),
  ],
)
def test_follows_the_oracle(shape, options, stochastic):
  steps, key = 20, jax.random.key(3)
  shared = {"rank": 2, "update_proj_gap": 2, "queue_size": 2, "cos_threshold": 0.6}
  # In float64, where a code is the oracle's code but for numbers next to a boundary.
  with jax.enable_x64(True):
    transform = q_galore(
      0.05,
      seed_key=key,
      projector_fn=signed_basis,
      stochastic_rounding=stochastic,
      **shared,
      **options,
    )
    gradients = jnp.asarray(drifting(steps, *shape))
    w = jnp.asarray(noise(*shape, seed=1), jnp.float64)
    actual, states = run(transform, w, gradients)
    uniforms = None
    if stochastic:
      # The only leaf has the empty path, whose checksum is 0.
      keys = [jax.random.fold_in(jax.random.fold_in(key, c + 1), 0) for c in range(20)]
      uniforms = [jax.random.uniform(k, shape, jnp.float64) for k in keys]
    expected, refreshed = oracle.trajectory(
      w, gradients, 0.05, uniforms=uniforms, **shared, **options
    )
    # The codes' map is float32, everything else float64.
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
    svds = np.diff(np.asarray(states.projector.num_svd), prepend=0)
    assert np.flatnonzero(svds).tolist() == refreshed
    assert len(refreshed) < 10 or not options["lazy"]


def test_worked_example():
  transform = q_galore(0.1, rank=1, seed_key=0, **OFF)
  w = jnp.full((4, 2), 0.5)
  u, state = transform.update(WORKED, transform.init(w), w)
  p = np.asarray(state.projector.projector)
  np.testing.assert_allclose(p * np.sign(-p[0, 0]), [[-0.9571, -0.2898]], atol=5e-5)
  row, last = [0.4761, 0.4928], [0.5239, 0.5072]
  np.testing.assert_allclose(w + u, [row, row, row, last], atol=5e-5)  # as printed


def refreshes(transform, gradients, w):
  _, states = run(transform, w, jnp.asarray(gradients, jnp.float32))
  return np.flatnonzero(np.diff(np.asarray(states.projector.num_svd), prepend=0))


def test_refresh_schedule_of_a_constant_subspace():
  options = {**OFF, "lazy": True, "update_proj_gap": 2, "queue_size": 2}
  gradients = np.stack([WORKED] * 40)
  steps = refreshes(q_galore(0.1, 1, seed_key=0, **options), gradients, WORKED)
  assert steps.tolist() == [0, 2, 4, 8, 16, 32]
  options["lazy"] = False
  steps = refreshes(q_galore(0.1, 1, seed_key=0, **options), gradients, WORKED)
  assert steps.tolist() == list(range(0, 40, 2))


@functools.cache
def lazy_steps(gap):
  """The number of refreshes after each step, as a function of the threshold."""

  def steps(gradients, threshold):
    transform = q_galore(
      0.1,
      2,
      gap,
      seed_key=0,
      **{**OFF, "lazy": True, "queue_size": 1, "cos_threshold": threshold},
    )
    return run(transform, jnp.zeros((4, 3)), gradients)[1].projector.num_svd

  return jax.jit(steps)


@quick
@hypothesis.given(
  st.integers(0, 2**16), st.sampled_from((1, 3)), st.floats(0, 1, width=32)
)
def test_laziness_never_adds_refreshes(seed, gap, threshold):
  gradients = jnp.asarray(drifting(12, 4, 3, seed), jnp.float32)
  done = lazy_steps(gap)(gradients, jnp.float32(threshold))
  steps = np.flatnonzero(np.diff(np.asarray(done), prepend=0))
  # Gaps double, so every refresh is one of the fixed schedule's.
  assert set(steps) <= set(range(0, 12, gap))


@jax.jit
def first_step(g):
  w, transform = jnp.zeros((5, 4)), q_galore(1.0, 2, 1, seed_key=0, **OFF)
  u, state = transform.update(g, transform.init(w), w)
  return u, state.projector.projector


@quick
@hypothesis.given(hnp.arrays(np.float32, (5, 4), elements=st.floats(-4, 4, width=32)))
def test_update_stays_in_the_subspace(g):
  hypothesis.assume(np.linalg.norm(g) > 1e-3)
  u, p = (np.asarray(x, np.float64) for x in first_step(g))
  np.testing.assert_allclose(p @ p.T, np.eye(2), atol=1e-5)  # float32 vectors
  np.testing.assert_allclose(u @ p.T @ p, u, atol=1e-5)
  # lr * scale * sqrt(size of R), because |A| <= 1 on the first step.
  assert np.linalg.norm(u) <= 0.25 * np.sqrt(10) * (1 + 1e-5)


def test_full_rank_keeps_all_of_the_gradient():
  g, w = jnp.asarray(noise(3, 4)), jnp.zeros((3, 4))
  transform = q_galore(1.0, 100, scale=1.0, eps=0.0, seed_key=0, **OFF)
  u, state = transform.update(g, transform.init(w), w)
  p = state.projector.projector
  assert p.shape == (3, 3)
  r = p.T @ g
  np.testing.assert_allclose(r.T @ r, g.T @ g, atol=1e-5)
  np.testing.assert_allclose(p.T @ u, -np.sign(r), atol=1e-5)


def test_invariant_to_the_scale_of_the_gradient():
  gradients, w = jnp.asarray(drifting(6, 5, 4), jnp.float32), jnp.zeros((5, 4))
  transform = q_galore(0.1, 2, 10, eps=0.0, seed_key=0, **OFF)
  one, two = (run(transform, w, c * gradients)[0] for c in (1.0, 64.0))
  np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)  # float32 vectors


def test_rounding_is_unbiased_and_stays_on_the_grid():
  w, draws = jnp.asarray(noise(16)).reshape(2, 8), 10_000
  options = {**OFF, "quantize_weights": True, "weight_bits": 4}

  def rounded(key, w=w):
    transform = q_galore(0.0, 2, seed_key=key, **options)
    return w + transform.update(w, transform.init(w), w)[0]

  keys = jax.random.split(jax.random.key(0), draws)
  out, w = np.asarray(jax.jit(jax.vmap(rounded))(keys)), np.asarray(w)
  step = (float(w.max()) - float(w.min())) / 15
  inside = (w > w.min()) & (w < w.max())
  # Five standard errors; one step apart, the variance is at most step^2 / 4.
  bound = 5 * 0.5 * step / np.sqrt(draws)
  assert np.abs(out.mean(0) - w)[inside].max() < bound
  assert np.abs(out - w).max() < step * (1 + 1e-5)


@quick
@hypothesis.given(hnp.arrays(np.float32, (2, 8), elements=st.floats(-4, 4, width=32)))
def test_rounding_again_changes_nothing(w):
  once = quantize_params(jnp.asarray(w), 5, 8)
  # A point of the grid is found again but for float32 rounding.
  np.testing.assert_allclose(quantize_params(once, 5, 8), once, rtol=1e-5, atol=1e-6)


def test_small_steps_stall_without_stochastic_rounding():
  g = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)
  w = quantize_params(jnp.asarray(noise(16, 16, seed=1)))
  moved = {}
  for stochastic in (False, True):
    options = {**OFF, "quantize_weights": True, "stochastic_rounding": stochastic}
    transform = q_galore(0.004, 16, 1000, seed_key=0, **options)
    out, _ = run(transform, w, jnp.stack([g] * 50))
    moved[stochastic] = float(jnp.vdot(w - out[-1], g))
  plain, _ = run(q_galore(0.004, 16, 1000, seed_key=0, **OFF), w, jnp.stack([g] * 50))
  full = float(jnp.vdot(w - plain[-1], g))
  assert abs(moved[False]) < 0.2 * full
  assert moved[True] > 0.7 * full


def test_a_gradient_without_directions_keeps_the_basis():
  transform = q_galore(0.1, 1, 1, seed_key=0, **{**OFF, "lazy": True})
  w = jnp.ones((4, 2))
  bad = WORKED.at[0, 0].set(jnp.nan)
  update = jax.jit(transform.update)
  _, empty = update(jnp.zeros((4, 2)), transform.init(w), w)
  assert empty.projector.num_svd == 0
  # Without any basis the next gradient makes one, whatever the gap.
  _, state = update(WORKED, empty, w)
  assert state.projector.num_svd == 1
  for g in (jnp.zeros((4, 2)), bad, jnp.full((4, 2), jnp.inf)):
    u, after = update(g, state, w)
    for old, new in zip(state.projector, after.projector, strict=True):
      np.testing.assert_array_equal(old, new)
    assert np.isfinite(u).all() == np.isfinite(g).all()


def test_gap_saturates():
  options = {**OFF, "lazy": True, "queue_size": 1, "gamma_proj": 1e6}
  transform = q_galore(0.1, 1, 1, seed_key=0, **options)
  state = transform.init(WORKED)
  for _ in range(2):
    _, state = transform.update(WORKED, state, WORKED)
  state = state._replace(count=jnp.int32(0))
  _, state = transform.update(WORKED, state, WORKED)
  assert state.projector.gap == 2**30


def _axis(state, k):
  return jax.tree.map(lambda x: x[k], (state.projector, state.mu, state.nu))


@pytest.mark.parametrize("options", [{**OFF, "lazy": True}, {**ON, **GRIDS}])
def test_a_stack_is_its_matrices(options):
  """Each with a gap of its own: of two layers one turns round, the other stays."""
  steady = drifting(9, 6, 4)
  gradients = jnp.asarray(np.stack([steady, noise(9, 6, 4)], 1), jnp.float32)
  options = {**options, "stochastic_rounding": False, "queue_size": 1}
  transform = q_galore(0.05, 2, 1, seed_key=0, cos_threshold=0.8, **options)
  w = jnp.asarray(noise(2, 6, 4, seed=1))
  out, states = run(transform, w, gradients)
  last = jax.tree.map(lambda x: x[-1], states)
  assert last.projector.gap[0] > last.projector.gap[1]
  for k in range(2):
    alone, kept = run(transform, w[k], gradients[:, k])
    np.testing.assert_allclose(out[:, k], alone, rtol=1e-5, atol=1e-6)
    kept = jax.tree.map(lambda x: x[-1], (kept.projector, kept.mu, kept.nu))
    for one, other in zip(
      jax.tree.leaves(_axis(last, k)), jax.tree.leaves(kept), strict=True
    ):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_leaves_that_are_alike_are_as_alone():
  """They share a loop; their gaps, their rounding and their results are their own."""
  options = {**ON, **GRIDS, "queue_size": 1, "cos_threshold": 0.8}
  transform = q_galore(0.05, 2, 1, seed_key=0, **options)
  gradients = {f"k{i}": noise(5, 6, 4, seed=i) for i in range(10)}
  gradients["k0"] = drifting(5, 6, 4).astype(np.float32)
  params = {name: jnp.asarray(noise(6, 4, seed=9)) for name in gradients}
  rows = [{name: g[i] for name, g in gradients.items()} for i in range(5)]
  out, state = follow(transform, params, rows)
  gaps = [int(p.gap) for p in state.projector.values()]
  assert len(set(gaps)) > 1
  for name in ("k0", "k9"):
    alone, kept = follow(
      transform, {name: params[name]}, [{name: row[name]} for row in rows]
    )
    for one, other in zip(out, alone, strict=True):
      np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)
    assert kept.projector[name].gap == state.projector[name].gap


def test_kernels_are_matrices_of_all_but_the_last_axis():
  transform = q_galore(0.1, 3, seed_key=0, **OFF)
  g, w = jnp.asarray(noise(3, 3, 2, 4)), jnp.zeros((3, 3, 2, 4))
  flat, _ = transform.update(g.reshape(18, 4), transform.init(w.reshape(18, 4)), None)
  u, state = transform.update(g, transform.init(w), None)
  np.testing.assert_allclose(u.reshape(18, 4), flat, atol=1e-6)
  assert state.mu.shape == (18, 3)
  # Attention's (width, heads, size) as one matrix, by saying so.
  spec = optax.contrib.MuonDimensionNumbers((0,), (1, 2))
  state = q_galore(0.1, 3, seed_key=0, dimension_numbers=spec, **OFF).init(
    jnp.zeros((8, 2, 5))
  )
  assert state.projector.projector.shape == (8, 3)


def test_which_leaves_are_projected():
  model = decoder(width=16, num_heads=2)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))[0]
  )
  state = jax.eval_shape(q_galore(0.1, 4, seed_key=0).init, shapes)
  treedef = jax.tree.structure(shapes)
  nodes = zip(
    jax.tree_util.tree_leaves_with_path(shapes),
    treedef.flatten_up_to(state.projector),
    strict=True,
  )
  chosen = {jax.tree_util.keystr(path) for (path, _), p in nodes if len(p)}
  assert all("kernel" in name and "head" not in name for name in chosen)
  assert len(chosen) == 6
  for label in (True, "matrix"):
    state = q_galore(0.1, 4, seed_key=0, label_fn=lambda p, x=label: x).init(
      {"embed": jnp.ones((3, 4))}
    )
    assert len(state.projector["embed"])


def test_other_leaves_get_adamw():
  tree = {
    "bias": jnp.asarray(noise(5)),
    "scale": jnp.float32(2),
    "empty": jnp.ones((0, 3)),
  }
  ours = q_galore(0.1, weight_decay=0.2, seed_key=0, b2=0.95)
  with jax.numpy_dtype_promotion("standard"):  # optax mixes counters with floats
    adamw = optax.adamw(0.1, b2=0.95, weight_decay=0.2)
    expected, _ = follow(adamw, tree, [tree] * 3)
  actual, _ = follow(ours, tree, [tree] * 3)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5), actual[-1], expected[-1]
  )


def test_stored_codes_are_those_of_the_floats():
  key, bits = jax.random.key(5), 4
  options = {**ON, **GRIDS, "weight_decay": 0.1, "rank": 2, "update_proj_gap": 2}
  params = {"a": jnp.asarray(noise(6, 4)), "b": jnp.asarray(noise(6, 4, seed=2))}
  params["bias"] = jnp.ones(3)
  transform = q_galore(0.05, seed_key=key, weight_bits=bits, **options)
  stored = quantize_params(params, bits, 8, storage=True)
  floats = quantize_params(params, bits, 8)
  state = one = transform.init(floats)
  options.pop("quantize_weights")

  @jax.jit
  def apply(stored, grads, state, key):
    return q_galore_apply(stored, grads, state, key, learning_rate=0.05, **options)

  for i in range(5):
    grads = jax.tree.map(lambda p, i=i: jnp.asarray(noise(*p.shape, seed=i)), params)
    u, one = jax.jit(transform.update)(grads, one, floats)
    floats = optax.apply_updates(floats, u)
    stored, state = apply(stored, grads, state, jax.random.fold_in(key, i + 1))
    # The floats are on the grid but for their own rounding.
    jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6),
      dequantize_params(stored),
      floats,
    )
  assert stored["a"].codes.dtype == jnp.uint8


def test_bytes_of_the_state():
  """Codes, scales, zeros, lead vectors, cosines and counters, of every leaf."""
  model = decoder(num_layers=2, width=128, num_heads=4)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))[0]
  )

  def per_parameter(**options):
    state = jax.eval_shape(q_galore(0.1, 32, seed_key=0, **options).init, shapes)
    leaves = jax.tree.leaves((state.projector, state.mu, state.nu))
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / size

  assert per_parameter() < 1.0
  assert per_parameter(**OFF) > 3.0  # float GaLore; Adam's 8


def _primitives(jaxpr, inside=False):
  """(name of primitive, whether it stands within a cond) of all equations."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name, inside
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _primitives(inner, inside or eqn.primitive.name == "cond")


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4)])
def test_decomposition_is_off_the_common_path(shape):
  transform, w = q_galore(0.1, 2, seed_key=0), jnp.ones(shape)
  for tree in (w, {"a": w, "b": w}):
    state = transform.init(tree)
    traced = jax.make_jaxpr(transform.update)(tree, state, tree)
    found = [inside for name, inside in _primitives(traced.jaxpr) if name == "svd"]
    assert found
    assert all(found)


def test_bfloat16():
  w = jnp.asarray(noise(6, 4), jnp.bfloat16)
  transform = q_galore(0.1, 2, seed_key=0, **OFF)
  u, state = transform.update(w, transform.init(w), w)
  assert u.dtype == jnp.bfloat16
  assert state.mu.dtype == state.projector.projector.dtype == jnp.float32
  assert np.isfinite(u.astype(jnp.float32)).all()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"rank": 0}, "rank"),
    ({"update_proj_gap": 0}, "update_proj_gap"),
    ({"gamma_proj": 1.0}, "gamma_proj"),
    ({"cos_threshold": 1.5}, "cos_threshold"),
    ({"queue_size": 0}, "queue_size"),
    ({"proj_bits": 1}, "proj_bits"),
    ({"weight_bits": 9}, "weight_bits"),
    ({"proj_group_size": 0}, "proj_group_size"),
    ({"weight_group_size": 0}, "weight_group_size"),
    ({"moment_block_size": 0}, "moment_block_size"),
    ({"min_8bit_size": -1}, "min_8bit_size"),
    ({"scale": 0.0}, "scale"),
    ({"learning_rate": -1.0}, "learning_rate"),
    ({"b1": 1.0}, "b1"),
    ({"b2": -0.1}, "b2"),
    ({"eps": -1.0}, "eps"),
    ({"weight_decay": -1.0}, "weight_decay"),
    ({"side": "both"}, "side must be one of small, large, right, left"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    q_galore(**{"learning_rate": 0.1, "seed_key": 0, **options})


def test_bad_leaves():
  transform = q_galore(0.1, seed_key=0)
  w = jnp.ones((4, 4))
  with pytest.raises(ValueError, match="quantize_weights"):
    transform.update(w, transform.init(w))
  decaying = q_galore(0.1, weight_decay=0.1, seed_key=0, **OFF)
  with pytest.raises(ValueError, match="weight_decay"):
    decaying.update(w, decaying.init(w))
  with pytest.raises(ValueError, match=r"floating-point.*int32"):
    transform.init({"a": jnp.ones((4, 4), jnp.int32)})
  with pytest.raises(ValueError, match=r"'b'.*fewer than two axes"):
    q_galore(0.1, seed_key=0, label_fn=lambda p: {"b": True}).init({"b": jnp.ones(3)})
  with pytest.raises(ValueError, match="label_fn must give"):
    q_galore(0.1, seed_key=0, label_fn=lambda p: "svd").init(w)
  with pytest.raises(ValueError, match="must divide"):
    q_galore(0.1, seed_key=0, zero_in_range=False, rank=3).init(w)
