import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.updates import (
  quadratic_apply,
  quadratic_labels,
  relinear,
  relinear_init,
  relinear_sg,
  relinear_sw,
)
from tests.oracles import relinear as oracle
from tests.transforms.updates.trajectories import follow, noise

quick = hypothesis.settings(max_examples=20, deadline=None)
# Without what underflows in a product.
ratios = st.floats(0, 1, width=32).map(lambda x: 0.0 if x < 1e-3 else x)
# float32 against float64: sums of a few terms of order one, a few steps.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def drawn(seed=0, inputs=3, features=2):
  """Parameters with all branches away from their linear point."""
  return {
    branch: {
      "kernel": noise(inputs, features, seed=seed + i),
      "bias": noise(features, seed=seed + i + 10),
    }
    for i, branch in enumerate("rgb")
  }


def assert_trees_close(actual, expected, **tolerance):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected
  )


def worked():
  return {
    "r": {"kernel": np.array([[0.5], [-1.0]]), "bias": np.array([0.2])},
    "g": {"kernel": np.array([[0.1], [0.3]]), "bias": np.array([1.0])},
    "b": {"kernel": np.array([[-0.2], [0.05]]), "bias": np.array([0.4])},
  }


def test_worked_example():
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), worked())
  x = jnp.array([[1.0, 2.0]])
  # float32 roundings of numbers near one, here and below
  np.testing.assert_allclose(quadratic_apply(params, x), [[-1.81]], rtol=1e-6)
  g = jax.grad(lambda p: quadratic_apply(p, x)[0, 0])(params)
  expected = {
    "r": {"kernel": [[1.7], [3.4]], "bias": [1.7]},
    "g": {"kernel": [[-1.3], [-2.6]], "bias": [-1.3]},
    "b": {"kernel": [[1.0], [4.0]], "bias": [1.0]},
  }
  for branch, leaves in expected.items():
    for name, value in leaves.items():
      np.testing.assert_allclose(g[branch][name], value, rtol=1e-6)
  transform = relinear_sg(optax.sgd(0.1), 0.01, 0.01)
  (after,), _ = follow(transform, params, [g])
  np.testing.assert_allclose(after["r"]["kernel"], [[0.33], [-1.34]], rtol=1e-6)
  np.testing.assert_allclose(after["g"]["kernel"], [[0.1013], [0.3026]], rtol=1e-6)


def test_outputs_and_gradients_follow_the_oracle():
  params, x, delta = drawn(), noise(5, 3, seed=7), noise(5, 2, seed=8)
  out, pull = jax.vjp(jax.jit(lambda p: quadratic_apply(p, x)), params)
  np.testing.assert_allclose(out, oracle.forward(params, x.astype(float)), **CLOSE)
  expected = oracle.gradients(params, x.astype(float), delta.astype(float))
  assert_trees_close(pull(jnp.asarray(delta))[0], expected, rtol=1e-5, atol=1e-5)
  compact = {name: params[name] for name in "rb"}
  np.testing.assert_allclose(
    quadratic_apply(compact, x), oracle.forward(compact, x.astype(float)), **CLOSE
  )


@pytest.mark.parametrize(
  ("gamma", "alpha", "momentum", "decay"),
  [
    ((0.3, 0.05), (1.0, 1.0), 0.9, 0.01),
    ((1.0, 0.0), (0.9, 0.5), 0.5, 0.0),
    ((0.2, 0.7), (0.0, 1.0), 0.9, 0.1),
  ],
)
def test_steps_follow_the_oracle(gamma, alpha, momentum, decay):
  params = jax.tree.map(jnp.asarray, drawn())
  grads = [drawn(100 + i) for i in range(6)]
  sgd = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1, momentum))
  transform = optax.chain(sgd, relinear(*gamma, alpha_g=alpha[0], alpha_b=alpha[1]))
  ours, _ = follow(transform, params, grads)
  theirs = oracle.trajectory(params, grads, 0.1, gamma, alpha, momentum, decay)
  for x, y in zip(ours, theirs, strict=True):
    assert_trees_close(x, y, **CLOSE)
  pieces = optax.chain(relinear_sg(sgd, *gamma), relinear_sw(*alpha))
  for x, y in zip(follow(pieces, params, grads)[0], ours, strict=True):
    assert_trees_close(x, y, rtol=1e-6, atol=1e-7)  # the same numbers, fused otherwise


