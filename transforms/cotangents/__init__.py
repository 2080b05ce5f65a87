"""Backward rules: an identity (or an operation) forward, the rule backward."""

from gradlab.transforms.cotangents.gradient_reversal import (
  adversarial_multitask_loss as adversarial_multitask_loss,
)
from gradlab.transforms.cotangents.gradient_reversal import (
  gradient_reversal as gradient_reversal,
)
from gradlab.transforms.cotangents.gradient_reversal import (
  reversal_schedule as reversal_schedule,
)
