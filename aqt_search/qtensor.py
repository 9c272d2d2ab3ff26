"""Real low-precision storage: codes in the narrowest container, with their scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from aqt_search.calibration import absmax_scale
from aqt_search.formats import (
    FormatError,
    NumericFormat,
    as_grid,
    code_values,
    codes_of,
    floating_array,
    numeric_format,
    round_to_grid,
)

_STORAGE_DTYPES = {
    numeric_format(name): np.dtype(dtype)
    for name, dtype in {
        "int8": np.int8,
        "uint8": np.uint8,
        "e4m3": ml_dtypes.float8_e4m3fn,
        "e5m2": ml_dtypes.float8_e5m2,
        "e3m4": ml_dtypes.float8_e3m4,
        "bf16": ml_dtypes.bfloat16,
        "fp16": np.float16,
        "fp32": np.float32,
    }.items()
}


def _pack(codes: jax.Array, bits: int) -> jax.Array:
    """Writes n codes of `bits` bits one behind another into ceil(n * bits / 8) bytes."""
    shifts = jnp.arange(bits, dtype=jnp.uint8)
    ones = codes.reshape(-1, 1) >> shifts[None] & 1
    return jnp.packbits(ones.reshape(-1), bitorder="little")


def _unpack(packed: jax.Array, bits: int, count: int) -> jax.Array:
    ones = jnp.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return jnp.sum(ones * weights[None], axis=1, dtype=jnp.uint8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized tensor: `x = values(data) * scale`.

    `data` has x's shape in a native dtype where one fits the format (int8, uint8, float8, bfloat16,
    ...), else it is a uint8 vector of packed codes (`formats.code_values` gives their order). The
    scale has the shape of `absmax_scale`, in float32 (float64 for a float64 tensor); it is absent
    (None) in formats of 16 bits or more.
    """

    data: jax.Array
    scale: jax.Array | None
    fmt: NumericFormat = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of the stored data and scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dequantize(self) -> jax.Array:
        """The represented values, of the original shape and dtype."""
        if self.fmt in _STORAGE_DTYPES:
            values = self.data.astype(jnp.float32)
        else:
            codes = _unpack(self.data, self.fmt.bits, math.prod(self.shape))
            table = jnp.asarray(code_values(self.fmt))
            values = jnp.take(table, codes.astype(jnp.int32)).reshape(self.shape)
        if self.scale is not None:
            values = values * self.scale
        return values.astype(self.dtype)


def quantize_tensor(
    x: jax.typing.ArrayLike, fmt: str | NumericFormat, channel_axes: Sequence[int] = ()
) -> QTensor:
    """Stores `x` in a format; its `dequantize()` equals `fake_quant(x, fmt, channel_axes)`.

    Args:
      x: any shape, floating point, finite.
      fmt: a name or a concrete `NumericFormat`: the storage dtype is fixed by it, so it cannot be
        traced.
      channel_axes: axes along which every index has its own scale.

    Raises:
      FormatError: unknown or traced format, or one wider than 8 bits without a storage dtype.
      TypeError: x is not floating point.
      ValueError: a channel axis is out of range.
    """
    x = floating_array(x, "quantize_tensor")
    fmt = numeric_format(fmt)
    if any(isinstance(field, jax.core.Tracer) for field in fmt):
        raise FormatError("quantize_tensor needs a concrete format: storage is fixed when traced.")
    fmt = NumericFormat(
        int(fmt.mantissa_bits), int(fmt.min_exponent), float(fmt.min_value), float(fmt.max_value),
        int(fmt.bits),
    )  # fmt: skip
    if fmt.bits > 8 and fmt not in _STORAGE_DTYPES:
        raise FormatError(
            f"{fmt} has {fmt.bits} bits and no storage dtype: store at most 8 bits, or bf16, fp16"
            " or fp32."
        )
    carrier = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    scale = None if fmt.bits >= 16 else absmax_scale(carrier, fmt, channel_axes)
    steps = carrier if scale is None else carrier * (1 / scale)
    values = round_to_grid(steps, as_grid(fmt, carrier.dtype))
    if fmt in _STORAGE_DTYPES:
        data = values.astype(_STORAGE_DTYPES[fmt])
    else:
        data = codes_of(values, fmt)
        data = _pack(data, fmt.bits) if fmt.bits < 8 else data.reshape(-1)
    return QTensor(data, scale, fmt, x.shape, x.dtype)
