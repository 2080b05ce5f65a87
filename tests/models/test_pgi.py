import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.models import PGINet, pgi
from gradlab.transforms.objectives import (
  programmable_gradient_information,
  strip_auxiliary,
)
from tests.models.drawn import drawn
from tests.oracles import programmable_gradient_information as oracle


def applied(model, *args, train=False):
  return jax.jit(model.apply, static_argnames="train")(*args, train=train)


def images(*shape, seed=1):
  return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def small(**kwargs):
  return pgi(**{"stages": (3, 4, 2), "outputs": 3, "activation": "tanh", **kwargs})


@functools.cache
def weighted():
  """Params, images and the gradient of the loss as a function of params and weight."""
  model, x = small(), images(3, 4, 4)
  return drawn(model, x)[0], x, jax.jit(functools.partial(gradients, model, x))


LABELS = jnp.array([0, 2, 1])


def gradients(model, x, params, weight):
  def loss(params):
    outputs, _ = model.apply(params, {}, x, train=True)
    return programmable_gradient_information(
      outputs, {"label": LABELS}, aux_weight=weight
    )[0]

  return jax.grad(loss)(params)


@pytest.mark.parametrize(
  ("aux_levels", "levels", "aux_branch", "depth"),
  [
    (3, (1, 2, 3), True, 1),
    ((2, 3), (2, 3), True, 2),
    ((1, 3), (1, 3), True, 1),
    (2, (2, 3), False, 2),
  ],
)
def test_outputs_match_float64(aux_levels, levels, aux_branch, depth):
  model = small(aux_levels=aux_levels, aux_branch=aux_branch, depth=depth)
  x = images(3, 7, 5, 2)
  params, state = drawn(model, x)
  (main, auxiliary), _ = applied(model, params, state, x, train=True)
  wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  expected = oracle.network(wide, x.astype(np.float64), levels)
  for left, right in zip((main, *auxiliary), (expected[0], *expected[1]), strict=True):
    # float32 sums of at most 60 terms below one
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
  assert state == {}


def test_stripping_leaves_the_main_output_bit_for_bit():
  model, x = small(batch_norm=True), images(3, 8, 8)
  params, state = drawn(model, x)
  _, state = applied(model, params, state, x, train=True)
  outputs, _ = applied(model, params, state, x)
  lean = strip_auxiliary(params), strip_auxiliary(state)
  assert set(lean[0]) == {"stage_1", "stage_2", "stage_3", "head"}
  assert set(lean[1]["batch_stats"]) == {"stage_1", "stage_2", "stage_3"}
  np.testing.assert_array_equal(applied(model, *lean, x)[0], outputs)
  plain = small(batch_norm=True, aux_levels=0)
  assert jax.tree.structure(plain.init(jax.random.key(0), x)) == jax.tree.structure(
    lean
  )
  np.testing.assert_array_equal(applied(plain, *lean, x)[0], outputs)


def test_inference_does_not_trace_the_branch():
  x = jnp.ones((2, 8, 8))
  full, plain = small(), small(aux_levels=())
  params, state = jax.eval_shape(full.init, jax.random.key(0), x)
  lean = strip_auxiliary(params)
  texts = [
    str(jax.make_jaxpr(lambda p, m=m: m.apply(p, state, x)[0])(lean))
    for m in (full, plain)
  ]
  assert texts[0] == texts[1]
  main, auxiliary = jax.eval_shape(
    lambda p: plain.apply(p, state, x, train=True)[0], lean
  )
  assert (main.shape, auxiliary) == ((2, 3), [])


def test_main_parameters_are_drawn_as_without_the_branch():
  x, key = jnp.ones((1, 8, 8)), jax.random.key(3)
  params, _ = jax.jit(small(stages=(3, 2)).init)(key, x)
  lean, _ = jax.jit(small(stages=(3, 2), aux_levels=0).init)(key, x)
  jax.tree.map(np.testing.assert_array_equal, strip_auxiliary(params), lean)
  assert params["aux_route_2"]["kernel"].shape == (1, 1, 2, 5)
  assert params["aux_route_1"]["kernel"].shape == (1, 1, 3, 3)
  light, _ = jax.eval_shape(small(aux_branch=False).init, key, x)
  assert {name for name in light if name.startswith("aux_")} == {
    "aux_head_1",
    "aux_head_2",
    "aux_head_3",
  }


