"""gradlab: functional gradient transforms for JAX, one signature per folder."""

from gradlab.types import ConfigError as ConfigError

__version__ = "0.1.0"
