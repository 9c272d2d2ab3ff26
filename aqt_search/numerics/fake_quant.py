"""Fake quantization: scale, round and rescale in floating point; straight-through gradient."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.calibration import Bounds
from aqt_search.numerics.formats import Grid, NumericFormat, as_grid, floating_array, unsigned_twin
from aqt_search.numerics.gradient_rules import scaled_by_error
from aqt_search.numerics.granularity import (
    PER_TENSOR,
    join_blocks,
    per_channel,
    resolve,
    split_blocks,
)
from aqt_search.numerics.outline import outline
from aqt_search.numerics.quantizer import (
    Codes,
    Quantizer,
    Recipe,
    calibrate,
    encode,
    quantizer,
    recipe,
)


def pack_grids(
    formats: Sequence[NumericFormat], dtype: np.dtype, unsigned: Sequence[bool] = ()
) -> jax.Array:
    """The grids of n formats as one array [n, 7] of `dtype`: a single kernel makes them all.

    Where `unsigned` is set, that of the format's unsigned twin.
    """
    columns = zip(*formats)
    stacked = NumericFormat(*(jnp.stack([jnp.asarray(v) for v in column]) for column in columns))
    if any(unsigned):
        mask = np.array(unsigned)
        twins = unsigned_twin(stacked)
        stacked = NumericFormat(*(jnp.where(mask, t, v) for t, v in zip(twins, stacked)))
    return jnp.stack(as_grid(stacked, dtype), axis=1)


def carrier_dtype(x: jax.Array) -> np.dtype:
    """The dtype that x is rounded in."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def unpack_grid(grids: jax.Array, row: jax.typing.ArrayLike) -> Grid:
    """The grid at a row of `pack_grids`."""
    packed = jax.lax.dynamic_index_in_dim(grids, row, keepdims=False)
    return Grid(*(packed[field] for field in range(len(Grid._fields))))


