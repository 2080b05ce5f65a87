"""The plain average over sources."""

from typing import Any

import optax
from optax.experimental import aggregating

from gradlab.transforms.aggregators._common import num_sources
from gradlab.types import Aggregator, method


@method(
  family="aggregators",
  paper="Robbins and Monro, A Stochastic Approximation Method, 1951",
)
def mean() -> Aggregator:
  r"""Averages the sources' gradients: the default, and every other one's baseline.

  .. math::
    g = \frac{1}{K} \sum_{k=1}^{K} g_k

  optax's ``average_per_element_updates`` does the work: it sums bf16 and float16
  stacks in float32. Around it stand a check of the source axis and the acceptance of
  keyword arguments that other aggregators read.

  Returns:
    An aggregator: ``update(stacked_grads, state, params=None, **extra) -> (grad,
    state)`` maps leaves ``[K, ...]`` of any float dtype to ``[...]`` of the same
    dtype. Its state is empty.

  Raises:
    ValueError: by ``update``, for a leaf that is not floating point, K = 0, or leaves
      that disagree about K.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.aggregators import mean
    >>> aggregator = mean()
    >>> state = aggregator.init({"w": jnp.zeros(2)})
    >>> grad, state = aggregator.update({"w": jnp.array([[1., 4.], [3., 0.]])}, state)
    >>> print(grad["w"])
    [2. 2.]

  References:
    Herbert Robbins and Sutton Monro, A Stochastic Approximation Method, Annals of
    Mathematical Statistics 22(3), 1951.
  """
  inner = aggregating.average_per_element_updates()

  def update(
    stacked: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    del extra
    num_sources(stacked, "mean")
    grad, state = inner.update(stacked, state, params)
    return grad, state

  return Aggregator(inner.init, update)
