"""Errors of elastic networks."""


class ArchitectureError(ValueError):
    """An architecture that a model does not have, or that cannot be cut out of it."""
