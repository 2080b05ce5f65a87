"""PyTorch, which the extra ``bench`` installs and nothing else needs."""

import contextlib
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np

from gradlab.types import ConfigError

PACKAGES = ("torch", "pytorch_optimizer")
INSTALL = "pip install 'gradlab[bench]' brings PyTorch and pytorch_optimizer"

# PyTorch has types, but not on a machine without it.
Tensor = Any


def missing() -> str:
  """How to get what is not installed, or ""."""
  found = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
  if found:
    return f"{' and '.join(found)} not installed; {INSTALL}."
  if jax.default_backend() == "gpu" and not load("torch").cuda.is_available():
    return "JAX runs on a GPU that the installed PyTorch cannot use."
  return ""


def versions() -> str:
  """Names and versions of the packages."""
  found = (f"{name} {metadata.version(name)}" for name in PACKAGES)
  return ", ".join(found)


def need(section: str) -> None:
  """Raises ``ConfigError`` when PyTorch is missing."""
  reason = missing()
  if reason:
    raise ConfigError(f"{section}: {reason}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Leaves out the warnings of PyTorch about its own future."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    yield


def load(name: str) -> Any:
  """``torch`` or ``pytorch_optimizer``, imported when it is needed."""
  with quiet():
    return importlib.import_module(name)


def device() -> Any:
  """Where JAX computes."""
  kind = "cuda" if jax.default_backend() == "gpu" else "cpu"
  return load("torch").device(kind)


def tensor(array: Any) -> Tensor:
  """A copy of an array where JAX computes."""
  return load("torch").tensor(np.asarray(array), device=device())


def timed(function: Callable[[], Any]) -> float:
  """Seconds until what ``function`` starts is computed."""
  cuda = load("torch").cuda
  wait = cuda.synchronize if device().type == "cuda" else lambda: None
  wait()
  begun = time.perf_counter()
  function()
  wait()
  return time.perf_counter() - begun
