"""Sums of products of 8-bit codes in parts that int32 holds: beyond, it would wrap silently.

largest |code - zero point|                  products that always fit
255 x 255 (uint8, or with a zero point)      33,025
255 x 128                                    65,793
128 x 128                                    131,071
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from aqt_search.numerics.symbolic import certainly
from aqt_search.products.layout import Layout

_LARGEST_INT32 = 2**31 - 1


class Part(NamedTuple):
    """What of an operand enters a part of the sum."""

    codes: jax.Array  # int8
    ones: jax.Array | None  # 1 where a code counts, for the terms of zero points; None without


def most_terms(spans: Sequence[bool]) -> int:
    """How many products fit, whatever the codes are.

    Args:
      spans: for either operand whether its codes lie up to 255 from its zero point, not 128.
    """
    return _LARGEST_INT32 // math.prod(255 if span else 128 for span in spans)


def terms_of(layout: Layout, lhs_shape: Sequence[int], rhs_shape: Sequence[int]) -> list[int]:
    """How long the axes are that are summed over, as the right operand names them."""
    if layout.kind == "conv_general_dilated":
        return [rhs_shape[axis] for axis in layout.contracting[1]]
    # In an einsum an axis of length 1 goes with any other.
    return [max(lhs_shape[a], rhs_shape[b]) for a, b in zip(*layout.contracting)]


def unknown_place(
    layout: Layout, lhs_shape: Sequence[int], rhs_shape: Sequence[int], most: int
) -> tuple[int, int] | None:
    """The place of a dot's contracting axis that must go into blocks, and their size.

    That is a symbolic axis, where the others are known to be short; None where all is known.
    """
    sizes = terms_of(layout, lhs_shape, rhs_shape)
    if layout.kind != "dot_general" or certainly(lambda: math.prod(sizes) <= most):
        return None
    unknown = [place for place, size in enumerate(sizes) if not isinstance(size, int)]
    others = math.prod(size for size in sizes if isinstance(size, int))
    return (unknown[0], most // others) if len(unknown) == 1 and others <= most else None


def in_parts(layout: Layout, lhs: Part, rhs: Part, most: int) -> list[tuple[Part, Part]]:
    """Both operands in parts that sum over at most `most` products each, all of them together."""
    sizes = terms_of(layout, lhs.codes.shape, rhs.codes.shape)
    if certainly(lambda: math.prod(sizes) <= most):
        return [(lhs, rhs)]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"The product sums over axes of the sizes {sizes}, which are not known to be at most"
            f" {most:,} terms in all, so that an int32 sum of codes may wrap. Bound them, as in"
            " jax.export.symbolic_shape('b, t', constraints=['t <= 4096']), or use another"
            " execution than int8: 'auto' and 'emulated' take any."
        )
    if layout.kind == "conv_general_dilated":
        return [(lhs, kernel) for kernel in _kernels(layout, rhs, sizes, most)]
    place = int(np.argmax(sizes))
    size, (left, right) = sizes[place], (contracting[place] for contracting in layout.contracting)
    halves = []
    for start, stop in ((0, size // 2), (size // 2, size)):
        sides = _between(lhs, left, start, stop), _between(rhs, right, start, stop)
        halves += in_parts(layout, *sides, most)
    return halves


def _between(part: Part, axis: int, start: int, stop: int) -> Part:
    if part.codes.shape[axis] == 1:
        return part
    return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, start, stop, axis=axis), part)


def _kernels(layout: Layout, kernel: Part, sizes: Sequence[int], most: int) -> list[Part]:
    """A kernel as a sum of kernels that are 0 elsewhere, which goes for every convolution."""
    number = np.arange(math.prod(sizes)).reshape(sizes)
    axes = np.argsort(layout.contracting[1])
    free = [axis for axis in range(kernel.codes.ndim) if axis not in layout.contracting[1]]
    number = np.expand_dims(number.transpose(axes), free)
    masks = [
        (number // most == part).astype(np.int8) for part in range(-(-math.prod(sizes) // most))
    ]
    return [jax.tree.map(lambda x, m=mask: x * m, kernel) for mask in masks]
