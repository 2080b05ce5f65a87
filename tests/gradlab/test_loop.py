"""The training loop: what the host does while the device works."""

import numpy as np

from gradlab import execution, experiment, loop
from gradlab.checkpoint import Checkpoints
from gradlab.state import Artifacts
from tests.launch import runs


class Watched:
  """A dispatch's metric that notes when the host asks for its value."""

  def __init__(self, value, name, events):
    self._value, self._name, self._events = value, name, events

  def __array__(self, dtype=None, copy=None):
    self._events.append(("fetch", self._name))
    return np.asarray(self._value, dtype)

  def __getitem__(self, index):
    return np.asarray(self._value)[index]


def test_metrics_are_fetched_when_the_next_dispatch_is_on_its_way(tmp_path):
  # checkpoints at 16 and 32, dispatches of 8 and an evaluation at the end
  stage = {**runs.TRAIN, "steps": 40, "checkpoint_every": 16, "update": {"sgd": SGD}}
  pipeline = experiment.build({**runs.CONFIG, "stages": {"train": stage}})
  stage, events = pipeline.config["stages"]["train"], []
  compiled = execution.compile_stage(
    pipeline.programs["train"],
    pipeline.dataset.train,
    seed=0,
    batch_size=8,
    parallel=pipeline.config["parallel"],
    path="stages.train",
  )

  def dispatch(state, start, num_steps):
    events.append(("dispatch", start))
    state, metrics = compiled.dispatch(state, start, num_steps)
    watched = {"loss": Watched(metrics["loss"], start, events)}
    return state, watched

  class Watcher(Checkpoints):
    def save(self, step, state):
      events.append(("save", step))
      super().save(step, state)

  state = compiled.init()
  with Watcher(tmp_path / "checkpoints") as checkpoints:
    loop.train(
      compiled._replace(dispatch=dispatch),
      Artifacts(state.params, state.model_state, state.params, None, {}, {}, {}),
      loop.Settings("train", stage, tmp_path),
      checkpoints,
      validation=pipeline.dataset.validation,
      evaluate=experiment.evaluator(pipeline, "train"),
      should_stop=lambda: False,
      progress=None,
    )
  assert list(dict.fromkeys(events)) == [
    ("dispatch", 0),
    ("dispatch", 8),
    ("fetch", 0),
    # a state is saved once all before it is known to be finite
    ("fetch", 8),
    ("save", 16),
    ("dispatch", 16),
    ("dispatch", 24),
    ("fetch", 16),
    ("fetch", 24),
    ("save", 32),
    ("dispatch", 32),
    ("fetch", 32),
    ("save", 40),
  ]


SGD = {"name": "optax.sgd", "learning_rate": 1e-2}
