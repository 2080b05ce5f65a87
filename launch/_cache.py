"""The persistent compilation cache that every program of ``launch`` uses."""

import os
import pathlib

import jax


def use() -> None:
  """Keeps compiled programs: ``JAX_COMPILATION_CACHE_DIR`` or ``~/.cache/gradlab``."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    folder = pathlib.Path.home() / ".cache" / "gradlab" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