@quick
@hypothesis.given(st.integers(0, 10**6), st.sampled_from([True, False]))
def test_starts_as_the_linear_layer_bit_for_bit(seed, compact):
  params = relinear_init(seed, (4, 3), compact=compact)
  assert set(params) == (set("rb") if compact else set("rgb"))
  x = 100 * noise(6, 4, seed=seed)
  linear = x @ params["r"]["kernel"] + params["r"]["bias"][None]
  np.testing.assert_array_equal(quadratic_apply(params, x), linear)


@quick
@hypothesis.given(st.integers(0, 1000))
def test_first_gradients(seed):
  """In r those of the linear layer; in g they carry its output, in b the squares."""
  params = relinear_init(seed, (3, 2))
  x, delta = noise(5, 3, seed=seed), noise(5, 2, seed=seed + 1)
  _, pull = jax.vjp(lambda p: quadratic_apply(p, x), params)
  (g,) = pull(jnp.asarray(delta))
  line = x @ np.asarray(params["r"]["kernel"])
  for branch, inputs, factor in (("r", x, delta), ("g", x, line * delta)):
    np.testing.assert_allclose(g[branch]["kernel"], inputs.T @ factor, **CLOSE)
    np.testing.assert_allclose(g[branch]["bias"], factor.sum(0), **CLOSE)
  np.testing.assert_allclose(g["b"]["kernel"], (x**2).T @ delta, **CLOSE)
  np.testing.assert_allclose(g["b"]["bias"], delta.sum(0), **CLOSE)


def test_gamma_zero_trains_the_linear_network():
  """Decay, momentum and all: the quadratic leaves do not move."""
  x, y = noise(20, 4), noise(20, 2, seed=1)
  params = relinear_init(3, (4, 2))
  sgd = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9))

  def train(predict, transform, params):
    def step(carry, _):
      params, state = carry
      g = jax.grad(lambda p: jnp.mean((predict(p) - y) ** 2))(params)
      u, state = transform.update(g, state, params)
      return (optax.apply_updates(params, u), state), None

    carry = (params, transform.init(params))
    return jax.jit(lambda c: jax.lax.scan(step, c, length=30)[0][0])(carry)

  quadratic = train(lambda p: quadratic_apply(p, x), relinear_sg(sgd, 0.0, 0.0), params)
  linear = train(
    lambda p: x @ p["kernel"] + jnp.broadcast_to(p["bias"], (20, 2)), sgd, params["r"]
  )
  # the products with one and zero are exact; compiled in another program
  assert_trees_close(quadratic["r"], linear, rtol=1e-6, atol=1e-7)
  for branch in "gb":
    jax.tree.map(np.testing.assert_array_equal, quadratic[branch], params[branch])


def stepped(transform, params, u):
  return transform.update(u, transform.init(params), params)[0]


@quick
@hypothesis.given(ratios, ratios, st.integers(0, 1000))
def test_update_is_linear_in_gamma(gamma_g, gamma_b, seed):
  params, u = drawn(seed), drawn(seed + 50)
  out = stepped(relinear(gamma_g, gamma_b), params, u)
  assert_trees_close(
    out,
    {
      "r": u["r"],
      "g": jax.tree.map(lambda leaf: np.float32(gamma_g) * leaf, u["g"]),
      "b": jax.tree.map(lambda leaf: np.float32(gamma_b) * leaf, u["b"]),
    },
    rtol=1e-6,
  )
  same = stepped(relinear(1.0, 1.0), params, u)
  jax.tree.map(np.testing.assert_array_equal, same, u)


