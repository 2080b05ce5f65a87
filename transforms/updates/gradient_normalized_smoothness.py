"""Newton-type steps damped by |gradient| / gamma, with gamma found on the fly."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import check_range
from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates import _curvature as curvature
from gradlab.transforms.updates._curvature import DiagonalHessian as DiagonalHessian
from gradlab.transforms.updates._curvature import HessFn, Solve
from gradlab.transforms.updates._curvature import LowRankHessian as LowRankHessian
from gradlab.transforms.updates._curvature import empirical_fisher as empirical_fisher
from gradlab.transforms.updates._curvature import exact_hessian as exact_hessian
from gradlab.transforms.updates._curvature import gauss_newton as gauss_newton
from gradlab.transforms.updates._curvature import rank_one as rank_one
from gradlab.transforms.updates._curvature import zero as zero
from gradlab.transforms.updates._gns import Rule, direction_and_damping
from gradlab.transforms.updates._gns_steps import GNSState as GNSState
from gradlab.transforms.updates._gns_steps import GNSTransformation as GNSTransformation
from gradlab.transforms.updates._gns_steps import Steps, ValueAndGrad
from gradlab.types import method

_HESSIANS = ("zero", "rank_one", "exact")


def regularized_newton_direction(
  g: jax.typing.ArrayLike,
  solve: Solve,
  gamma: jax.typing.ArrayLike,
  eps: jax.typing.ArrayLike = 1e-8,
  dual_norm: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
  r"""The step of one trial and its damping.

  .. math::
    \lambda = \|g\|_* / (\gamma + \epsilon), \qquad d = -(H + \lambda B)^{-1} g

  Args:
    g: the gradient [d].
    solve: ``solve(lam, b) -> (H + lam B)^{-1} b``.
    gamma: the radius, > 0.
    eps: added to the radius, >= 0.
    dual_norm: the norm of g; None is the Euclidean one.

  Returns:
    ``(direction, lam)``; both are zero for a zero gradient.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import regularized_newton_direction
    >>> solve = lambda lam, b: b / (1 + lam)
    >>> d, lam = regularized_newton_direction(jnp.array([2.0]), solve, 1.0, 0.0)
    >>> print(f"{d[0]:.4f} {lam:.4f}")
    -0.6667 2.0000

  References:
    Semenov et al., `Gradient-Normalized Smoothness for Optimization with Approximate
    Hessians <https://arxiv.org/abs/2506.13710>`_, 2026
  """
  g = jnp.asarray(g)
  norm = jnp.linalg.norm(g) if dual_norm is None else jnp.asarray(dual_norm)
  return direction_and_damping(g, solve, gamma, eps, norm.astype(g.dtype))


def scale_by_gns(
  gamma_init: jax.typing.ArrayLike = 1.0,
  gamma_min: jax.typing.ArrayLike = 1e-9,
  max_search: int = 40,
  adaptive: bool = True,
  metric: Any = None,
  eps: jax.typing.ArrayLike = 1e-8,
  hessian: str = "zero",
  tol: jax.typing.ArrayLike = 0.0,
  accept_last: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """The rule of :func:`gradient_normalized_smoothness` for a chain.

  ``update(grad, state, params, *, value, value_and_grad_fn, hess)``: ``value`` is the
  objective at ``params``; ``value_fn`` (and ``grad_fn``) do as well as
  ``value_and_grad_fn``; ``hess`` is [d, d], a :class:`LowRankHessian`, a
  :class:`DiagonalHessian` or None for 0, and without it ``hessian`` decides. The state
  keeps the next value and gradient, for ``optax.value_and_grad_from_state``.

  Args:
    gamma_init: the first radius, > 0.
    gamma_min: floor of the radius after a search, > 0.
    max_search: halvings per iteration, >= 0.
    adaptive: whether steps are tested and gamma moves.
    metric: B, SPD: None (the identity), its diagonal [d] or [d, d].
    eps: added to gamma, >= 0.
    hessian: "zero", "rank_one" (g g^T) or "exact" (d x d, for few parameters).
    tol: no step is taken once the gradient's dual norm is at most this, >= 0.
    accept_last: whether an exhausted search takes its last trial.

  Returns:
    A transformation whose output is the whole step, to be added to the parameters.

  Raises:
    ValueError: an argument out of its range, or one that update misses.
  """
  return gradient_normalized_smoothness(
    gamma_init=gamma_init,
    gamma_min=gamma_min,
    max_search=max_search,
    adaptive=adaptive,
    metric=metric,
    eps=eps,
    hessian=hessian,
    tol=tol,
    accept_last=accept_last,
  )


@method(
  family="updates",
  paper="Semenov, Jaggi, Doikov, Gradient-Normalized Smoothness for Optimization with "
  "Approximate Hessians, 2026",
  arxiv="2506.13710",
  seeds=("004:25",),
)
def gradient_normalized_smoothness(
  value_and_grad_fn: ValueAndGrad | None = None,
  hess_fn: HessFn | None = None,
  *,
  gamma_init: jax.typing.ArrayLike = 1.0,
  gamma_min: jax.typing.ArrayLike = 1e-9,
  max_search: int = 40,
  adaptive: bool = True,
  metric: Any = None,
  eps: jax.typing.ArrayLike = 1e-8,
  hessian: str = "zero",
  tol: jax.typing.ArrayLike = 0.0,
  accept_last: bool = False,
) -> GNSTransformation:
  r"""Newton-type steps for any Hessian approximation, without problem constants.

  .. math::
    \lambda &= \|g\|_* / (\gamma + \epsilon), \qquad
    d = -(H + \lambda B)^{-1} g, \qquad g_+ = \nabla f(x + d) \\
    &f(x) - f(x + d) \ge \|g_+\|_*^2 / (8 \lambda): \quad
    x \leftarrow x + d, \; \gamma \leftarrow \max(2 \gamma, \gamma_{\min}) \\
    &\text{otherwise} \quad \gamma \leftarrow \gamma / 2 \text{ and again, same } H

  A value or gradient that is not finite and a matrix that is not positive definite
  count as trials that failed. A search of which all trials fail keeps x and reports
  ``accepted=False``. In float32 the test is given four units in the last place of f.
  The theory is for one deterministic objective.

  Args:
    value_and_grad_fn: ``(x[, batch]) -> (value, grad)``, for ``init(x)`` and
      ``step(state, batch)``; ``init(x, batch)`` where it needs a batch. Without it,
      the result is used as a transformation (see :func:`scale_by_gns`).
    hess_fn: ``(x[, batch])`` -> positive semidefinite [d, d] in the order of the
      tree, :class:`LowRankHessian`, :class:`DiagonalHessian` or None for 0. Made by
      :func:`exact_hessian`, :func:`empirical_fisher`, :func:`gauss_newton`,
      :func:`rank_one` and :func:`zero`.
    gamma_init: the first radius, > 0.
    gamma_min: floor of the radius after a search, > 0.
    max_search: halvings per iteration, >= 0.
    adaptive: whether steps are tested and gamma moves.
    metric: B, SPD: None (the identity), its diagonal [d] or [d, d].
    eps: added to gamma, >= 0.
    hessian: H without a hess_fn: "zero", "rank_one" (g g^T) or "exact" (d x d).
    tol: no step is taken once the gradient's dual norm is at most this, >= 0.
    accept_last: whether an exhausted search takes its last trial.

  Returns:
    A transformation with a :class:`GNSState` and, beside ``init`` and ``update``,
    ``step(state, batch=None) -> state``.

  Raises:
    ValueError: an argument out of its range, a metric that is not SPD, an unknown
      Hessian, a leaf that is not floating point, or an argument that update misses.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gradlab.transforms.updates import gradient_normalized_smoothness
    >>> solver = gradient_normalized_smoothness(
    ...   jax.value_and_grad(lambda x: 0.5 * x**2), lambda x: jnp.ones((1, 1))
    ... )
    >>> state = solver.step(solver.init(jnp.array(2.0)))
    >>> print(f"{state.params:.4f} {state.gamma} {state.accepted}")
    1.3333 2.0 True

  References:
    Semenov et al., `Gradient-Normalized Smoothness for Optimization with Approximate
    Hessians <https://arxiv.org/abs/2506.13710>`_, 2026
  """
  check_range("gamma_init", gamma_init, 0, open_low=True)
  check_range("gamma_min", gamma_min, 0, open_low=True)
  check_range("eps", eps, 0)
  check_range("tol", tol, 0)
  check_range("max_search", max_search, 0)
  if hessian not in _HESSIANS:
    raise ValueError(f"hessian must be one of {', '.join(_HESSIANS)}, got {hessian!r}.")
  curvature.check_metric(metric)
  rule = Rule(
    common.scalar(gamma_min),
    max_search,
    adaptive,
    common.scalar(eps),
    common.scalar(tol),
    accept_last,
  )
  own = Steps(value_and_grad_fn, hess_fn, hessian, gamma_init, metric, rule)
  return GNSTransformation(own.init, own.update, own.step)
