"""Calibration: how the scale of a quantized tensor is chosen."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from aqt_search.formats import Grid, NumericFormat, as_grid


def reduced_axes(ndim: int, channel_axes: Sequence[int]) -> tuple[int, ...]:
    """The axes a scale is shared over: all but `channel_axes`.

    `reduced_axes(4, (-1,)) == (0, 1, 2)`. Raises ValueError for an axis that is out of range.
    """
    for axis in channel_axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"Channel axis {axis} is out of range for an array with {ndim} dimensions."
            )
    kept = {axis % ndim for axis in channel_axes}
    return tuple(axis for axis in range(ndim) if axis not in kept)


def absmax_scale(
    x: jax.Array,
    fmt: NumericFormat,
    channel_axes: Sequence[int] = (),
    axis_name: Hashable | None = None,
) -> jax.Array:
    """The scale that maps the largest magnitude onto the largest value of the format.

        scale = max|x| * (1 / max_value)   (1 where max|x| is zero, or the format is used unscaled)

    Nothing is clipped under this scale, except negative values in an unsigned format. So that
    nothing overflows or is flushed to zero on the way, max|x| is cut to a quarter of the dtype's
    largest value and the scale is at least its smallest normal number. A NaN or an infinity makes
    its scale, and with it every value of that channel, NaN.

    Args:
      x: [...], float32 or float64.
      fmt: the format; formats of 16 bits or more have scale 1 (chosen by data, not by a branch).
      channel_axes: axes of x along which every index has its own scale; () is one per tensor.
      axis_name: a mapped axis (of pmap or vmap) over whose shards the maximum is taken as well.

    Returns:
      x's shape with 1 in place of every axis that is shared; x's dtype.
    """
    return absmax_scale_of_grid(x, as_grid(fmt, x.dtype), channel_axes, axis_name)


def absmax_scale_of_grid(
    x: jax.Array, grid: Grid, channel_axes: Sequence[int], axis_name: Hashable | None
) -> jax.Array:
    """`absmax_scale` for a format that is a grid already."""
    axes = reduced_axes(x.ndim, channel_axes)
    absmax = jax.lax.reduce_max(jax.lax.abs(x), axes)
    absmax = jax.lax.expand_dims(jax.lax.max(absmax, jnp.zeros_like(absmax)), axes)
    if axis_name is not None:
        absmax = jax.lax.pmax(absmax, axis_name)
    info = jnp.finfo(x.dtype)
    largest, smallest = x.dtype.type(info.max / 4), x.dtype.type(info.tiny)
    # A product, as XLA rewrites a division by a broadcast scalar into one: the scale, and so every
    # rounded value, is then the same bits in every program.
    scale = jax.lax.min(absmax, largest) * grid.inverse_max
    scale = jax.lax.max(scale, smallest) + 0 * absmax  # NaN where the maximum is not finite
    unscaled = (absmax == 0) | (grid.unscaled > 0)
    return jax.lax.select(unscaled, jnp.ones_like(scale), scale)
