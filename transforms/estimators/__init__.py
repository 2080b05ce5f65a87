"""f -> g: what takes the place of ``jax.value_and_grad``."""

from gradlab.transforms.estimators.backprop import backprop as backprop
from gradlab.transforms.estimators.mezo import MezoState as MezoState
from gradlab.transforms.estimators.mezo import mezo as mezo
from gradlab.transforms.estimators.mezo import mezo_step as mezo_step
from gradlab.transforms.estimators.mezo import spsa_gradient as spsa_gradient
from gradlab.transforms.estimators.mezo import spsa_noise as spsa_noise
from gradlab.transforms.estimators.mezo import (
  spsa_projected_gradient as spsa_projected_gradient,
)
