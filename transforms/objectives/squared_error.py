"""Mean squared error."""

import jax
import jax.numpy as jnp
import optax

from gradlab.transforms.objectives._common import field, mean, weights_of
from gradlab.types import Batch, method


@method(
  family="objectives",
  paper="Gauss, Theoria motus corporum coelestium in sectionibus conicis solem "
  "ambientium, 1809",
)
def squared_error(
  outputs: jax.Array, batch: Batch, *, label: str = "label"
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""Mean of the squared differences over all elements, without a factor 1/2.

  .. math:: L = \frac{1}{N} \sum_{n} (o_n - y_n)^2

  Args:
    outputs: predictions ``[...]`` of any float dtype; computed in float32.
    batch: has the targets, numbers of the same shape (an axis of length 1 that only
      one of the two has at its end is dropped: ``[B, 1]`` predicts ``[B]``), and may
      have ``mask``, weights (1 counts, 0 does not) of that shape or of its first
      axes: the means are then weighted means over what counts, and 0 where nothing
      does. Where the weight is 0 targets and outputs may be NaN.
    label: the name of the targets' field.

  Returns:
    The loss and ``{"mae"}``, the mean absolute difference, float32 scalars; both are
    means, so that averages over equal shards of an unmasked batch are the batch's
    values.

  Raises:
    ValueError: a missing field, or shapes that do not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import squared_error
    >>> batch = {"label": jnp.array([1.0, -1.0])}
    >>> loss, aux = squared_error(jnp.array([[2.0], [2.0]]), batch)
    >>> float(loss), float(aux["mae"])
    (5.0, 2.0)

  References:
    Gauss, Theoria motus corporum coelestium in sectionibus conicis solem ambientium,
    1809.
  """
  targets = field(batch, label)
  if outputs.shape == (*targets.shape, 1):
    outputs = jnp.squeeze(outputs, -1)
  elif targets.shape == (*outputs.shape, 1):
    targets = jnp.squeeze(targets, -1)
  if outputs.shape != targets.shape:
    raise ValueError(
      f"outputs and {label!r} must have the same shape, got {outputs.shape} and "
      f"{targets.shape}."
    )
  outputs, targets = outputs.astype(jnp.float32), targets.astype(jnp.float32)
  weights = weights_of(batch, targets.shape)
  if weights is not None:
    # Zeros on both sides: a NaN behind weight 0 would reach the gradient otherwise.
    outputs = jnp.where(weights > 0, outputs, 0.0)
    targets = jnp.where(weights > 0, targets, 0.0)
  loss = mean(optax.losses.squared_error(outputs, targets), weights)
  return loss, {"mae": mean(jnp.abs(outputs - targets), weights)}
