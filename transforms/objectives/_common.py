"""Helpers that the objectives share: batch fields, weighted means, class losses."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gradlab.transforms._common import concrete
from gradlab.types import Batch


def field(batch: Batch, name: str) -> jax.Array:
  """The batch's field of that name, or a ValueError that lists the fields."""
  if name not in batch:
    raise ValueError(
      f"the batch has no field {name!r}; its fields are {', '.join(sorted(batch))}."
    )
  return batch[name]


def weights_of(batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
  """The optional field ``mask`` as float32 weights of the given shape.

  A mask may have fewer axes than the shape: the first ones.
  """
  mask = batch.get("mask")
  if mask is None:
    return None
  if mask.ndim > len(shape) or mask.shape != shape[: mask.ndim]:
    raise ValueError(
      f"the mask has shape {mask.shape}; it must be the beginning of {shape}."
    )
  spread = jnp.reshape(mask, mask.shape + (1,) * (len(shape) - mask.ndim))
  return jnp.broadcast_to(spread, shape).astype(jnp.float32)


def mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
  """Mean, or mean weighted by ``weights``; 0 when all weights are 0.

  What has weight 0 is not read: it may be NaN.
  """
  if weights is None:
    return jnp.mean(values)
  total = jnp.sum(weights)
  counted = jnp.where(weights > 0, values * weights, 0.0)
  return jnp.sum(counted) / jnp.where(total > 0, total, 1.0)


def class_losses(
  logits: jax.Array, labels: jax.Array, label_smoothing: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Per-position loss, negative log-likelihood and correctness, all float32.

  Args:
    logits: ``[..., C]``, any float dtype.
    labels: ``[...]``, integers in [0, C).
    label_smoothing: weight of the uniform distribution in the target.
  """
  logits, labels = logits.astype(jnp.float32), labels.astype(jnp.int32)
  nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
  correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
  if concrete(label_smoothing) and label_smoothing == 0:
    # Without smoothing a class may have logit -inf, which 0 * inf would spoil.
    return nll, nll, correct
  uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
  share = jnp.asarray(label_smoothing, jnp.float32)
  return nll + share * (uniform - nll), nll, correct
