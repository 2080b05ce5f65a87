"""What a program costs before it runs: seconds to compile, and peak memory."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache


class Built(NamedTuple):
  """A compiled function.

  Attributes:
    run: the function, for arguments of the shapes that it was compiled for.
    seconds: of tracing, lowering and compiling it.
    peak_bytes: of its arguments, results and temporaries, shared ones counted once.
  """

  run: Callable[..., Any]
  seconds: float
  peak_bytes: int


@contextlib.contextmanager
def uncached() -> Iterator[None]:
  """Leaves the persistent compilation cache out."""
  config: Any = jax.config
  before = config.jax_enable_compilation_cache
  # JAX looks at the option once per process, unless the cache is reset.
  config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def build(
  function: Callable[..., Any],
  arguments: tuple[Any, ...],
  *,
  donate: tuple[int, ...] = (),
) -> Built:
  """Traces and compiles ``function`` anew, whatever the caches hold.

  Args:
    function: of arrays and trees of them; traced once per call.
    arguments: what it is going to be called with, or shapes.
    donate: positions of the arguments that it may overwrite.
  """
  # jax.jit keeps what it traced by the function's identity.
  jitted = jax.jit(lambda *given: function(*given), donate_argnums=donate)
  with uncached():
    begun = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - begun
  return Built(compiled, seconds, peak_bytes(compiled))


def peak_bytes(compiled: Any) -> int:
  """Arguments, results and temporaries of a compiled program, in bytes."""
  found = compiled.memory_analysis()
  total = found.argument_size_in_bytes + found.output_size_in_bytes
  return int(total + found.temp_size_in_bytes - found.alias_size_in_bytes)
