"""ReLinear: quadratic neurons that start linear and become quadratic slowly."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import check_range
from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates._quadratic import key_of
from gradlab.transforms.updates._quadratic import quadratic_apply as quadratic_apply
from gradlab.transforms.updates._quadratic import quadratic_labels as quadratic_labels
from gradlab.transforms.updates._quadratic import relinear_init as relinear_init
from gradlab.types import method

_LABELS = ("g", "b", "other")


def _labelled(labels: Any, tree: Any) -> Any:
  """The label of every leaf of ``tree``."""
  given = labels(tree) if callable(labels) else labels
  given = quadratic_labels(tree) if given is None else given
  out = jax.tree.map(lambda name, sub: jax.tree.map(lambda _: name, sub), given, tree)
  for path, name in jax.tree_util.tree_leaves_with_path(out):
    if name not in _LABELS:
      raise ValueError(
        f"labels must be g, b or other, got {name!r} for {jax.tree_util.keystr(path)}."
      )
  return out


def relinear_sg(
  inner: optax.GradientTransformation,
  gamma_g: jax.typing.ArrayLike = 1e-4,
  gamma_b: jax.typing.ArrayLike = 1e-4,
  labels: Any = None,
  *,
  allow_above_one: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Shrinking gradients: quadratic weights with learning rates of their own.

  .. math::
    u_g \leftarrow \gamma_g u_g, \quad u_b \leftarrow \gamma_b u_b

  on the updates u of ``inner``, so that the factor does not cancel in an adaptive rule.

  Args:
    inner: the optimiser, with its learning rate, momentum and decay.
    gamma_g: ratio of the learning rates of (w_g, b_g) and of w_r, in [0, 1].
    gamma_b: the same for (w_b, c), in [0, 1].
    labels: as in :func:`relinear`.
    allow_above_one: whether the ratios may exceed 1.

  Returns:
    A transformation with the state of ``inner``.

  Raises:
    ValueError: a ratio out of its range, or an unknown label.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import relinear_init, relinear_sg
    >>> params = relinear_init(0, (2, 1))
    >>> transform = relinear_sg(optax.sgd(0.5), 0.25, 0.0)
    >>> g = jax.tree.map(jnp.ones_like, params)
    >>> u, _ = transform.update(g, transform.init(params), params)
    >>> [u[branch]["bias"].item() for branch in "rgb"]
    [-0.5, -0.125, -0.0]
  """
  return optax.with_extra_args_support(
    optax.chain(
      inner, relinear(gamma_g, gamma_b, labels, allow_above_one=allow_above_one)
    )
  )


def relinear_sw(
  alpha_g: jax.typing.ArrayLike, alpha_b: jax.typing.ArrayLike, labels: Any = None
) -> optax.GradientTransformationExtraArgs:
  r"""Shrinking weights: quadratic weights pulled to their linear point every step.

  .. math::
    p \leftarrow p^* + \alpha (p + u - p^*)

  with :math:`p^* = 1` for the biases of branch g and 0 for all else. The last piece
  of a chain.

  Args:
    alpha_g: factor of (w_g, b_g - 1) in [0, 1]; 1 is no pull.
    alpha_b: factor of (w_b, c) in [0, 1].
    labels: as in :func:`relinear`.

  Returns:
    A transformation without state; it needs params.

  Raises:
    ValueError: a factor out of its range, an unknown label, or no params.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gradlab.transforms.updates import relinear_init, relinear_sw
    >>> params = jax.tree.map(lambda p: p + 1, relinear_init(0, (2, 1)))
    >>> u, _ = relinear_sw(0.5, 0.0).update(params, (), params)
    >>> [(params[b]["bias"] + u[b]["bias"]).item() for b in "rgb"]
    [2.0, 2.5, 0.0]
  """
  return relinear(1.0, 1.0, labels, alpha_g=alpha_g, alpha_b=alpha_b)


