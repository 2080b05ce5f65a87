"""PGI beside deep supervision and the main loss alone, on a deep and narrow network.

``python -m gradlab.launch.claims
--only=programmable_gradient_information_helps_deep_nets``
"""

from ml_collections import ConfigDict

from gradlab.claims import Claim, Comparison, tuned
from gradlab.sweeps import choices, product

STEPS, RATES = 400, (1e-3, 3e-3, 1e-2)
TRAIN = "stages.train.objective"
OBJECTIVE = {"name": "programmable_gradient_information"}


def get_config() -> ConfigDict:
  """Twelve convolutions of eight channels, without skips, on digits of 16 x 16."""
  return ConfigDict(
    {
      "seed": 0,
      "data": {"name": "digits"},
      "model": {
        "name": "pgi",
        "stages": (8, 8, 8, 8),
        "depth": 3,
        "aux_levels": 3,
        "aux_branch": True,
        "image_shape": (8, 8),
        "resize": (16, 16),
      },
      "stages": {
        "train": {
          "steps": STEPS,
          "batch_size": 32,
          "objective": {**OBJECTIVE, "aux_weight": 0.25},
          "update": {"adamw": {"learning_rate": 3e-3, "weight_decay": 0.0}},
        },
        "validation": {
          "kind": "evaluate",
          "split": "validation",
          "objective": OBJECTIVE,
        },
        "test": {"kind": "evaluate", "objective": OBJECTIVE},
      },
    }
  )


def measure(seeds, folder, smoke):
  """The same main network under three losses, each at its best of three rates."""
  rates = choices("stages.train.update.adamw.learning_rate", RATES)
  arms = {
    # A weight of zero is training without the branch, in the program of the branch.
    "main only": product(rates, choices(f"{TRAIN}.aux_weight", [0.0])),
    "deep supervision": product(rates, choices("model.aux_branch", [False])),
    "pgi": rates,
  }
  if smoke:
    arms = {label: grid[:1] for label, grid in arms.items()}
  run = tuned(get_config, arms, ("validation/accuracy", "higher"))
  return run(seeds, folder, smoke)


def claim() -> Claim:
  """Each kind of auxiliary loss against less of it."""

  def higher(says, method, baseline):
    return Comparison(says, "test/accuracy", method, baseline, "higher")

  metric = "train/main_loss"
  return Claim(
    methods=("programmable_gradient_information",),
    paper="the auxiliary branch gives main stages better gradients: about half a point "
    "of AP on COCO, most in deep networks",
    setting="CNN of 4 stages of 3 convolutions, 8 channels, no skips, on the digits at "
    f"16 x 16, batch 32, {STEPS} Adam steps; rates {RATES} chosen by validation "
    "accuracy of the main head.",
    measure=measure,
    comparisons=(
      higher("better than the main loss alone", "pgi", "main only"),
      higher("better than deep supervision", "pgi", "deep supervision"),
      higher("deep supervision better than none", "deep supervision", "main only"),
      Comparison("main head trains faster", metric, "pgi", "main only", "lower"),
    ),
  )
