import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.models import cnn
from gradlab.transforms.updates import dhspg
from tests.oracles import dhspg as oracle
from tests.transforms.updates.trajectories import follow, noise

quick = hypothesis.settings(max_examples=15, deadline=None)
GROUPS = (
  (("conv", 3), ("bias", 0)),
  (("dense", 1), ("offset", -1)),
)
SHAPES = {
  "bias": (5,),
  "conv": (2, 1, 2, 5),
  "dense": (4, 6),
  "head": (3, 2),
  "offset": (6,),
}
# The groups of a plain matrix are its rows.
ROWS = ((("w", 0),),)


def params(seed=0, dtype=np.float64):
  return {
    name: noise(*shape, seed=seed + i).astype(dtype)
    for i, (name, shape) in enumerate(SHAPES.items())
  }


def gradients(step, x=None):
  """Noise around a pull away from zero, the same for every trajectory."""
  return {name: 0.4 * leaf for name, leaf in params(100 + 10 * step).items()}


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def run(steps, *args, tree=None, **options):
  """[(params, redundant, zero_fraction)] of one compiled scan, as NumPy arrays."""
  transform = dhspg(*args, **options)
  tree = params() if tree is None else tree
  dtype = tree["head"].dtype
  stacked = jax.tree.map(
    lambda *leaves: np.stack(leaves).astype(dtype), *map(gradients, range(steps))
  )

  def step(carry, g):
    x, state = carry
    u, state = transform.update(g, state, x)
    x = optax.apply_updates(x, u)
    return (x, state), (x, state.redundant, state.zero_fraction)

  def rollout(x, g):
    return jax.lax.scan(step, (x, transform.init(x)), g)[1]

  out = jax.tree.map(np.asarray, jax.jit(rollout)(tree, stacked))
  return [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(steps)]


def once(transform, tree, g):
  """The parameters after one compiled step and the state, as NumPy arrays."""

  def step(x, g):
    u, state = transform.update(g, transform.init(x), x)
    return optax.apply_updates(x, u), state

  return jax.tree.map(np.asarray, jax.jit(step)(tree, g))


