"""Sweeps: lists of arms, and an arm is a mapping from config paths to values.

A config file defines ``sweep_<name>()`` functions that return such lists, built from
the functions here; each is pure and checks what it is given.
"""

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gradlab.catalog import nearest
from gradlab.runfolder import jsonable
from gradlab.types import ConfigError

Arm = dict[str, Any]
_LONGEST_NAME = 120


def choices(path: str, values: Iterable[Any]) -> list[Arm]:
  """One arm per value of one field.

  Args:
    path: of the field in the config, such as "stages.train.batch_size".
    values: numbers, strings, tuples or mappings; NumPy numbers become Python's.

  Examples:
    >>> from gradlab.sweeps import choices
    >>> choices("stages.train.batch_size", (32, 64))
    [{'stages.train.batch_size': 32}, {'stages.train.batch_size': 64}]
  """
  return [{path: v.item() if isinstance(v, np.generic) else v} for v in values]


def seeds(count: int, start: int = 0) -> list[Arm]:
  """``count`` seeds of initialisation, noise and data order, from ``start`` on.

  Examples:
    >>> from gradlab.sweeps import seeds
    >>> seeds(3)
    [{'seed': 0}, {'seed': 1}, {'seed': 2}]
  """
  return choices("seed", range(start, start + count))


def log_uniform(
  path: str, low: float, high: float, count: int, seed: int | None = None
) -> list[Arm]:
  """Values of one field, uniform in their logarithm.

  Args:
    path: of the field.
    low: the smallest value; positive.
    high: the largest value; at least ``low``.
    count: number of values; at least 1.
    seed: of random draws in [low, high]; None spaces the values evenly, both ends
      included.

  Raises:
    ConfigError: a range that is not positive or is empty, or no value.

  Examples:
    >>> from gradlab.sweeps import log_uniform
    >>> [round(arm["lr"], 6) for arm in log_uniform("lr", 1e-3, 1e-1, 3)]
    [0.001, 0.01, 0.1]
  """
  if not 0 < low <= high < math.inf:
    raise ConfigError(
      f"log_uniform: {path} needs 0 < low <= high, got {low} and {high}."
    )
  if count < 1:
    raise ConfigError(f"log_uniform: {path} needs a count of 1 or more, got {count}.")
  if seed is None:
    return choices(path, np.geomspace(low, high, count) if count > 1 else [low])
  drawn = np.random.default_rng(seed).uniform(math.log(low), math.log(high), count)
  return choices(path, np.clip(np.exp(drawn), low, high))


def product(*sweeps: Sequence[Arm]) -> list[Arm]:
  """Every combination; the last sweep varies fastest.

  Raises:
    ConfigError: two of the sweeps set the same field.

  Examples:
    >>> from gradlab.sweeps import choices, product, seeds
    >>> product(choices("steps", (10, 20)), seeds(2))[1]
    {'steps': 10, 'seed': 1}
  """
  arms: list[Arm] = [{}]
  for sweep in sweeps:
    arms = [_merged("product", arm, other) for arm in arms for other in sweep]
  return arms


def zipped(*sweeps: Sequence[Arm]) -> list[Arm]:
  """The first arms of all together, then the second ones, and so on.

  Raises:
    ConfigError: sweeps of different lengths, or two that set the same field.

  Examples:
    >>> from gradlab.sweeps import choices, zipped
    >>> zipped(choices("a", (1, 2)), choices("b", (3, 4)))
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]
  """
  lengths = [len(sweep) for sweep in sweeps]
  if len(set(lengths)) > 1:
    raise ConfigError(f"zipped: the sweeps have {lengths} arms; they must be as many.")
  return [_merged("zipped", *arms) for arms in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Arm]) -> list[Arm]:
  """One sweep after the other.

  Examples:
    >>> from gradlab.sweeps import chain, choices, seeds
    >>> chain(choices("steps", (10,)), seeds(1))
    [{'steps': 10}, {'seed': 0}]
  """
  return [dict(arm) for sweep in sweeps for arm in sweep]


