"""Four update rules on the digits: each at three rates, five seeds.

``python -m gradlab.launch.ablate --config=experiments/digits_ablation.py
--workdir=runs/demo`` (this is ``make demo``); under a minute on two cores.
"""

from ml_collections import ConfigDict

METHODS = ("adamw", "adan", "diffgrad", "sinkgd")
STEPS = 400


def get_config(method: str = "adamw") -> ConfigDict:
  """One rule on a two-layer MLP, at its middle rate."""
  return ConfigDict(
    {
      "seed": 0,
      "data": {"name": "digits"},
      "model": {"name": "mlp", "features": (128, 128)},
      "stages": {
        "train": {
          "steps": STEPS,
          "batch_size": 128,
          "eval_every": 20,
          "objective": {"name": "cross_entropy"},
          "update": {method: {"learning_rate": 2e-2}},
        },
        "test": {"kind": "evaluate", "objective": {"name": "cross_entropy"}},
      },
    }
  )


def sweep_learning_rate(method: str) -> list[dict[str, float]]:
  """Three rates: on a wider grid, with other seeds, all four did best within them."""
  path = f"stages.train.update.{method}.learning_rate"
  return [{path: rate} for rate in (5e-3, 2e-2, 8e-2)]


def sweep_seed() -> list[dict[str, float]]:
  """Five seeds of initialisation, noise and data order."""
  return [{"seed": seed} for seed in range(5)]