def test_gradients_are_affine_in_the_weight():
  params, x, of = weighted()
  at = {weight: of(params, weight) for weight in (0.0, 0.5, 2.0)}
  without = jax.jit(functools.partial(gradients, small(aux_levels=0), x))
  plain = without(strip_auxiliary(params), 0.25)
  # two programs: the compiler may order the same float32 sums in two ways
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    strip_auxiliary(at[0.0]),
    plain,
  )
  for name, leaf in at[0.0].items():
    if name.startswith("aux_"):
      jax.tree.map(
        np.testing.assert_array_equal, leaf, jax.tree.map(jnp.zeros_like, leaf)
      )
  line = jax.tree.map(lambda a, b: a + 4.0 * (b - a), at[0.0], at[0.5])
  # float32 differences of numbers of order one
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), line, at[2.0]
  )
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), at[0.0], at[2.0])
  assert min(jax.tree.leaves(moved["stage_1"])) > 1e-4


def test_closed_routes_cut_the_branch_off_but_learn():
  params, x, of = weighted()
  closed = {
    name: jax.tree.map(jnp.zeros_like, leaf) if "route" in name else leaf
    for name, leaf in params.items()
  }
  grads, zero = of(closed, 0.25), of(closed, 0.0)
  for name in strip_auxiliary(params):
    jax.tree.map(np.testing.assert_array_equal, grads[name], zero[name])
  for level in (1, 2, 3):
    assert float(jnp.abs(grads[f"aux_route_{level}"]["kernel"]).max()) > 1e-5
  other = {**closed, "stage_1": jax.tree.map(lambda p: 2 * p, closed["stage_1"])}
  outputs = jax.jit(lambda p: small().apply(p, {}, x, train=True)[0][1])
  jax.tree.map(np.testing.assert_array_equal, outputs(closed), outputs(other))


def test_deep_supervision_reads_the_main_stages():
  model, x = small(aux_branch=False, aux_levels=(3,)), images(3, 8, 8)
  params, _ = drawn(model, x)
  params = {**params, "aux_head_3": params["head"]}
  (main, (auxiliary,)), _ = applied(model, params, {}, x, train=True)
  np.testing.assert_array_equal(main, auxiliary)


def test_flat_inputs_are_resized_by_nearest_index():
  x = images(2, 3, 4)
  model = small(image_shape=(3, 4), resize=(6, 6))
  params, _ = drawn(model, x.reshape(2, 12))
  bigger = oracle.nearest(x[..., None], 6, 6).astype(np.float32)
  expected = applied(small(), params, {}, bigger)[0]
  np.testing.assert_array_equal(
    applied(model, params, {}, x.reshape(2, 12))[0], expected
  )


def test_bfloat16_stays_near_float32():
  x = images(3, 8, 8)
  low, exact = small(dtype="bfloat16"), small()
  params, _ = drawn(low, x)
  outputs, reference = (applied(m, params, {}, x, train=True)[0] for m in (low, exact))
  for left, right in zip(
    jax.tree.leaves(outputs), jax.tree.leaves(reference), strict=True
  ):
    assert left.dtype == jnp.float32
    # 8 bits of mantissa through four layers with outputs of order one
    np.testing.assert_allclose(left, right, atol=0.1)


def test_module_by_its_own_name():
  module = PGINet((2, 3), 4, (2,))
  x = images(2, 4, 4, 1)
  init = functools.partial(module.init, train=True)
  variables = jax.tree.map(
    lambda p: jnp.full(p.shape, 0.1), jax.eval_shape(init, jax.random.key(0), x)
  )
  main, (auxiliary,) = module.apply(variables, x, train=True)
  assert main.shape == auxiliary.shape == (2, 4)
  np.testing.assert_array_equal(module.apply(variables, x), main)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"stages": ()}, "at least one stage"),
    ({"stages": (0,)}, "stages must hold positive integers"),
    ({"depth": 0}, "must hold positive integers"),
    ({"image_shape": (64,)}, r"image_shape must be \(H, W\) or"),
    ({"resize": (8, 8, 1)}, r"resize must be \(H, W\), got"),
    ({"aux_levels": (0, 1)}, r"distinct levels in 1\.\.3, got \(0, 1\)"),
    ({"aux_levels": (2, 2)}, "distinct levels"),
    ({"aux_levels": -1}, "aux_levels must be at least 0"),
    ({"activation": "relu6"}, "activation must be one of"),
    ({"dtype": "int8"}, "dtype must be one of"),
  ],
)
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    pgi(**kwargs)
