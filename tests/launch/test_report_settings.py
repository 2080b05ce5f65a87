"""What a report takes for swept, and the names, groups and colours that follow."""

from gradlab.launch._report import config as report_config
from gradlab.launch._report import load, style
from gradlab.launch._report import settings as report_settings
from tests.launch import report_folders as folders

UPDATE = "stages.train.update"
RATE = f"{UPDATE}.adamw.learning_rate"


def arms_of(overrides):
  empty = load.Arm("", "waiting", None, None, {}, {}, None, {}, "", ())
  return [empty._replace(overrides=dict(o)) for o in overrides]


def columns_of(arms):
  columns, seeds = report_settings.swept(arms)
  return {c.name: c.values for c in columns}, seeds


def test_rates_of_different_methods_are_one_column():
  found, seeds = columns_of(
    arms_of(
      {UPDATE: {m: {}}, f"{UPDATE}.{m}.learning_rate": r, "seed": s}
      for m in ("adan", "adamw")
      for r in (0.1, 0.2)
      for s in (0, 1)
    )
  )
  assert list(found) == ["update", "learning_rate"]
  assert found["update"] == ("adan",) * 4 + ("adamw",) * 4
  assert found["learning_rate"] == (0.1, 0.1, 0.2, 0.2) * 2
  assert seeds == (0, 1) * 4


def test_methods_that_only_the_paths_tell_apart_get_a_column():
  found, _ = columns_of(
    arms_of(
      {f"{UPDATE}.{m}.learning_rate": r} for m in ("adan", "adamw") for r in (0.1, 0.2)
    )
  )
  assert found["update"] == ("adan", "adan", "adamw", "adamw")
  assert found["learning_rate"] == (0.1, 0.2, 0.1, 0.2)


def test_paths_that_meet_in_an_arm_stay_apart_under_longer_names():
  found, _ = columns_of(
    arms_of(
      {
        f"stages.{a}.update.adam.learning_rate": r,
        "stages.tune.steps": n,
        "data.seed": n,
      }
      for a, r, n in (("train", 0.1, 1), ("train", 0.2, 2))
    )
  )
  assert list(found) == ["learning_rate", "steps", "data.seed"]
  both = {
    "stages.train.update.adam.learning_rate": 0.1,
    "stages.tune.update.adam.learning_rate": 0.3,
  }
  other = {path: 2 * rate for path, rate in both.items()}
  found, _ = columns_of(arms_of([both, other]))
  assert list(found) == [
    "train.update.adam.learning_rate",
    "tune.update.adam.learning_rate",
  ]


def test_mapping_shows_its_name_or_keys_and_what_it_does_not_fix():
  chain = {"clip": {"max_norm": 1.0}, "adan": {"learning_rate": 0.1}}
  found, _ = columns_of(
    arms_of([{UPDATE: chain}, {UPDATE: {"adamw": {"learning_rate": 0.2}}}])
  )
  assert found == {"update": ("clip+adan", "adamw")}
  compressor = "stages.train.compressor"
  top = [{"name": "top_k", "ratio": ratio} for ratio in (0.1, 0.5)]
  found, _ = columns_of(arms_of({compressor: value} for value in [None, *top]))
  assert found["compressor"] == ("none", "top_k", "top_k")
  assert found["ratio"] == (None, 0.1, 0.5)


def test_configs_tell_what_is_swept_where_no_plan_does():
  arms = [
    arm._replace(overrides=None, config=folders.config({"seed": s}, update))
    for update in ("adan", "adamw")
    for s in (0, 1)
    for arm in arms_of([{}])
  ]
  found, seeds = columns_of(arms)
  # their rates are the same: nothing else differs
  assert found == {"update": ("adan", "adan", "adamw", "adamw")}
  assert seeds == (0, 1, 0, 1)
  parted = {"parallel": {"mode": "pmap"}, **arms[0].config}
  moved = arms[0]._replace(config=parted)
  assert columns_of([arms[0], moved])[0] == {}


def test_config_differences_and_what_is_shared():
  first, second = folders.config({"seed": 1}), folders.config({"seed": 2, RATE: 0.5})
  assert report_config.differing([first, second]) == {
    "seed": [1, 2],
    RATE: [1e-3, 0.5],
  }
  common = report_config.shared([first, second])
  assert "seed" not in common
  assert common["data"] == {"name": "digits"}


def test_many_settings_share_few_groups():
  rates = tuple(float(i) for i in range(1, 101))
  column = report_settings.Column("rate", ("a.rate",), rates, True)
  settings = report_settings.settings([column], 100)
  legend, groups, index = style.groups([column], settings)
  assert legend == "rate"
  assert len(groups) == 8
  assert index == sorted(index)
  sizes = [index.count(g) for g in range(8)]
  assert max(sizes) - min(sizes) <= 1
  for number, rate in zip(index, rates, strict=True):
    low, high = map(float, groups[number].label.split(" to "))
    assert low <= rate <= high
