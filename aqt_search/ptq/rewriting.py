"""New values for some leaves of a tree of variables."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.ptq.dataflow import Tail
from aqt_search.ptq.errors import PTQError, SkippedSite
from aqt_search.tracing.flat_graph import Leaf


def warn_skipped(step: str, site: str, reason: str) -> None:
    """Warns that a step leaves a site as it is."""
    warnings.warn(f"{step} leaves site {site!r} as it is: {reason}.", SkippedSite, stacklevel=3)


class Rewriting:
    """Reads leaves as float64 numpy arrays, and puts new values in their place.

    The variables that it starts from are not changed; those it ends with have the same tree, shapes
    and dtypes.
    """

    def __init__(self, variables: Any):
        self._leaves, self._tree = jax.tree.flatten(variables)
        self._new: dict[int, np.ndarray] = {}

    def __getitem__(self, index: int) -> np.ndarray:
        new = self._new.get(index)
        return np.asarray(self._leaves[index], np.float64) if new is None else new

    def read(self, leaf: Leaf) -> np.ndarray:
        """The value of a leaf.

        Raises:
          PTQError: it is not finite.
        """
        value = self[leaf.index]
        if not np.isfinite(value).all():
            raise PTQError(f"Parameter {leaf.name!r} holds values that are not finite.")
        return value

    def write(self, leaf: Leaf, value: np.ndarray) -> None:
        """Puts a value, of as many elements, in place of a leaf."""
        self._new[leaf.index] = np.asarray(value, np.float64).reshape(self[leaf.index].shape)

    def multiply(self, leaf: Leaf, factor: np.ndarray | float) -> None:
        """Multiplies a leaf by one factor for each of its elements."""
        self.write(leaf, self.read(leaf).reshape(-1) * factor)

    def add_to_product(self, tail: Tail, delta: np.ndarray) -> None:
        """Changes the first shift of a tail as adding delta [channels] to the product would."""
        shift, factors = tail.shifts[0], list(tail.gain.factors)
        for factor in shift.through.factors:
            factors.remove(factor)
        behind = tail.gain._replace(factors=tuple(factors)).value(self)
        change = delta * behind / shift.coefficient
        self.write(shift.leaf, self.read(shift.leaf).reshape(-1) + change)

    def variables(self) -> Any:
        """The tree with its new values."""
        leaves = list(self._leaves)
        for index, value in self._new.items():
            leaves[index] = jnp.asarray(value, leaves[index].dtype)
        return jax.tree.unflatten(self._tree, leaves)
