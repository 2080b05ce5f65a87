"""batch -> loss: functions of (model outputs, batch) that return (scalar, aux)."""

from gradlab.transforms.objectives.cross_entropy import cross_entropy as cross_entropy
from gradlab.transforms.objectives.next_token import next_token as next_token
from gradlab.transforms.objectives.programmable_gradient_information import (
  fuse as fuse,
)
from gradlab.transforms.objectives.programmable_gradient_information import (
  pgi_loss as pgi_loss,
)
from gradlab.transforms.objectives.programmable_gradient_information import (
  programmable_gradient_information as programmable_gradient_information,
)
from gradlab.transforms.objectives.programmable_gradient_information import (
  resize_nearest as resize_nearest,
)
from gradlab.transforms.objectives.programmable_gradient_information import (
  route as route,
)
from gradlab.transforms.objectives.programmable_gradient_information import (
  strip_auxiliary as strip_auxiliary,
)
from gradlab.transforms.objectives.squared_error import squared_error as squared_error
