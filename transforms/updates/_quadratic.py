"""Quadratic layers: their parameters, their outputs, and how to tell them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms._common import as_key
from gradlab.transforms.updates import _common as common


def relinear_init(
  key: int | jax.Array,
  shape_r: tuple[int, ...],
  dtype: jax.typing.DTypeLike = jnp.float32,
  *,
  compact: bool = False,
) -> dict[str, dict[str, jax.Array]]:
  r"""Parameters of a quadratic layer that equals a linear one.

  ``r/kernel`` is Kaiming normal, of standard deviation :math:`\sqrt{2 / n}` for n
  inputs of a neuron, ``g/bias`` is one, everything else zero.

  Args:
    key: a jax key or an int.
    shape_r: shape of each kernel, [inputs, features] or [h, w, inputs, features].
    dtype: of the parameters.
    compact: whether the branch g is left out.

  Returns:
    ``{"r": {kernel, bias}, "g": {kernel, bias}, "b": {kernel, bias}}``.

  Raises:
    ValueError: a kernel with fewer than two axes.

  Examples:
    >>> from gradlab.transforms.updates import relinear_init
    >>> params = relinear_init(0, (3, 2))
    >>> params["r"]["kernel"].shape, params["g"]["bias"].tolist()
    ((3, 2), [1.0, 1.0])
  """
  if len(shape_r) < 2:
    raise ValueError(
      f"shape_r must be [..., inputs, features], at least two axes, got {shape_r!r}."
    )
  std = math.sqrt(2 / max(math.prod(shape_r[:-1]), 1))
  normal = std * jax.random.normal(as_key(key), shape_r)

  def linear(kernel: jax.Array, bias: float) -> dict[str, jax.Array]:
    return {
      "kernel": kernel.astype(dtype),
      "bias": jnp.full(shape_r[-1:], bias, dtype),
    }

  zero = jnp.zeros(shape_r)
  gate = {} if compact else {"g": linear(zero, 1)}
  return {"r": linear(normal, 0)} | gate | {"b": linear(zero, 0)}


def quadratic_apply(
  params: Mapping[str, Mapping[str, jax.Array]],
  x: jax.Array,
  linear_op: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
) -> jax.Array:
  r"""A layer of quadratic neurons.

  .. math::
    q(x) = (W_r x + b_r) \circ (W_g x + b_g) + W_b (x \circ x) + c

  Without branch g, :math:`q(x) = W_r x + b_r + W_b (x \circ x) + c`.

  Args:
    params: as from :func:`relinear_init`; c is ``b/bias``.
    x: [..., inputs].
    linear_op: ``linear_op(x, kernel)`` without bias, such as a convolution.

  Returns:
    q(x), in the dtype of x; computed in at least float32, because products of two
    pre-activations overflow half precision early.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import quadratic_apply, relinear_init
    >>> params = relinear_init(0, (2, 3))
    >>> x = jnp.array([[1.0, -2.0]])
    >>> bool((quadratic_apply(params, x) == x @ params["r"]["kernel"]).all())
    True
  """
  x = jnp.asarray(x)
  wide = common.widen(x)
  branches = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(wide.dtype), params)

  def linear(branch: str, inputs: jax.Array) -> jax.Array:
    out = linear_op(inputs, branches[branch]["kernel"])
    return out + jnp.broadcast_to(branches[branch]["bias"], out.shape)

  out = linear("r", wide)
  if "g" in branches:
    out = out * linear("g", wide)
  return (out + linear("b", jnp.square(wide))).astype(x.dtype)


def quadratic_labels(tree: Any) -> Any:
  """Per leaf "g", "b" or "other": the branches of quadratic layers, by their names.

  A branch is a dict of ``kernel`` and ``bias`` that stands beside exactly ``r`` and
  the other branch (or beside ``r`` alone, in a compact layer); leaves elsewhere that
  happen to be called g or b are "other".

  Args:
    tree: parameters or updates.

  Returns:
    A tree of strings with the structure of ``tree``.

  Examples:
    >>> from gradlab.transforms.updates import quadratic_labels, relinear_init
    >>> labels = quadratic_labels({"layer": relinear_init(0, (2, 2)), "b": 0.0})
    >>> labels["layer"]["g"], labels["b"]
    ({'bias': 'g', 'kernel': 'g'}, 'other')
  """

  def hidden(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode) or node is None

  siblings: dict[Any, set[Any]] = {}
  for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=hidden):
    for end, part in enumerate(path):
      siblings.setdefault(path[:end], set()).add(key_of(part))

  def label(path: Any, _: Any) -> str:
    names = tuple(key_of(part) for part in path[-2:])
    if len(names) < 2 or names[0] not in ("g", "b"):
      return "other"
    layer = siblings[path[:-2]] in ({"r", "g", "b"}, {"r", "b"})
    return names[0] if layer and siblings[path[:-1]] <= {"kernel", "bias"} else "other"

  return jax.tree_util.tree_map_with_path(label, tree)


def key_of(part: Any) -> Any:
  """The plain key of one part of a path."""
  for name in ("key", "name", "idx"):
    if hasattr(part, name):
      return getattr(part, name)
  return part
