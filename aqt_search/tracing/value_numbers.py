"""Value numbers: which values of a program are the same array.

What is computed from parameters and constants alone gets a number, equal for what is computed in
the same way from the same. Two sites whose weights have one number can share what is stored.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax.extend.core as jex_core
import numpy as np


class ValueNumbers:
    """Numbers values as they are met; None stands for a value that nothing is known of."""

    def __init__(self):
        self._numbers: dict[Hashable, int] = {}
        self._transposed: dict[int, tuple[int, tuple[int, ...]]] = {}

    def of(self, *what: Hashable) -> int:
        """The number of what is described so."""
        return self._numbers.setdefault(what, len(self._numbers))

    def literal(self, value) -> int:
        """That of a scalar in the program."""
        array = np.asarray(value)
        return self.of("literal", str(array.dtype), array.shape, array.tobytes())

    def sliced(self, number: int | None, length: int, reverse: bool) -> int | None:
        """That of the slices a scan takes of a value, in its order."""
        return None if number is None else self.of("slice", number, length, reverse)

    def results(self, eqn: jex_core.JaxprEqn, inputs: Sequence[int | None]) -> list[int | None]:
        """Those of the results of an equation that holds no jaxpr."""
        params = tuple(sorted(eqn.params.items(), key=lambda item: item[0]))
        try:
            what = (eqn.primitive.name, params, tuple(inputs))
            hash(what)
        except TypeError:  # a parameter cannot be compared
            return [None] * len(eqn.outvars)
        if None in inputs or eqn.effects:
            return [None] * len(eqn.outvars)
        numbers: list[int | None] = [self.of(*what, place) for place in range(len(eqn.outvars))]
        if eqn.primitive.name == "transpose":
            (source,), (number,) = inputs, numbers
            assert source is not None
            assert number is not None
            origin, order = self.untransposed(source)
            moved = eqn.params["permutation"]
            self._transposed[number] = origin, tuple(order[a] if order else a for a in moved)
        return numbers

    def untransposed(self, number: int) -> tuple[int, tuple[int, ...]]:
        """The value that one is a transpose of, and its axes in the one's order; () as they are."""
        origin, order = self._transposed.get(number, (number, ()))
        return origin, () if order == tuple(range(len(order))) else order
