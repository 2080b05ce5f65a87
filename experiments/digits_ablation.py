"""Four update rules on the digits: each at three rates, five seeds.

``python -m gradlab.launch.sweep --config=experiments/digits_ablation.py
--workdir=runs/demo --sweep=rule,seed`` (this is ``make demo``); under a minute on two
cores.
"""

from ml_collections import ConfigDict

from gradlab.sweeps import Arm, chain, choices, product, seeds

RULES = ("adamw", "adan", "diffgrad", "sinkgd")
# on a wider grid, with other seeds, all four did best within these
RATES = (5e-3, 2e-2, 8e-2)


def get_config() -> ConfigDict:
  """AdamW on a two-layer MLP, at its middle rate."""
  return ConfigDict(
    {
      "seed": 0,
      "data": {"name": "digits"},
      "model": {"name": "mlp", "features": (128, 128)},
      "stages": {
        "train": {
          "steps": 400,
          "batch_size": 128,
          "eval_every": 20,
          "log_every": 20,
          "objective": {"name": "cross_entropy"},
          "update": {"adamw": {"learning_rate": 2e-2}},
        },
        "test": {"kind": "evaluate", "objective": {"name": "cross_entropy"}},
      },
    }
  )


def sweep_rule() -> list[Arm]:
  """Every rule at every rate; a rule's arms are one compiled program."""
  update = "stages.train.update"
  return chain(
    *(
      product(
        choices(update, [{rule: {}}]),
        choices(f"{update}.{rule}.learning_rate", RATES),
      )
      for rule in RULES
    )
  )


def sweep_seed() -> list[Arm]:
  """Five seeds of initialisation, noise and data order."""
  return seeds(5)