@method(
  family="updates",
  paper="Fan et al., On Expressivity and Trainability of Quadratic Networks, 2023",
  arxiv="2110.06081",
  seeds=("003:94",),
)
def relinear(
  gamma_g: jax.typing.ArrayLike = 1e-4,
  gamma_b: jax.typing.ArrayLike = 1e-4,
  labels: Any = None,
  *,
  alpha_g: jax.typing.ArrayLike | None = None,
  alpha_b: jax.typing.ArrayLike | None = None,
  allow_above_one: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Slows, and pulls back, the quadratic weights; stands after an optimiser.

  .. math::
    u_l &\leftarrow \gamma_l u_l \\
    u_l &\leftarrow \alpha_l u_l + (1 - \alpha_l) (p^*_l - p_l),
      \qquad l \in \{g, b\}

  on the updates u that come in, for the leaves p of the branches g and b of quadratic
  layers: :math:`p^* = 1` for a bias of branch g and 0 for all else. With
  :math:`\gamma = 0` a network that :func:`relinear_init` made linear stays linear, with
  1 it trains freely.

  Args:
    gamma_g: ratio of the learning rates of (w_g, b_g) and of w_r, in [0, 1].
    gamma_b: the same for (w_b, c), in [0, 1].
    labels: "g", "b" or "other" per leaf: a prefix tree, a function of the parameters
      that returns one, or None for :func:`quadratic_labels`. A leaf of g named
      "bias" has the linear point 1.
    alpha_g: factor of (w_g, b_g - 1) after every step, in [0, 1]; None is 1, no pull.
    alpha_b: the same for (w_b, c).
    allow_above_one: whether the ratios may exceed 1.

  Returns:
    A transformation without state; with an alpha it needs params.

  Raises:
    ValueError: an argument out of its range, an unknown label, or no params although
      an alpha is given.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import relinear, relinear_init
    >>> params = relinear_init(0, (2, 1))
    >>> transform = optax.chain(optax.sgd(1.0), relinear(0.5, 0.25))
    >>> g = jax.tree.map(jnp.ones_like, params)
    >>> u, _ = transform.update(g, transform.init(params), params)
    >>> [u[branch]["bias"].item() for branch in "rgb"]
    [-1.0, -0.5, -0.25]

  References:
    Fan et al., `On Expressivity and Trainability of Quadratic Networks
    <https://arxiv.org/abs/2110.06081>`_, 2023
  """
  for name, gamma in (("gamma_g", gamma_g), ("gamma_b", gamma_b)):
    check_range(name, gamma, 0, math.inf if allow_above_one else 1)
  for name, alpha in (("alpha_g", alpha_g), ("alpha_b", alpha_b)):
    if alpha is not None:
      check_range(name, alpha, 0, 1)
  gammas, alphas = {"g": gamma_g, "b": gamma_b}, {"g": alpha_g, "b": alpha_b}

  def update(
    updates: optax.Updates,
    state: optax.EmptyState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, optax.EmptyState]:
    del extra
    pulled = alpha_g is not None or alpha_b is not None
    if pulled and params is None:
      raise ValueError("relinear needs params in update when an alpha is given.")

    def leaf(path: Any, u: Any, label: str, p: Any = None) -> Any:
      if label == "other":
        return u
      out = common.widen(jnp.asarray(u))
      out = common.scalar(gammas[label]).astype(out.dtype) * out
      factor = alphas[label]
      if factor is not None:
        alpha = common.scalar(factor).astype(out.dtype)
        point = 1 if label == "g" and path and key_of(path[-1]) == "bias" else 0
        # Not u - (1 - alpha)(p + u - point): exactly u for 1, exactly point for 0.
        out = alpha * out + (1 - alpha) * (point - jnp.asarray(p).astype(out.dtype))
      return out.astype(jnp.result_type(u))

    trees = (updates, _labelled(labels, updates), *((params,) if pulled else ()))
    return jax.tree_util.tree_map_with_path(leaf, *trees), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
