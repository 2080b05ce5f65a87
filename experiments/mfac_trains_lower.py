"""M-FAC beside SGD with momentum and Adam on a digits MLP, each at its best of twelve.

``python -m gradlab.launch.claims --only=mfac_trains_lower``
"""

from ml_collections import ConfigDict

from gradlab.claims import Claim, Comparison, tuned
from gradlab.sweeps import choices, product

UPDATE = "stages.train.update"
RATES = (1e-2, 3e-2, 1e-1)


def get_config() -> ConfigDict:
  """A 64-32-10 network, 330 steps of Adam."""
  loss = {"kind": "evaluate", "objective": {"name": "cross_entropy"}}
  return ConfigDict(
    {
      "seed": 0,
      "data": {"name": "digits"},
      "model": {"name": "mlp", "features": (32,)},
      "stages": {
        "train": {
          "steps": 330,
          "batch_size": 64,
          "objective": {"name": "cross_entropy"},
          "update": {"rule": {"name": "optax.adam", "learning_rate": 3e-2}},
        },
        "fit": {**loss, "split": "train"},
        "validation": {**loss, "split": "validation"},
        "test": loss,
      },
    }
  )


def claim() -> Claim:
  """Chosen by validation loss; compared in training loss and test accuracy."""

  def grid(name, **fields):
    values = [choices(f"{UPDATE}.rule.{field}", v) for field, v in fields.items()]
    return product(choices(UPDATE, [{"rule": {"name": name}}]), *values)

  arms = {
    "sgd": grid(
      "optax.sgd", learning_rate=(0.03, 0.1, 0.3, 1.0), momentum=(0.8, 0.9, 0.95)
    ),
    "adam": grid("optax.adam", learning_rate=(3e-3, *RATES), b1=(0.8, 0.9, 0.95)),
    "mfac": grid(
      "mfac", num_grads=(32, 128), damping=(1e-3, 1e-2), learning_rate=RATES
    ),
  }

  def against(baseline):
    says = (
      f"lower training loss than {baseline}",
      f"better test accuracy than {baseline}",
    )
    return (
      Comparison(says[0], "fit/loss", "mfac", baseline, "lower"),
      Comparison(says[1], "test/accuracy", "mfac", baseline, "higher"),
    )

  return Claim(
    methods=("mfac",),
    paper="better accuracy than first-order and other second-order optimisers at close "
    "to Adam's cost",
    setting="Digits, MLP 64-32-10, batch 64, 330 steps; 12 points per arm (rates times "
    "momentum, b1, or window 32/128 and damping 1e-3/1e-2), chosen by validation loss.",
    measure=tuned(get_config, arms, ("validation/loss", "lower")),
    comparisons=(*against("sgd"), *against("adam")),
  )
