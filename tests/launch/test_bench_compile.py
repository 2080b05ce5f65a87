"""Compile times are those of compiling, and memory is counted once."""

import jax
import jax.numpy as jnp

from gradlab.launch._bench import compile


def _twice(x):
  return jnp.sin(x) * jnp.float32(2)


def test_memory_is_arguments_and_results():
  x = jnp.zeros(1000, jnp.float32)
  assert compile.build(_twice, (x,)).peak_bytes == 8000
  assert compile.build(_twice, (x,), donate=(0,)).peak_bytes == 4000


def test_every_build_traces_and_compiles_anew(tmp_path):
  traced, before = [], jax.config.jax_compilation_cache_dir

  def function(x):
    traced.append(1)
    return _twice(x)

  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  try:
    built = [compile.build(function, (jnp.ones(3),)) for _ in range(3)]
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
    compile.compilation_cache.reset_cache()
  assert len(traced) == 3
  assert all(each.seconds > 0 for each in built)
  assert not list(tmp_path.iterdir())
  assert jax.config.jax_enable_compilation_cache


def test_the_built_function_is_the_function():
  x = jnp.arange(3, dtype=jnp.float32)
  built = compile.build(_twice, (x,))
  assert jnp.allclose(built.run(x), _twice(x))
