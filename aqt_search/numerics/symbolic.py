"""Sizes that may be symbolic, as `jax.export` with `symbolic_shape` traces them."""

from __future__ import annotations

from collections.abc import Callable

import jax


def certainly(comparison: Callable[[], bool]) -> bool:
    """Whether a comparison of sizes holds whatever the symbolic ones among them are."""
    try:
        return bool(comparison())
    except jax.errors.InconclusiveDimensionOperation:
        return False
