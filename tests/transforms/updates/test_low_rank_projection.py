import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradlab.transforms.updates import (
  chain,
  init_projector,
  lazy_refresh,
  low_rank_projection,
  quantised_moments,
  scale_by_diffgrad,
)
from tests.oracles import q_galore as oracle
from tests.transforms.updates.trajectories import follow, noise


def rank_of(u):
  return np.linalg.matrix_rank(np.asarray(u), tol=1e-4 * np.linalg.norm(u))


@pytest.mark.parametrize(
  ("shape", "side"), [((6, 4), "small"), ((4, 7), "small"), ((6, 4), "large")]
)
def test_adam_inside_is_galore(shape, side):
  gradients, w = noise(6, *shape), noise(*shape, seed=1)
  projection = low_rank_projection(
    2, 100, 0.25, side=side, inner=optax.scale_by_adam(eps=1e-6)
  )
  with jax.numpy_dtype_promotion("standard"):  # optax mixes counters with floats
    actual, state = follow(
      optax.chain(projection, optax.scale(-0.1)), jnp.asarray(w), gradients
    )
  expected, _ = oracle.trajectory(w, gradients, 0.1, 2, 100, side=side, eps=1e-6)
  # Two steps of Adam may cancel: float32, against float64.
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)
  right = (shape[0] >= shape[1]) == (side == "small")
  assert state[0].inner.mu.shape == ((shape[0], 2) if right else (2, shape[1]))


@pytest.mark.parametrize("n", [4, 6])
def test_square_leaves_agree_with_optax(n):
  """Only there: optax projects the other dimension."""
  gradients, w = noise(5, n, n), jnp.asarray(noise(n, n, seed=1))
  spec = optax.contrib.GaLoreDimensionNumbers(reduction_axis=1, output_axis=0)
  with jax.numpy_dtype_promotion("standard"):
    theirs, _ = follow(
      optax.contrib.scale_by_galore(
        2, 10, 0.25, optax.scale_by_adam(), weight_dimension_numbers=spec
      ),
      w,
      gradients,
    )
    ours, _ = follow(
      low_rank_projection(2, 10, 0.25, inner=optax.scale_by_adam()), w, gradients
    )
  # The same float32 operations in another order.
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_alone_it_is_the_part_in_the_subspace():
  g = jnp.asarray(noise(7, 5))
  transform = low_rank_projection(2)
  u, _ = transform.update(g, transform.init(g))
  left, s, right = np.linalg.svd(g, full_matrices=False)
  np.testing.assert_allclose(u, left[:, :2] * s[:2] @ right[:2], atol=1e-5)


def test_a_chain_puts_it_around_what_follows():
  """Projected, moments in eight bits, diffGrad: and back."""
  params = {"kernel": jnp.asarray(noise(8, 6)), "bias": jnp.zeros(6)}
  rows = [
    {"kernel": noise(8, 6, seed=i), "bias": noise(6, seed=i + 50)} for i in range(4)
  ]

  def pieces():
    return quantised_moments(8, min_size=0), scale_by_diffgrad()

  chained = chain(low_rank_projection(2, 2), *pieces(), optax.scale(-0.1))
  (state,) = chained.init(params)
  assert state.inner[0].inner[0].mu["kernel"].codes.shape == (8, 2)
  assert state.inner[0].inner[0].mu["bias"].codes.shape == (6,)
  nested = low_rank_projection(
    2,
    2,
    inner=optax.chain(quantised_moments(8, pieces()[1], min_size=0), optax.scale(-0.1)),
  )
  one, _ = follow(chained, params, rows)
  two, _ = follow(nested, params, rows)
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), one, two)
  moved = one[1]["kernel"] - one[0]["kernel"]
  assert rank_of(moved) == 2
  # Without a chain of ours nothing is inside.
  plain = optax.chain(low_rank_projection(2), scale_by_diffgrad())
  assert plain.init(params)[1].mu["kernel"].shape == (8, 6)


def test_inner_sees_projected_params():
  g = w = jnp.asarray(noise(6, 4))
  transform = low_rank_projection(2, inner=optax.add_decayed_weights(0.5))
  u, state = transform.update(g, transform.init(w), w)
  p = np.asarray(state.projector.projector)
  np.testing.assert_allclose(u, 1.5 * np.asarray(g) @ p.T @ p, rtol=1e-4, atol=1e-5)


def test_other_leaves_go_to_inner_as_they_are():
  tree = {"bias": jnp.ones(3), "embed": jnp.ones((4, 3)), "none": None}
  transform = low_rank_projection(2, inner=optax.scale(2.0))
  u, _ = transform.update(tree, transform.init(tree))
  np.testing.assert_array_equal(u["embed"], 2 * tree["embed"])
  np.testing.assert_array_equal(u["bias"], 2 * tree["bias"])


def test_quantised_stacks_and_kernels_have_low_rank():
  tree = {
    "stack": jnp.asarray(noise(3, 6, 5)),
    "kernel": jnp.asarray(noise(3, 3, 2, 4)),
  }
  transform = low_rank_projection(2, quantize_projector=True, lazy=True)
  u, state = jax.jit(transform.update)(tree, transform.init(tree))
  assert [rank_of(x) for x in u["stack"]] == [2, 2, 2]
  assert rank_of(u["kernel"].reshape(18, 4)) == 2
  assert state.projector["stack"].num_svd.tolist() == [1, 1, 1]
  # Four bits of an orthonormal basis: the projection is off by a few per cent.
  exact = low_rank_projection(2)
  e, _ = exact.update(tree, exact.init(tree))
  assert np.linalg.norm(u["stack"] - e["stack"]) < 0.3 * np.linalg.norm(e["stack"])


def test_refresh_without_a_transformation():
  g = jnp.asarray(noise(6, 4))
  state = init_projector(g, 2, update_proj_gap=3, proj_bits=None)
  refresh = jax.jit(lazy_refresh)
  for count, done in enumerate((1, 1, 1, 2, 2)):
    state = refresh(state, g, count)
    assert state.num_svd == done
  assert state.cosines[-1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"rank": 0}, "rank"),
    ({"update_proj_gap": 0}, "update_proj_gap"),
    ({"scale": -1.0}, "scale"),
    ({"gamma_proj": 0.5}, "gamma_proj"),
    ({"side": "top"}, "side must be"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    low_rank_projection(**{"rank": 2, **options})


def test_integer_leaves():
  with pytest.raises(ValueError, match="floating-point"):
    low_rank_projection(2).init({"a": jnp.ones((3, 3), jnp.int32)})


def test_a_projection_with_its_own_inner_is_a_plain_link_of_a_chain():
  g = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
  projection = low_rank_projection(2, inner=optax.scale(3.0))
  links = chain(projection, optax.scale(0.5))
  plain = optax.chain(projection, optax.scale(0.5))
  found, state = links.update(g, links.init(g))
  expected, same = plain.update(g, plain.init(g))
  np.testing.assert_array_equal(found, expected)
  assert jax.tree.structure(state) == jax.tree.structure(same)
