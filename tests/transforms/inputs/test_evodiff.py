"""``evodiff``: against the written-out rule, its bounds, and exact flows."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.pipeline import build
from gradlab.transforms.inputs import edm_sigmas, evodiff, evodiff_sample, log_sigmas
from gradlab.types import ConfigError
from tests.oracles import evodiff as oracle

quick = hypothesis.settings(max_examples=20, deadline=None)
SHAPE = (4, 3, 3, 2)
GRIDS = {"log": log_sigmas, "edm": edm_sigmas}


def normal(x, sigma):
  """The denoiser of standard normal data."""
  return x / (1 + sigma**2)


def noise(seed=0, shape=SHAPE):
  return np.random.default_rng(seed).normal(size=shape)


def means(seed=1):
  return noise(seed, (5, *SHAPE[1:]))


@functools.cache
def sampler(name="mixture", **options):
  """The compiled sampler of a denoiser, with the mixture's means as an argument."""

  def denoiser(centres):
    if name == "normal":
      return normal
    return oracle.mixture_denoiser(centres, 0.3, xp=jnp)

  return jax.jit(
    lambda x, sigmas, centres: evodiff(denoiser(centres), x, sigmas, **options)
  )


def sample(x, sigmas, **options):
  x, sigmas, centres = (jnp.asarray(a, jnp.float32) for a in (x, sigmas, means()))
  return sampler(**options)(x, sigmas, centres)


@pytest.mark.parametrize("grid", ["log", "edm"])
@pytest.mark.parametrize("count", [2, 3, 10, 20, 21])
def test_follows_the_oracle(grid, count):
  x = 80 * noise()
  with jax.enable_x64(True):
    sigmas = GRIDS[grid](count)
    ours, trace = sampler()(jnp.asarray(x), sigmas, jnp.asarray(means()))
    assert ours.dtype == trace.rho.dtype == jnp.float64
  denoise = oracle.mixture_denoiser(means(), 0.3)
  expected, coefficients, _ = oracle.sample(denoise, x, np.asarray(sigmas))
  # float64 on both sides; x starts near 100 and projections divide small sums.
  np.testing.assert_allclose(ours, expected, atol=1e-10)
  assert trace.rho.shape == (count - 2, SHAPE[0], 1, 1, SHAPE[3])
  for index, row in enumerate(coefficients):
    for ours, expected in zip(trace, row, strict=True):
      np.testing.assert_allclose(ours[index], expected, rtol=1e-8)


@pytest.mark.parametrize(
  "options",
  [
    {"denoise_to_zero": False},
    {"feature_axes": (-1, 1, 2)},
    {"feature_axes": (2,), "sigma_norm": (100.0, 0.5)},
  ],
)
def test_options_follow_the_oracle(options):
  sigmas, x = np.geomspace(4, 0.1, 7), 4 * noise()
  denoise = oracle.mixture_denoiser(means(), 0.3)
  expected, coefficients, _ = oracle.sample(denoise, x, sigmas, **options)
  ours, trace = sample(x, sigmas, **options)
  # A dozen float32 operations on numbers near one in each of six steps.
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)
  assert trace.eta[0].shape == coefficients[0][1].shape


def test_worked_example():
  x, sigmas = jnp.array([[4.0, -2.0]]).reshape(1, 1, 2, 1), jnp.array([4, 2, 1, 0.5])
  shape = (1, 1, 2, 1)
  path, trace = jax.jit(lambda x: evodiff(normal, x, sigmas, denoise_to_zero=False))(x)
  np.testing.assert_allclose(path.ravel(), (0.34418130, -0.17209065), rtol=1e-6)
  np.testing.assert_allclose(
    [leaf.item() for leaf in trace], (0.58392060, 0.36552929, 0.49836727), rtol=1e-6
  )
  denoised = jax.jit(lambda x: evodiff_sample(normal, x, sigmas))(x)
  assert denoised.shape == shape
  np.testing.assert_allclose(denoised.ravel(), (0.27534504, -0.13767252), rtol=1e-6)


@pytest.mark.parametrize("to_zero", [True, False])
def test_calls_are_at_the_levels_in_order(to_zero):
  calls, traces = [], []

  def denoise(x, sigma):
    traces.append(x.dtype)
    assert sigma.shape == ()
    jax.debug.callback(lambda s: calls.append(float(s)), sigma, ordered=True)
    return normal(x, sigma)

  sigmas = log_sigmas(9)
  run = jax.jit(lambda x: evodiff_sample(denoise, x, sigmas, denoise_to_zero=to_zero))
  jax.block_until_ready(run(80 * jnp.ones(SHAPE)))
  jax.effects_barrier()
  assert calls == [float(s) for s in sigmas][: 9 + to_zero]
  assert len(traces) == 3 + to_zero  # two first calls, the scan's body, the last call


