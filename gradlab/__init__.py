"""gradlab: functional gradient transforms for JAX, one signature per folder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from gradlab.types import ConfigError as ConfigError

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  # Not before it is asked for: with it comes jax.
  if name == "ConfigError":
    from gradlab.types import ConfigError

    return ConfigError
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
