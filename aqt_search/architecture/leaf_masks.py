"""Which elements of a parameter a subnet has: as a mask under traced choices, or cut out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.architecture.decisions import Factors, known_value, value_under


@dataclasses.dataclass(frozen=True)
class LeafMask:
    """Which elements of a leaf a subnet has."""

    shape: tuple[int, ...]
    widths: tuple[tuple[int, Factors], ...]  # axis, and how many channels of it are there
    windows: tuple[tuple[tuple[int, ...], Factors], ...]  # axes, and how many taps of them
    present: tuple[Factors, ...]  # whether the leaf is there at all

    def mask(self, choices: jax.Array) -> jax.Array | None:
        """Bool, to be broadcast to the leaf; None where every subnet has all of it."""
        parts = [
            _along(jnp.arange(self.shape[axis]) < value_under(factors, choices), axis, self.shape)
            for axis, factors in self.widths
        ]
        for axes, factors in self.windows:
            for axis in axes:
                size = self.shape[axis]
                off = np.abs(2 * np.arange(size) - (size - 1))
                inside = off < value_under(factors, choices)
                parts.append(_along(inside, axis, self.shape))
        parts += [value_under(factors, choices) > 0 for factors in self.present]
        total = None
        for part in parts:
            total = part if total is None else total & part
        return total

    def cut(self, leaf: jax.Array, choices: np.ndarray) -> jax.Array | None:
        """What a subnet has of a leaf; None where it has nothing."""
        if any(known_value(factors, choices) == 0 for factors in self.present):
            return None
        index = [slice(None)] * leaf.ndim
        for axis, factors in self.widths:
            index[axis] = slice(known_value(factors, choices))
        for axes, factors in self.windows:
            for axis in axes:
                taps = known_value(factors, choices)
                start = (self.shape[axis] - taps) // 2
                index[axis] = slice(start, start + taps)
        return leaf[tuple(index)]


def _along(mask: jax.typing.ArrayLike, axis: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(mask).reshape([n if a == axis else 1 for a, n in enumerate(shape)])