@pytest.mark.parametrize("disable", [False, True])
def test_two_steps_are_euler_and_the_last_one(disable):
  sigmas, x = np.array([3.0, 1.0, 0.2]), 3 * noise()
  expected, _, calls = oracle.sample(normal, x, sigmas, denoise_to_zero=False)
  assert calls == [3.0, 1.0]
  with jax.disable_jit(disable):
    ours, trace = evodiff(
      normal, jnp.asarray(x, jnp.float32), sigmas, denoise_to_zero=False
    )
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
  assert trace.eta.shape == (0, 4, 1, 1, 2)


@quick
@hypothesis.given(st.integers(0, 10**6), st.sampled_from((6, 24)))
def test_coefficients_stay_in_their_intervals(seed, count):
  x, sigmas = 10 * noise(seed), np.geomspace(10, 0.01, count + 1)
  _, trace = sample(x, sigmas)
  # The bounds to the last places of float32; on this grid r = 1.
  assert np.all(trace.rho >= 0.5 - 1e-5)
  assert np.all(trace.rho < 1)
  assert np.all(trace.eta >= 0.25 - 1e-6)
  assert np.all(trace.eta <= 0.36553)
  low = 0.37754 if count <= 20 else 0.0
  assert np.all(trace.zeta >= low - 1e-6)
  assert np.all(trace.zeta < 1 + 1e-6)


@quick
@hypothesis.given(st.permutations(range(4)), st.permutations(range(2)))
def test_rows_and_channels_permute(rows, channels):
  sigmas, x = np.geomspace(10, 0.01, 7), 10 * noise()
  ours, _ = sample(x, sigmas, name="normal")
  moved, _ = sample(x[rows][..., channels], sigmas, name="normal")
  np.testing.assert_allclose(moved, ours[np.array(rows)][..., channels], rtol=1e-6)


def test_rows_are_independent_and_vmap():
  sigmas, x = np.geomspace(10, 0.01, 7), 10 * noise()
  together, _ = sample(x, sigmas)
  denoise = oracle.mixture_denoiser(jnp.asarray(means(), jnp.float32), 0.3, xp=jnp)

  def single(row):
    return evodiff_sample(
      lambda x, s: denoise(x[None], s)[0], row, sigmas, feature_axes=(0, 1)
    )

  apart = jax.jit(jax.vmap(single))(jnp.asarray(x, jnp.float32))
  run = jax.jit(single)
  alone = jnp.stack([run(row) for row in jnp.asarray(x, jnp.float32)])
  # Sums of eighteen products in another order, seen through six steps.
  np.testing.assert_allclose(apart, together, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)


def test_a_constant_denoiser_is_ddim_on_the_log_grid():
  m, x = jnp.asarray(noise(3), jnp.float32), 20 * noise()
  levels = np.geomspace(20, 0.002, 9)
  run = jax.jit(lambda x: evodiff(lambda x, s: m, x, levels, denoise_to_zero=False))
  ours, trace = run(jnp.asarray(x, jnp.float32))
  expected = oracle.ddim(lambda x, s: np.asarray(m), x, levels[:-1])
  q, s, t = levels[-1] / levels[-2], levels[-2], levels[-1]
  d = (1 - q) * 0.5 * (0.5 * np.sqrt(q)) * np.asarray(m)
  expected = (1 - np.sqrt(s * t)) * (q * expected + (1 - q) * m) + d
  # D_1 and D_2 are rounding errors of the coefficients: 1e-7 of m at most.
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
  assert np.isfinite(trace.zeta).all()


def test_zero_predictions_project_to_zero():
  sigmas = np.geomspace(4, 0.5, 6)
  x, trace = evodiff(lambda x, s: 0 * x, jnp.ones(SHAPE), sigmas, denoise_to_zero=False)
  shrink = sigmas[-1] / sigmas[0] * (1 - np.sqrt(sigmas[-1] * sigmas[-2]))
  np.testing.assert_allclose(x, shrink, rtol=1e-5)
  np.testing.assert_allclose(trace.eta, 0.25)
  np.testing.assert_allclose(trace.zeta, 1 / (1 + np.exp(0.5)), rtol=1e-6)


def test_many_steps_approach_the_exact_flow():
  x, variance = 80 * noise(shape=(2, 2, 2, 1)), 0.5
  exact = oracle.normal_flow(x, 80.0, variance)

  @jax.jit
  def sampled(x, sigmas):
    return evodiff_sample(lambda x, s: x * variance / (variance + s**2), x, sigmas)

  with jax.enable_x64(True):
    grids = [log_sigmas(count) for count in (40, 160, 640)]
    ends = [np.asarray(sampled(jnp.asarray(x), sigmas)) for sigmas in grids]
  errors = [np.sqrt(np.mean((end - exact) ** 2) / np.mean(exact**2)) for end in ends]
  # At least first order, down to what the last step's factor near 1 - 0.002 leaves.
  assert errors[1] < 0.3 * errors[0] + 0.002
  assert errors[2] < 0.003
  assert errors[0] > 0.005


