"""AdamW: optax's, with float32 moments and hyperparameters that may be traced."""

from typing import Any

import jax
import optax

from gradlab.transforms._common import check_range
from gradlab.transforms.updates._common import in_float32
from gradlab.types import method


@method(
  family="updates",
  paper="Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019",
  arxiv="1711.05101",
)
def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  weight_decay: jax.typing.ArrayLike = 1e-4,
  mask: Any = None,
  nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""AdamW: ``optax.adamw`` on float32 copies of the gradients and parameters.

  .. math::
    m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \quad v_t = b_2 v_{t-1} + (1 - b_2) g_t^2 \\
    \theta_t &= \theta_{t-1} - \eta \left(
      \frac{\hat m_t}{\sqrt{\hat v_t + \bar\epsilon} + \epsilon}
      + \lambda \theta_{t-1} \right)

  On float32 parameters it is ``optax.adamw`` bit for bit. On bfloat16 parameters the
  moments are float32, and a traced float32 hyperparameter changes no dtype.

  Args:
    learning_rate: eta >= 0, a number or a schedule.
    b1: decay of the average of gradients, in [0, 1).
    b2: decay of the average of squared gradients, in [0, 1).
    eps: added to the root, >= 0.
    eps_root: added under the root, >= 0.
    weight_decay: lambda >= 0, decoupled.
    mask: which leaves decay: a prefix tree of bools, a function of params that
      returns one, or None for all.
    nesterov: whether to use Nesterov's momentum.

  Returns:
    A transformation with the state of ``optax.adamw``; it needs params.

  Raises:
    ValueError: an argument out of its range, or no params.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import adamw
    >>> transform, theta = adamw(0.1), jnp.ones(2, jnp.bfloat16)
    >>> state = transform.init(theta)
    >>> update, state = transform.update(2 * theta, state, theta)
    >>> print(update)
    [-0.100098 -0.100098]
    >>> state[0].mu.dtype
    dtype('float32')

  References:
    Loshchilov & Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2019
  """
  check_range("learning_rate", learning_rate, 0)
  check_range("b1", b1, 0, 1, open_high=True)
  check_range("b2", b2, 0, 1, open_high=True)
  check_range("eps", eps, 0)
  check_range("eps_root", eps_root, 0)
  check_range("weight_decay", weight_decay, 0)
  return in_float32(
    optax.adamw(
      learning_rate,
      b1=b1,
      b2=b2,
      eps=eps,
      eps_root=eps_root,
      weight_decay=weight_decay,
      mask=mask,
      nesterov=nesterov,
    )
  )
