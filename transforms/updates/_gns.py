"""One iteration of gradient-normalised smoothness on flat vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradlab.transforms.updates._curvature import Metric, Solve

# In float32 f(x) - f(x + d) is rounding noise near a minimum.
_FLOAT32_SLACK = 4


class Rule(NamedTuple):
  """The hyperparameters of the search."""

  gamma_min: jax.typing.ArrayLike
  max_search: int
  adaptive: bool
  eps: jax.typing.ArrayLike
  tol: jax.typing.ArrayLike
  accept_last: bool


class Found(NamedTuple):
  """What a search found: a step, what is there, and the next radius."""

  direction: jax.Array
  value: jax.Array
  grad: jax.Array
  gamma: jax.Array
  num_evals: jax.Array
  accepted: jax.Array


class _Trial(NamedTuple):
  tried: jax.Array
  gamma: jax.Array
  direction: jax.Array
  value: jax.Array
  grad: jax.Array
  accepted: jax.Array
  finite: jax.Array


def direction_and_damping(
  g: jax.Array, solve: Solve, gamma: Any, eps: Any, norm: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """``-(H + lam B)^{-1} g`` and ``lam = norm / (gamma + eps)``; zeros for norm 0."""
  dtype = g.dtype
  lam = norm / (jnp.asarray(gamma).astype(dtype) + jnp.asarray(eps).astype(dtype))
  safe = jnp.where(norm > 0, lam, 1)
  return jnp.where(norm > 0, -solve(safe, g), 0), lam


def search(
  x: jax.Array,
  value: jax.Array,
  g: jax.Array,
  gamma: jax.Array,
  solve: Solve,
  metric: Metric,
  value_and_grad: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  rule: Rule,
) -> Found:
  """Halves gamma until the step makes the progress that its damping promises.

  Args:
    x: the point [d], with its ``value`` and gradient ``g``.
    value: scalar.
    g: [d].
    gamma: the first radius.
    solve: ``solve(lam, b)``, NaN where the matrix is not positive definite.
    metric: the geometry.
    value_and_grad: of the objective, on flat vectors.
    rule: the hyperparameters.
  """
  dtype = g.dtype
  norm = metric.dual_norm(g)
  slack = _FLOAT32_SLACK * float(np.finfo(dtype).eps) if dtype == jnp.float32 else 0.0
  floor = jnp.asarray(rule.gamma_min).astype(dtype)
  ceiling = float(np.finfo(dtype).max) / 4
  done = norm <= jnp.asarray(rule.tol).astype(dtype)
  # From a bad value or gradient no step can be judged: nothing is learnt of gamma.
  judged = jnp.isfinite(norm) & jnp.isfinite(value)

  def attempt(trial: _Trial) -> _Trial:
    d, lam = direction_and_damping(g, solve, trial.gamma, rule.eps, norm)
    after, g_after = value_and_grad(x + d)
    after, g_after = after.astype(dtype), g_after.astype(dtype)
    finite = (
      jnp.isfinite(after) & jnp.all(jnp.isfinite(g_after)) & jnp.all(jnp.isfinite(d))
    )
    if not rule.adaptive:
      return _Trial(trial.tried + 1, trial.gamma, d, after, g_after, finite, finite)
    promised = jnp.square(metric.dual_norm(g_after)) / (8 * lam)
    noise = jnp.asarray(slack, dtype) * jnp.maximum(jnp.abs(value), jnp.abs(after))
    passed = finite & (value - after + noise >= promised)
    grown = jnp.minimum(jnp.maximum(2 * trial.gamma, floor), ceiling)
    next_gamma = jnp.where(passed, grown, trial.gamma / 2)
    return _Trial(trial.tried + 1, next_gamma, d, after, g_after, passed, finite)

  trials = rule.max_search + 1 if rule.adaptive else 1
  start = _Trial(
    jnp.zeros([], jnp.int32), gamma, jnp.zeros_like(x), value, g, done, done
  )
  last = lax.while_loop(
    lambda trial: (trial.tried < trials) & ~trial.accepted & judged, attempt, start
  )
  moved = last.accepted
  if rule.accept_last:
    moved = moved | last.finite
  elif rule.adaptive:
    kept = jnp.where(judged, jnp.maximum(last.gamma, floor), gamma)
    last = last._replace(gamma=jnp.where(moved, last.gamma, kept))
  return Found(
    jnp.where(moved, last.direction, 0),
    jnp.where(moved, last.value, value),
    jnp.where(moved, last.grad, g),
    last.gamma,
    last.tried,
    last.accepted,
  )
