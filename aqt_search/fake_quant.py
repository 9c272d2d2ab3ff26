"""Fake quantization: scale, round, rescale, with a straight-through gradient."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import jax
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from aqt_search.calibration import absmax_scale
from aqt_search.formats import NumericFormat, floating_array, numeric_format, round_to_grid


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scale_round_rescale(x, fmt, channel_axes, axis_name):
    carrier = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    scale = absmax_scale(carrier, fmt, channel_axes, axis_name)
    return (round_to_grid(carrier * (1 / scale), fmt) * scale).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _fake_quant(x, fmt, channel_axes, axis_name):
    if jax.default_backend() != "cpu":
        return _scale_round_rescale(x, fmt, channel_axes, axis_name)
    # Inlined, XLA:CPU fuses the rounding into every layout copy of its result and so computes it
    # again in the backward pass: a ResNet-20 step took 1.2 to 1.4 times the float step instead of
    # 0.93, and its compilation held 85 roundings for 44 quantized tensors.
    with set_xla_metadata(inlineable="false"):
        return _scale_round_rescale(x, fmt, channel_axes, axis_name)


@_fake_quant.defjvp
def _fake_quant_jvp(channel_axes, axis_name, primals, tangents):
    # absmax clips nothing, so the straight-through gradient is the identity and saves nothing.
    return _fake_quant(*primals, channel_axes, axis_name), tangents[0]


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
    return _fake_quant(x, numeric_format(fmt), tuple(channel_axes), axis_name)