@pytest.mark.parametrize(
  ("options", "fewest"),
  [
    ({"start_step": 3, "half_space_eps": 0.95, "penalty": 0.5}, 4),
    (
      {
        "b1": 0.9,
        "dampening": 0.3,
        "weight_decay": 0.05,
        "half_space_eps": 0.8,
        "penalty": 1.0,
      },
      4,
    ),
    ({"penalty": 1.0, "penalty_cap": 3.0, "descent_bound": False}, 2),
    ({"variant": "adam", "weight_decay": 0.1, "penalty": 3.0}, 2),
    ({"variant": "adamw", "start_step": 2, "b1": 0.5, "half_space_eps": 0.6}, 4),
    ({"target_sparsity": 0.2, "tolerance": 0.7, "half_space_eps": 0.95}, 2),
    ({"learning_rate": lambda step: 0.2 / (1 + step), "half_space_eps": 0.95}, 3),
  ],
)
def test_follows_the_oracle(x64, options, fewest):
  options = dict(options)
  rate = options.pop("learning_rate", 0.1)
  target = options.pop("target_sparsity", 0.5)
  ours = run(15, rate, GROUPS, target, **options)
  theirs = oracle.trajectory(params(), GROUPS, gradients, 15, rate, target, **options)
  for (x, redundant, fraction), (x_, redundant_, fraction_) in zip(
    ours, theirs, strict=True
  ):
    for name in x:
      # float64 against float64, sums in another order
      np.testing.assert_allclose(x[name], x_[name], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(fraction, fraction_, rtol=1e-6)  # kept in float32
    for mask, mask_ in zip(redundant, redundant_ or (), strict=bool(redundant_)):
      np.testing.assert_array_equal(mask, mask_)
  assert round(theirs[-1][2] * 11) >= fewest


def test_float32_follows_the_oracle():
  options = {"half_space_eps": 0.9, "start_step": 2, "b1": 0.9}
  ours = run(10, 0.1, GROUPS, tree=params(dtype=np.float32), **options)
  theirs = oracle.trajectory(params(), GROUPS, gradients, 10, 0.1, **options)
  for name in SHAPES:
    # float32 against float64 over ten steps of numbers of order one
    np.testing.assert_allclose(
      ours[-1][0][name], theirs[-1][0][name], rtol=2e-5, atol=2e-6
    )
  assert ours[-1][2] == np.float32(theirs[-1][2]) > 0


@functools.cache
def example_program(descent_bound):
  def step(tree, g, eps, penalty, amplify):
    transform = dhspg(
      0.5,
      ROWS,
      half_space_eps=eps,
      penalty=penalty,
      penalty_amplify=amplify,
      penalty_cap=10.0,
      descent_bound=descent_bound,
    )
    u, state = transform.update(g, transform.init(tree), tree)
    return optax.apply_updates(tree, u)["w"][0], state

  return jax.jit(step)


def example(d, eps, penalty=0.1, amplify=2.0, descent_bound=True):
  """One step of the group (0.6, 0.8), redundant beside one that is not."""
  tree = {"w": np.array([[0.6, 0.8], [60.0, 80.0]], np.float32)}
  g = {"w": np.array([d, [-1.0, -1.0]], np.float32)}
  x, state = example_program(descent_bound)(tree, g, eps, penalty, amplify)
  assert state.redundant[0].tolist() == [True, False]
  return x, state


@pytest.mark.parametrize(
  ("d", "eps", "expected", "zeros"),
  [
    ((-0.5, 0.1), 0.0, (0.718, 0.574), 0.0),
    ((-0.5, 0.1), 0.95, (0.0, 0.0), 0.5),
    ((0.3, 0.9), 0.0, (0.42, 0.31), 0.0),
    ((0.3, 0.9), 0.49, (0.42, 0.31), 0.0),
    ((0.3, 0.9), 0.51, (0.0, 0.0), 0.5),
  ],
)
def test_worked_example(d, eps, expected, zeros):
  x, state = example(d, eps)
  np.testing.assert_allclose(x, expected, rtol=1e-6)  # float32 numbers near one
  assert state.zero_fraction == zeros


def test_worked_strength():
  x, d = np.array([0.6, 0.8]), np.array([-0.5, 0.1])
  assert oracle.strength(x, d, 0.1, 2.0, 10.0) == pytest.approx(0.44)
  # (lo + hi) / 2 = (0.22 + 1.18181818) / 2 once lambda would reach hi
  moved, _ = example((-0.5, 0.1), 0.0, penalty=1.0, amplify=6.0)
  expected = x - 0.5 * d - 0.5 * (0.22 + 1.18181818) / 2 * x
  np.testing.assert_allclose(moved, expected, rtol=1e-6)  # float32 numbers near one
  free, _ = example((-0.5, 0.1), 0.0, penalty=1.0, amplify=6.0, descent_bound=False)
  np.testing.assert_allclose(free, x - 0.5 * d - 0.5 * 1.32 * x, rtol=1e-6)


def test_parallel_direction_stops_unless_the_bound_is_off():
  """-d parallel to x: both bounds are |d|, and the group does not move."""
  x, _ = example((-0.06, -0.08), 0.0, penalty=0.5)
  np.testing.assert_allclose(x, (0.6, 0.8), rtol=1e-6)
  x, _ = example((-0.06, -0.08), 0.0, penalty=0.5, descent_bound=False)
  np.testing.assert_allclose(x, np.array([0.6, 0.8]) * (1 + 0.05 - 0.25), rtol=1e-6)


BASES = {
  "sgd": ({"b1": 0.9, "weight_decay": 0.1}, None),
  "adam": ({}, optax.adam(0.1)),
  "adamw": ({"weight_decay": 0.3}, optax.adamw(0.1, weight_decay=0.3)),
}


@pytest.mark.parametrize(
  ("variant", "idle"),
  [("sgd", "redundant"), ("adam", "start_step"), ("adamw", "redundant")],
)
def test_is_the_base_rule_when_nothing_is_redundant(variant, idle):
  options, base = BASES[variant]
  if base is None:
    base = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
  idle = {"start_step": 9} if idle == "start_step" else {"tolerance": 0.0}
  target = 0.5 if "start_step" in idle else 0.05
  tree = params(dtype=np.float32)
  ours = run(5, 0.1, GROUPS, target, tree=tree, variant=variant, **options, **idle)
  tree = jax.tree.map(jnp.asarray, tree)
  grads = [gradients(i) for i in range(5)]
  with jax.numpy_dtype_promotion("standard"):  # optax mixes counters with floats
    theirs, _ = follow(base, tree, grads)
  for (x, redundant, fraction), y in zip(ours, theirs, strict=True):
    assert fraction == 0
    assert not any(mask.any() for mask in redundant)
    for name in x:
      # optax computes 1 - 0.999**t in float32, which loses up to 6e-5 of it
      np.testing.assert_allclose(x[name], y[name], rtol=1e-4, atol=1e-5)


def test_the_rest_follows_the_base_rule_and_zeros_stay():
  options = {"half_space_eps": 0.95, "penalty": 1.0}
  pruned = run(12, 0.1, GROUPS, tree=params(dtype=np.float32), **options)
  dense = run(12, 0.1, GROUPS, start_step=99, tree=params(dtype=np.float32))
  redundant = pruned[0][1]
  assert sum(int(mask.sum()) for mask in redundant) == 6  # floor(11 * 0.55)
  before = 0.0
  for (x, masks, fraction), (y, _, _) in zip(pruned, dense, strict=True):
    np.testing.assert_array_equal(x["head"], y["head"])
    for family, mask, first in zip(GROUPS, masks, redundant, strict=True):
      np.testing.assert_array_equal(mask, first)
      for path, axis in family:
        kept = np.flatnonzero(~mask)
        ours, theirs = (np.take(z[path], kept, axis) for z in (x, y))
        np.testing.assert_array_equal(ours, theirs)
    assert before <= fraction <= 6 / 11 + 1e-6
    before = fraction
  assert before >= 0.5


@quick
@hypothesis.given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 0.5))
def test_every_family_keeps_a_group(seed, target, tolerance):
  tree = params(seed, np.float32)
  state = chosen()(tree, gradients(seed), target, tolerance)
  count = sum(int(mask.sum()) for mask in state.redundant)
  assert all(not mask.all() for mask in state.redundant)
  limit = np.floor(np.float32(11 * min(target + tolerance, 0.999) * (1 + 1e-6)))
  assert limit - 2 <= count <= limit


