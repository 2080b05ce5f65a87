"""Strict numerics for every test: nothing is promoted, no warning is overlooked."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def _strict_numerics():
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_numpy_dtype_promotion", "strict")
