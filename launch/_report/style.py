"""Colours and dashes of settings, the same in every figure of a report."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from gradlab.launch._report.settings import Column, Setting, Value, brief, label, show

# Okabe and Ito's palette, told apart with any colour vision; its yellow is too pale
# for lines on white. On dark ground the blue is lifted.
HUES = (
  ("#0072b2", "#4aa8e8"),
  ("#d55e00", "#f08a45"),
  ("#009e73", "#2fc79a"),
  ("#cc79a7", "#e09cc3"),
  ("#b8860b", "#e6b422"),
  ("#56b4e9", "#9ad4f5"),
  ("#6b6f76", "#a9afb8"),
)
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_GROUPS = 36
_BINS = 8
# Viridis at equal distances; the ends that vanish into the ground are cut off.
_VIRIDIS = (
  "#440154",
  "#482878",
  "#3e4a89",
  "#31688e",
  "#26828e",
  "#1f9e89",
  "#35b779",
  "#6ece58",
  "#b5de2b",
  "#fde725",
)


class Group(NamedTuple):
  """Lines that share a colour and a legend entry: one setting, or many alike."""

  label: str
  light: str
  dark: str
  dash: str


def plain(labels: Sequence[str]) -> list[Group]:
  """A hue for each label."""
  hues = itertools.cycle(HUES)
  return [Group(name, *hue, "solid") for name, hue in zip(labels, hues, strict=False)]


def groups(
  columns: Sequence[Column], settings: Sequence[Setting]
) -> tuple[str, list[Group], list[int]]:
  """What the labels are values of, the groups, and the index of each setting's group.

  A categorical setting gives the hue, a numeric one the dash or the shade; without a
  categorical one, colours run along the first numeric setting. More settings than
  ``MOST_GROUPS`` share their hue, or their part of the scale.
  """
  kinds = _kinds(columns, settings)
  names = list(dict.fromkeys(kinds))
  if len(settings) > MOST_GROUPS:
    return _shared(columns, settings, kinds)
  if len(names) > 1 or not columns:
    members = {name: kinds.count(name) for name in names}
    seen = dict.fromkeys(names, 0)
    found = []
    for setting, kind in zip(settings, kinds, strict=True):
      hue = HUES[names.index(kind)]
      place, of = seen[kind], members[kind]
      seen[kind] += 1
      if of <= len(DASHES):
        found.append(Group(label(setting.values), *hue, DASHES[place]))
      else:
        light, dark = _shade(hue, 1 - place / of)
        found.append(Group(label(setting.values), light, dark, "solid"))
  else:
    found = [
      Group(label(setting.values), *ramp(place), dash)
      for setting, place, dash in zip(
        settings, *_places(columns, settings), strict=True
      )
    ]
  return ", ".join(c.name for c in columns), found, list(range(len(settings)))


def ramp(place: float) -> tuple[str, str]:
  """The colour at ``place`` in [0, 1] of the scale, on light and on dark ground."""
  return _viridis(0.88 * place), _viridis(0.25 + 0.75 * place)


def grade(value: float, low: float, high: float, higher: bool) -> float:
  """Where a value is between the worst colour, 0, and the best, 1."""
  place = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 1.0
  return place if higher else 1.0 - place


def _kinds(
  columns: Sequence[Column], settings: Sequence[Setting]
) -> list[tuple[Value, ...]]:
  """Each setting's categorical values: as many columns as there are hues for."""
  places = [i for i, column in enumerate(columns) if not column.numeric]
  while places:
    kinds = [tuple(s.values[i] for i in places) for s in settings]
    if len(set(kinds)) <= len(HUES):
      return kinds
    places.pop()
  return [()] * len(settings)


def _places(
  columns: Sequence[Column], settings: Sequence[Setting]
) -> tuple[list[float], list[str]]:
  """Each setting's place on the scale, and its dash."""
  by = max(columns, key=lambda c: (c.numeric, len(c.ordered())))
  at = list(columns).index(by)
  order = by.ordered()
  last = max(len(order) - 1, 1)
  ranks = {value: rank / last for rank, value in enumerate(order)}
  rest = [s.values[:at] + s.values[at + 1 :] for s in settings]
  dashes = {values: i for i, values in enumerate(dict.fromkeys(rest))}
  few = len(dashes) <= len(DASHES)
  return (
    [ranks.get(setting.values[at], 0.0) for setting in settings],
    [DASHES[dashes[values]] if few else "solid" for values in rest],
  )


def _shared(
  columns: Sequence[Column],
  settings: Sequence[Setting],
  kinds: Sequence[tuple[Value, ...]],
) -> tuple[str, list[Group], list[int]]:
  names = list(dict.fromkeys(kinds))
  if len(names) > 1:
    found = [
      Group(label(kind), *hue, "solid") for kind, hue in zip(names, HUES, strict=False)
    ]
    chosen = [c.name for c in columns if not c.numeric][: len(names[0])]
    return ", ".join(chosen), found, [names.index(kind) for kind in kinds]
  places, _ = _places(columns, settings)
  by = max(columns, key=lambda c: (c.numeric, len(c.ordered())))
  order = by.ordered()
  bins = min(_BINS, len(order))
  last = max(len(order) - 1, 1)
  of = [min(round(place * last) * bins // len(order), bins - 1) for place in places]
  found = []
  for number in range(bins):
    low = order[-(-number * len(order) // bins)]
    high = order[-(-(number + 1) * len(order) // bins) - 1]
    span = show(low) if low == high else f"{brief(low)} to {brief(high)}"
    found.append(Group(span, *ramp(number / max(bins - 1, 1)), "solid"))
  return by.name, found, of


def _viridis(place: float) -> str:
  position = place * (len(_VIRIDIS) - 1)
  index = min(int(position), len(_VIRIDIS) - 2)
  return _mix(_VIRIDIS[index], _VIRIDIS[index + 1], position - index)


def _shade(hue: tuple[str, str], strength: float) -> tuple[str, str]:
  """The hue, faded towards the ground."""
  strength = 0.35 + 0.65 * strength
  return _mix("#ffffff", hue[0], strength), _mix("#16191d", hue[1], strength)


def _mix(first: str, second: str, weight: float) -> str:
  pairs = ((int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5))
  return "#" + "".join(f"{round(a + (b - a) * weight):02x}" for a, b in pairs)
