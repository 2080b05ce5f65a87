"""Next-token prediction: the loss of a causal language model."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradlab.transforms._common import check_range
from gradlab.transforms.objectives._common import class_losses, field, mean, weights_of
from gradlab.types import Batch, method


@method(
  family="objectives",
  paper="Bengio et al., A Neural Probabilistic Language Model, 2003",
)
def next_token(
  outputs: jax.Array,
  batch: Batch,
  *,
  tokens: str = "inputs",
  label_smoothing: ArrayLike = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""Mean cross-entropy of every token given those before it.

  .. math::
    L = -\frac{1}{B (T - 1)} \sum_{b} \sum_{t=1}^{T-1} \log p_{b,t}(x_{b,t+1})

  The outputs at position t predict token t+1; those at the last position are not used.

  Args:
    outputs: logits ``[B, T, V]`` of any float dtype; computed in float32.
    batch: has the tokens, integers in [0, V) of shape ``[B, T]``, T at least 2, and
      may have ``mask``, weights (1 counts, 0 does not) of shape ``[B]`` or ``[B, T]``,
      where ``mask[b, t]`` weighs the prediction OF token t: the means are then
      weighted means over what counts, and 0 where nothing does.
    tokens: the name of the tokens' field.
    label_smoothing: a in [0, 1], as in ``cross_entropy``.

  Returns:
    The loss in nats per token and ``{"accuracy", "bits_per_token"}``, float32 scalars;
    bits per token are those of the unsmoothed labels. All are means, so that averages
    over equal shards of an unmasked batch are the batch's values.

  Raises:
    ValueError: a missing field, tokens that are not integers, shapes that do not fit,
      T below 2, or a concrete label_smoothing outside [0, 1].

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms import next_token
    >>> loss, aux = next_token(jnp.zeros((1, 3, 4)), {"inputs": jnp.array([[0, 1, 0]])})
    >>> round(float(loss), 4), float(aux["bits_per_token"]), float(aux["accuracy"])
    (1.3863, 2.0, 0.5)

  References:
    Bengio et al., A Neural Probabilistic Language Model, 2003.
  """
  check_range("label_smoothing", label_smoothing, 0.0, 1.0)
  ids = field(batch, tokens)
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"{tokens!r} must hold integer tokens, got {ids.dtype}.")
  if ids.ndim != 2 or outputs.shape[:-1] != ids.shape or ids.shape[1] < 2:
    raise ValueError(
      f"outputs must be [B, T, V] for tokens [B, T] with T at least 2, got "
      f"{outputs.shape} and {ids.shape}."
    )
  weights = weights_of(batch, ids.shape)
  if weights is not None:
    weights = weights[:, 1:]
  losses, nll, correct = class_losses(outputs[:, :-1], ids[:, 1:], label_smoothing)
  aux = {
    "accuracy": mean(correct, weights),
    "bits_per_token": mean(nll, weights) / np.float32(np.log(2.0)),
  }
  return mean(losses, weights), aux
