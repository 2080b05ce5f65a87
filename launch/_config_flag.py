"""The ``--config`` flag: a config file whose fields flags may override."""

import pathlib
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from gradlab.types import ConfigError

# What a mistake in a config file raises; anything else keeps its traceback.
_MISTAKES = (
  ArithmeticError,
  AttributeError,
  ImportError,
  LookupError,
  NameError,
  OSError,
  SyntaxError,
  TypeError,
  ValueError,
)


class Fields(ml_collections.ConfigDict):  # type: ignore[misc]
  """A ``ConfigDict`` whose fields come before its methods.

  ``ConfigDict`` has a method ``update``, which would hide the field of that name from
  ``--config.stages.train.update.adan.learning_rate``.
  """

  def __getattribute__(self, name: str) -> Any:
    attributes = object.__getattribute__(self, "__dict__")
    if name in attributes.get("_fields", ()):
      return self[name]
    return super().__getattribute__(name)

  def __setitem__(self, key: str, value: Any) -> None:
    # a whole mapping given by a flag, --config.data={'name':'wine'}, is a ConfigDict
    plain = type(value) is ml_collections.ConfigDict
    super().__setitem__(key, fields(value) if plain else value)


def fields(config: ml_collections.ConfigDict) -> Fields:
  """The same fields, references and order, as ``Fields`` at every depth."""
  out = Fields()
  # the fields themselves, not their values: a placeholder must keep its type
  for name, value in vars(config)["_fields"].items():
    nested = isinstance(value, ml_collections.ConfigDict)
    out[name] = fields(value) if nested else value
  return out


def load(path: str) -> Fields:
  """What ``get_config()`` of a file returns, locked.

  Args:
    path: the file; what follows a colon is passed to ``get_config``.

  Raises:
    ConfigError: no such file, or one that is not a config.
  """
  file, *argument = path.split(":", 1)
  if not pathlib.Path(file).is_file():
    raise ConfigError(f"--config: there is no file {file!r}.")
  try:
    module = runpy.run_path(file)
    if "get_config" not in module:
      raise ConfigError(f"--config: {file} has no get_config().")
    found = module["get_config"](*argument)
  except ConfigError:
    raise
  except _MISTAKES as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    line = f", line {lines[-1]}" if lines else ""
    raise ConfigError(
      f"--config: {file}{line}: {type(error).__name__}: {error}"
    ) from error
  if isinstance(found, dict):
    found = ml_collections.ConfigDict(found)
  if not isinstance(found, ml_collections.ConfigDict):
    raise ConfigError(
      f"--config: get_config() of {file} returns a {type(found).__name__}, not a "
      "ConfigDict."
    )
  return fields(found).lock()


class _Parser(flags.ArgumentParser):  # type: ignore[type-arg]
  """Reads the file when the flag is parsed."""

  def parse(self, path: str) -> Fields:
    return load(path)

  def flag_type(self) -> str:
    return "config object"


def path() -> str:
  """What ``--config`` was given."""
  given: str = config_flags.get_config_filename(flags.FLAGS["config"])
  return given


def overrides(argv: Sequence[str]) -> list[str]:
  """What a command line changes in the config, as it was written."""
  return [argument for argument in argv if argument.startswith("--config.")]


def define_config() -> Any:
  """Defines ``--config`` and returns its holder; ``.value`` is the config."""
  holder = config_flags.DEFINE_config_file("config", None, "File with get_config().")
  flag = flags.FLAGS["config"]
  flag.parser = _Parser()
  return holder
