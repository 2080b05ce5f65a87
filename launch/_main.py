"""How every program of ``launch`` starts and ends."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from gradlab.launch import _cache
from gradlab.types import ConfigError, Interrupted, NonFiniteError


def _parse(argv: Sequence[str], required: Sequence[str]) -> list[str]:
  app.define_help_flags()
  try:
    rest: list[str] = flags.FLAGS(list(argv))
  except (AttributeError, KeyError) as error:
    raise ConfigError(f"flags: {_unknown_field(error, argv)}") from error
  except (flags.Error, TypeError, ValueError) as error:
    raise ConfigError(f"flags: {error}") from error
  except OSError as error:
    raise ConfigError(f"flags: cannot read a config: {error}.") from error
  if rest[1:]:
    raise ConfigError(f"flags: unexpected arguments {' '.join(rest[1:])}.")
  for name in required:
    if not flags.FLAGS[name].value:
      raise ConfigError(f"flags: --{name} is missing.")
  return rest


def _unknown_field(error: BaseException, argv: Sequence[str]) -> str:
  """What the config says of a field that it lacks, and the flag that asked for it."""
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  said = str(error.args[0])
  key = said.splitlines()[0].strip("'\"")
  paths = [a.split("=")[0] for a in argv if a.startswith("--config.")]
  path = next((path for path in paths if key in path.split(".")), "--config")
  return f"{path}: {said}"


def run(main: Callable[[Sequence[str]], None], *, required: Sequence[str] = ()) -> None:
  """``absl.app.run``, with the user's errors as one line on stderr and exit code 2.

  Args:
    main: called with the arguments that are no flags: the program's name.
    required: names of the flags that must be given.
  """
  logging.set_verbosity(logging.WARNING)
  _cache.use()
  try:
    app.run(main, flags_parser=lambda argv: _parse(argv, required))
  except (ConfigError, NonFiniteError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
  except Interrupted as stopped:
    print(stopped)
    sys.exit(0)
