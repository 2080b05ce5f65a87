"""An MLP on the digits: the smallest complete experiment.

``python -m gradlab.launch.train --config=experiments/digits.py --workdir=runs/digits``
"""

from ml_collections import ConfigDict

from gradlab.sweeps import Arm, log_uniform, seeds


def get_config() -> ConfigDict:
  """AdamW on a two-layer MLP."""
  return ConfigDict(
    {
      "seed": 0,
      "data": {"name": "digits"},
      "model": {"name": "mlp", "features": (128, 128)},
      "stages": {
        "train": {
          "steps": 500,
          "batch_size": 128,
          "objective": {"name": "cross_entropy"},
          "update": {"adamw": {"learning_rate": 1e-3}},
        },
        "test": {"kind": "evaluate", "objective": {"name": "cross_entropy"}},
      },
    }
  )


def sweep_learning_rate() -> list[Arm]:
  """Sixteen rates over three decades."""
  return log_uniform("stages.train.update.adamw.learning_rate", 1e-4, 1e-1, 16)


def sweep_seed() -> list[Arm]:
  """Four seeds of initialisation, noise and data order."""
  return seeds(4)
