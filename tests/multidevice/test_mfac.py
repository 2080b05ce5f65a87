"""M-FAC's window is divided like its parameters; devices exchange products only."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gradlab import sharding
from gradlab.transforms.updates import scale_by_mfac

M, RULES = 7, (("kernel$", (None, "model")), ("bias$", ("model",)))


def test_what_devices_exchange_is_a_few_numbers_per_row():
  rng = np.random.default_rng(0)

  def draw():
    shapes = {"a": {"kernel": (16, 64), "bias": (64,)}, "b": {"kernel": (64, 24)}}
    return jax.tree.map(
      lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
      shapes,
      is_leaf=lambda node: isinstance(node, tuple),
    )

  mesh, transform = sharding.make_mesh({"model": 8}), scale_by_mfac(M, 0.1)
  params = draw()
  specs = sharding.param_specs(params, RULES, mesh)
  state = transform.init(params)
  state_specs = sharding.state_specs(state, params, specs)
  assert state_specs.grads["a"]["kernel"] == P(None, None, "model")
  to = sharding.named(mesh, (specs, state_specs))
  step = jax.jit(transform.update, donate_argnums=1, out_shardings=to)
  alone, expected = jax.jit(transform.update), transform.init(params)
  state = sharding.shard(state, to[1])
  for _ in range(M + 2):
    grads = draw()
    u, state = step(sharding.shard(grads, to[0]), state)
    v, expected = alone(grads, expected)
    # Sums over devices are taken in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), u, v)
  window = state.grads["a"]["kernel"]
  assert {part.data.shape for part in window.addressable_shards} == {(M, 16, 8)}

  text = step.lower(sharding.shard(grads, to[0]), state).compile().as_text()
  for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
    assert f" {other}(" not in text
  sizes = [
    int(np.prod([int(n) for n in shape.split(",") if n]))
    for line in text.splitlines()
    if " all-reduce(" in line
    for shape in re.findall(r"f32\[([\d,]*)\]", line.split(" all-reduce(")[0])
  ]
  assert sizes
  assert sum(sizes) <= 3 * (M + 1)
