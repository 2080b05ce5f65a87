import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from gradlab.models import from_functions, from_linen, from_nnx

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(jax.random.key(1), (6, 5)))


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x, deterministic=True):
    x = nn.BatchNorm(use_running_average=deterministic, name="norm")(x)
    x = nn.Dropout(0.5, deterministic=deterministic)(x)
    self.sow("intermediates", "seen", x)
    return nn.Dense(3, name="out")(x)


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(5, rngs=rngs)
    self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
    self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])

  def __call__(self, x):
    x = self.norm(x)
    for drop, layer in zip(self.drops, self.layers, strict=True):
      x = layer(drop(x))
    self.seen = nnx.Intermediate(x)
    return x


def models():
  return {"linen": from_linen(Linen()), "nnx": from_nnx(Nnx)}


@pytest.fixture(params=["linen", "nnx"])
def model(request):
  return models()[request.param]


def test_trees_are_plain_dicts_of_float32(model):
  def check(node):
    if not isinstance(node, dict):
      assert isinstance(node, jax.Array)
      assert node.dtype == jnp.float32
      return
    assert type(node) is dict
    for name, child in node.items():
      assert isinstance(name, str)
      check(child)

  params, state = model.init(KEY, X)
  check(params)
  check(state)
  assert "params" not in params
  assert len(jax.tree.leaves(state)) == 2


def test_state_changes_only_in_training_and_keeps_its_form(model):
  params, state = model.init(KEY, X)
  _, same = model.apply(params, state, X)
  _, after = jax.jit(lambda p, s: model.apply(p, s, X, key=KEY, train=True))(
    params, state
  )
  assert same is state

  def describe(tree):
    return jax.tree.map(lambda z: (z.shape, z.dtype, z.weak_type), tree)

  assert describe(after) == describe(state)
  moved = [
    float(jnp.abs(a - b).max())
    for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True)
  ]
  assert min(moved) > 1e-4


def test_state_is_a_scan_carry(model):
  params, state = model.init(KEY, X)

  def body(s, k):
    return (model.apply(params, s, X, key=k, train=True)[1], None)

  scanned, _ = jax.lax.scan(body, state, jax.random.split(KEY, 3))
  looped = state
  for key in jax.random.split(KEY, 3):
    looped = body(looped, key)[0]
  # the same float32 operations, fused differently
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), scanned, looped
  )


def test_running_moments_follow_the_batch(model):
  params, state = model.init(KEY, X)
  _, after = model.apply(params, state, X, key=KEY, train=True)
  leaves = dict(
    (path[-1].key, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(after)
  )
  # both libraries move by 1 % from (0, 1); moments of 6 float32 numbers
  np.testing.assert_allclose(leaves["mean"], 0.01 * X.mean(0), rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(leaves["var"], 0.99 + 0.01 * X.var(0), rtol=1e-5)


def test_key_decides_the_dropout_and_nothing_else(model):
  params, state = model.init(KEY, X)

  def outputs(**kwargs):
    return np.asarray(model.apply(params, state, X, **kwargs)[0])

  first = outputs(key=KEY, train=True)
  np.testing.assert_array_equal(first, outputs(key=KEY, train=True))
  assert not np.allclose(first, outputs(key=jax.random.key(5), train=True))
  np.testing.assert_array_equal(outputs(), outputs(key=KEY))


def test_initial_parameters_follow_the_key(model):
  first, again, other = (model.init(jax.random.key(k), X)[0] for k in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)

  def kernels(params):
    return [p for p in jax.tree.leaves(params) if p.ndim == 2]

  for a, b in zip(kernels(first), kernels(other), strict=True):
    assert not np.allclose(a, b)


def test_per_example_gradients_add_up(model):
  params, state = model.init(KEY, X)

  def loss(p, x):
    return jnp.sum(model.apply(p, state, x)[0] ** 2)

  whole = jax.grad(loss)(params, X)
  each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, X[:, None])
  # sums of 6 float32 gradients in another order
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=1e-4, atol=1e-5),
    each,
    whole,
  )


