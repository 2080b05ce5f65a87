import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab import pipeline, sharding
from gradlab.transforms.updates import (
  adamw,
  adan,
  chain,
  diffgrad,
  low_rank_projection,
  quantised_moments,
  scale_by_adan,
  scale_by_diffgrad,
)
from gradlab.transforms.updates.quantised_moments import QuantisedMoment, moment_map
from tests.oracles import quantise as oracle
from tests.transforms.updates.trajectories import follow, noise

FACTORIES = {"adamw": adamw, "adan": adan, "diffgrad": diffgrad}
P = jax.sharding.PartitionSpec


def rule(name, learning_rate):
  more = {"weight_decay": 0.0} if name == "adamw" else {}
  return FACTORIES[name](learning_rate, **more)


def bytes_of(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def shapes(transform, params):
  """The state of a transformation, without its numbers."""
  return jax.eval_shape(transform.init, params)


def moments(state):
  """The quantised arrays of a state."""
  leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantisedMoment))
  return [leaf for leaf in leaves if isinstance(leaf, QuantisedMoment)]


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize(
  ("bits", "block", "shape"), [(8, None, (7, 41)), (8, 16, (6, 8)), (4, None, (9, 33))]
)
def test_follows_the_oracle(name, bits, block, shape):
  gradients, theta = noise(8, *shape), noise(*shape, seed=1)
  transform = quantised_moments(bits, rule(name, 0.05), block_size=block, min_size=0)
  thetas, state = follow(transform, jnp.asarray(theta), gradients)
  block = block or {8: 256, 4: 128}[bits]
  expected, kept = oracle.trajectory(name, theta, gradients, 0.05, bits, block)
  # float32 against float64; no entry of these lies so near a midpoint as to differ.
  np.testing.assert_allclose(thetas, expected, rtol=2e-4, atol=2e-5)
  found = [moment.dequantise() for moment in moments(state)]
  assert len(found) == len(kept)
  for ours, theirs in zip(found, kept.values(), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
  ("name", "plain", "eight", "four"),
  [
    ("adamw", 8, 2.03125, 1.0625),
    ("adan", 16, 4.0625, 2.125),
    ("diffgrad", 12, 3.046875, 1.59375),
  ],
)
def test_bytes_per_parameter(name, plain, eight, four):
  params = {"kernel": jnp.zeros((256, 128))}
  count = 4  # one int32
  sizes = [
    (bytes_of(jax.jit(transform.init)(params)) - count) / (256 * 128)
    for transform in (
      rule(name, 0.1),
      quantised_moments(8, rule(name, 0.1)),
      quantised_moments(4, rule(name, 0.1)),
    )
  ]
  assert sizes == [plain, eight, four]