def _merged(function: str, *arms: Arm) -> Arm:
  out: Arm = {}
  for arm in arms:
    for path in arm:
      if path in out:
        raise ConfigError(f"{function}: two of the sweeps set {path!r}.")
    out |= arm
  return out


def override(config: ConfigDict, arm: Mapping[str, Any]) -> ConfigDict:
  """A copy of the config with an arm's values; what refers to them follows.

  Args:
    config: as ``get_config()`` returned it.
    arm: config path -> value. The mapping that holds the field must be there; the
      field itself may be one that the config leaves at its default.

  Raises:
    ConfigError: a path into something that is not there, or a value of another type.
  """
  out = copy.deepcopy(config).unlock()
  for path, value in arm.items():
    *parents, last = path.split(".")
    at: Any = out
    for depth, key in enumerate(parents):
      where = ".".join(parents[:depth]) or "the config"
      if not isinstance(at, ConfigDict):
        raise ConfigError(f"{path}: {where} is a value and has no fields.")
      if key not in at:
        near = nearest(key, tuple(at))
        listed = "" if near else f" Fields: {', '.join(at)}."
        raise ConfigError(f"{path}: {where} has no field {key!r}.{near}{listed}")
      at = at[key]
    if not isinstance(at, ConfigDict):
      raise ConfigError(f"{path}: {'.'.join(parents)} is a value and has no fields.")
    try:
      at[last] = value
    except TypeError as error:
      raise ConfigError(
        f"{path}: {value!r} is of another type than the config's {at[last]!r}."
      ) from error
  return out


def name(arm: Mapping[str, Any]) -> str:
  """What an arm is called: its own fields and values, fit for a folder's name.

  Examples:
    >>> from gradlab.sweeps import name
    >>> name({"stages.train.update.adan.learning_rate": 1e-3, "seed": 2})
    'learning_rate=0.001,seed=2'
    >>> name({"stages.train.update": {"adan": {}}})
    'update=adan'
  """
  shown = [_shown(value) for value in arm.values()]
  labels = [
    f"{label}={text}"
    for label, (text, _) in zip(short_names(tuple(arm)), shown, strict=True)
  ]
  joined = ",".join(labels) or "base"
  out = re.sub(r"[^A-Za-z0-9._=+,-]+", "-", joined)[:_LONGEST_NAME]
  if out == joined and all(whole for _, whole in shown):
    return out
  return f"{out}~{digest(arm)[:6]}"


def digest(value: Any) -> str:
  """A hash of anything that JSON can hold; the order of mappings counts."""
  return hashlib.sha256(json.dumps(jsonable(value)).encode()).hexdigest()


def short_names(paths: Sequence[str]) -> list[str]:
  """The shortest ends of the paths that tell them apart.

  Examples:
    >>> from gradlab.sweeps import short_names
    >>> short_names(("stages.a.steps", "stages.b.steps", "seed"))
    ['a.steps', 'b.steps', 'seed']
  """
  parts = [path.split(".") for path in paths]
  out = []
  for path in parts:
    for length in range(1, len(path) + 1):
      end = path[-length:]
      if sum(other[-length:] == end for other in parts) == 1:
        break
    out.append(".".join(end))
  return out


def _shown(value: Any) -> tuple[str, bool]:
  """The value as text, and whether the text says all of it."""
  if isinstance(value, float):
    short = f"{value:.6g}"
    return (short if float(short) == value else repr(value)), True
  if isinstance(value, Mapping):
    named = isinstance(value.get("name"), str)
    text = value["name"] if named else "+".join(map(str, value))
    return text, not named and all(v == {} for v in value.values())
  if isinstance(value, Sequence) and not isinstance(value, str):
    items = [_shown(item) for item in value]
    return "-".join(text for text, _ in items), all(whole for _, whole in items)
  return str(value), True
