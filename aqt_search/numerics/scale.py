"""Scales: which factor takes the bounds of a tensor to the range of its format."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aqt_search.numerics.calibration import Bounds
from aqt_search.numerics.formats import Grid, as_grid, leading_power, numeric_format, round_to_grid
from aqt_search.numerics.outline import where
from aqt_search.numerics.quantizer import Recipe

_E4M3 = numeric_format("e4m3")
_E4M3_SMALLEST = 2.0**-9


class Scale(NamedTuple):
    """Scales as they are stored; what they mean is their product."""

    block: jax.Array  # one for every group of elements
    tensor: jax.Array | None = None  # one for the tensor, of every dimension 1
    zero_point: jax.Array | None = None  # the code of 0

    def value(self) -> jax.Array:
        """The factor from codes to values."""
        return self.block if self.tensor is None else self.block * self.tensor


def _inverse_edge(grid: Grid, edge: str) -> jax.Array:
    """1 / what the bound meets."""
    if edge == "max_value":
        return grid.inverse_max
    last_step = leading_power(grid.max_value) * grid.step
    return 1 / (grid.max_value + 0.5 * last_step)


def _floor_power(x: jax.Array) -> jax.Array:
    """The largest power of two not above x, at least the smallest normal one."""
    return jnp.maximum(leading_power(x), jnp.finfo(x.dtype).tiny)


def _power_of_two_scale(bound: jax.Array, grid: Grid) -> jax.Array:
    """2^(floor(log2 bound) - floor(log2 max_value)): OCP Microscaling v1.0, section 6.3."""
    return _floor_power(bound) * (1 / leading_power(grid.max_value))


def _two_level_scale(scale: jax.Array, grid: Grid, axis_name: Hashable | None) -> Scale:
    """`scale` as e4m3 numbers times one that brings the largest to e4m3's largest (NVFP4)."""
    dtype = scale.dtype
    largest = jnp.max(scale, keepdims=True, initial=0)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    tensor = jnp.maximum(largest * dtype.type(1 / _E4M3.max_value), jnp.finfo(dtype).tiny)
    tensor = where((largest == 0) | (grid.unscaled > 0), jnp.ones_like(tensor), tensor)
    block = round_to_grid(scale * (1 / tensor), as_grid(_E4M3, dtype))
    return Scale(jnp.maximum(block, dtype.type(_E4M3_SMALLEST)), tensor)


def _is_integer(grid: Grid) -> jax.Array:
    return (grid.min_power == grid.steps) & (grid.max_value < 2 * grid.min_power)


def _with_middle_at_zero(scale: jax.Array, grid: Grid) -> Scale:
    """`scale`, made for bounds on max_value, for a grid whose middle stands for 0."""
    integer = _is_integer(grid)
    width = grid.max_value - grid.min_value
    scale = scale * where(integer, 2 * grid.max_value / width, 1.0)
    middle = where(integer, 0.5 * (grid.min_value + grid.max_value), 0.0)
    return Scale(scale, None, jnp.reshape(middle, (1,) * scale.ndim))


def _asymmetric_scale(upper: jax.Array, lower: jax.Array, grid: Grid, how: Recipe) -> Scale:
    """lower .. upper on min_value .. max_value with a zero point; symmetric in float formats."""
    info = jnp.finfo(upper.dtype)
    quarter = upper.dtype.type(info.max / 4)
    high, low = jnp.minimum(upper, quarter), jnp.maximum(lower, -quarter)
    integer = _is_integer(grid)
    symmetric = jnp.maximum(high, -low) * grid.inverse_max
    scale = where(integer, (high - low) * (1 / (grid.max_value - grid.min_value)), symmetric)
    if how.scale_format == "e8m0":  # the next power of two, so that nothing is clipped
        floor = _floor_power(scale)
        scale = where(floor < scale, 2 * floor, floor)
    scale = jnp.maximum(scale, info.tiny)
    scale = where((high == low) | (grid.unscaled > 0), jnp.ones_like(scale), scale)
    zero = jax.lax.round(grid.min_value - low / scale, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    zero = where(integer, jax.lax.clamp(grid.min_value, zero, grid.max_value), 0.0)
    return Scale(scale + 0 * (upper + lower), None, zero)


def scale_of(bounds: Bounds, grid: Grid, how: Recipe) -> Scale:
    """The scale under which the format holds the bounds.

    Bounds are cut to a quarter of the dtype's largest value and the scale is at least its smallest
    normal number, so that nothing overflows or is flushed to zero. The scale is 1 where the bound
    is 0 or the format is used unscaled, NaN where a bound is not finite.
    """
    if bounds.low is not None:
        return _asymmetric_scale(bounds.high, bounds.low, grid, how)
    bound = bounds.high
    info = jnp.finfo(bound.dtype)
    cut = jax.lax.min(bound, bound.dtype.type(info.max / 4))
    if how.scale_format == "e8m0":
        scale = _power_of_two_scale(cut, grid)
    else:
        # A product, as XLA rewrites a division by a broadcast scalar into one: the scale, and so
        # every rounded value, is then the same bits in every program.
        scale = cut * _inverse_edge(grid, how.edge)
    found = Scale(jax.lax.max(scale, bound.dtype.type(info.tiny)))
    if how.scale_format == "e4m3":
        found = _two_level_scale(scale, grid, how.axis_name)
    if how.calibration.centred:
        found = _with_middle_at_zero(found.block, grid)
    block = found.block + 0 * bound  # NaN where the bound is not finite
    unscaled = grid.unscaled > 0
    if not how.calibration.centred:  # which has no level at 0: the smallest scale comes nearest
        unscaled = unscaled | (bound == 0)
    return found._replace(block=jax.lax.select(unscaled, 1 + 0 * block, block))
