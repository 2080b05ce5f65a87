"""Finds what a sweep sweeps: its columns, and the settings that seeds repeat."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gradlab.launch._report.load import Arm

Value = int | float | str | None
_UNSET = object()


class Column(NamedTuple):
  """A swept setting.

  Attributes:
    name: the last components of its path, as many as it takes.
    paths: config paths; several if no arm has two of them.
    values: one per arm; None where the arm does not have it.
    numeric: whether all values are numbers.
  """

  name: str
  paths: tuple[str, ...]
  values: tuple[Value, ...]
  numeric: bool

  def ordered(self) -> list[Value]:
    """The distinct values: numbers ascending, others as they first appear."""
    found: list[Value] = [v for v in dict.fromkeys(self.values) if v is not None]
    return sorted(found, key=lambda v: float(v or 0)) if self.numeric else found


class Setting(NamedTuple):
  """Arms that differ in nothing but the seed."""

  values: tuple[Value, ...]
  arms: tuple[int, ...]


class _Entry(NamedTuple):
  """A path's values by arm, and the paths of the choices that it stands under."""

  path: str
  values: dict[int, Value]
  under: tuple[str, ...]


def show(value: Value) -> str:
  """A setting's value as tables and legends show it."""
  if value is None:
    return "unset"
  return f"{value:.6g}" if isinstance(value, float) else str(value)


def brief(value: Value) -> str:
  """``show`` in three digits, for the ticks of an axis."""
  return f"{value:.3g}" if isinstance(value, float) else show(value)


def label(values: Iterable[Value]) -> str:
  """A setting by its values, for legends."""
  return ", ".join(map(show, values))


def swept(arms: Sequence[Arm]) -> tuple[list[Column], tuple[Value, ...]]:
  """The columns that arms differ in, the seed apart, and every arm's seed."""
  planned = any(arm.overrides is not None for arm in arms)
  found = _from_overrides(arms) if planned else _from_configs(arms)
  merged: dict[str, _Entry] = {}
  for entry in found:
    known = merged.setdefault(entry.path, entry)
    known.values.update(entry.values)
  seeds = merged.pop("seed", _Entry("seed", {}, ())).values
  for number, arm in enumerate(arms):
    if number not in seeds and arm.config is not None and "seed" in arm.config:
      seeds[number] = _scalar(arm.config["seed"])
  known_arms = {
    n for n, arm in enumerate(arms) if arm.overrides is not None or arm.config
  }
  columns = _columns(list(merged.values()), sorted(known_arms), len(arms))
  return columns, tuple(seeds.get(n) for n in range(len(arms)))


def settings(columns: Sequence[Column], count: int) -> list[Setting]:
  """The arms by setting, in the order of the columns' values."""
  groups: dict[tuple[Value, ...], list[int]] = {}
  for arm in range(count):
    groups.setdefault(tuple(c.values[arm] for c in columns), []).append(arm)
  ranks = [{v: i for i, v in enumerate(c.ordered())} for c in columns]

  def rank(values: tuple[Value, ...]) -> list[int]:
    return [r.get(v, len(r)) for r, v in zip(ranks, values, strict=True)]

  return [Setting(key, tuple(groups[key])) for key in sorted(groups, key=rank)]


def _from_overrides(arms: Sequence[Arm]) -> Iterator[_Entry]:
  paths = dict.fromkeys(path for arm in arms for path in arm.overrides or ())
  for path in paths:
    values = {}
    for number, arm in enumerate(arms):
      if arm.overrides is None and arm.config is not None:
        there = _lookup(arm.config, path)
      else:
        there = (arm.overrides or {}).get(path, _UNSET)
      if there is not _UNSET:
        values[number] = there
    yield from _walk(path, values, ())


def _from_configs(arms: Sequence[Arm]) -> Iterator[_Entry]:
  values = {n: arm.config for n, arm in enumerate(arms) if arm.config is not None}
  # Where a run happens is not which run it is.
  kept = {n: {k: v for k, v in c.items() if k != "parallel"} for n, c in values.items()}
  yield from _walk("", kept, ())


def _walk(path: str, values: Mapping[int, Any], under: tuple[str, ...]) -> Any:
  """The entries at and below a path; mappings that name a choice give one too."""
  trees = {n: v for n, v in values.items() if isinstance(v, Mapping)}
  if len(trees) < len(values):
    yield _Entry(path, {n: _scalar(v) for n, v in values.items()}, under)
    under = (*under, path)
  elif path and _is_choice(list(trees.values())):
    yield _Entry(path, {n: _scalar(v) for n, v in trees.items()}, under)
    under = (*under, path)
  for key in dict.fromkeys(key for tree in trees.values() for key in tree):
    if key == "name" and under and under[-1] == path:
      continue
    below = {n: tree[key] for n, tree in trees.items() if key in tree}
    yield from _walk(f"{path}.{key}".lstrip("."), below, under)


