"""The package's version, also read by pyproject.toml."""

VERSION = "0.1.0"
