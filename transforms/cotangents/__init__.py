"""Backward rules: an identity (or an operation) forward, the rule backward."""

from gradlab.transforms.cotangents.ensloss import ensloss as ensloss
from gradlab.transforms.cotangents.ensloss import (
  ensloss_derivatives as ensloss_derivatives,
)
from gradlab.transforms.cotangents.ensloss import (
  ensloss_objective as ensloss_objective,
)
from gradlab.transforms.cotangents.ensloss import sample_box_cox as sample_box_cox
from gradlab.transforms.cotangents.gradient_reversal import (
  adversarial_multitask_loss as adversarial_multitask_loss,
)
from gradlab.transforms.cotangents.gradient_reversal import (
  gradient_reversal as gradient_reversal,
)
from gradlab.transforms.cotangents.gradient_reversal import (
  reversal_schedule as reversal_schedule,
)
from gradlab.transforms.cotangents.pixelwise_gradient_clip import (
  clip_pixels as clip_pixels,
)
from gradlab.transforms.cotangents.pixelwise_gradient_clip import (
  pixelwise_gradient_clip as pixelwise_gradient_clip,
)
from gradlab.transforms.cotangents.relu_mlp_second_order import (
  eikonal_loss as eikonal_loss,
)
from gradlab.transforms.cotangents.relu_mlp_second_order import (
  level_mask as level_mask,
)
from gradlab.transforms.cotangents.relu_mlp_second_order import (
  relu_mlp_second_order as relu_mlp_second_order,
)
from gradlab.transforms.cotangents.relu_mlp_second_order import (
  relu_mlp_value_and_input_grad as relu_mlp_value_and_input_grad,
)
