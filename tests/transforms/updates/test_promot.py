import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.updates import (
  adamw,
  attach_prompt,
  init_prompt,
  promot,
  prompt_mask,
)
from tests.oracles import promot as oracle
from tests.transforms.updates.trajectories import noise

WHERE = {"prompt": True, "model": False}
A, B, C = noise(5, 3), noise(5, 4, seed=1), noise(5, seed=2)
quick = hypothesis.settings(max_examples=20, deadline=None)


def start():
  return {
    "prompt": jnp.asarray(noise(3, seed=3)),
    "model": {"w": jnp.asarray(noise(4, seed=4))},
  }


def loss(params):
  """Not quadratic, so that every step sees another Hessian."""
  z = A @ params["prompt"] + B @ params["model"]["w"] - C
  return jnp.sum(jnp.logaddexp(z, -z))


def gradient(prompt, model):
  slope = np.tanh(A.astype(float) @ prompt + B.astype(float) @ model - C)
  return A.T.astype(float) @ slope, B.T.astype(float) @ slope


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def scan(make, switch, steps, value=loss):
  """The params after each step and the last state; ``switch`` is traced."""
  transform = make(switch)

  def step(carry, _):
    params, state = carry
    updates, state = transform.update(jax.grad(value)(params), state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  params = start()
  (_, state), trace = jax.lax.scan(step, (params, transform.init(params)), length=steps)
  return trace, state


def adam_both(switch):
  return promot(optax.adam(0.3), optax.adam(0.05), switch, WHERE)


def test_worked_example():
  transform = promot(optax.sgd(0.5), optax.sgd(0.5), 2, {"p": True, "w": False})
  params = {"p": jnp.float32(0), "w": jnp.float32(0)}
  state, trace = transform.init(params), []
  for _ in range(4):
    slope = params["p"] + params["w"] - 3
    updates, state = transform.update({"p": slope, "w": slope}, state, params)
    params = optax.apply_updates(params, updates)
    trace.append((params["p"].item(), params["w"].item()))
  # Halves of small numbers are exact.
  assert trace == [(1.5, 0), (2.25, 0), (2.25, 0.375), (2.25, 0.5625)]


RULES = {
  "sgd": (
    optax.sgd(0.02, momentum=0.9),
    oracle.sgd(0.02, 0.9),
    optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, momentum=0.5)),
    oracle.sgd(0.01, 0.5, 0.1),
  ),
  "adam": (
    optax.adam(0.3, b2=0.9),  # float32 loses half the digits of 1 - 0.999
    oracle.adam(0.3, b2=0.9),
    optax.adam(lambda count: 0.1 / (1.0 + count), b2=0.9),
    oracle.adam(lambda t: 0.1 / (1 + t), b2=0.9),
  ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("switch", [0, 3, 8])
def test_follows_two_plain_loops(name, switch):
  _, theirs_p, _, theirs_m = RULES[name]
  trace, _ = _rules(name, jnp.int32(switch))
  initial = start()
  expected = oracle.run(
    np.asarray(initial["prompt"], float),
    np.asarray(initial["model"]["w"], float),
    gradient,
    theirs_p,
    theirs_m,
    switch,
    8 - switch,
  )
  for i, (prompt, model) in enumerate(expected):
    # float32 against float64 over eight steps.
    np.testing.assert_allclose(trace["prompt"][i], prompt, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(trace["model"]["w"][i], model, rtol=2e-5, atol=1e-5)


@functools.cache
def _maker(name):
  ours_p, _, ours_m, _ = RULES[name]
  return lambda switch: promot(ours_p, ours_m, switch, WHERE)


def _rules(name, switch):
  return scan(_maker(name), switch, 8)


@quick
@hypothesis.given(st.integers(0, 10))
def test_what_rests_keeps_its_bits(switch):
  trace, _ = scan(adam_both, jnp.int32(switch), 8)
  initial = start()
  for i in range(8):
    if i < switch:
      np.testing.assert_array_equal(trace["model"]["w"][i], initial["model"]["w"])
      assert (trace["prompt"][i] != initial["prompt"]).all()
    else:
      frozen = trace["prompt"][switch - 1] if switch else initial["prompt"]
      np.testing.assert_array_equal(trace["prompt"][i], frozen)


def test_limits_are_fine_tuning_and_prompt_tuning():
  def alone(which, rule):
    params, state, out = start(), rule.init(start()[which]), []
    step = jax.jit(rule.update)
    for _ in range(8):
      with jax.numpy_dtype_promotion("standard"):
        u, state = step(jax.grad(loss)(params)[which], state, params[which])
      params = {**params, which: optax.apply_updates(params[which], u)}
      out.append(params[which])
    return jax.tree.map(lambda *rows: jnp.stack(rows), *out)

  model, _ = scan(adam_both, jnp.int32(0), 8)
  prompt, _ = scan(adam_both, jnp.int32(8), 8)
  # A scan and a loop are two compilations of the same rule.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    (model["model"], prompt["prompt"]),
    (alone("model", optax.adam(0.05)), alone("prompt", optax.adam(0.3))),
  )


@pytest.mark.parametrize("switch", [0, 3])
def test_is_the_composition_from_optax(switch):
  """Bit for bit, on the same gradients."""
  labels = {"prompt": "prompt", "model": {"w": "model"}}
  theirs = optax.partition(
    {
      "prompt": optax.conditionally_mask(optax.adam(0.3), lambda s: s < switch),
      "model": optax.conditionally_mask(optax.adam(0.05), lambda s: s >= switch),
    },
    labels,
  )
  ours, params = adam_both(switch), start()
  a, b = ours.init(params), theirs.init(params)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for i in range(5):
    grads = jax.tree.map(lambda p, i=i: jnp.asarray(noise(*p.shape, seed=i)), params)
    left, a = ours.update(grads, a, params)
    with jax.numpy_dtype_promotion("standard"):
      right, b = theirs.update(grads, b, params)
    jax.tree.map(np.testing.assert_array_equal, (left, a), (right, b))


def test_second_stage_is_a_fresh_run():
  """Two programs, switched at N_1, are the one program that switches by itself."""
  trace, _ = scan(adam_both, jnp.int32(3), 8)
  middle = jax.tree.map(lambda x: x[2], trace)
  transform, params = adam_both(0), middle
  state, step = transform.init(params), jax.jit(transform.update)
  for i in range(3, 8):
    updates, state = step(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
    jax.tree.map(
      lambda x, y, i=i: np.testing.assert_allclose(x, y[i], rtol=1e-5, atol=1e-6),
      params,
      trace,
    )


def test_bad_gradients_of_what_rests_do_not_matter():
  transform, params = adam_both(1), start()
  grads = jax.tree.map(jnp.ones_like, params)
  bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
  state = transform.init(params)
  for given, resting in (
    ({**grads, "model": bad["model"]}, "model"),
    ({**grads, "prompt": bad["prompt"]}, "prompt"),
  ):
    updates, state = transform.update(given, state, params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates[resting]))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))


