"""The persistent compilation cache that every program of ``launch`` uses."""

import os
import pathlib

import jax


def use() -> None:
  """Keeps compiled programs: ``JAX_COMPILATION_CACHE_DIR`` or ``~/.cache/gradlab``.

  What compiles within 0.2 seconds is not kept, unless
  ``JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`` says otherwise.
  """
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    folder = pathlib.Path.home() / ".cache" / "gradlab" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  seconds = os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS") or "0.2"
  jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))
