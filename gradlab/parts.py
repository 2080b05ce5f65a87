"""Methods as a config names them: found, checked against their signatures, built.

A method is written as a mapping: ``name`` (a catalogue name, ``optax.<name>`` or
``module:function``) and its keyword arguments. A float may itself be a mapping that
names a controller. ``None`` (an empty placeholder) means "leave it at its default".
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gradlab import catalog
from gradlab.schema import REQUIRED, SLOT_FIELDS, at, fields, join, unknown
from gradlab.types import ConfigError, Method

# Families whose public function is called by the pipeline on what stands before `*`.
FUNCTIONS = ("cotangents", "scores", "params", "inputs", "objectives")


class Part(NamedTuple):
  """A method and its arguments, the floats apart so that they can be traced.

  Attributes:
    method: the catalogue entry.
    path: where it stands in the stage, e.g. "update.adan".
    static: arguments fixed at compile time.
    floats: argument -> value; traced as ``hyperparams[f"{path}.{argument}"]``.
    controllers: argument -> the ``Part`` of the controller that sets it.
    fields: what the slot itself was given (``over``, ``every``, ...).
  """

  method: Method
  path: str
  static: dict[str, Any]
  floats: dict[str, float]
  controllers: dict[str, "Part"]
  fields: dict[str, Any]


def _kinds(annotation: Any) -> set[str]:
  """Which config values an annotation admits: float, int, bool, str, tuple, none."""
  origin = typing.get_origin(annotation)
  if origin in (typing.Union, types.UnionType):
    return set().union(*(_kinds(a) for a in typing.get_args(annotation)))
  if origin is typing.Literal:
    return {"str" if isinstance(a, str) else "any" for a in typing.get_args(annotation)}
  table: dict[Any, str] = {
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    type(None): "none",
  }
  if table.get(annotation):
    return {table[annotation]}
  if (origin or annotation) in (tuple, list, Sequence):
    return {"tuple"}
  if (origin or annotation) in (Callable, typing.Callable, jax.Array, np.ndarray):
    return {"object"}
  if (origin or annotation) in (dict, Mapping):
    return {"mapping"}
  if inspect.isclass(annotation):
    return {"object"}
  return {"any"}


def _argument_kinds(parameter: inspect.Parameter) -> set[str]:
  if parameter.annotation is REQUIRED:
    default = parameter.default
    known = isinstance(default, bool | int | float | str | tuple)
    return _kinds(type(default)) if known else {"any"}
  return _kinds(parameter.annotation)


def _coerce(value: Any, kinds: set[str], path: str) -> Any:
  """The value as the argument's type, or a ConfigError."""
  if "any" in kinds:
    return value
  if isinstance(value, bool):
    if "bool" in kinds:
      return value
  elif isinstance(value, int):
    if "int" in kinds and "float" not in kinds:
      return value
    if "float" in kinds:
      return float(value)
  elif isinstance(value, float):
    if "float" in kinds:
      return value
  else:
    words: dict[type, str] = {str: "str", tuple: "tuple", dict: "mapping"}
    if words.get(type(value), "object") in kinds:
      return value
  names = ", ".join(sorted(kinds - {"object"})) or "nothing that a config can hold"
  raise ConfigError(
    f"{path}: expected {names}, got {value!r} ({type(value).__name__})."
  )


def find(family: str, name: Any, path: str) -> Method:
  """The method of that name: catalogue, ``optax.<name>`` or ``module:function``."""
  if not isinstance(name, str):
    raise ConfigError(f"{path}.name: a method's name is a str, got {name!r}.")
  known = catalog.methods()
  if name in known:
    if known[name].family != family:
      raise ConfigError(
        f"{path}: {name!r} belongs to {known[name].family}; this place takes one of "
        f"{family}."
      )
    return known[name]
  if name.startswith("optax.") and family in ("updates", "controllers"):
    home = optax if family == "updates" else optax.schedules
    factory = getattr(home, name.removeprefix("optax."), None)
    if not callable(factory):
      raise unknown(path, "optax name", name, [f"optax.{n}" for n in dir(home)])
    return Method(name, family, factory, "optax", "", ())
  if ":" in name:
    return Method(name, family, load_object(name, path), name, "", ())
  of_family = tuple(n for n, m in known.items() if m.family == family)
  raise unknown(path, f"{family} method", name, of_family)


def load_object(name: str, path: str) -> Callable[..., Any]:
  """The callable that ``module:attribute`` names."""
  module, _, attribute = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ConfigError(f"{path}: cannot import {name!r}: {error}.") from error
  if not callable(found):
    raise ConfigError(f"{path}: {name!r} is not callable.")
  return typing.cast(Callable[..., Any], found)


