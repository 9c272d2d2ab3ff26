"""Architecture decisions: the widths, windows and depths that an elastic network may have."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("width", "expansion", "window", "depth")


@dataclasses.dataclass(frozen=True)
class Times:
    """Widths that are multiples of the width of another group: the expansions of a block.

        widths={"block2/expand": Times("block1/project", (3, 6))}

    Attributes:
      of: a regex that matches the name of one group.
      ratios: whole numbers of at least 1.
    """

    of: str
    ratios: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ArchitectureDecision:
    """One thing to choose about the architecture; a `Decision` of formats beside it in a `Space`.

    Attributes:
      name: `block2/expand/kernel:width`, `block2/depthwise/kernel:window`, `block2..block4:depth`.
      kind: of `KINDS`; an expansion is a multiple of another width.
      options: channels, ratios, windows or numbers of blocks.
      about: groups, sites or blocks.
    """

    name: str
    kind: str
    options: tuple[int | tuple[int, ...], ...]
    about: tuple[str, ...]
    sites: tuple[str, ...] = ()  # whose formats it chooses
    role: str = "architecture"

    @property
    def group(self) -> str:
        """A group of its own."""
        return self.name

    @property
    def labels(self) -> tuple[str, ...]:
        """The options' names, for tables and files."""
        unit = {"width": "c", "expansion": "x", "window": "k", "depth": "d"}[self.kind]
        return tuple(
            unit + "+".join(map(str, o if isinstance(o, tuple) else (o,))) for o in self.options
        )


class Factor(NamedTuple):
    """What a number is multiplied by under each option of a decision."""

    decision: int
    of_option: np.ndarray  # [options], float64 or int


Factors = tuple[Factor, ...]


def known_value(factors: Factors, choices: np.ndarray) -> int:
    """The product of factors under known choices."""
    return math.prod(int(f.of_option[int(choices[f.decision])]) for f in factors)


def value_under(factors: Factors, choices: jax.Array) -> jax.Array:
    """The product of factors under choices that may be traced: int32, []."""
    total = jnp.int32(1)
    for decision, of_option in factors:
        total = total * jnp.asarray(of_option, jnp.int32)[choices[decision]]
    return total
