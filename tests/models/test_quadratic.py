import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.models import QuadraticConv, QuadraticDense, mlp, quadratic_mlp
from gradlab.transforms.updates import quadratic_labels
from tests.models.drawn import drawn
from tests.oracles import relinear as oracle

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(jax.random.key(1), (6, 5)))


def patches(x, size, padding):
  """The windows of [B, H, W, C] as rows [B, H', W', size * size * C]."""
  if padding == "SAME":
    low = (size - 1) // 2
    x = np.pad(x, ((0, 0), *((low, size - 1 - low),) * 2, (0, 0)))
  view = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  return np.moveaxis(view, 3, -1).reshape(*view.shape[:3], -1)


@pytest.mark.parametrize("compact", [False, True])
def test_perceptron_matches_float64(compact):
  model = quadratic_mlp((7, 3), 4, "tanh", compact=compact)
  params, state = drawn(model, X)
  outputs, after = model.apply(params, state, X)
  assert set(params["hidden_0"]) == (set("rb") if compact else set("rgb"))
  x = X.astype(np.float64)
  for k in range(2):
    x = np.tanh(oracle.forward(params[f"hidden_{k}"], x))
  expected = x @ np.float64(params["head"]["kernel"]) + params["head"]["bias"]
  # float32 sums of at most 7 products of order one
  np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
  assert outputs.dtype == jnp.float32
  assert state == after == {}


def test_starts_as_the_linear_perceptron():
  model, linear = quadratic_mlp((7, 3), 4), mlp((7, 3), 4)
  params, _ = model.init(KEY, X)
  outputs, _ = model.apply(params, {}, X)
  for k in range(2):
    params[f"hidden_{k}"] = params[f"hidden_{k}"]["r"]
  np.testing.assert_array_equal(outputs, linear.apply(params, {}, X)[0])


def test_labels_of_a_perceptron():
  params, _ = drawn(quadratic_mlp((7,), (("b", 2), ("g", 3))), X)
  labels = jax.tree.leaves(quadratic_labels(params))
  # two heads with two leaves and branch r stay as they are
  assert sorted(labels) == ["b"] * 2 + ["g"] * 2 + ["other"] * 6


def test_random_initialisation_draws_every_branch():
  params, _ = quadratic_mlp((200,), 1, init="random").init(KEY, X)
  kernels = [params["hidden_0"][b]["kernel"] for b in "rgb"]
  for kernel in kernels:
    # 1000 normals: relative deviation about 2%
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / 5), rtol=0.1)
  assert not np.array_equal(kernels[0], kernels[1])
  assert not np.array_equal(kernels[1], kernels[2])
  assert not any(params["hidden_0"][b]["bias"].any() for b in "rgb")


@pytest.mark.parametrize(("padding", "compact"), [("SAME", False), ("VALID", True)])
def test_convolution_is_a_dense_layer_on_windows(padding, compact):
  layer = QuadraticConv(3, padding=padding, compact=compact)
  x = np.asarray(jax.random.normal(KEY, (2, 5, 6, 2)))
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: random.normal(size=leaf.shape).astype(np.float32) / 3,
    jax.eval_shape(layer.init, KEY, x)["params"],
  )
  assert params["b"]["kernel"].shape == (3, 3, 2, 3)
  flat = {
    b: {"kernel": p["kernel"].reshape(-1, 3), "bias": p["bias"]}
    for b, p in params.items()
  }
  rows = patches(x.astype(np.float64), 3, padding)
  # float32 sums of 18 products of order one
  np.testing.assert_allclose(
    layer.apply({"params": params}, x),
    oracle.forward(flat, rows),
    rtol=1e-4,
    atol=1e-5,
  )


def test_convolution_along_one_axis_with_strides():
  layer = QuadraticConv(2, (3,), strides=(2,), padding="VALID")
  x = np.asarray(jax.random.normal(KEY, (4, 9, 3)))
  params = layer.init(KEY, x)
  outputs = layer.apply(params, x)
  assert outputs.shape == (4, 4, 2)
  kernel = np.asarray(params["params"]["r"]["kernel"]).reshape(-1, 2)
  windows = np.stack([x[:, i : i + 3].reshape(4, -1) for i in range(0, 7, 2)], 1)
  # float32 sums of 9 products of order one
  np.testing.assert_allclose(outputs, windows @ kernel, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r"\[B, \*space, C\] with 3 axes, got \(9, 3\)"):
    layer.apply(params, x[0])


def test_a_dense_layer_alone_learns_a_product():
  """x_1 x_2 is one quadratic neuron, and no linear one."""
  x = np.asarray(jax.random.normal(KEY, (64, 2)))
  y = x[:, :1] * x[:, 1:]
  layer, optimiser = QuadraticDense(1, kernel_init="random"), optax.adam(0.05)
  params = layer.init(jax.random.key(3), x)

  def loss(params):
    return jnp.mean((layer.apply(params, x) - y) ** 2)

  def step(carry, _):
    params, state = carry
    value, g = jax.value_and_grad(loss)(params)
    u, state = optimiser.update(g, state)
    return (optax.apply_updates(params, u), state), value

  with jax.numpy_dtype_promotion("standard"):  # optax mixes counters with floats
    carry = params, optimiser.init(params)
    losses = jax.jit(lambda c: jax.lax.scan(step, c, length=400)[1])(carry)
  assert losses[-1] < 1e-3 < 0.5 < losses[0]


def test_bfloat16_goes_between_the_layers():
  model = quadratic_mlp((32,), 4, dtype="bfloat16")
  params, state = drawn(model, X)
  outputs, _ = model.apply(params, state, X)
  exact, _ = quadratic_mlp((32,), 4).apply(params, state, X)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  assert outputs.dtype == jnp.float32
  # 8 bits of mantissa on numbers of order ten
  np.testing.assert_allclose(outputs, exact, rtol=0.05, atol=0.2)
  assert float(jnp.abs(outputs - exact).max()) > 0


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"features": (0,)}, "features must hold positive integers"),
    ({"outputs": 0}, "outputs must hold positive integers"),
    ({"activation": "rleu"}, "activation must be one of"),
    ({"init": "linear"}, "init must be one of relinear, random; got 'linear'"),
    ({"dtype": "int32"}, "dtype must be one of"),
  ],
)
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    quadratic_mlp(**kwargs)
