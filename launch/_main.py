"""How every program of ``launch`` starts and ends."""

import atexit
import gc
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from gradlab import _disk
from gradlab.launch import _cache
from gradlab.types import ConfigError, Interrupted, NonFiniteError


def _parse(argv: Sequence[str], required: Sequence[str], arguments: int) -> list[str]:
  app.define_help_flags()
  try:
    rest: list[str] = flags.FLAGS(list(argv))
  except (AttributeError, KeyError) as error:
    raise ConfigError(_unknown_field(error, argv)) from error
  except (flags.Error, TypeError, ValueError) as error:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ConfigError):
      raise cause from None
    said = str(error)
    where = "" if said.startswith("flag --") else "flags: "
    raise ConfigError(where + said.removeprefix("flag ")) from error
  if unexpected := rest[1 + arguments :]:
    raise ConfigError(f"flags: unexpected arguments {' '.join(unexpected)}.")
  for name in required:
    if not flags.FLAGS[name].value:
      raise ConfigError(f"flags: --{name} is missing.")
  return rest


def _unknown_field(error: BaseException, argv: Sequence[str]) -> str:
  """Which flag asked for a field that the config lacks, and the nearest field."""
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  said = str(error.args[0])
  key = said.splitlines()[0].strip("'\"")
  paths = [a.split("=")[0] for a in argv if a.startswith("--config.")]
  asked = [path for path in paths if key in path.split(".")]
  if not asked:
    where = [path for path in paths if path.removeprefix("--config.") in said]
    return f"{' '.join(where[:1]) or 'flags'}: {said}"
  near = re.search(r'Did you mean "(.*?)"', said)
  hint = f" Did you mean {near[1]!r}?" if near else ""
  return (
    f"{asked[0]}: the config file has no field {key!r}, and a flag can only change "
    f"what the file has.{hint}"
  )


def _fail(said: str) -> NoReturn:
  print(f"error: {' '.join(said.split())}", file=sys.stderr)
  sys.exit(2)


def run(
  main: Callable[[Sequence[str]], None],
  *,
  required: Sequence[str] = (),
  arguments: int = 0,
) -> None:
  """``absl.app.run``; an error of the user or the disk is one line and exit code 2.

  Args:
    main: called with the arguments that are no flags, the program's name first.
    required: names of the flags that must be given.
    arguments: how many arguments that are no flags there may be, beside the name.
  """
  logging.set_verbosity(logging.WARNING)
  _cache.use()
  # the interpreter's last collections would walk through every module once more
  atexit.register(gc.freeze)
  try:
    app.run(main, flags_parser=lambda argv: _parse(argv, required, arguments))
  except (ConfigError, NonFiniteError) as error:
    _fail(str(error))
  except OSError as error:
    said = _disk.disk_error(error)
    if said is None:
      raise
    _fail(said)
  except Interrupted as stopped:
    print(stopped)
    sys.exit(0)