def arguments(
  function: Callable[..., Any], given: Mapping[str, Any], path: str, keyword_only: bool
) -> dict[str, Any]:
  """``given`` checked against the function's signature, numbers made floats."""
  parameters = inspect.signature(function, eval_str=True).parameters
  allowed = {
    name: p
    for name, p in parameters.items()
    if p.kind is p.KEYWORD_ONLY
    or (p.kind is p.POSITIONAL_OR_KEYWORD and not keyword_only)
  }
  out = {}
  for name, value in given.items():
    here = join(path, name)
    if name not in allowed:
      raise unknown(here, "argument", name, tuple(allowed))
    if value is None:
      continue
    admitted = _argument_kinds(allowed[name])
    if isinstance(value, Mapping) and "float" in admitted:
      out[name] = value
    else:
      out[name] = _coerce(value, admitted, here)
  for name, parameter in allowed.items():
    if parameter.default is REQUIRED and name not in out and name != "key":
      raise ConfigError(f"{join(path, name)}: missing; it has no default.")
  return out


def part(
  family: str,
  spec: Mapping[str, Any],
  path: str,
  *,
  root: str = "",
  key: str = "",
  slot: str = "",
) -> Part:
  """One method of the config, checked.

  Args:
    family: the signature that this place takes.
    spec: the mapping that names the method and its arguments.
    path: where it stands in the stage.
    root: where the stage stands; both together are what an error names.
    key: the method's name when the spec has no ``name``.
    slot: a key of ``SLOT_FIELDS`` for fields beside the arguments.
  """
  where = join(root, path)
  if not isinstance(spec, Mapping):
    raise ConfigError(
      f"{where}: expected a mapping with a method's name, got {spec!r}."
    )
  given = {k: v for k, v in spec.items() if k != "name"}
  name = spec.get("name", key)
  if not name:
    raise ConfigError(f"{where}.name: missing; it names one of {family}.")
  method = find(family, name, where)
  own = SLOT_FIELDS.get(slot, {})
  slot_given = {k: given.pop(k) for k in tuple(given) if k in own}
  checked = arguments(method.factory, given, where, family in FUNCTIONS)
  static, floats, controllers = {}, {}, {}
  for argument, value in checked.items():
    if isinstance(value, Mapping) and "name" in value:
      here = join(path, argument)
      controllers[argument] = part("controllers", value, here, root=root)
    elif isinstance(value, float) and argument not in method.static:
      floats[argument] = value
    else:
      static[argument] = value
  found = Part(
    method, path, static, floats, controllers, fields(slot_given, own, where)
  )
  if family not in FUNCTIONS:
    with at(where):
      build_part(found, {}, jax.random.key(0))
  return found


def build_part(
  part: Part, hyperparams: Mapping[str, Any], key: jax.Array | None = None
) -> Any:
  """The part's factory called, or its function bound to its keyword arguments.

  ``hyperparams`` overrides the floats written in the config; a controlled argument
  that it lacks is left at its default.
  """
  given = dict(part.static)
  for name, value in part.floats.items():
    given[name] = hyperparams.get(f"{part.path}.{name}", value)
  for name, controller in part.controllers.items():
    path = f"{part.path}.{name}"
    if path in hyperparams:
      given[name] = hyperparams[path]
    else:
      given[name] = float(build_controller(controller, {}).init()[0])
  if part.method.family in FUNCTIONS:
    return lambda *args, **extra: part.method.factory(*args, **given, **extra)
  parameters = inspect.signature(part.method.factory).parameters
  if "key" in parameters and "key" not in given and key is not None:
    given["key"] = key
  return part.method.factory(**given)


def build_controller(part: Part, hyperparams: Mapping[str, Any]) -> Any:
  """The part's ``Controller``; an optax schedule is wrapped into one."""
  built = build_part(part, hyperparams)
  if part.method.name.startswith("optax."):
    from gradlab.transforms.controllers import from_schedule

    return from_schedule(built)
  return built


def named(
  spec: Mapping[str, Any], known: Mapping[str, Callable[..., Any]], path: str, kind: str
) -> tuple[Callable[..., Any], dict[str, Any]]:
  name = spec.get("name")
  if not isinstance(name, str):
    raise ConfigError(f"{path}.name: missing; it names a {kind}.")
  if ":" in name:
    function = load_object(name, path)
  elif name in known:
    function = known[name]
  else:
    raise unknown(f"{path}.name", kind, name, tuple(known))
  given = {k: v for k, v in spec.items() if k != "name"}
  return function, arguments(function, given, path, keyword_only=False)
