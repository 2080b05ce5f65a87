"""Adan beside AdamW on a byte-level decoder: at as many steps, and at half as many.

``python -m gradlab.launch.claims --only=adan_needs_half_the_steps``
"""

from ml_collections import ConfigDict

from gradlab.claims import Claim, Comparison, tuned
from gradlab.sweeps import choices, product

STEPS = 240
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
UPDATE = "stages.train.update"


def get_config() -> ConfigDict:
  """One layer of width 32 under AdamW at a constant rate."""
  return ConfigDict(
    {
      "seed": 0,
      "data": {"name": "stdlib_bytes", "context": 32},
      "model": {"name": "decoder", "num_layers": 1, "width": 32, "num_heads": 2},
      "stages": {
        "train": {
          "steps": STEPS,
          "batch_size": 16,
          "objective": {"name": "next_token"},
          "update": {"adamw": {"learning_rate": 3e-3}},
        },
        "validation": {
          "kind": "evaluate",
          "objective": {"name": "next_token"},
          "split": "validation",
        },
        "test": {"kind": "evaluate", "objective": {"name": "next_token"}},
      },
    }
  )


def claim() -> Claim:
  """Each rule at its best of four rates, at all the steps and at half of them."""

  def grid(rule, steps=STEPS, **more):
    return product(
      choices(UPDATE, [{rule: more}]),
      choices(f"{UPDATE}.{rule}.learning_rate", RATES),
      choices("stages.train.steps", [steps]),
    )

  arms = {
    "adamw": grid("adamw"),
    "adan": grid("adan"),
    "adan b1=0.9": grid("adan", b1=0.9),
    "adan b1=0.9, half": grid("adan", STEPS // 2, b1=0.9),
  }

  def lower(says, method):
    return Comparison(says, "test/loss", method, "adamw", "lower")

  return Claim(
    methods=("adan",),
    paper="same or better than AdamW in about half the epochs",
    setting=f"Byte-level decoder (1 layer, width 32, context 32) on the standard "
    f"library's source, batch 16, {STEPS} steps; rates {RATES} for every arm, chosen "
    "by validation loss.",
    measure=tuned(get_config, arms, ("validation/loss", "lower")),
    comparisons=(
      lower("better at equal steps, paper's b1 = 0.98", "adan"),
      lower("better at equal steps, b1 = 0.9", "adan b1=0.9"),
      lower("better at half the steps", "adan b1=0.9, half"),
    ),
  )
