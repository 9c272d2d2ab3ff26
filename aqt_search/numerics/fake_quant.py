"""Fake quantization: scale, round and rescale in floating point; straight-through gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.calibration import Bounds
from aqt_search.numerics.explicit_axes import sharded_as
from aqt_search.numerics.formats import NumericFormat, floating_array
from aqt_search.numerics.gradient_rules import scaled_by_error
from aqt_search.numerics.granularity import (
    PER_TENSOR,
    join_blocks,
    per_channel,
    resolve,
    split_blocks,
)
from aqt_search.numerics.outline import outline
from aqt_search.numerics.quantized import (
    Quantized,
    calibrated,
    codes_of_tensor,
    in_one_format,
    init_bounds,
)
from aqt_search.numerics.quantizer import Quantizer, Recipe, quantizer, recipe

# --- Quantized tensors as values ------------------------------------------------------------------


@functools.partial(outline, static_argnums=(1, 2))
def quantize_dequantize(
    q: Quantized, dtype: np.dtype, told: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The values of `fake_quantized` in `dtype`, and where their gradient passes.

    None says that it does everywhere, or that it was not to be told.
    """
    found = codes_of_tensor(q, q.grid())
    values = join_blocks(found.values(), q.how.granularity, q.x.shape).astype(dtype)
    if found.inside is None or not told:
        return values, None
    return values, join_blocks(found.inside, q.how.granularity, q.x.shape)


@jax.custom_jvp
def fake_quantized(q: Quantized) -> jax.Array:
    """What the tensor's format makes of it, in its shape and dtype: see `fake_quant`."""
    return quantize_dequantize(q, q.x.dtype, False)[0]


@fake_quantized.defjvp
def _fake_quantized_jvp(primals, tangents):
    (q,), (tangent,) = primals, tangents
    if q.how.calibration.covers:
        # Nothing is clipped, so the gradient is the identity and saves nothing.
        return fake_quantized(q), tangent.x
    stopped = dataclasses.replace(q, x=jax.lax.stop_gradient(q.x))
    values, inside = quantize_dequantize(stopped, q.x.dtype, True)

    def through(x, bounds):
        return straight_through(dataclasses.replace(q, x=x, bounds=bounds), values, inside)

    return jax.jvp(through, (q.x, q.bounds), (tangent.x, tangent.bounds))


def straight_through(q: Quantized, values: jax.Array, inside: jax.Array | None) -> jax.Array:
    """`values`, the result of quantizing q.x, with the derivative that stands for that of rounding.

        d values = dx inside of the bounds, and none outside: to every order

    (with `PASS_THROUGH` dx everywhere). Learned bounds add to it, where the format has a scale,

        (values - x) d scale / scale inside ("lsq"; nothing with "pact")
        values d scale / scale - scale d zero outside

    the derivative of (round(clip(x / scale + zero)) - round(zero)) * scale under roundings of
    derivative 1: zero is min_value - low / scale, and has no part in it where low is -high (LSQ:
    Esser et al. 2020, arXiv 1902.08153, equation 3; PACT: Choi et al. 2018, arXiv 1805.06085,
    equation 4).
    """
    return _straight_through(q.x, q.bounds, values, inside, q.grid().unscaled, q.how)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _straight_through(x, bounds, values, inside, unscaled, how: Recipe):
    return values


@_straight_through.defjvp
def _straight_through_jvp(how, primals, tangents):
    x, bounds, values, inside, unscaled = primals
    tangent = tangents[0]
    if how.calibration.derivative is not None and bounds is not None:
        slopes = jax.tree.map(lambda t: jnp.where(unscaled > 0, 0, t), tangents[1])
        tangent = _with_slope_of_bounds(x, bounds, values, unscaled, tangent, slopes, how)
    elif inside is not None:  # None, too, where the gradient rule does not clip
        tangent = jnp.where(inside, tangent, jnp.zeros_like(tangent))
    return _straight_through(*primals, how), tangent


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
        assert slopes.low is not None  # the slopes are the tangent of the bounds
        widening = (slopes.high - slopes.low) / jnp.maximum(bounds.high - low, tiny)
        shift = slopes.low - low * widening

        def spread(slope):
            return jnp.broadcast_to(slope, x.shape)

        # Transposed to sums of products, and not of selections: XLA:CPU writes those down before.
        within = tangent + x * spread(-widening) + spread(-shift)
        tangent = jnp.where(inside, within, zeros) + values * spread(widening) + spread(shift)
    return join_blocks(tangent, how.granularity, shape).astype(dtype)


@outline
def _relative_error(q: Quantized) -> jax.Array:
    """(x - its quantized value) / (what the format spans)."""
    grid = q.grid()
    found = codes_of_tensor(q, grid)
    span = found.scale.value() * (grid.max_value - grid.min_value)
    error = (q.blocks() - found.values()) * (1 / span)
    return join_blocks(error, q.how.granularity, q.x.shape).astype(q.x.dtype)


def with_gradient_rule(q: Quantized) -> Quantized:
    """The same tensor; its gradient is scaled by its error where `how.gradient` says so."""
    delta = q.how.gradient.error_scaling
    if not delta:
        return q
    error = _relative_error(jax.lax.stop_gradient(q))
    return dataclasses.replace(q, x=scaled_by_error(q.x, error, delta))


# --- Functions of arrays --------------------------------------------------------------------------


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
    tensor = in_one_format(x, q, how)
    quantize = sharded_as(lambda q: fake_quantized(with_gradient_rule(q)), jax.typeof(x).sharding)
    return quantize(tensor)


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
    tensor, state = calibrated(in_one_format(x, q, how), state, update=update)
    return fake_quantized(with_gradient_rule(tensor)), state