def _is_choice(trees: Sequence[Mapping[str, Any]]) -> bool:
  """Whether mappings differ in what they are, and not just in their fields."""
  if all("name" in tree for tree in trees):
    return len({str(tree["name"]) for tree in trees}) > 1
  common = set(trees[0]).intersection(*trees)
  own = [tree[key] for tree in trees for key in tree if key not in common]
  return bool(own) and all(isinstance(value, Mapping) for value in own)


def _scalar(value: Any) -> Value:
  if isinstance(value, Mapping):
    return str(value.get("name") or "+".join(value) or "none")
  if value is None:
    return "none"
  if isinstance(value, bool):
    return "true" if value else "false"
  if isinstance(value, int | float | str):
    return value
  return json.dumps(value).strip("[]")


def _lookup(config: Any, path: str) -> Any:
  for key in path.split("."):
    if not isinstance(config, Mapping) or key not in config:
      return _UNSET
    config = config[key]
  return config


def _columns(
  entries: Sequence[_Entry], arms: Sequence[int], count: int
) -> list[Column]:
  """Merged, reduced to what varies of itself, and named."""
  labels = {entry.path: entry.values for entry in entries}
  kept: list[tuple[list[str], dict[int, Value]]] = []
  origins: list[dict[int, str]] = []
  for group in _merge(entries):
    values = {n: v for entry in group for n, v in entry.values.items()}
    choices = {path for entry in group for path in entry.under}
    fixed = any(_determined(values, labels[path], arms) for path in choices)
    if len({values.get(n) for n in arms}) > 1 and not fixed:
      kept.append(([entry.path for entry in group], values))
    origins.append({n: entry.path for entry in group for n in entry.values})
  for origin in origins:
    if _collide(origin, [values for _, values in kept]):
      kept.insert(0, _difference(origin))
  names = _names([paths for paths, _ in kept])
  return [
    _column(name, tuple(paths), values, count)
    for name, (paths, values) in zip(names, kept, strict=True)
  ]


def _column(
  name: str, paths: tuple[str, ...], values: Mapping[int, Value], count: int
) -> Column:
  numeric = all(isinstance(v, int | float) for v in values.values())
  return Column(name, paths, tuple(values.get(n) for n in range(count)), numeric)


def _determined(
  values: Mapping[int, Value], by: Mapping[int, Value], arms: Sequence[int]
) -> bool:
  """Whether a choice alone fixes the value, as it fixes a method's own defaults."""
  pairs = {(by.get(n), values.get(n)) for n in arms}
  return len(pairs) == len({key for key, _ in pairs})


def _collide(origin: Mapping[int, str], columns: Sequence[Mapping[int, Value]]) -> bool:
  """Whether arms of two paths that became one column look alike in every column."""
  keys = {(path, *(c.get(n) for c in columns)) for n, path in origin.items()}
  return len(keys) > len({key[1:] for key in keys})


def _difference(origin: Mapping[int, str]) -> tuple[list[str], dict[int, Value]]:
  """A column of the components in which merged paths differ."""
  split = {n: path.split(".") for n, path in origin.items()}
  paths = list(split.values())
  head, tail = _shared(paths), _shared([path[::-1] for path in paths])
  values: dict[int, Value] = {
    n: ".".join(path[head : len(path) - tail]) or "none" for n, path in split.items()
  }
  return [".".join(paths[0][:head])], values


def _shared(paths: Sequence[Sequence[str]]) -> int:
  """How many leading components all paths share."""
  same = (len(set(parts)) == 1 for parts in zip(*paths, strict=False))
  return sum(itertools.takewhile(bool, same))


def _merge(entries: Sequence[_Entry]) -> list[list[_Entry]]:
  """Paths with one last component become one column if no arm has two of them."""
  groups: list[list[_Entry]] = []
  for same in _by(entries, lambda path: path[-1:]):
    for part in [same] if _exclusive(same) else _by(same, _pattern):
      groups += [part] if _exclusive(part) else [[entry] for entry in part]
  first = {entry.path: i for i, entry in enumerate(entries)}
  return sorted(groups, key=lambda group: first[group[0].path])


def _pattern(path: tuple[str, ...]) -> tuple[str, ...]:
  return (*path[:-2], *path[-1:])


def _by(entries: Iterable[_Entry], key: Any) -> list[list[_Entry]]:
  parts: dict[Any, list[_Entry]] = {}
  for entry in entries:
    parts.setdefault(key(tuple(entry.path.split("."))), []).append(entry)
  return list(parts.values())


def _exclusive(entries: Sequence[_Entry]) -> bool:
  arms = [n for entry in entries for n in entry.values]
  return len(arms) == len(set(arms))


def _names(groups: Sequence[Sequence[str]]) -> list[str]:
  """The shortest suffix of each path (of what merged paths share) that no other has."""
  parts = []
  for paths in groups:
    split = [path.split(".") for path in paths]
    parts.append([c for c in split[0] if all(c in other for other in split)])
  names = []
  for i, own in enumerate(parts):
    others = [p for j, p in enumerate(parts) if j != i] + [["seed"]]
    lengths = range(1, len(own) + 1)
    n = next((n for n in lengths if all(p[-n:] != own[-n:] for p in others)), len(own))
    names.append(".".join(own[-n:]))
  return names
