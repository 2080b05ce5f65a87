"""What the configs of a sweep share, and where they differ."""

from collections.abc import Mapping, Sequence
from typing import Any

_MISSING = object()


def shared(configs: Sequence[Mapping[str, Any]]) -> Any:
  """The fields that all configs hold with the same value.

  Examples:
    >>> from gradlab.launch._report.config import shared
    >>> shared([{"seed": 0, "data": {"name": "digits"}}, {"seed": 1, "data": {"name":
    ... "digits"}}])
    {'data': {'name': 'digits'}}
  """
  if not configs:
    return {}
  found = {}
  for key, value in configs[0].items():
    values = [config.get(key, _MISSING) for config in configs]
    if all(other == value for other in values):
      found[key] = value
    elif all(isinstance(other, Mapping) for other in values) and (
      below := shared(values)
    ):
      found[key] = below
  return found


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
  """Path -> its distinct values, for each field that not all configs share.

  Examples:
    >>> from gradlab.launch._report.config import differing
    >>> differing([{"seed": 0, "a": {"b": 1}}, {"seed": 1, "a": {"b": 1}}])
    {'seed': [0, 1]}
  """
  return _differing(list(configs), "") if configs else {}


def _differing(values: list[Any], path: str) -> dict[str, list[Any]]:
  if all(isinstance(value, Mapping) for value in values):
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for value in values for key in value):
      below = [value[key] for value in values if key in value]
      here = f"{path}.{key}".lstrip(".")
      found.update(_differing(below, here))
      told = any(name == here or name.startswith(f"{here}.") for name in found)
      if len(below) < len(values) and not told:
        found[here] = below[:1]
    return found
  distinct: list[Any] = []
  for value in values:
    if value not in distinct:
      distinct.append(value)
  return {path: distinct} if len(distinct) > 1 else {}
