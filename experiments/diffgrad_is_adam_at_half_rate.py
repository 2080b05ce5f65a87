"""diffGrad beside Adam: tuned against tuned, and at twice Adam's rate.

``python -m gradlab.launch.claims --only=diffgrad_is_adam_at_half_rate``
"""

from ml_collections import ConfigDict

from gradlab.claims import Claim, Comparison, tuned
from gradlab.sweeps import choices, product

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
UPDATE = "stages.train.update"


def get_config() -> ConfigDict:
  """A two-layer MLP on the digits under Adam."""
  return ConfigDict(
    {
      "seed": 0,
      "data": {"name": "digits"},
      "model": {"name": "mlp", "features": (128, 128)},
      "stages": {
        "train": {
          "steps": 300,
          "batch_size": 64,
          "objective": {"name": "cross_entropy"},
          "update": {"adamw": {"learning_rate": 2e-3, "weight_decay": 0.0}},
        },
        "validation": {
          "kind": "evaluate",
          "objective": {"name": "cross_entropy"},
          "split": "validation",
        },
        "test": {"kind": "evaluate", "objective": {"name": "cross_entropy"}},
      },
    }
  )


def claim() -> Claim:
  """Both rules over the same five rates, and two pairs at fixed rates."""

  def grid(rule, rates, **more):
    return product(
      choices(UPDATE, [{rule: more}]), choices(f"{UPDATE}.{rule}.learning_rate", rates)
    )

  def adam(*rates):
    return grid("adamw", rates, weight_decay=0.0)

  arms = {
    "adam": adam(*RATES),
    "diffgrad": grid("diffgrad", RATES),
    "adam at 1e-3": adam(1e-3),
    "diffgrad at 2e-3": grid("diffgrad", (2e-3,)),
    "diffgrad at 1e-3": grid("diffgrad", (1e-3,)),
  }

  def lower(says, metric, method, baseline, margin=0.0):
    return Comparison(says, metric, method, baseline, "lower", margin)

  return Claim(
    methods=("diffgrad",),
    paper="higher accuracy than Adam and five other rules on CIFAR with ResNet50",
    setting="MLP 64-128-128-10 on the digits, batch 64, 300 steps; both rules tuned "
    f"over the rates {RATES} by validation loss.",
    measure=tuned(get_config, arms, ("validation/loss", "lower")),
    comparisons=(
      Comparison("better than Adam", "test/accuracy", "diffgrad", "adam", "higher"),
      lower("better than Adam", "test/loss", "diffgrad", "adam"),
      lower(
        "no more than Adam at half the rate",
        "train/loss",
        "adam at 1e-3",
        "diffgrad at 2e-3",
        -0.01,
      ),
      lower(
        "slower than Adam at its own rate",
        "train/loss",
        "adam at 1e-3",
        "diffgrad at 1e-3",
      ),
    ),
  )
