"""DHSPG and H2SPG: whole groups of parameters driven to exactly zero in one run."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import check_float_leaves, check_range
from gradlab.transforms.updates import _common as common
from gradlab.transforms.updates._families import (
  Groups,
  check_format,
  inner,
  resolve,
  spread,
  zero_groups,
)
from gradlab.transforms.updates._half_space import (
  ROUNDING,
  outside,
  partition,
  shrink,
  strength,
)
from gradlab.types import method

Variant = Literal["sgd", "adam", "adamw"]
# Of each variant: penalty, penalty_amplify, penalty_cap, b1, b2, weight_decay.
_NAMES = ("penalty", "penalty_amplify", "penalty_cap", "b1", "b2", "weight_decay")
_DEFAULTS: dict[str, tuple[float | None, ...]] = {
  "sgd": (1e-3, 2.0, 10.0, None, None, 0.0),
  "adam": (1e-2, 20.0, 1e3, 0.9, 0.999, 0.0),
  "adamw": (1e-2, 20.0, 1e3, 0.9, 0.999, 1e-2),
}


class DHSPGState(NamedTuple):
  """State of DHSPG.

  Attributes:
    count: int32 scalar, the number of steps done.
    m: momentum or first moment, like the parameters; None without momentum.
    v: second moment, like the parameters; None for "sgd".
    redundant: bool [groups] per family: what is to become zero.
    partitioned: bool scalar, whether ``redundant`` has been decided.
    zero_fraction: float32 scalar, the share of groups that are exactly zero.
  """

  count: jax.Array  # type: ignore[assignment]
  m: Any
  v: Any
  redundant: tuple[jax.Array, ...]
  partitioned: jax.Array
  zero_fraction: jax.Array


def _directions(
  gradients: Sequence[jax.Array],
  x: Sequence[jax.Array],
  moments: tuple[Any, Any],
  count: jax.Array,
  hyper: dict[str, Any],
  variant: str,
) -> tuple[Any, Any, Any]:
  """The search directions d and the moments, as lists of leaves."""
  b1, b2 = (None if hyper[n] is None else common.scalar(hyper[n]) for n in ("b1", "b2"))
  decay = common.scalar(0 if variant == "adamw" else hyper["weight_decay"])
  d = [g + decay.astype(g.dtype) * p for g, p in zip(gradients, x, strict=True)]
  if b1 is None:
    return d, None, None
  if variant == "sgd":
    plain = (count == 0) | (b1 == 0)
    gain = jnp.where(plain, 1, common.scalar(1 - hyper["dampening"]))
    m = _average(d, moments[0], b1, gain)
    return m, m, None
  m = _average(d, moments[0], b1, common.scalar(1 - hyper["b1"]))
  squares = [jnp.square(g) for g in d]
  v = _average(squares, moments[1], b2, common.scalar(1 - hyper["b2"]))
  done = optax.safe_increment(count)
  c1, c2 = (common.bias_correction(hyper[name], done) for name in ("b1", "b2"))

  def adapted(m: jax.Array, v: jax.Array) -> jax.Array:
    return m / c1.astype(m.dtype) / (jnp.sqrt(v / c2.astype(v.dtype)) + 1e-8)

  return [adapted(*pair) for pair in zip(m, v, strict=True)], m, v


def _average(
  values: Sequence[jax.Array], old: Sequence[jax.Array], decay: Any, gain: jax.Array
) -> list[jax.Array]:
  return [
    decay.astype(m.dtype) * m + gain.astype(m.dtype) * value
    for value, m in zip(values, old, strict=True)
  ]


@method(
  family="updates",
  paper="Chen et al., OTOv3: Automatic Architecture-Agnostic Neural Network Training "
  "and Compression from Structured Pruning to Erasing Operators, 2023",
  arxiv="2312.09411",
  seeds=("003:200",),
)
def dhspg(
  learning_rate: optax.ScalarOrSchedule,
  groups: Groups,
  target_sparsity: jax.typing.ArrayLike = 0.5,
  *,
  tolerance: jax.typing.ArrayLike = 0.05,
  start_step: int = 0,
  half_space_eps: jax.typing.ArrayLike = 0.0,
  penalty: jax.typing.ArrayLike | None = None,
  penalty_amplify: jax.typing.ArrayLike | None = None,
  penalty_cap: jax.typing.ArrayLike | None = None,
  variant: Variant = "sgd",
  b1: jax.typing.ArrayLike | None = None,
  b2: jax.typing.ArrayLike | None = None,
  dampening: jax.typing.ArrayLike = 0.0,
  weight_decay: jax.typing.ArrayLike | None = None,
  freeze_zero_groups: bool = True,
  descent_bound: bool = True,
  eligible_fn: Callable[[jax.Array], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""DHSPG: trains with SGD or Adam and zeroes whole groups on the way.

  At step ``start_step`` the groups with the highest scores become redundant; from
  then on they are shrunk, and zeroed once their trial point leaves the half-space
  around them. x and d are a group's parameters and its search direction.

  .. math::
    s_g &= \tfrac12 \frac{c_g}{\|c\|} + \tfrac12 \frac{r_g}{\|r\|}, \quad
      c_g = \cos(x_g, d_g), \quad r_g = (\|x_g\| / n_g + 10^{-6})^{-1} \\
    \hat x &= x - \eta d - \eta \lambda x / (\|x\| + 10^{-8}) \\
    x &\leftarrow 0 \text{ if } \langle \hat x, x \rangle < \epsilon \|x\|^2,
      \text{ else } \hat x

  :math:`\lambda` is the penalty where the step shrinks the group already, and else
  within :math:`(-\langle x, d \rangle / \|x\|, -\|d\|^2 \|x\| / \langle x, d
  \rangle)`, where the move both shrinks and descends. All other parameters follow the
  base rule, and so does every group once enough are zero.

  Args:
    learning_rate: eta >= 0, a number or a schedule.
    groups: families, each a tuple of (leaf path, axis): slice g along these axes is
      one group. Paths are keys joined by "/", such as "conv_0/kernel". What feeds a
      channel belongs to its family: kernel, bias, scale and offset of its norm. Groups
      are numbered family after family.
    target_sparsity: share of groups to zero, in [0, 1].
    tolerance: how many more groups may be redundant, as a share, >= 0.
    start_step: steps of the base rule alone, >= 0.
    half_space_eps: epsilon in [0, 1); a larger one zeroes sooner.
    penalty: smallest lambda, > 0; None is 1e-3 for "sgd", else 1e-2.
    penalty_amplify: lambda as a multiple of its lower bound, > 0; None is 2 or 20.
    penalty_cap: largest lambda as a multiple of the penalty, >= 1; None is 10 or 1e3.
    variant: "sgd", "adam" (decay in the gradient) or "adamw" (decay of its own).
    b1: decay of the momentum in [0, 1); None is 0.9, and no momentum for "sgd".
    b2: decay of the squares in [0, 1), of no use to "sgd"; None is 0.999.
    dampening: of the momentum of "sgd", in [0, 1].
    weight_decay: >= 0; None is 1e-2 for "adamw", else 0.
    freeze_zero_groups: whether zero groups stay zero, from ``start_step`` on.
    descent_bound: whether lambda is kept below its upper bound. Where -d is parallel
      to x both bounds are the same and a group can stop short of zero; False lets it.
    eligible_fn: H2SPG: ``eligible_fn(candidates)`` tells from a bool array over all
      groups whether the network without them is still connected; redundant groups are
      then added one by one, best score first, while it is. Must be traceable.

  Returns:
    A transformation with a :class:`DHSPGState`; it needs params.

  Raises:
    ValueError: an argument out of its range, a family that does not fit the
      parameters, a leaf that is not floating point, or no params.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import dhspg
    >>> w = {"w": jnp.array([[0.6, 0.8], [0.1, 0.0], [2.0, 1.0]])}
    >>> transform = dhspg(0.5, ((("w", 0),),), 0.3)
    >>> g = {"w": jnp.array([[-0.5, 0.1], [0.3, 0.0], [0.0, 0.1]])}
    >>> u, state = transform.update(g, transform.init(w), w)
    >>> optax.apply_updates(w, u)["w"][1].tolist(), round(float(state.zero_fraction), 3)
    ([0.0, 0.0], 0.333)

  References:
    Chen et al., `OTOv2: Automatic, Generic, User-Friendly
    <https://arxiv.org/abs/2303.06862>`_, 2023; Chen et al., `OTOv3
    <https://arxiv.org/abs/2312.09411>`_, 2023
  """
  if variant not in _DEFAULTS:
    raise ValueError(f"variant must be sgd, adam or adamw, got {variant!r}.")
  given = (penalty, penalty_amplify, penalty_cap, b1, b2, weight_decay)
  hyper: dict[str, Any] = {
    name: default if value is None else value
    for name, value, default in zip(_NAMES, given, _DEFAULTS[variant], strict=True)
  }
  hyper["dampening"] = dampening
  check_format(groups)
  check_range("learning_rate", learning_rate, 0)
  check_range("target_sparsity", target_sparsity, 0, 1)
  check_range("tolerance", tolerance, 0)
  check_range("start_step", start_step, 0)
  check_range("half_space_eps", half_space_eps, 0, 1, open_high=True)
  check_range("penalty", hyper["penalty"], 0, open_low=True)
  check_range("penalty_amplify", hyper["penalty_amplify"], 0, open_low=True)
  check_range("penalty_cap", hyper["penalty_cap"], 1)
  for name in ("b1", "b2"):
    if hyper[name] is not None:
      check_range(name, hyper[name], 0, 1, open_high=True)
  check_range("dampening", dampening, 0, 1)
  check_range("weight_decay", hyper["weight_decay"], 0)

  def init(params: optax.Params) -> DHSPGState:
    check_float_leaves(params, "DHSPG")

    def moment(kept: bool) -> Any:
      return jax.tree.map(jnp.zeros_like, common.widen(params)) if kept else None

    return DHSPGState(
      jnp.zeros([], jnp.int32),
      moment(hyper["b1"] is not None),
      moment(variant != "sgd"),
      tuple(jnp.zeros([family.size], bool) for family in resolve(groups, params)),
      jnp.zeros([], bool),
      jnp.zeros([], jnp.float32),
    )

  def update(
    updates: optax.Updates,
    state: DHSPGState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, DHSPGState]:
    del extra
    if params is None:
      raise ValueError("dhspg needs params in update, got None.")
    check_float_leaves(updates, "DHSPG")
    families = resolve(groups, params)
    leaves, treedef = jax.tree.flatten(params)
    tree: Any = treedef
    x = common.widen(leaves)
    g = [
      jnp.asarray(each).astype(p.dtype)
      for each, p in zip(tree.flatten_up_to(updates), x, strict=True)
    ]
    old = jax.tree.leaves(state.m), jax.tree.leaves(state.v)
    d, m, v = _directions(g, x, old, state.count, hyper, variant)
    eta = common.rate_at(learning_rate, state.count)
    decay = eta * common.scalar(hyper["weight_decay"] if variant == "adamw" else 0)
    move = [
      -eta.astype(p.dtype) * each - decay.astype(p.dtype) * p
      for each, p in zip(d, x, strict=True)
    ]
    xx, dd, xd = (inner(families, *pair) for pair in ((x, x), (d, d), (x, d)))
    target = jnp.asarray(target_sparsity, jnp.float32)
    share = jnp.minimum(
      common.scalar(target_sparsity) + common.scalar(tolerance), 0.999
    )
    now = ~state.partitioned & (state.count >= start_step)
    redundant = jax.lax.cond(
      now,
      lambda: partition(families, xx, dd, xd, share, eligible_fn),
      lambda: state.redundant,
    )
    partitioned = state.partitioned | now
    active = partitioned & (state.zero_fraction < target * (1 - ROUNDING))
    penalties = [common.scalar(hyper[name]) for name in _NAMES[:3]]
    pulls = [
      jnp.where(active & chosen, eta * strength(dots, penalties, descent_bound), 0)
      for chosen, *dots in zip(redundant, xx, dd, xd, strict=True)
    ]
    move = shrink(families, x, move, xx, pulls)
    bound = common.scalar(half_space_eps)
    zeroed = outside(families, x, move, [bound * squares for squares in xx])
    zeroed = [active & z & r for z, r in zip(zeroed, redundant, strict=True)]
    if freeze_zero_groups:
      still = zip(zeroed, zero_groups(families, x), strict=True)
      zeroed = [z | (partitioned & zero) for z, zero in still]
    dead = spread(families, zeroed, x)
    out = [
      jnp.where(each, -p, step).astype(jnp.result_type(leaf))
      for each, p, step, leaf in zip(dead, x, move, leaves, strict=True)
    ]
    # Of the parameters as they will be stored.
    after = [jnp.asarray(p) + u for p, u in zip(leaves, out, strict=True)]
    zeros = zero_groups(families, after)
    count = sum((jnp.sum(z, dtype=jnp.float32) for z in zeros), jnp.float32(0))
    everything = max(sum(family.size for family in families), 1)
    return tree.unflatten(out), DHSPGState(
      optax.safe_increment(state.count),
      None if m is None else tree.unflatten(m),
      None if v is None else tree.unflatten(v),
      redundant,
      partitioned,
      (count / everything).astype(jnp.float32),
    )

  return optax.GradientTransformationExtraArgs(init, update)