@functools.cache
def chosen():
  """The state after one step, for traced shares."""

  def step(tree, g, target, tolerance):
    transform = dhspg(0.1, GROUPS, target, tolerance=tolerance)
    g = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), g)
    return transform.update(g, transform.init(tree), tree)[1]

  return jax.jit(step)


@functools.cache
def tiny_step():
  def step(w, g, penalty, amplify):
    groups = ((("", 0),),)
    transform = dhspg(
      1e-4, groups, penalty=penalty, penalty_amplify=amplify, penalty_cap=1e3
    )
    return transform.update(g, transform.init(w), w)

  return jax.jit(step)


vectors = hnp.arrays(
  np.float32, 4, elements=st.floats(-3, 3, width=32).map(lambda x: round(x, 2))
)


@quick
@hypothesis.given(vectors, vectors, st.floats(1e-3, 0.9), st.floats(1.05, 5))
def test_move_shrinks_and_descends(x, d, penalty, amplify):
  x, d = x.astype(np.float64), d.astype(np.float64)
  p, norm = x @ d, np.sqrt(x @ x)
  hypothesis.assume(p < -1e-3 * norm * np.sqrt(d @ d) and norm > 0.1)
  low, high = -p / norm, -(d @ d) * norm / p
  hypothesis.assume(high > low * (1 + 1e-3))
  with jax.enable_x64(True):
    w = jnp.asarray(np.stack([x, 100 * np.abs(x) + 100]))
    g = jnp.asarray(np.stack([d, -np.ones(4)]))
    u, state = tiny_step()(w, g, jnp.float64(penalty), jnp.float64(amplify))
    assert bool(state.redundant[0][0])
    move = np.asarray(u[0]) / 1e-4
  strength = oracle.strength(x, d, penalty, amplify, 1e3)
  # the rule divides by |x| + 1e-8, and u was a difference of 1e-4
  np.testing.assert_allclose(move, -(d + strength * x / norm), rtol=1e-6, atol=1e-6)
  assert d @ move < 0
  # above lo by construction, unless the penalty's own floor is below it
  assert (x @ move < 0) == (strength > low)


