"""Errors of configurations."""


class ConfigError(ValueError):
    """A configuration with a value that cannot be, or values that do not fit together."""