def test_zero_gradients_move_moments_of_the_active_side_only():
  transform, params = adam_both(2), start()
  ones, zeros = (jax.tree.map(f, params) for f in (jnp.ones_like, jnp.zeros_like))
  _, state = transform.update(ones, transform.init(params), params)
  _, after = transform.update(zeros, state, params)

  def moments(state, side):
    return state.inner_states[side].inner_state.inner_state[0]

  np.testing.assert_allclose(
    moments(after, "prompt").mu["prompt"],
    0.9 * moments(state, "prompt").mu["prompt"],
    rtol=1e-6,
  )
  jax.tree.map(
    np.testing.assert_array_equal, moments(after, "model"), moments(state, "model")
  )
  assert moments(after, "model").count == 0


def test_labels_by_path_or_prefix():
  params = {"prompt": jnp.ones(2), "model": {"a": jnp.ones(2), "b": None}}
  for where in (WHERE, lambda path, leaf: path[0].key == "prompt"):
    transform = promot(optax.sgd(1.0), optax.sgd(1.0), 1, where)
    updates, _ = transform.update(params, transform.init(params), params)
    assert updates["prompt"].tolist() == [-1, -1]
    assert updates["model"] == {"a": pytest.approx(np.zeros(2)), "b": None}


def test_bfloat16_keeps_dtypes_and_float32_moments():
  params = {"prompt": jnp.ones(3), "model": {"w": jnp.ones(4, jnp.bfloat16)}}
  transform = promot(adamw(0.1), adamw(jnp.float32(0.1)), 1, WHERE)
  state = transform.init(params)
  for _ in range(2):
    updates, state = transform.update(params, state, params)
    assert updates["model"]["w"].dtype == jnp.bfloat16
    assert updates["prompt"].dtype == jnp.float32
  floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert floats
  assert all(x.dtype == jnp.float32 for x in floats)


