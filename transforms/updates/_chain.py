"""Chains in which a transformation may take those that follow it inside itself."""

from collections.abc import Callable

import optax


class Around(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
  """A transformation without the one that it needs inside.

  Attributes:
    around: ``around(inner)`` is the transformation with ``inner`` inside.
  """

  around: Callable[
    [optax.GradientTransformation], optax.GradientTransformationExtraArgs
  ]


def chain(
  *transforms: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """``optax.chain``, in which a wrapper without ``inner`` wraps all that follows it.

  ``optax.chain`` shows no transformation another one's state. Here, what has an
  attribute ``around`` (``quantised_moments(8)``, say) is given the chain of all
  transformations behind it: ``chain(a, quantised_moments(8), b, c)`` is
  ``optax.chain(a, quantised_moments(8, optax.chain(b, c)))``.

  Args:
    *transforms: in the order in which they see the gradients.

  Returns:
    A transformation with the state of that ``optax.chain``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import chain, quantised_moments
    >>> from gradlab.transforms.updates import scale_by_diffgrad
    >>> transform = chain(quantised_moments(8, min_size=0), scale_by_diffgrad())
    >>> (state,) = transform.init(jnp.ones(2))
    >>> state.inner[0].mu.codes.dtype
    dtype('uint8')
  """
  for i, transform in enumerate(transforms[:-1]):
    around = getattr(transform, "around", None)
    if around is not None:
      return optax.chain(*transforms[:i], around(chain(*transforms[i + 1 :])))
  return optax.chain(*transforms)


def named_chain(
  *transforms: tuple[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """:func:`chain` of named transformations, with the state of ``optax.named_chain``.

  Args:
    *transforms: pairs of a name and a transformation.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import named_chain, quantised_moments
    >>> from gradlab.transforms.updates import scale_by_diffgrad
    >>> small = quantised_moments(8, min_size=0)
    >>> transform = named_chain(("small", small), ("rule", scale_by_diffgrad()))
    >>> list(transform.init(jnp.ones(2))["small"].inner)
    ['rule']
  """
  for i, (name, transform) in enumerate(transforms[:-1]):
    around = getattr(transform, "around", None)
    if around is not None:
      wrapped = (name, around(named_chain(*transforms[i + 1 :])))
      return optax.named_chain(*transforms[:i], wrapped)
  return optax.named_chain(*transforms)
