"""Mistakes in stages, in what does not fit together, and in flags."""

from tests.launch.mistakes import EDIT, HEADS, LOSS, PRUNE, Mistake

STAGES = [
  Mistake(
    "steps", {"train.steps": 0}, "stages.train.steps: must be at least 1, got 0."
  ),
  Mistake(
    "no steps", {"train.steps": None}, "stages.train.steps: missing; it has no default."
  ),
  Mistake(
    "half a step",
    {"train.steps": 4.5},
    "stages.train.steps: expected int, got 4.5 (float).",
  ),
  Mistake(
    "eval_every",
    {"train.eval_every": -1},
    "stages.train.eval_every: must be 0 (off) or more, got -1.",
  ),
  Mistake(
    "neither objective nor tasks",
    {"train.objective": None},
    "stages.train: give either objective or tasks, got neither.",
  ),
  Mistake(
    "objective and tasks",
    {"train.tasks.a": LOSS},
    "stages.train: give either objective or tasks, got objective and tasks.",
  ),
  Mistake(
    "no task",
    {"train.objective": None, "train.tasks": {}},
    "stages.train: give either objective or tasks, got neither.",
  ),
  Mistake(
    "aggregator over task without tasks",
    {"train.aggregator": {"name": "pcgrad", "over": "task"}},
    "stages.train.aggregator.over: 'task' needs stages.train.tasks.",
  ),
  Mistake(
    "task without a head",
    {**HEADS, "train.tasks": {"a": LOSS, "c": LOSS}},
    "stages.train.tasks.c: unknown head of the model 'c'. Allowed: a, b.",
  ),
  Mistake(
    "no update",
    {"train.update": {}},
    "stages.train.update: name at least one update rule.",
  ),
  Mistake(
    "field",
    {"train.batchsize": 8},
    "stages.train.batchsize: unknown field 'batchsize'. Did you mean 'batch_size'?",
  ),
  Mistake(
    "field of the config",
    {"sed": 8},
    "sed: unknown field 'sed'. Did you mean 'seed'?",
  ),
  Mistake(
    "field of another kind",
    {"test.steps": 8},
    "stages.test.steps: unknown field 'steps'. "
    "Allowed: kind, objective, tasks, split, inputs, batch_size.",
  ),
  Mistake(
    "kind",
    {"test.kind": "evalute"},
    "stages.test.kind: unknown kind of stage 'evalute'. Did you mean 'evaluate'?",
  ),
  Mistake("no stage", {"stages": {}}, "stages: name at least one stage."),
  Mistake("not a stage", {"extra": 3}, "stages.extra: a stage is a mapping, got 3."),
  Mistake(
    "every",
    {EDIT: {"sparsity": 0.5, "every": 0}},
    "stages.train.edits.magnitude_prune.every: must be at least 1, got 0.",
  ),
  Mistake(
    "stop",
    {EDIT: {"sparsity": 0.5, "start": 3, "stop": 2}},
    "stages.train.edits.magnitude_prune.stop: must be at least start = 3, got 2.",
  ),
  Mistake(
    "scores",
    {"prune": {"kind": "edit", "method": PRUNE, "scores": "train"}},
    "stages.prune.scores: no earlier score stage is called 'train'; "
    "earlier score stages: none.",
  ),
  Mistake(
    "inputs",
    {"test.inputs": "attack"},
    "stages.test.inputs: no earlier search stage is called 'attack'; "
    "earlier search stages: none.",
  ),
  Mistake(
    "score without a loss",
    {"score": {"kind": "score", "method": {"name": "snip"}}},
    "stages.score.objective: missing; the method needs a loss.",
  ),
  Mistake(
    "search",
    {
      "attack": {
        "kind": "search",
        "objective": LOSS,
        "method": {"name": "fgsm", "eps": -1.0},
      }
    },
    "stages.attack.method: eps must lie in [0, inf), got -1.0.",
  ),
  Mistake("seed", {"seed": -1}, "seed: must lie in [0, 2**32), got -1."),
]