# How far from the float32 run the parameters end, and how much of the progress in the
# loss is lost: twice what was measured. Four bits of g_prev make a rough difference.
NEAR = {
  "adamw": ((8, False, 0.015, 0.001), (4, False, 0.35, 0.02), (4, True, 0.25, 0.02)),
  "adan": ((8, False, 0.05, 0.001), (4, True, 0.7, 0.08)),
  "diffgrad": ((8, False, 0.035, 0.001), (4, True, 0.4, 0.05)),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_stays_near_the_float32_rule(name):
  """60 steps of least squares."""
  inputs, targets = jnp.asarray(noise(64, 40)), jnp.asarray(noise(64, 12, seed=1))

  def loss(theta):
    return jnp.mean(jnp.square(inputs @ theta - targets))

  def run(transform):
    def step(carry, _):
      theta, state = carry
      value, grad = jax.value_and_grad(loss)(theta)
      updates, state = transform.update(grad, state, theta)
      return (optax.apply_updates(theta, updates), state), (value, theta)

    def scan(theta):
      return jax.lax.scan(step, (theta, transform.init(theta)), length=60)[1]

    return jax.jit(scan)(jnp.zeros((40, 12)))

  values, thetas = run(rule(name, 0.02))
  for bits, stochastic, apart, worse in NEAR[name]:
    found, others = run(
      quantised_moments(
        bits, rule(name, 0.02), min_size=0, stochastic_rounding=stochastic
      )
    )
    distance = jnp.linalg.norm(others[-1] - thetas[-1]) / jnp.linalg.norm(thetas[-1])
    assert distance < apart
    assert abs(found[-1] - values[-1]) < worse * (values[0] - values[-1])


def test_what_is_quantised_and_with_which_map():
  params = {
    "kernel": jnp.ones((64, 64)),
    "bias": jnp.ones(64),
    "empty": jnp.ones((0, 3)),
    "scale": jnp.float32(1),
    "none": None,
  }
  state = shapes(quantised_moments(8, scale_by_adan()), params).inner
  signs = {name: getattr(state, name)["kernel"].signed for name in "mvn"}
  assert signs == {"m": True, "v": True, "n": False}
  assert state.g_prev["kernel"].signed
  assert state.count.dtype == jnp.int32
  for name in ("bias", "empty", "scale"):
    assert state.m[name].dtype == jnp.float32
  everything = shapes(quantised_moments(4, scale_by_adan(), min_size=0), params).inner
  assert everything.m["scale"].codes.shape == (1,)
  assert everything.m["bias"].codes.shape == (32,)
  assert everything.m["empty"].shape == (0, 3)
  other = shapes(
    quantised_moments(8, scale_by_adan(), second_moments=("v",), skip=("n", "m")),
    params,
  )
  assert [moment.signed for moment in moments(other)] == [False, True]


def test_a_single_array_and_wrapped_states():
  single = shapes(quantised_moments(8, optax.scale_by_adam()), jnp.ones((64, 64)))
  assert not single.inner.nu.signed
  params = {"a": jnp.ones((64, 64)), "b": jnp.ones((80, 64))}
  masked = optax.masked(adamw(0.1), {"a": True, "b": False})
  state = quantised_moments(8, optax.named_chain(("rule", masked))).init(params)
  assert [moment.shape for moment in moments(state)] == [(64, 64)] * 2
  assert [moment.signed for moment in moments(state)] == [True, False]


def test_accumulated_gradients_are_not_quantised():
  transform = quantised_moments(8, optax.MultiSteps(adamw(0.1), 2), min_size=0)
  state = transform.init({"w": jnp.ones((4, 4))})
  assert len(moments(state)) == 2
  assert state.inner.acc_grads["w"].dtype == jnp.float32


def test_second_moments_never_become_zero():
  """An entry far below its block's largest keeps a direction of the order of one."""
  g = jnp.full((2, 64), 1e-6).at[0, 0].set(1.0)
  for bits in (8, 4):
    assert moment_map(False, bits).min() > 0
    transform = quantised_moments(bits, diffgrad(1.0), min_size=0)
    (_, last), state = follow(transform, jnp.zeros((2, 64)), [g, -g])
    assert np.abs(last).max() < 3
    (nu,) = [moment for moment in moments(state) if not moment.signed]
    assert nu.dequantise().min() > 0


def test_maps():
  for bits in (8, 4):
    for signed in (True, False):
      expected = oracle.moment_map(signed, bits)
      np.testing.assert_allclose(moment_map(signed, bits), expected, rtol=1e-6)


def test_zero_gradients_change_nothing_and_zero_blocks_stay():
  theta = jnp.asarray(noise(4, 300))
  for bits in (8, 4):
    transform = quantised_moments(bits, rule("adamw", 0.1), min_size=0, block_size=256)
    zero = jnp.zeros_like(theta)
    thetas, state = follow(transform, theta, [zero, zero.at[0, 0].set(1.0)])
    np.testing.assert_array_equal(thetas[0], theta)
    np.testing.assert_array_equal(thetas[1][1:], theta[1:])
    for moment in moments(state):
      np.testing.assert_array_equal(moment.absmax > 0, np.arange(5) == 0)
      np.testing.assert_array_equal(moment.dequantise().reshape(-1)[256:], 0)


def test_what_is_not_finite_spoils_its_block_only():
  transform = quantised_moments(8, rule("adamw", 0.1), min_size=0, block_size=64)
  g = jnp.ones((4, 64)).at[2, 5].set(jnp.nan)
  (_, last), _ = follow(transform, jnp.zeros((4, 64)), [g, jnp.ones((4, 64))])
  spoilt = np.broadcast_to(np.arange(4)[:, None] == 2, (4, 64))
  np.testing.assert_array_equal(np.isnan(last), spoilt)


def test_bfloat16_parameters_and_states():
  theta = jnp.ones((16, 16), jnp.bfloat16)
  gradients = noise(3, 16, 16).astype(jnp.bfloat16)
  wrapped = quantised_moments(8, adamw(jnp.float32(0.1)), min_size=0)
  thetas, state = follow(wrapped, theta, gradients)
  assert thetas[-1].dtype == jnp.bfloat16
  assert [moment.dtype for moment in moments(state)] == [jnp.float32] * 2
  half = quantised_moments(8, scale_by_adan(accumulator_dtype=jnp.bfloat16), min_size=0)
  before = half.init(theta)
  updates, after = half.update(jnp.asarray(gradients[0]), before, theta)
  assert updates.dtype == jnp.bfloat16
  assert moments(after)[0].dequantise().dtype == jnp.bfloat16
  assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)


