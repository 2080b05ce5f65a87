"""The catalogue: every method by name, with its family, paper and factory."""

import difflib
import importlib

from gradlab.types import REGISTRY, Method
from gradlab.types import method as method


def methods() -> dict[str, Method]:
  """All registered methods, name -> ``Method``, sorted by family and name."""
  importlib.import_module("gradlab.transforms")
  return dict(sorted(REGISTRY.items(), key=lambda item: (item[1].family, item[0])))


def nearest(name: str, names: "list[str] | tuple[str, ...]") -> str:
  """' Did you mean ...?' for a misspelt name, or '' when nothing is near."""
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  return f" Did you mean {close[0]!r}?" if close else ""
