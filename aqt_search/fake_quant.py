"""Fake quantization: scale, round, rescale, with a straight-through gradient."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.calibration import absmax_scale_of_grid
from aqt_search.formats import (
    Grid,
    NumericFormat,
    as_grid,
    floating_array,
    numeric_format,
    round_to_grid,
)
from aqt_search.outline import outline


def pack_grids(formats: Sequence[NumericFormat], dtype: np.dtype) -> jax.Array:
    """The grids of n formats as one array [n, 7] of `dtype`: a single kernel makes them all."""
    columns = zip(*formats)
    stacked = NumericFormat(*(jnp.stack([jnp.asarray(v) for v in column]) for column in columns))
    return jnp.stack(as_grid(stacked, dtype), axis=1)


def carrier_dtype(x: jax.Array) -> np.dtype:
    """The dtype that x is rounded in."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


@functools.partial(outline, static_argnums=(3, 4))
def _scale_round_rescale(x, grids, row, channel_axes, axis_name):
    carrier = x.astype(grids.dtype)
    packed = jax.lax.dynamic_index_in_dim(grids, row, keepdims=False)
    grid = Grid(*(packed[field] for field in range(len(Grid._fields))))
    scale = absmax_scale_of_grid(carrier, grid, channel_axes, axis_name)
    return (round_to_grid(carrier * (1 / scale), grid) * scale).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def fake_quant_packed(
    x: jax.Array,
    grids: jax.Array,
    row: jax.typing.ArrayLike,
    channel_axes: tuple[int, ...],
    axis_name: Hashable | None,
) -> jax.Array:
    """`fake_quant` in the format at `row` of `grids`, an array made by `pack_grids`."""
    return _scale_round_rescale(x, grids, row, channel_axes, axis_name)


@fake_quant_packed.defjvp
def _fake_quant_jvp(channel_axes, axis_name, primals, tangents):
    # absmax clips nothing, so the straight-through gradient is the identity and saves nothing.
    return fake_quant_packed(*primals, channel_axes, axis_name), tangents[0]


def fake_quant(
    x: jax.typing.ArrayLike,
    fmt: str | NumericFormat,
    channel_axes: Sequence[int] = (),
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Quantizes and dequantizes `x` in its own dtype: what low precision does to the values.

        scale = max|x| / max_value  per tensor or channel
        y = round_to_format(x * (1 / scale), fmt) * scale
        dy/dx = 1  (straight-through: Bengio et al. 2013, arXiv 1308.3432)

    Formats of 16 bits or more are used with scale 1. NaN or infinity in a channel makes the whole
    channel NaN, so that bad values never pass silently. In an unsigned format negative values
    become 0.

    Args:
      x: any shape, floating point; below float32 it is computed in float32 and cast back.
      fmt: a name or a `NumericFormat` with scalar fields; may be traced.
      channel_axes: axes along which every index has its own scale; () is one scale per tensor.
      axis_name: a mapped axis (of pmap or vmap) over whose shards the maximum is shared.

    Returns:
      An array of x's shape and dtype.

    Raises:
      FormatError: unknown format name.
      TypeError: x is not floating point.
      ValueError: a channel axis is out of range.
    """
    x = floating_array(x, "fake_quant")
    grids = pack_grids([numeric_format(fmt)], carrier_dtype(x))
    return fake_quant_packed(x, grids, np.int32(0), tuple(channel_axes), axis_name)