FITTING = [
  Mistake(
    "data source",
    {"data.name": "digit"},
    "data.name: unknown data source 'digit'. Did you mean 'digits'?",
  ),
  Mistake(
    "data argument",
    {"data.context": 3},
    "data.context: unknown argument 'context'. Allowed: none.",
  ),
  Mistake(
    "data argument's value",
    {"data": {"name": "quadratic", "dimension": 0}},
    "data: dimension must be at least 1, got 0.",
  ),
  Mistake(
    "data that is none",
    {"data": {"name": "tests.launch.sources:not_data"}},
    "data: tests.launch.sources:not_data makes a int, not a Dataset.",
  ),
  Mistake(
    "data without its file",
    {"data": {"name": "tests.launch.sources:missing"}},
    "data: [Errno 2] No such file or directory: '/nowhere/train.npz'",
  ),
  Mistake(
    "data without inputs",
    {"data": {"name": "tests.launch.sources:unlabelled"}},
    "data: train: has no field 'inputs', only label.",
  ),
  Mistake(
    "model",
    {"model.name": "mpl"},
    "model.name: unknown model 'mpl'. Did you mean 'mlp'?",
  ),
  Mistake(
    "model argument",
    {"model.feature": (8,)},
    "model.feature: unknown argument 'feature'. Did you mean 'features'?",
  ),
  Mistake(
    "model argument's value",
    {"model.activation": "rleu"},
    "model: activation must be one of gelu, identity, relu, sigmoid, silu, softplus, "
    "tanh; got 'rleu'.",
  ),
  Mistake(
    "model for other data",
    {"model": {"name": "cnn"}},
    "model: inputs must be [B, H, W] or [B, H, W, C], or image_shape be given, "
    "got (2, 64).",
  ),
  Mistake(
    "objective for other outputs",
    {"train.objective": {"name": "squared_error"}},
    "stages.train.objective: outputs and 'label' must have the same shape, "
    "got (2, 10) and (2,).",
  ),
  Mistake(
    "objective for other labels",
    {"data.name": "diabetes"},
    "stages.train.objective: 'label' must hold integer classes, got float32.",
  ),
  Mistake(
    "objective for one head",
    {"model.outputs": HEADS["model.outputs"]},
    "stages.train.objective: does not fit the model's outputs "
    "{'a': (2, 10), 'b': (2, 10)}",
  ),
  Mistake(
    "objective for another field",
    {"train.objective.label": "target"},
    "stages.train.objective: the batch has no field 'target'; "
    "its fields are inputs, label.",
  ),
  Mistake(
    "few examples",
    {"train.batch_size": 2000},
    "stages.train.batch_size: 2000 is more than the 1078 training examples.",
  ),
]

PLACEMENT = [
  Mistake(
    "mode",
    {"parallel.mode": "fsdp"},
    "parallel.mode: 'fsdp' is not one of jit, pmap.",
  ),
  Mistake(
    "batch over the mesh",
    {"parallel.mesh.data": 3},
    "stages.train.batch_size: 8 is not divisible by the mesh's data axis (3).",
  ),
  Mistake(
    "batch over replicas",
    {"parallel": {"mode": "pmap", "mesh": {"data": 3}}},
    "stages.train.batch_size: 8 is not divisible by the number of replicas (3).",
  ),
  Mistake(
    "few devices",
    {"parallel.mesh": {"data": 8, "model": 2}},
    "parallel.mesh: mesh {'data': 8, 'model': 2} needs 16 devices, but there are 8.",
  ),
  Mistake(
    "few devices for the rest",
    {"parallel.mesh": {"data": -1, "model": 16}},
    "parallel.mesh: mesh {'data': -1, 'model': 16} needs a multiple of 16 devices, "
    "but there are 8.",
  ),
  Mistake(
    "few devices for replicas",
    {"parallel": {"mode": "pmap", "mesh": {"data": 16}}},
    "parallel.mesh: 16 replicas do not fit 8 devices",
  ),
  Mistake(
    "size of an axis",
    {"parallel.mesh.data": 2.0},
    "parallel.mesh.data: expected int, got 2.0 (float).",
  ),
  Mistake(
    "pmap with a model axis",
    {"parallel": {"mode": "pmap", "mesh": {"data": 2, "model": 2}}},
    "parallel: mode 'pmap' replicates the parameters over the one mesh axis 'data' "
    "and takes no rules, got mesh {'data': 2, 'model': 2} and 0 rules.",
  ),
  Mistake(
    "parameter without a rule",
    {"parallel.mesh.data": 2, "parallel.rules": (("hidden", ()),)},
    "parallel.rules: no sharding rule covers parameter 'head/bias' of shape (10,); "
    "add one, such as ('.*', ()) as the last rule to replicate what is left.",
  ),
  Mistake(
    "axis that the mesh lacks",
    {
      "parallel.mesh.data": 2,
      "parallel.rules": (("kernel", (None, "model")), (".*", ())),
    },
    "parallel.rules: the sharding rule of parameter 'head/kernel' of shape (8, 10) "
    "names the axis 'model', but the mesh has 'data'.",
  ),
  Mistake(
    "not a rule",
    {"parallel.mesh.data": 2, "parallel.rules": ("fsdp",)},
    "parallel.rules: sharding rule 'fsdp' is not a pair (regex, spec)",
  ),
]

FLAGS = [
  Mistake(
    "field that the config lacks",
    {},
    "--config.stages.train.update.adamw.learning_rat: the config file has no field "
    "'learning_rat', and a flag can only change what the file has. "
    "Did you mean 'learning_rate'?",
    ("--config.stages.train.update.adamw.learning_rat=3",),
  ),
  Mistake(
    "field of a number",
    {},
    "--config.seed.x: Attribute <class 'int'>.x does not exist",
    ("--config.seed.x=3",),
  ),
  Mistake(
    "value of another type",
    {},
    "--config.stages.train.steps=many: invalid literal for int() with base 10: 'many'",
    ("--config.stages.train.steps=many",),
  ),
  Mistake(
    "value out of range",
    {},
    "stages.train.update.adamw: b1 must lie in [0, 1), got 1.0.",
    ("--config.stages.train.update.adamw={'learning_rate': 0.1, 'b1': 1.0}",),
  ),
  Mistake(
    "unknown flag",
    {},
    "flags: Unknown command line flag 'workdirs'. Did you mean: workdir",
    ("--workdirs=runs",),
  ),
  Mistake("no flag", {}, "flags: unexpected arguments runs.", ("runs",)),
]
