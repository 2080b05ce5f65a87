"""Which groups are redundant, and how strongly they are pulled to zero."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradlab.transforms.updates._families import Family, along, inner

# A share of the groups is a quotient of float32: equal within some roundings.
ROUNDING = 1e-6


def partition(
  families: tuple[Family, ...],
  xx: list[jax.Array],
  dd: list[jax.Array],
  xd: list[jax.Array],
  share: jax.Array,
  eligible_fn: Callable[[jax.Array], Any] | None,
) -> tuple[jax.Array, ...]:
  """The redundant groups: the highest scores, all but one of a family at most."""
  ends = [sum(f.size for f in families[: i + 1]) for i in range(len(families))]
  groups = ends[-1] if ends else 0
  if not groups:
    return tuple(jnp.zeros([family.size], bool) for family in families)
  limit = jnp.floor(groups * share * (1 + ROUNDING)).astype(jnp.int32)
  norms = [jnp.sqrt(each) for each in xx]
  cosine = jnp.concatenate(
    [
      dot / jnp.maximum(norm * jnp.sqrt(square), 1e-8)
      for dot, norm, square in zip(xd, norms, dd, strict=True)
    ]
  )
  inverse = jnp.concatenate(
    [
      1 / (norm / max(family.numel, 1) + 1e-6)
      for norm, family in zip(norms, families, strict=True)
    ]
  )
  score = 0.5 * _unit(cosine) + 0.5 * _unit(inverse)
  order = jnp.argsort(score, descending=True, stable=True)
  ranks = (
    jnp.zeros([groups], jnp.int32).at[order].set(jnp.arange(groups, dtype=jnp.int32))
  )
  if eligible_fn is None:
    chosen = ranks < limit
  else:
    check = eligible_fn

    def add(mask: jax.Array, group: jax.Array) -> tuple[jax.Array, None]:
      trial = mask.at[group].set(True)
      fits = jnp.sum(mask, dtype=jnp.int32) < limit
      valid = jnp.asarray(check(trial)).astype(bool)
      return jnp.where(fits & valid, trial, mask), None

    chosen, _ = jax.lax.scan(add, jnp.zeros([groups], bool), order)

  def spared(chosen: jax.Array, ranks: jax.Array) -> jax.Array:
    last = ranks == jnp.max(ranks, initial=0)
    return chosen & ~(jnp.all(chosen) & last)

  cuts = ends[:-1]
  parts = zip(jnp.split(chosen, cuts), jnp.split(ranks, cuts), strict=True)
  return tuple(spared(*part) for part in parts)


def _unit(score: jax.Array) -> jax.Array:
  # A group that is not finite must not decide over the others.
  score = jnp.where(jnp.isfinite(score), score, 0)
  norm = jnp.sqrt(jnp.sum(jnp.square(score)))
  return score / jnp.where(norm > 0, norm, 1)


def strength(
  dots: Sequence[jax.Array], penalties: Sequence[jax.Array], descent_bound: bool
) -> jax.Array:
  """lambda of every group from its <x, x>, <d, d> and <x, d>: [groups]."""
  xx, dd, xd = dots
  penalty, amplify, cap = penalties
  norm, grows = jnp.sqrt(xx), (xd < 0) & (xx > 0)
  low = -xd / jnp.where(xx > 0, norm, 1)
  high = -dd * norm / jnp.where(grows, xd, -1)
  chosen = jnp.minimum(jnp.maximum(amplify * low, penalty), penalty * cap)
  if descent_bound:
    chosen = jnp.where(chosen >= high, (low + high) / 2, chosen)
  return jnp.where(grows, chosen, penalty)


def shrink(
  families: Sequence[Family],
  x: Sequence[jax.Array],
  move: Sequence[jax.Array],
  xx: Sequence[jax.Array],
  pulls: Sequence[jax.Array],
) -> list[jax.Array]:
  """The moves, with every group pulled to zero by its ``pulls`` in norm."""
  out = list(move)
  for family, squares, pull in zip(families, xx, pulls, strict=True):
    factor = pull / (jnp.sqrt(squares) + 1e-8)
    for i, axis in family.members:
      out[i] = out[i] - along(factor, axis, x[i].ndim).astype(x[i].dtype) * x[i]
  return out


def outside(
  families: Sequence[Family],
  x: Sequence[jax.Array],
  move: Sequence[jax.Array],
  bounds: Sequence[jax.Array],
) -> list[jax.Array]:
  """Which groups' trial points leave the half-space <x + move, x> >= bound."""
  trial = [p + step for p, step in zip(x, move, strict=True)]
  products = inner(families, trial, x)
  return [dot < bound for dot, bound in zip(products, bounds, strict=True)]