def _random(key: jax.Array, shape: tuple[int, ...], axis_name: Hashable | None, dtype) -> jax.Array:
    """Uniform numbers, drawn row by row: a batch gets the same ones however it is sharded."""
    if not shape:
        return jax.random.uniform(key, shape, dtype)
    rows = jnp.arange(shape[0])
    if axis_name is not None:
        rows = rows + jax.lax.axis_index(axis_name) * shape[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return jax.vmap(lambda k: jax.random.uniform(k, shape[1:], dtype))(keys)


def _split(x: jax.Array, how: Recipe) -> jax.Array:
    """x split into blocks.

    Raises:
      ValueError: the last block is short and the calibration would count what fills it up.
    """
    _, size, axis = how.granularity
    if axis is not None and how.calibration.counts and x.shape[axis] % size:
        raise ValueError(
            f"percentile and mean_deviation need full blocks: {size} does not divide axis {axis} of"
            f" shape {x.shape}. Choose a size that does, or absmax, min_max or mse."
        )
    return split_blocks(x, how.granularity)


def codes_of_operand(
    x: jax.Array, grid: Grid, bounds: Bounds | None, key: jax.Array | None, how: Recipe
) -> Codes:
    """The codes of x, split into blocks, in the grid's dtype."""
    random = None
    if how.rounding == "stochastic":
        random = _random(key, x.shape, how.axis_name, grid.max_value.dtype)
        random = split_blocks(random, how.granularity)
    carrier = _split(x.astype(grid.max_value.dtype), how)
    return encode(carrier, bounds, grid, how, random)


@functools.partial(outline, static_argnums=(5,))
def quantize_dequantize(x, grids, row, bounds, key, how: Recipe):
    """The arguments of `fake_quant_packed`; its values, and where its gradient passes (or None)."""
    found = codes_of_operand(x, unpack_grid(grids, row), bounds, key, how)
    values = join_blocks(found.values(), how.granularity, x.shape).astype(x.dtype)
    if found.inside is None:
        return values, None
    return values, join_blocks(found.inside, how.granularity, x.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def fake_quant_packed(
    x: jax.Array,
    grids: jax.Array,
    row: jax.typing.ArrayLike,
    bounds: Bounds | None,
    key: jax.Array | None,
    how: Recipe,
) -> jax.Array:
    """`fake_quant` in the format at `row` of `grids`, an array made by `pack_grids`.

    Args:
      x: the tensor.
      grids, row: the format.
      bounds: as a calibration with state gave them; None for one without.
      key: for stochastic rounding.
      how: the static part of the quantizer.
    """
    return quantize_dequantize(x, grids, row, bounds, key, how)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def straight_through(
    x: jax.Array,
    bounds: Bounds | None,
    values: jax.Array,
    inside: jax.Array | None,
    unscaled: jax.Array,
    how: Recipe,
) -> jax.Array:
    """`values`, the result of quantizing x, with the derivative that stands for that of rounding.

        d values = dx inside of the bounds, and none outside: to every order

    (with `PASS_THROUGH` dx everywhere). Learned bounds add to it, where the format has a scale,

        (values - x) d scale / scale inside ("lsq"; nothing with "pact")
        values d scale / scale - scale d zero outside

    the derivative of (round(clip(x / scale + zero)) - round(zero)) * scale under roundings of
    derivative 1: zero is min_value - low / scale, and has no part in it where low is -high (LSQ:
    Esser et al. 2020, arXiv 1902.08153, equation 3; PACT: Choi et al. 2018, arXiv 1805.06085,
    equation 4).
    """
    return values


@straight_through.defjvp
def _straight_through_jvp(how, primals, tangents):
    x, bounds, values, inside, unscaled = primals
    tangent = tangents[0]
    if how.calibration.derivative is not None and bounds is not None:
        slopes = jax.tree.map(lambda t: jnp.where(unscaled > 0, 0, t), tangents[1])
        tangent = _with_slope_of_bounds(x, bounds, values, unscaled, tangent, slopes, how)
    elif inside is not None:  # None, too, where the gradient rule does not clip
        tangent = jnp.where(inside, tangent, jnp.zeros_like(tangent))
    return straight_through(*primals, how), tangent


def _with_slope_of_bounds(x, bounds: Bounds, values, unscaled, tangent, slopes: Bounds, how):
    """The tangent of `values` under those of x and of the bounds."""
    (shape, dtype), split = (x.shape, x.dtype), lambda v: split_blocks(v, how.granularity)
    x, values, tangent = split(x.astype(bounds.high.dtype)), split(values), split(tangent)
    low = -bounds.high if bounds.low is None else bounds.low
    # Told here, not where x is rounded, so that no mask is kept for the backward pass.
    inside = ((x >= low) & (x <= bounds.high)) | (unscaled > 0)
    zeros, tiny = jnp.zeros_like(x), jnp.finfo(bounds.high.dtype).tiny
    if bounds.low is None:
        residual = zeros if how.calibration.derivative == "pact" else values - x
        # Outside, values are a multiple of high.
        factor = jnp.where(inside, residual, values)
        slope = factor * (slopes.high / jnp.maximum(bounds.high, tiny))
        tangent = jnp.where(inside, tangent, zeros) + slope
    else:
        widening = (slopes.high - slopes.low) / jnp.maximum(bounds.high - low, tiny)
        shift = slopes.low - low * widening

        def spread(slope):
            return jnp.broadcast_to(slope, x.shape)

        # Transposed to sums of products, and not of selections: XLA:CPU writes those down before.
        within = tangent + x * spread(-widening) + spread(-shift)
        tangent = jnp.where(inside, within, zeros) + values * spread(widening) + spread(shift)
    return join_blocks(tangent, how.granularity, shape).astype(dtype)


@fake_quant_packed.defjvp
def _fake_quant_jvp(how, primals, tangents):
    if how.calibration.covers:
        # Nothing is clipped, so the gradient is the identity and saves nothing.
        return fake_quant_packed(*primals, how), tangents[0]
    x, grids, row, bounds, _ = primals
    values, inside = quantize_dequantize(jax.lax.stop_gradient(x), *primals[1:], how)
    unscaled = unpack_grid(grids, row).unscaled

    def through(x, bounds):
        return straight_through(x, bounds, values, inside, unscaled, how)

    return jax.jvp(through, (x, bounds), (tangents[0], tangents[3]))


@functools.partial(outline, static_argnums=(5,))
def _relative_error(x, grids, row, bounds, key, how: Recipe) -> jax.Array:
    """(x - its quantized value) / (what the format spans)."""
    grid = unpack_grid(grids, row)
    found = codes_of_operand(x, grid, bounds, key, how)
    span = found.scale.value() * (grid.max_value - grid.min_value)
    error = (_split(x.astype(grids.dtype), how) - found.values()) * (1 / span)
    return join_blocks(error, how.granularity, x.shape).astype(x.dtype)


def with_gradient_rule(
    x: jax.Array,
    grids: jax.Array,
    row: jax.typing.ArrayLike,
    bounds: Bounds | None,
    key: jax.Array | None,
    how: Recipe,
) -> jax.Array:
    """x, whose gradient is scaled by the error of quantizing it where `how.gradient` says so."""
    delta = how.gradient.error_scaling
    if not delta:
        return x
    stopped = jax.lax.stop_gradient((x, grids, row, bounds))
    return scaled_by_error(x, _relative_error(*stopped, key, how), delta)


def check_key(q: Quantizer) -> None:
    """Raises ValueError where stochastic rounding has no key."""
    if q.rounding == "stochastic" and q.key is None:
        raise ValueError(
            "Stochastic rounding needs a random key: Quantizer(..., key=jax.random.key(0)), or"
            " with_keys(assignment, key) for an assignment."
        )


def prepare(
    x: jax.typing.ArrayLike, fmt: Any, channel_axes: Sequence[int], axis_name, caller: str
) -> tuple[jax.Array, Quantizer, Recipe]:
    """The arguments of `fake_quant` checked, and its quantizer's static part for this tensor."""
    x = floating_array(x, caller)
    q = quantizer(fmt)
    check_key(q)
    if q.granularity is not None and tuple(channel_axes):
        raise ValueError(
            f"{caller} got channel_axes {tuple(channel_axes)} and a quantizer with the granularity"
            f" {q.granularity}: give one of them."
        )
    granularity = q.granularity
    if granularity is None:
        granularity = per_channel(*channel_axes) if tuple(channel_axes) else PER_TENSOR
    elif granularity.block_size is not None and granularity.block_axis is None:
        granularity = granularity._replace(block_axis=-1)
    return x, q, recipe(q, resolve(granularity, x.ndim), axis_name)


def fake_quant(
    x: jax.typing.ArrayLike,
    fmt: str | NumericFormat | Quantizer,
    channel_axes: Sequence[int] = (),
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Quantizes and dequantizes `x` in its own dtype: what low precision does to the values.

        scale = max|x| / max_value  per tensor or channel
        y = round_to_format(x * (1 / scale), fmt) * scale
        dy/dx = 1  (straight-through: Bengio et al. 2013, arXiv 1308.3432)

    A `Quantizer` chooses scales otherwise (see there); where its calibration clips, dy/dx is 0
    outside of the bounds. Formats of 16 bits or more are used with scale 1. NaN or infinity in a
    channel makes the whole channel NaN, so that bad values never pass silently; a calibration that
    does not look at every value makes that value NaN. In an unsigned format negative values become
    0.

    Args:
      x: any shape, floating point; below float32 it is computed in float32 and cast back.
      fmt: a name, a `NumericFormat` with scalar fields, or a `Quantizer`; formats may be traced.
        Blocks without an axis run along the last one.
      channel_axes: axes along which every index has its own scale; () is one scale per tensor.
        Short for a `Quantizer` with `per_channel(*channel_axes)`.
      axis_name: a mapped axis (of pmap or vmap) over whose shards scales are shared; stochastic
        rounding then gives every row of the whole batch the same bits as without sharding.

    Returns:
      An array of x's shape and dtype.

    Raises:
      FormatError: unknown format name.
      TypeError: x is not floating point.
      ValueError: an axis is out of range; two granularities; stochastic rounding without a key; a
        calibration with state, which `fake_quant_with_state` takes.
    """
    x, q, how = prepare(x, fmt, channel_axes, axis_name, "fake_quant")
    if q.calibration.read is not None:
        raise ValueError(
            "This calibration has state: use fake_quant_with_state(x, quantizer, state), with the"
            " first state from init_state(quantizer, x.shape)."
        )
    grids, row = pack_grids([q.fmt], carrier_dtype(x)), np.int32(0)
    x = with_gradient_rule(x, grids, row, None, q.key, how)
    return fake_quant_packed(x, grids, row, None, q.key, how)


def _bounds_shape(shape: tuple[int, ...], how: Recipe) -> tuple[int, ...]:
    """The shape of the bounds of a tensor split into blocks."""
    split = jax.eval_shape(
        lambda x: split_blocks(x, how.granularity), jax.ShapeDtypeStruct(shape, np.float32)
    ).shape
    shared = how.over(len(shape)).axes
    return tuple(1 if axis in shared else n for axis, n in enumerate(split))


def init_bounds(shape: tuple[int, ...], how: Recipe) -> Any:
    """The first state of a calibration for tensors of `shape`."""
    return how.calibration.init(_bounds_shape(shape, how))


def next_bounds(
    x: jax.Array, grids: jax.Array, row: jax.typing.ArrayLike, how: Recipe, state: Any
) -> tuple[Bounds, Any]:
    """The bounds a calibration with state gives x, and its next state; no gradient flows."""
    carrier = _split(jax.lax.stop_gradient(x).astype(grids.dtype), how)
    return calibrate(carrier, unpack_grid(grids, row), how, state)


def init_state(q: Quantizer, shape: tuple[int, ...], channel_axes: Sequence[int] = ()) -> Any:
    """The state of a quantizer's calibration for tensors of `shape`; () if it has none."""
    _, _, how = prepare(np.zeros(shape, np.float32), q, channel_axes, None, "init_state")
    return init_bounds(tuple(shape), how)


def fake_quant_with_state(
    x: jax.typing.ArrayLike,
    q: Quantizer,
    state: Any,
    channel_axes: Sequence[int] = (),
    axis_name: Hashable | None = None,
    *,
    update: bool = True,
) -> tuple[jax.Array, Any]:
    """`fake_quant` under a calibration with state: returns the values and the next state.

    With `update=False` the bounds are read from the state alone, as in evaluation, and the state
    is returned as it is. The other arguments are those of `fake_quant`.
    """
    x, q, how = prepare(x, q, channel_axes, axis_name, "fake_quant_with_state")
    grids, row = pack_grids([q.fmt], carrier_dtype(x)), np.int32(0)
    bounds, new_state = bounds_of(x, grids, row, how, state, update)
    x = with_gradient_rule(x, grids, row, bounds, q.key, how)
    return fake_quant_packed(x, grids, row, bounds, q.key, how), new_state


def bounds_of(
    x: jax.Array, grids: jax.Array, row: jax.typing.ArrayLike, how: Recipe, state: Any, update: bool
) -> tuple[Bounds | None, Any]:
    """Bounds for x and the next state; None for a calibration without state, which looks itself."""
    if how.calibration.read is None:
        return None, state
    if not update:
        bounds = how.calibration.read(state, unpack_grid(grids, row))
        return jax.tree.map(lambda b: b.astype(grids.dtype), bounds), state
    return next_bounds(x, grids, row, how, state)
