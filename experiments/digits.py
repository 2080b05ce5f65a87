"""An MLP on the digits: the smallest complete experiment.

``python -m gradlab.launch.train --config=experiments/digits.py --workdir=runs/digits``
"""

from ml_collections import ConfigDict


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