@quick
@hypothesis.given(st.integers(0, 1000), ratios)
def test_pull(seed, alpha):
  params, u = drawn(seed), drawn(seed + 50)
  same = stepped(relinear_sw(1.0, 1.0), params, u)
  jax.tree.map(np.testing.assert_array_equal, same, u)
  linear = relinear_init(seed, (3, 2))
  zeros = jax.tree.map(np.zeros_like, u)
  # the linear point is fixed
  still = stepped(relinear_sw(alpha, alpha), linear, zeros)
  jax.tree.map(np.testing.assert_array_equal, still, zeros)
  # and with alpha = 0 the next step is there, whatever the update
  out = optax.apply_updates(params, stepped(relinear_sw(0.0, 0.0), params, u))
  for branch in "gb":
    # 1 - p is rounded before p is added again
    assert_trees_close(out[branch], linear[branch], rtol=0, atol=3e-7)
  out = optax.apply_updates(linear, stepped(relinear_sw(0.0, 0.0), linear, u))
  for branch in "gb":
    jax.tree.map(np.testing.assert_array_equal, out[branch], linear[branch])


@quick
@hypothesis.given(st.integers(0, 1000), st.floats(-2, 2, width=32))
def test_affine_in_the_branches(seed, t):
  a, b, x = drawn(seed), drawn(seed + 50), noise(4, 3, seed=seed + 99)
  for moving in ("r", "b"):
    other = a | {moving: b[moving]}
    mixed = a | {
      moving: jax.tree.map(lambda p, q: (1 - t) * p + t * q, a[moving], b[moving])
    }
    between = (1 - t) * quadratic_apply(a, x) + t * quadratic_apply(other, x)
    # float32 products of order ten
    np.testing.assert_allclose(quadratic_apply(mixed, x), between, rtol=1e-4, atol=2e-4)


def test_zero_gradients():
  params = drawn()
  zeros = jax.tree.map(np.zeros_like, params)
  slow = stepped(relinear_sg(optax.sgd(0.1), 0.3, 0.3), params, zeros)
  assert not any(leaf.any() for leaf in jax.tree.leaves(slow))
  out = optax.apply_updates(params, stepped(relinear_sw(0.5, 0.25), params, zeros))
  np.testing.assert_allclose(out["g"]["kernel"], 0.5 * params["g"]["kernel"], rtol=1e-6)
  np.testing.assert_allclose(
    out["g"]["bias"], 1 + 0.5 * (params["g"]["bias"] - 1), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(out["b"]["bias"], 0.25 * params["b"]["bias"], rtol=1e-6)
  np.testing.assert_array_equal(out["r"]["bias"], params["r"]["bias"])


def test_labels_know_quadratic_layers_only():
  layer, compact = relinear_init(0, (2, 2)), relinear_init(0, (2, 2), compact=True)
  tree = {
    "net": (layer, {"conv": compact}),
    "colours": {"r": 1.0, "g": 1.0, "b": 1.0},
    "gate": {"g": {"kernel": 1.0}, "b": {"kernel": 1.0}},
    "more": {name: layer["r"] for name in "rgbh"},
    "b": {"kernel": 1.0},
    "odd": {"r": layer["r"], "g": {"scale": 1.0}, "b": layer["b"]},
    "none": None,
  }
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/"): label
    for path, label in jax.tree_util.tree_leaves_with_path(quadratic_labels(tree))
    if label != "other"
  }
  leaves = ("bias", "kernel")
  assert found == {
    **{f"net/0/{branch}/{leaf}": branch for branch in "gb" for leaf in leaves},
    **{f"net/1/conv/b/{leaf}": "b" for leaf in leaves},
    **{f"odd/b/{leaf}": "b" for leaf in leaves},
  }


