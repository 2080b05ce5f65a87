"""Cross-entropy of a softmax with integer labels."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gradlab.transforms._common import check_range
from gradlab.transforms.objectives._common import class_losses, field, mean, weights_of
from gradlab.types import Batch, method


@method(
  family="objectives",
  paper="Bridle, Probabilistic Interpretation of Feedforward Classification Network "
  "Outputs, with Relationships to Statistical Pattern Recognition, 1990",
)
def cross_entropy(
  outputs: jax.Array,
  batch: Batch,
  *,
  label: str = "label",
  label_smoothing: ArrayLike = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""Mean cross-entropy between smoothed labels and the softmax of the outputs.

  .. math::
    L = \frac{1}{N} \sum_{n} \Big[ -(1 - a) \log p_{n, y_n}
      - \frac{a}{C} \sum_c \log p_{n, c} \Big], \qquad
    p_n = \operatorname{softmax}(z_n)

  Args:
    outputs: logits ``[..., C]`` of any float dtype; computed in float32.
    batch: has the labels, integers in [0, C) of shape ``[...]``, and may have
      ``mask``, weights (1 counts, 0 does not) of the labels' shape or of its first
      axes: the means are then weighted means over what counts, and 0 where nothing
      does. A label whose weight is 0 may be anything.
    label: the name of the labels' field.
    label_smoothing: a in [0, 1].

  Returns:
    The loss in nats and ``{"accuracy"}``, float32 scalars; both are means, so that
    averages over equal shards of an unmasked batch are the batch's values.

  Raises:
    ValueError: a missing field, labels that are not integers, shapes that do not fit,
      or a concrete label_smoothing outside [0, 1].

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import cross_entropy
    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
    >>> loss, aux = cross_entropy(logits, {"label": jnp.array([0, 1])})
    >>> round(float(loss), 4), float(aux["accuracy"])
    (1.0397, 0.5)

  References:
    Bridle, Probabilistic Interpretation of Feedforward Classification Network Outputs,
    with Relationships to Statistical Pattern Recognition, 1990. Label smoothing:
    Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016,
    arXiv 1512.00567.
  """
  check_range("label_smoothing", label_smoothing, 0.0, 1.0)
  labels = field(batch, label)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"{label!r} must hold integer classes, got {labels.dtype}.")
  if outputs.shape[:-1] != labels.shape:
    raise ValueError(
      f"outputs must be [..., classes] for labels [...], got {outputs.shape} and "
      f"{labels.shape}."
    )
  weights = weights_of(batch, labels.shape)
  losses, _, correct = class_losses(outputs, labels, label_smoothing)
  return mean(losses, weights), {"accuracy": mean(correct, weights)}
