"""The ``--config`` flag: a config file whose fields flags may override."""

from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from gradlab.types import ConfigError


class Fields(ml_collections.ConfigDict):
  """A ``ConfigDict`` whose fields come before its methods.

  ``ConfigDict`` has a method ``update``, which would hide the field of that name from
  ``--config.stages.train.update.adan.learning_rate``.
  """

  def __getattribute__(self, name: str) -> Any:
    attributes = object.__getattribute__(self, "__dict__")
    if name in attributes.get("_fields", ()):
      return self[name]
    return super().__getattribute__(name)


def fields(config: ml_collections.ConfigDict) -> Fields:
  """The same fields, references and order, as ``Fields`` at every depth."""
  out = Fields()
  # the fields themselves, not their values: a placeholder must keep its type
  for name, value in vars(config)["_fields"].items():
    nested = isinstance(value, ml_collections.ConfigDict)
    out[name] = fields(value) if nested else value
  return out


class _Parser(flags.ArgumentParser):  # type: ignore[type-arg]
  """Parses as ``config_flags`` does, then lets fields hide methods."""

  def __init__(self, inner: Any) -> None:
    self._inner = inner

  def parse(self, path: str) -> Fields:
    found = self._inner.parse(path)
    if isinstance(found, dict):
      found = ml_collections.ConfigDict(found)
    if not isinstance(found, ml_collections.ConfigDict):
      raise ConfigError(f"--config: cannot read {path!r} or its get_config().")
    return fields(found).lock()

  def flag_type(self) -> str:
    return "config object"


def define_config() -> Any:
  """Defines ``--config`` and returns its holder; ``.value`` is the config."""
  holder = config_flags.DEFINE_config_file("config", None, "File with get_config().")
  flag = flags.FLAGS["config"]
  flag.parser = _Parser(flag.parser)
  return holder