def test_vmap_over_parameters_is_an_ensemble(model):
  params, state = jax.vmap(model.init, (0, None))(jax.random.split(KEY, 3), X)
  outputs = jax.vmap(lambda p, s: model.apply(p, s, X)[0])(params, state)
  for k in range(3):
    one = jax.tree.map(lambda z, k=k: z[k], (params, state))
    # batched and single float32 products
    np.testing.assert_allclose(
      outputs[k], model.apply(*one, X)[0], rtol=1e-5, atol=1e-6
    )


def test_nnx_outputs_match_the_equations():
  model = from_nnx(Nnx)
  params, state = model.init(KEY, X)
  y = X.astype(np.float64) / np.sqrt(1 + 1e-5)
  for index in "01":
    y = y @ np.asarray(params["layers"][index]["kernel"], np.float64)
  # float32 sums of 5 terms
  np.testing.assert_allclose(model.apply(params, state, X)[0], y, rtol=1e-5, atol=1e-5)


def test_nnx_layers_draw_their_own_masks():
  class Twice(nnx.Module):
    def __init__(self, rngs):
      self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
      return self.drops[0](x), self.drops[1](x)

  model = from_nnx(Twice)
  x = jnp.ones((64,))
  params, state = model.init(KEY, x)
  (left, right), _ = model.apply(params, state, x, key=KEY, train=True)
  assert params == state == {}
  assert set(np.unique(left)) == set(np.unique(right)) == {0.0, 2.0}
  assert not np.array_equal(left, right)


def test_nnx_stacked_streams_are_split():
  class Stack(nnx.Module):
    def __init__(self, rngs):
      @nnx.split_rngs(splits=3)
      @nnx.vmap
      def make(rngs):
        return nnx.Dropout(0.5, rngs=rngs)

      self.drops = make(rngs)

    def __call__(self, x):
      return nnx.vmap(lambda drop, x: drop(x))(self.drops, x)

  model = from_nnx(Stack)
  x = jnp.ones((3, 64))
  outputs, _ = model.apply(*model.init(KEY, x), x, key=KEY, train=True)
  assert len(np.unique(outputs, axis=0)) == 3


def test_nnx_training_with_streams_needs_a_key():
  model = from_nnx(Nnx)
  params, state = model.init(KEY, X)
  with pytest.raises(ValueError, match="needs a key to train"):
    model.apply(params, state, X, train=True)


def test_linen_boxes_are_removed():
  init = nn.with_partitioning(nn.initializers.ones, ("data", "model"))
  model = from_linen(nn.Dense(3, kernel_init=init))
  params, _ = model.init(KEY, X)
  np.testing.assert_array_equal(params["kernel"], np.ones((5, 3)))


def test_linen_streams_are_named_and_differ():
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      if not train:
        return x
      return jnp.stack([jax.random.normal(self.make_rng(n), x.shape) for n in "ab"])

  model = from_linen(Noisy(), rngs=("a", "b"))
  outputs, _ = model.apply(*model.init(KEY, X), X, key=KEY, train=True)
  assert not np.allclose(outputs[0], outputs[1])


def test_functions_get_what_they_ask_for():
  def init(key, x):
    return {"w": jax.random.normal(key, x.shape[-1:])}

  plain = from_functions(init, lambda params, x: x @ params["w"])
  params, state = plain.init(KEY, X)
  outputs, after = plain.apply(params, state, X, key=KEY, train=True)
  np.testing.assert_array_equal(outputs, X @ params["w"])
  assert state == after == {}

  def noisy(params, x, *, key, train):
    return x @ params["w"] + (jax.random.normal(key) if train else 0.0)

  model = from_functions(init, noisy)
  np.testing.assert_array_equal(model.apply(params, {}, X)[0], outputs)
  noise = model.apply(params, {}, X, key=KEY, train=True)[0] - outputs
  # one number added to float32 outputs of order one
  np.testing.assert_allclose(noise, np.full(6, jax.random.normal(KEY)), atol=1e-6)