@quick
@hypothesis.given(st.integers(0, 10**6), st.floats(0, 0.9), st.floats(0, 0.09))
def test_larger_eps_zeroes_a_superset(seed, eps, more):
  tree = params(seed, np.float32)
  zeros = []
  for value in (0.0, eps, eps + more):
    u = one_step()(tree, gradients(seed + 7), value)
    after = {name: tree[name] + np.asarray(u[name]) for name in tree}
    zeros.append(
      [
        not oracle.gather(after, family, g).any()
        for family, size in zip(GROUPS, (5, 6), strict=True)
        for g in range(size)
      ]
    )
    if value == 0.0:
      for family, size in zip(GROUPS, (5, 6), strict=True):
        for g in np.flatnonzero(zeros[0][:5] if size == 5 else zeros[0][5:]):
          old = oracle.gather(tree, family, g)
          assert trial(tree, seed + 7, family, g) @ old < 1e-5
  assert np.all(np.array(zeros[0]) <= np.array(zeros[1]))
  assert np.all(np.array(zeros[1]) <= np.array(zeros[2]))


def trial(tree, seed, family, group):
  """x - eta (d + lambda x / |x|) of one group."""
  x = oracle.gather(jax.tree.map(np.float64, tree), family, group)
  d = oracle.gather(gradients(seed), family, group)
  pull = oracle.strength(x, d, 0.5, 2.0, 10.0)
  return x - 0.8 * d - 0.8 * pull * x / np.sqrt(x @ x)


@functools.cache
def one_step():
  def step(tree, g, eps):
    transform = dhspg(0.8, GROUPS, half_space_eps=eps, penalty=0.5)
    g = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), g)
    return transform.update(g, transform.init(tree), tree)[0]

  return jax.jit(step)


@quick
@hypothesis.given(st.permutations(range(6)), st.integers(0, 1000))
def test_permuted_groups_give_the_permuted_result(order, seed):
  order = np.array(order)
  tree, g = params(seed, np.float32), gradients(seed + 1)

  def permuted(leaves):
    return leaves | {
      "dense": leaves["dense"][:, order],
      "offset": leaves["offset"][order],
    }

  u = one_step()(tree, g, 0.5)
  v = one_step()(permuted(tree), permuted(g), 0.5)
  for name, leaf in permuted(u).items():
    # norms over all groups are summed in another order
    np.testing.assert_allclose(v[name], leaf, rtol=1e-6, atol=1e-7)


