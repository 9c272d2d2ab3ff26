"""Granularity: which elements of a tensor share a scale.

    granularity                 tensor [64, 96]     kernel [3, 3, 16, 32]
    PER_TENSOR                  scale [1, 1]        scale [1, 1, 1, 1]
    per_channel(-1)             scale [1, 96]       scale [1, 1, 1, 32]
    per_channel(0, 1)           scale [64, 96]
    per_block(32, axis=-1)      scale [64, 3]
    per_block(32, axis=0)       scale [2, 96]
    per_block(8, axis=2)                            scale [3, 3, 2, 32]

As an operand of a product, axes may be left to it:

    PER_CHANNEL                 every index of the axes that survive the product: [1, 96] for the
                                right side of a matrix product, [1, 1, 1, 32] for a kernel
    PER_TOKEN                   the same of an activation: [64, 1] for the left side of a matrix
                                product, [batch, tokens, 1] for that of a dense layer on tokens,
                                [batch, 1, 1, 1] for images, whose pixels meet in a window
    per_block(32)               blocks along the contraction (a convolution's input features)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aqt_search.numerics.symbolic import certainly


class Granularity(NamedTuple):
    """Axes along which every index has its own scale, and blocks along one further axis.

    None in place of an axis leaves it to the product that the tensor is an operand of. With `rows`
    an index of the channel axes is a row of the data at hand: replicas have rows of their own, so
    they share no scale, and no state remembers one, since the next batch has other rows.
    """

    channel_axes: tuple[int, ...] | None = ()
    block_size: int | None = None
    block_axis: int | None = None
    rows: bool = False


PER_TENSOR = Granularity()
PER_CHANNEL = Granularity(None)
PER_TOKEN = Granularity(None, rows=True)


def per_channel(*axes: int) -> Granularity:
    """One scale for every index of `axes`."""
    return Granularity(tuple(operator.index(axis) for axis in axes))


def per_block(size: int, axis: int | None = None) -> Granularity:
    """One scale for every `size` neighbours along `axis`, at every index of the other axes.

    Where `size` does not divide the axis its last block is shorter.

    Raises:
      ValueError: a size below 1.
    """
    if operator.index(size) < 1:
        raise ValueError(f"A block holds at least one element; got a block size of {size}.")
    return Granularity(None, operator.index(size), None if axis is None else operator.index(axis))


def free_axes(ndim: int, contracting: Sequence[int]) -> tuple[int, ...]:
    """The axes that survive a contraction: along them a scale can be taken out of the product."""
    contracted = {axis % ndim for axis in contracting}
    return tuple(axis for axis in range(ndim) if axis not in contracted)


def _checked_axis(axis: int, ndim: int, what: str) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"{what} {axis} is out of range for an array with {ndim} dimensions.")
    return axis % ndim


def resolve(
    granularity: Granularity, ndim: int, contracting: Sequence[int] | None = None
) -> Granularity:
    """The granularity with every axis named and counted from 0.

    Args:
      granularity: of a tensor with `ndim` axes.
      contracting: the axes that a product sums over, the one that blocks run along last; None for
        a tensor outside of any product.

    Raises:
      ValueError: an axis is out of range, or left to a product where there is none.
    """
    channel_axes, size, axis, rows = granularity
    if contracting is not None:
        contracting = [c % ndim for c in contracting]
    if size is not None:
        if axis is None:
            if contracting is None:
                raise ValueError("per_block needs an axis outside of a product: per_block(32, -1).")
            if not contracting:
                return resolve(PER_CHANNEL, ndim, contracting)
            axis = contracting[-1]
        axis = _checked_axis(axis, ndim, "Block axis")
        return Granularity(tuple(a for a in range(ndim) if a != axis), size, axis)
    if channel_axes is None:
        if contracting is None and not rows:
            raise ValueError(
                "PER_CHANNEL leaves its axes to a product; outside of one name them, as in"
                " per_channel(-1)."
            )
        # Outside of a product a row runs along the last axis.
        contracting = range(ndim)[-1:] if contracting is None else contracting
        channel_axes = free_axes(ndim, contracting)
    return Granularity(
        tuple(sorted({_checked_axis(a, ndim, "Channel axis") for a in channel_axes})), rows=rows
    )


def resolved_channel_axes(granularity: Granularity) -> tuple[int, ...]:
    """The channel axes of a granularity that `resolve` returned."""
    assert granularity.channel_axes is not None, "resolve names every axis"
    return granularity.channel_axes


def scale_shape(shape: Sequence[int], granularity: Granularity) -> tuple[int, ...]:
    """The shape of the scales of a tensor: `per_block(32, -1)` gives [64, 3] for [64, 96]."""
    granularity = resolve(granularity, len(shape))
    channel_axes, size = resolved_channel_axes(granularity), granularity.block_size
    block_axis = granularity.block_axis
    sizes = [n if axis in channel_axes else 1 for axis, n in enumerate(shape)]
    if size is not None and block_axis is not None:
        sizes[block_axis] = -(-shape[block_axis] // size)
    return tuple(sizes)


def shared_axes(ndim: int, granularity: Granularity) -> tuple[int, ...]:
    """The axes that a scale is shared over, of a tensor split by `split_blocks`."""
    if granularity.block_axis is not None:
        return (granularity.block_axis + 1,)
    channel_axes = resolved_channel_axes(granularity)
    return tuple(axis for axis in range(ndim) if axis not in channel_axes)


def split_blocks(x: jax.Array, granularity: Granularity) -> jax.Array:
    """Splits the block axis in two, [.., n, ..] to [.., blocks, size, ..]; zeros fill the last."""
    size, axis = granularity.block_size, granularity.block_axis
    if size is None or axis is None:
        return x
    blocks = -(-x.shape[axis] // size)
    short = blocks * size - x.shape[axis]
    if not certainly(lambda: short == 0):
        x = jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)])
    return x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])


def join_blocks(x: jax.Array, granularity: Granularity, shape: Sequence[int]) -> jax.Array:
    """Undoes `split_blocks` for a tensor that had `shape`."""
    axis = granularity.block_axis
    if axis is None:
        return x
    joined = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(joined, 0, shape[axis], axis=axis)