def test_labels_inside_a_mask():
  params = {"layer": drawn(), "head": noise(2, 2)}
  mask = {"layer": {"r": False, "g": True, "b": True}, "head": False}
  transform = optax.masked(relinear(0.5, 0.25), mask)
  u = stepped(transform, params, params)
  np.testing.assert_array_equal(u["head"], params["head"])
  np.testing.assert_array_equal(
    u["layer"]["g"]["kernel"], 0.5 * params["layer"]["g"]["kernel"]
  )
  np.testing.assert_array_equal(
    u["layer"]["b"]["bias"], 0.25 * params["layer"]["b"]["bias"]
  )


def test_labels_may_be_given():
  params = {"layer": drawn(), "mine": {"bias": np.ones(2, np.float32)}}
  prefix = {"layer": "other", "mine": "g"}
  for labels in (prefix, lambda tree: jax.tree.map(lambda _: "g", tree) | prefix):
    u = stepped(relinear(0.5, 0.5, labels, alpha_g=0.0), params, params)
    np.testing.assert_array_equal(u["mine"]["bias"], 0)  # 1 is where it stays
    jax.tree.map(np.testing.assert_array_equal, u["layer"], params["layer"])


def test_half_precision_is_computed_in_float32():
  params = {
    branch: {"kernel": np.ones((1, 1), np.float16), "bias": np.zeros(1, np.float16)}
    for branch in "rgb"
  }
  params["b"]["kernel"] = -params["b"]["kernel"]
  x = np.full((1, 1), 300, np.float16)
  # 300 * 300 and its square are beyond float16; their difference is not
  out = quadratic_apply(params, x)
  assert out.dtype == jnp.float16
  np.testing.assert_array_equal(out, 0)
  low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), drawn())
  u = stepped(relinear(jnp.float32(0.5), 0.5, alpha_g=jnp.float32(0.9)), low, low)
  assert {leaf.dtype for leaf in jax.tree.leaves(u)} == {jnp.dtype(jnp.bfloat16)}


def test_non_finite_updates_propagate():
  params, u = drawn(), drawn(1)
  u["g"]["bias"][0] = np.nan
  u["b"]["bias"][1] = np.inf
  out = stepped(relinear(0.0, 0.5), params, u)
  assert np.isnan(out["g"]["bias"][0])
  assert np.isinf(out["b"]["bias"][1])
  assert np.isfinite(out["g"]["bias"][1])


def test_initialisation():
  params = relinear_init(jax.random.key(0), (3, 3, 16, 32), jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  assert params["b"]["kernel"].shape == (3, 3, 16, 32)
  std = np.asarray(params["r"]["kernel"], np.float64).std()
  # 4608 normals: relative deviation about 1%
  np.testing.assert_allclose(std, np.sqrt(2 / 144), rtol=0.05)
  with pytest.raises(ValueError, match=r"shape_r must be .*, got \(3,\)"):
    relinear_init(0, (3,))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"gamma_g": 1.5}, r"gamma_g must lie in \[0, 1\]"),
    ({"gamma_b": -0.1}, "gamma_b"),
    ({"alpha_g": 1.1}, "alpha_g"),
    ({"alpha_b": -0.1}, "alpha_b"),
    ({"gamma_b": -0.1, "allow_above_one": True}, "gamma_b"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    relinear(**options)


def test_ratios_above_one_are_allowed_on_request():
  params = drawn()
  with pytest.raises(ValueError, match="gamma_g"):
    relinear_sg(optax.identity(), 2.0, 1.0)
  fast = relinear_sg(optax.identity(), 2.0, 1.0, allow_above_one=True)
  u = stepped(fast, params, params)
  np.testing.assert_array_equal(u["g"]["bias"], 2 * params["g"]["bias"])


def test_bad_labels_and_missing_params():
  params = drawn()
  labels = {"r": "other", "g": "gate", "b": "b"}
  with pytest.raises(ValueError, match=r"labels must be g, b or other, got 'gate'"):
    stepped(relinear(0.5, 0.5, labels), params, params)
  with pytest.raises(ValueError, match="needs params"):
    relinear_sw(0.5, 0.5).update(params, optax.EmptyState())