def test_pruned_network_is_the_full_one():
  """Channels whose groups are zero can be cut out of a network with norms."""
  model = cnn((4, 6), 3, batch_norm=True, image_shape=(4, 4))
  inputs = jax.random.normal(jax.random.key(0), (24, 16))
  labels = jnp.arange(24) % 3
  tree, moments = model.init(jax.random.key(1), inputs)
  groups = tuple(
    (
      (f"conv_{k}/kernel", 3),
      (f"conv_{k}/bias", 0),
      (f"norm_{k}/scale", 0),
      (f"norm_{k}/bias", 0),
    )
    for k in range(2)
  )
  transform = dhspg(0.1, groups, start_step=5, half_space_eps=0.9, penalty=2.0)

  def loss(tree, moments):
    outputs, moments = model.apply(tree, moments, inputs, train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return jnp.mean(losses), moments

  def step(carry, _):
    tree, moments, state = carry
    g, moments = jax.grad(loss, has_aux=True)(tree, moments)
    u, state = transform.update(g, state, tree)
    return (optax.apply_updates(tree, u), moments, state), None

  carry = tree, moments, transform.init(tree)
  scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=40)[0])
  tree, moments, state = scan(carry)
  assert state.zero_fraction >= 0.5
  full, _ = model.apply(tree, moments, inputs)

  kept = [np.flatnonzero(np.asarray(tree[f"norm_{k}"]["scale"])) for k in range(2)]
  assert all(len(k) > 0 for k in kept)
  assert sum(map(len, kept)) == 10 - round(float(state.zero_fraction) * 10)
  small, stats = dict(tree), dict(moments["batch_stats"])
  for k in range(2):
    kernel = tree[f"conv_{k}"]["kernel"][..., kept[k]]
    kernel = kernel[:, :, kept[0]] if k else kernel
    small[f"conv_{k}"] = {"kernel": kernel, "bias": tree[f"conv_{k}"]["bias"][kept[k]]}
    for name, where in ((f"norm_{k}", small), (f"norm_{k}", stats)):
      where[name] = {leaf: value[kept[k]] for leaf, value in where[name].items()}
  head = tree["head"]["kernel"].reshape(-1, 6, 3)[:, kept[1]].reshape(-1, 3)
  small["head"] = {"kernel": head, "bias": tree["head"]["bias"]}
  pruned = cnn(tuple(map(len, kept)), 3, batch_norm=True, image_shape=(4, 4))
  outputs, _ = pruned.apply(small, {"batch_stats": stats}, inputs)
  # what was cut out added exact zeros; the sums are shorter
  np.testing.assert_allclose(outputs, full, rtol=1e-5, atol=1e-5)


def connected(mask):
  """Two branches of three channels: one channel of either must be left."""
  alive = ~mask
  return alive[:3].any() & alive[3:6].any() & alive[7]


def test_h2spg_keeps_the_network_connected():
  """One family over both branches: DHSPG would erase one of them."""
  w = np.concatenate([np.full((3, 4), 0.01), noise(5, 4) + 9.0]).astype(np.float32)
  w[7] *= 1e-3
  tree, g = {"w": w}, {"w": noise(8, 4, seed=3)}
  _, plain = once(dhspg(0.1, ROWS, 0.7, tolerance=0.0), tree, g)
  assert not connected(plain.redundant[0])
  bound = dhspg(0.1, ROWS, 0.7, tolerance=0.0, eligible_fn=connected)
  after, state = once(bound, tree, g)
  (mask,) = state.redundant
  assert connected(mask)
  # of 3 + 3 + 2 groups one, one and the last must stay
  assert mask.sum() == 5 == plain.redundant[0].sum()
  expected = oracle.redundant_groups(tree, g, ROWS, 5, connected)
  np.testing.assert_array_equal(mask, expected[0])
  assert np.isfinite(after["w"]).all()


def test_families_of_one_group_are_never_redundant():
  tree = {"a": np.full((1, 3), 1e-3, np.float32), "b": noise(6, 2) + 5}
  groups = ((("a", 0),), (("b", 0),))
  _, state = once(dhspg(0.1, groups, 0.9), tree, tree)
  assert state.redundant[0].tolist() == [False]
  # 6 of 7 were chosen, the one of the first family among them
  assert int(state.redundant[1].sum()) == 5


