"""metrics -> hyperparameters: schedules and feedback, between steps."""

from gradlab.transforms.controllers._common import from_schedule as from_schedule
from gradlab.transforms.controllers.cubic_sparsity import (
  cubic_sparsity as cubic_sparsity,
)
from gradlab.transforms.controllers.cubic_sparsity import (
  cubic_sparsity_schedule as cubic_sparsity_schedule,
)
from gradlab.transforms.controllers.warmup_cosine import (
  warmup_cosine as warmup_cosine,
)
from gradlab.transforms.controllers.warmup_cosine import (
  warmup_cosine_schedule as warmup_cosine_schedule,
)