def test_attach_prompt_and_its_mask():
  prompt, x = jnp.asarray(noise(2, 3)), jnp.asarray(noise(4, 5, 3, seed=1))
  out = attach_prompt(prompt, x)
  assert out.shape == (4, 7, 3)
  np.testing.assert_array_equal(out[:, 2:], x)
  np.testing.assert_array_equal(out[:, :2], jnp.stack([prompt] * 4))
  np.testing.assert_array_equal(attach_prompt(prompt, x[0]), out[0])
  np.testing.assert_array_equal(attach_prompt(jnp.zeros((0, 3)), x), x)
  prompts, task = jnp.asarray(noise(3, 2, 3, seed=2)), jnp.array([2, 0, 0, 1])
  own = attach_prompt(prompts[task], x)
  np.testing.assert_array_equal(own[:, :2], prompts[task])
  half = attach_prompt(prompt, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  mask = prompt_mask(jnp.ones((4, 5), bool).at[:, 3:].set(False), 2)
  assert mask.shape == (4, 7)
  assert mask.dtype == bool
  assert mask[0].tolist() == [True] * 5 + [False] * 2
  assert prompt_mask(jnp.array([0, 1]), 0).tolist() == [0, 1]
  assert attach_prompt(prompt, x, max_length=7).shape == (4, 7, 3)
  with pytest.raises(ValueError, match="7 positions together, more than the 6"):
    attach_prompt(prompt, x, max_length=6)
  with pytest.raises(ValueError, match=r"a prompt \[\.\.\., k, 3\] fits"):
    attach_prompt(jnp.ones((2, 4)), x)
  with pytest.raises(ValueError, match=r"a prompt \[\.\.\., k, 3\] fits"):
    attach_prompt(jnp.ones(3), x)


def test_init_prompt():
  table = jnp.asarray(noise(10, 3), jnp.bfloat16)
  prompt = init_prompt(0, 10, 3, table)
  assert prompt.dtype == jnp.float32
  rows = np.asarray(table, np.float32)
  # Every row once: drawn without replacement.
  np.testing.assert_array_equal(np.sort(prompt, axis=0), np.sort(rows, axis=0))
  longer = init_prompt(jax.random.key(0), 25, 3, table)
  assert all((rows == row).all(1).any() for row in np.asarray(longer))
  uniform = init_prompt(1, 500, 4, scale=0.25)
  assert float(jnp.abs(uniform).max()) <= 0.25
  # 2000 uniform numbers have a standard deviation of 0.25 / sqrt(3), to some percent.
  np.testing.assert_allclose(np.std(uniform), 0.25 / 3**0.5, rtol=0.05)
  np.testing.assert_array_equal(
    uniform, init_prompt(jax.random.key(1), 500, 4, None, 0.25)
  )
  assert (uniform != init_prompt(2, 500, 4, scale=0.25)).any()
  assert init_prompt(0, 0, 4).shape == (0, 4)
  with pytest.raises(ValueError, match="num_tokens must be 0 or more"):
    init_prompt(0, -1, 4)
  with pytest.raises(ValueError, match="3 features, dim is 4"):
    init_prompt(0, 2, 4, table)


def test_predictions_without_the_prompt_do_not_see_it():
  """And the first stage leaves them as they are."""
  table, head = jnp.asarray(noise(6, 3)), jnp.asarray(noise(3, seed=1))
  tokens = jnp.array([[0, 3, 5], [1, 1, 2]])
  params = {"prompt": init_prompt(0, 2, 3), "model": {"table": table, "head": head}}

  def predict(params, attached):
    x = params["model"]["table"][tokens]
    if attached:
      x = attach_prompt(params["prompt"], x)
    return jnp.mean(jnp.tanh(x), axis=1) @ params["model"]["head"]

  def value(params):
    return jnp.sum(jnp.square(predict(params, attached=True) - 1))

  before = predict(params, attached=False)
  transform = adam_both(1)
  updates, _ = transform.update(jax.grad(value)(params), transform.init(params), params)
  assert updates["prompt"].all()
  params = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(predict(params, attached=False), before)


@pytest.mark.parametrize("steps", [-1, 1.5, np.array([-1])])
def test_bad_number_of_steps(steps):
  with pytest.raises(ValueError, match="integer of at least 0"):
    promot(optax.sgd(1.0), optax.sgd(1.0), steps, WHERE)


@pytest.mark.parametrize(("flag", "word"), [(True, "all"), (False, "no")])
def test_one_sided_labels(flag, word):
  for where in (flag, lambda path, leaf: flag):
    transform = promot(optax.sgd(1.0), optax.sgd(1.0), 1, where)
    with pytest.raises(ValueError, match=f"got {word} leaves as the prompt"):
      transform.init(start())