def test_a_leaf_may_have_groups_along_two_axes():
  tree = {"w": noise(4, 4)}
  groups = ((("w", 0),), (("w", 1),))
  transform = dhspg(0.5, groups, half_space_eps=0.99, penalty=1.0)
  after, state = once(transform, tree, tree)
  rows, columns = state.redundant
  zero = rows[:, None] | columns[None]
  assert 0 < int(zero.sum()) < 16
  np.testing.assert_array_equal(after["w"] == 0, zero)


def test_zero_groups_train_before_the_partition_and_stay_after():
  tree = {"w": np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]], np.float32)}
  g = {"w": np.ones((3, 2), np.float32)}
  after, state = once(dhspg(0.1, ROWS, start_step=1), tree, g)
  np.testing.assert_allclose(after["w"][0], -0.1, rtol=1e-6)
  assert not state.partitioned
  after, state = once(dhspg(0.1, ROWS), tree, g)
  np.testing.assert_array_equal(after["w"][0], 0)
  assert state.partitioned
  np.testing.assert_allclose(state.zero_fraction, 1 / 3, rtol=1e-6)
  after, state = once(dhspg(0.1, ROWS, freeze_zero_groups=False), tree, g)
  np.testing.assert_allclose(after["w"][0], -0.1, rtol=1e-6)
  assert np.isfinite(after["w"]).all()


def test_zero_direction_takes_the_penalty():
  tree = {"w": np.array([[0.3, 0.4], [30.0, 40.0]], np.float32)}
  zeros = {"w": np.zeros((2, 2), np.float32)}
  after, state = once(dhspg(0.1, ROWS, penalty=0.2), tree, zeros)
  assert state.redundant[0].tolist() == [True, False]
  # x - eta lambda x / |x|
  np.testing.assert_allclose(after["w"][0], (0.288, 0.384), rtol=1e-6)
  np.testing.assert_array_equal(after["w"][1], tree["w"][1])


def test_non_finite_groups_propagate_and_are_no_zeros():
  tree, g = {"w": noise(6, 2)}, {"w": np.ones((6, 2), np.float32)}
  g["w"][2, 0] = np.nan
  after, state = once(dhspg(0.1, ROWS, half_space_eps=0.95), tree, g)
  assert np.isnan(after["w"][2, 0])
  assert np.isfinite(np.delete(after["w"], 2, axis=0)).all()
  zero = ~after["w"].any(axis=1)
  np.testing.assert_allclose(state.zero_fraction, zero.sum() / 6, rtol=1e-6)
  assert zero.sum() > 0
  assert not zero[2]


def test_target_is_reached_exactly_and_pruning_stops():
  """Half of the groups is half: then all follow the base rule again."""
  tree = {"w": jnp.asarray(noise(10, 3))}
  zeros = jax.tree.map(jnp.zeros_like, tree)
  options = {"half_space_eps": 0.97, "penalty": 0.2, "tolerance": 0.0}
  trees, state = follow(dhspg(1.0, ROWS, 0.7, **options), tree, [zeros] * 12)
  assert state.zero_fraction == np.float32(7) / np.float32(10)
  # The quotient in float32 is below 0.7, and so must not be compared bit by bit.
  np.testing.assert_array_equal(trees[-1]["w"], trees[-2]["w"])


def test_b1_of_zero_is_no_momentum(x64):
  """And so it has no dampening, as the oracle says."""
  options = {"dampening": 0.5, "half_space_eps": 0.5, "b1": 0.0}
  ours = run(3, 0.1, GROUPS, **options)
  theirs = oracle.trajectory(params(), GROUPS, gradients, 3, 0.1, **options)
  for name in SHAPES:
    # float64 against float64, sums in another order
    np.testing.assert_allclose(ours[-1][0][name], theirs[-1][0][name], rtol=1e-11)