def test_gradients_pass_and_nan_stays_in_its_channel():
  sigmas = np.geomspace(4, 0.5, 6)
  x = jnp.asarray(noise(), jnp.float32)
  run = jax.jit(lambda x: evodiff_sample(normal, x, sigmas))
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(run(x))))(x)
  assert np.isfinite(gradient).all()
  assert gradient.any()
  bad = np.array(run(x.at[1, 0, 0, 1].set(jnp.nan)))
  assert np.isnan(bad[1, :, :, 1]).all()
  bad[1, :, :, 1] = 0
  assert np.isfinite(bad).all()


def test_traced_levels_are_the_numbers():
  x = jnp.asarray(4 * noise(), jnp.float32)
  grids = jnp.stack([log_sigmas(5, 4.0, 0.1), edm_sigmas(5, 4.0, 0.1)])
  swept = jax.jit(jax.vmap(lambda s: evodiff_sample(normal, x, s)))(grids)
  for row, sigmas in zip(swept, grids, strict=True):
    expected, _, _ = oracle.sample(normal, np.float64(x), sigmas)
    np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6)


def test_bfloat16_only_around_the_model():
  seen = []

  def denoise(x, sigma):
    seen.append((x.dtype, sigma.dtype))
    return normal(x, sigma)

  x, sigmas = 4 * noise(), np.geomspace(4, 0.1, 7)
  run = jax.jit(lambda x: evodiff(denoise, x, sigmas))
  ours, trace = run(jnp.asarray(x, jnp.bfloat16))
  assert ours.dtype == jnp.bfloat16
  assert trace.rho.dtype == jnp.float32
  assert set(seen) == {(jnp.dtype(jnp.bfloat16),) * 2}
  expected, _, _ = oracle.sample(normal, x, sigmas)
  # Eight bits of every prediction.
  np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0.1, atol=0.02)


def test_grids():
  np.testing.assert_allclose(log_sigmas(4), np.geomspace(80, 0.002, 5), rtol=2e-6)
  ramp = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 5)
  np.testing.assert_allclose(edm_sigmas(4), ramp**7, rtol=1e-5)
  np.testing.assert_allclose(edm_sigmas(2, 3.0, 1.0, rho=1.0), (3, 2, 1), rtol=1e-6)
  for make in GRIDS.values():
    with pytest.raises(ValueError, match="num_steps"):
      make(0)
    with pytest.raises(ValueError, match="sigma_min"):
      make(3, 1.0, 0.0)
    with pytest.raises(ValueError, match="sigma_max must lie in"):
      make(3, 1.0, 2.0)
  with pytest.raises(ValueError, match="rho"):
    edm_sigmas(3, rho=0.0)


@pytest.mark.parametrize(
  ("x", "sigmas", "options", "message"),
  [
    (jnp.ones(SHAPE), (1.0, 0.5), {}, "N >= 2"),
    (jnp.ones(SHAPE), 1.0, {}, "N >= 2"),
    (jnp.ones(SHAPE), (1.0, 1.0, 0.5), {}, "strictly decreasing"),
    (jnp.ones(SHAPE), (1.0, 0.5, 0.0), {}, "positive"),
    (jnp.ones(SHAPE), (1.0, 0.5, np.nan), {}, "positive"),
    (jnp.ones(SHAPE, int), (2.0, 1.0, 0.5), {}, "floating-point"),
    (jnp.ones(SHAPE), (2.0, 1.0, 0.5), {"feature_axes": ()}, "feature_axes"),
    (jnp.ones((4, 3)), (2.0, 1.0, 0.5), {}, "feature_axes"),
    (jnp.ones(SHAPE), (2.0, 1.0, 0.5), {"feature_axes": (1, -3)}, "feature_axes"),
  ],
)
def test_bad_arguments(x, sigmas, options, message):
  with pytest.raises(ValueError, match=message):
    evodiff_sample(normal, x, sigmas, **options)


def test_a_prediction_of_another_shape():
  with pytest.raises(ValueError, match="denoise_fn must keep the shape"):
    evodiff_sample(lambda x, s: x[:1], jnp.ones(SHAPE), (2.0, 1.0, 0.5))


def test_a_search_stage_says_what_it_lacks():
  config = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "features": (4,)},
    "stages": {
      "sample": {
        "kind": "search",
        "objective": {"name": "cross_entropy"},
        "method": {"name": "evodiff"},
      }
    },
  }
  with pytest.raises(
    ConfigError, match=r"stages\.sample\.method: evodiff needs 'denoise_fn'"
  ):
    build(config)