def test_integer_leaves_are_the_inner_rules_business():
  params = {"w": jnp.ones((8, 8)), "steps": jnp.arange(8)}
  with pytest.raises(ValueError, match="diffGrad needs floating-point"):
    quantised_moments(8, diffgrad(0.1)).init(params)
  state = quantised_moments(8, optax.trace(0.9), min_size=0).init(params)
  assert state.inner.trace["steps"].dtype == jnp.int32
  assert state.inner.trace["w"].codes.dtype == jnp.uint8


def test_inner_learning_rates_vmap():
  theta, gradients = jnp.asarray(noise(8, 40)), jnp.asarray(noise(3, 8, 40, seed=1))

  def run(learning_rate):
    transform = quantised_moments(8, rule("adamw", learning_rate), min_size=0)

    def step(carry, g):
      updates, state = transform.update(g, carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (theta, transform.init(theta)), gradients)[0]

  rates = jnp.array([0.1, 0.01])
  thetas, states = jax.jit(jax.vmap(run))(rates)
  assert states.inner[0].mu.codes.shape == (2, 8, 40)
  for i, rate in enumerate(rates):
    # The rate is a factor of the whole update, so that the moments are the same.
    alone, state = jax.jit(run)(rate)
    np.testing.assert_allclose(thetas[i], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(states.inner[0].mu.codes[i], state.inner[0].mu.codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_stochastic_rounding_is_unbiased_and_repeatable(bits):
  g = jnp.asarray(noise(2, 64))

  def state_of(key):
    transform = quantised_moments(
      bits, scale_by_diffgrad(), min_size=0, stochastic_rounding=True, key=key
    )
    return transform.update(g, transform.init(g))[1]

  states = jax.jit(jax.vmap(state_of))(jax.random.split(jax.random.key(0), 2000))
  mean = [
    np.asarray(jax.vmap(QuantisedMoment.dequantise)(moment), np.float64).mean(axis=0)
    for moment in moments(states)
  ]
  expected = [0.1 * g, 1e-3 * jnp.square(g), g]
  entries = [moment_map(moment.signed, bits) for moment in moments(states)]
  for found, wanted, grid in zip(mean, expected, entries, strict=True):
    scale = np.abs(wanted).max()
    inside = (wanted / scale > grid[0]) & (wanted != 0)
    # A mean of 2000 with a spread of at most half the widest gap: five sigma.
    bound = 5 * np.diff(grid).max() / 2 / np.sqrt(2000) * scale
    assert np.abs(found - wanted)[inside].max() < bound
  one, same, other = (jax.jit(state_of)(jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one.inner.mu.codes, same.inner.mu.codes)
  assert np.any(one.inner.mu.codes != other.inner.mu.codes)
  assert not jnp.array_equal(
    jax.random.key_data(one.key), jax.random.key_data(jax.random.key(1))
  )


def test_a_chain_puts_it_around_what_follows():
  params, g = jnp.ones((8, 8)), jnp.asarray(noise(8, 8))
  clip, rest = optax.clip(0.5), (scale_by_diffgrad(), optax.scale(-0.1))
  sugar = chain(clip, quantised_moments(8, min_size=0), *rest)
  spelt = optax.chain(clip, quantised_moments(8, optax.chain(*rest), min_size=0))
  results = [t.update(g, t.init(params), params) for t in (sugar, spelt)]
  jax.tree.map(np.testing.assert_array_equal, *results)
  # Nothing behind it, and nothing to put around: optax's own chain.
  plain = chain(clip, quantised_moments(8, scale_by_diffgrad(), min_size=0))
  assert len(moments(plain.init(params))) == 3
  for alone in (quantised_moments(8), chain(clip, quantised_moments(8))):
    with pytest.raises(ValueError, match="quantised_moments needs inner"):
      alone.init(params)
  with pytest.raises(ValueError, match=r"optax\.chain can't hand them over"):
    optax.chain(quantised_moments(8), scale_by_diffgrad()).init(params)


def test_low_rank_moments_in_eight_bits():
  params, g = {"w": jnp.ones((64, 32))}, {"w": jnp.asarray(noise(64, 32))}
  transform = chain(
    low_rank_projection(4), quantised_moments(8, min_size=0), scale_by_diffgrad()
  )
  state = transform.init(params)
  assert {moment.shape for moment in moments(state)} == {(64, 4)}
  updates, _ = transform.update(g, state, params)
  plain = low_rank_projection(4, inner=scale_by_diffgrad())
  expected, _ = plain.update(g, plain.init(params), params)
  # Before anything has been rounded they are the same.
  np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4, atol=1e-5)
  assert np.linalg.matrix_rank(updates["w"], tol=1e-3) == 4


def test_codes_are_placed_like_their_parameter():
  params = {"w": jax.ShapeDtypeStruct((64, 128), "float32")}
  specs = {"w": P("data", "model")}
  for bits, expected in ((8, P("data", "model")), (4, P("data"))):
    state = jax.eval_shape(quantised_moments(bits, adamw(0.1)).init, params)
    placed = sharding.state_specs(state, params, specs)
    mu = placed.inner[0].mu["w"]
    assert mu.codes == expected
    assert mu.absmax == P()


def test_a_config_names_it():
  update = {"quantised_moments": {"bits": 4, "inner": {"adan": {"learning_rate": 0.1}}}}
  config = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "features": (64,)},
    "stages": {
      "train": {
        "steps": 1,
        "batch_size": 8,
        "objective": {"name": "cross_entropy"},
        "update": update,
      }
    },
  }
  program = pipeline.build(config).programs["train"]
  path = "update.quantised_moments.inner.adan.learning_rate"
  assert program.hyperparams[path] == 0.1
  inputs = jax.ShapeDtypeStruct((8, 64), "float32")
  state = jax.eval_shape(program.init, jax.random.key(0), inputs)
  # The kernel of 64 x 64, under four averages; the rest is smaller.
  assert [m.shape for m in moments(state.update)] == [(64, 64)] * 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"bits": 5}, "bits must be 8 or 4, got 5"),
    ({"block_size": 0}, "block_size must be at least 1"),
    ({"min_size": -1}, "min_size must be at least 0"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    quantised_moments(**{"inner": adamw(0.1)} | options)