def test_bfloat16_zeroes_exactly():
  tree = params(dtype=jnp.bfloat16)
  options = {"half_space_eps": 0.95, "variant": "adam"}
  state = jax.eval_shape(dhspg(0.1, GROUPS, **options).init, tree)
  moments = jax.tree.leaves((state.m, state.v))
  assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
  x, _, fraction = run(8, 0.1, GROUPS, tree=tree, **options)[-1]
  assert {leaf.dtype for leaf in x.values()} == {jnp.dtype(jnp.bfloat16)}
  last = jax.tree.map(np.float32, x)
  zero = [
    not oracle.gather(last, family, g).any()
    for family, size in zip(GROUPS, (5, 6), strict=True)
    for g in range(size)
  ]
  assert fraction == np.float32(sum(zero) / 11) > 0.3


def test_odd_trees_survive():
  tree = {
    "scalar": jnp.float32(2),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    "masked": optax.MaskedNode(),
    "pair": (jnp.ones((4, 2)), {}),
  }
  for groups in ((), ((("pair/0", 0),),), ((("['pair'][0]", -2),),)):
    transform = dhspg(0.1, groups, variant="adam")
    state = jax.eval_shape(transform.init, tree)
    u, after = jax.eval_shape(transform.update, tree, state, tree)
    assert jax.tree.structure(u) == jax.tree.structure(tree)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert len(state.redundant) == len(groups)
  nothing, state = transform.update({}, transform.init({}), {})
  assert nothing == {}
  assert state.zero_fraction == 0


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"learning_rate": -1.0}, "learning_rate"),
    ({"target_sparsity": 1.5}, "target_sparsity"),
    ({"tolerance": -0.1}, "tolerance"),
    ({"start_step": -1}, "start_step"),
    ({"half_space_eps": 1.0}, "half_space_eps"),
    ({"penalty": 0.0}, "penalty"),
    ({"penalty_amplify": 0.0}, "penalty_amplify"),
    ({"penalty_cap": 0.5}, "penalty_cap"),
    ({"b1": 1.0}, "b1"),
    ({"b2": -0.1}, "b2"),
    ({"dampening": 2.0}, "dampening"),
    ({"weight_decay": -1.0}, "weight_decay"),
    ({"variant": "lion"}, "variant must be sgd, adam or adamw, got 'lion'"),
    ({"groups": ("dense",)}, r"groups\[0\] must be a family"),
    ({"groups": ((),)}, r"groups\[0\] must be a family"),
    ({"groups": (("dense", 1),)}, r"must hold pairs \(leaf path, axis\), got 'dense'"),
    ({"groups": ((("dense", 0.5),),)}, r"pairs \(leaf path, axis\)"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    dhspg(**{"learning_rate": 0.1, "groups": GROUPS} | options)


@pytest.mark.parametrize(
  ("groups", "message"),
  [
    (((("dnse", 1),),), r"groups\[0\] names the unknown leaf 'dnse'; .*'dense'"),
    (((("scale", 0),),), r"groups\[0\] names 'scale', a scalar"),
    (((("dense", 2),),), r"groups\[0\] names axis 2 of 'dense', whose shape is \(4, 6"),
    (
      ((("dense", 1), ("bias", 0)),),
      "one number of slices along all axes, but 'dense' has 6, 'bias' has 5",
    ),
    (
      ((("dense", 1),), (("offset", 0), ("dense", -1))),
      "groups name axis -1 of 'dense' twice",
    ),
  ],
)
def test_families_that_do_not_fit(groups, message):
  tree = params() | {"scale": np.float32(1)}
  with pytest.raises(ValueError, match=message):
    dhspg(0.1, groups).init(tree)


def test_bad_leaves_and_missing_params():
  with pytest.raises(ValueError, match="DHSPG needs floating-point"):
    dhspg(0.1, ROWS).init({"w": jnp.ones((2, 2), jnp.int32)})
  tree = {"w": jnp.ones((2, 2))}
  transform = dhspg(0.1, ROWS)
  with pytest.raises(ValueError, match="dhspg needs params"):
    transform.update(tree, transform.init(tree))
