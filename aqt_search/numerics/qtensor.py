"""Real low-precision storage: codes in the narrowest container, with their scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from aqt_search.numerics.calibration import Bounds
from aqt_search.numerics.explicit_axes import replicated, sharded_as
from aqt_search.numerics.fake_quant import prepare
from aqt_search.numerics.formats import (
    FormatError,
    NumericFormat,
    code_values,
    codes_of,
    floating_array,
    is_integer,
    is_traced,
    numeric_format,
)
from aqt_search.numerics.granularity import Granularity, join_blocks, split_blocks
from aqt_search.numerics.quantized import carrier_dtype, codes_of_tensor, in_one_format
from aqt_search.numerics.quantizer import Quantizer, Recipe, quantizer
from aqt_search.numerics.scale import Scale

STORAGE_DTYPES = {
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
_SCALE_DTYPES = {"e8m0": ml_dtypes.float8_e8m0fnu, "e4m3": ml_dtypes.float8_e4m3fn}


def pack_codes(codes: jax.Array, bits: int) -> jax.Array:
    """Writes rows of n codes, [..., n], one behind another into ceil(n * bits / 8) bytes each."""
    shifts = jnp.arange(bits, dtype=jnp.uint8)
    ones = codes[..., None] >> shifts.reshape((1,) * codes.ndim + (-1,)) & 1
    return jnp.packbits(ones.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_codes(packed: jax.Array, bits: int, count: int) -> jax.Array:
    """Undoes `pack_codes` for rows of `count` codes."""
    rows = packed.shape[:-1]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape((1,) * packed.ndim + (-1,))
        codes = packed[..., None] >> shifts & np.uint8(2**bits - 1)
        return codes.reshape(*rows, -1)[..., :count]
    ones = jnp.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8).reshape((1,) * packed.ndim + (-1,))
    return jnp.sum(ones.reshape(*rows, count, bits) * weights, axis=-1, dtype=jnp.uint8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized tensor: `x = (codes - zero_point) * scale * tensor_scale`.

    `data` has x's shape in a native dtype where one fits the format (int8, uint8, float8, bfloat16,
    ...), else it holds packed codes (`formats.code_values` gives their order): uint8 of shape
    [*shape[:row_axes], bytes].
    """

    data: jax.Array
    # One for every group, see `granularity.scale_shape`: float32 (float64 for a float64 tensor),
    # float8_e8m0fnu or float8_e4m3fn; None in formats of 16 bits or more.
    scale: jax.Array | None
    tensor_scale: jax.Array | None  # float32, one number, beside e4m3 scales
    zero_point: jax.Array | None  # the scale's shape, float32: the code of 0
    fmt: NumericFormat = dataclasses.field(metadata={"static": True})
    granularity: Granularity = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    row_axes: int = dataclasses.field(default=0, metadata={"static": True})
    # Whether the middle of the format's codes stands for 0; `zero_point` is then None.
    centred: bool = dataclasses.field(default=False, metadata={"static": True})
    # The axes of `data` in the order of the tensor's, where they are not the same (`transposed`).
    order: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored data and scales."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def transposed(self, order: Sequence[int]) -> QTensor:
        """The tensor with its axes in another order; the data stay as they are stored."""

        def moved(part):
            """Scales may have more axes in front: a stack of them."""
            if part is None or part.ndim < self.ndim:
                return part
            ahead = part.ndim - self.ndim
            return part.transpose(*range(ahead), *(ahead + axis for axis in order))

        channels, size, block, _ = self.granularity
        place = {axis: new for new, axis in enumerate(order)}
        axes = channels and tuple(sorted(place[axis] for axis in channels))
        return dataclasses.replace(
            self, scale=moved(self.scale), zero_point=moved(self.zero_point),
            granularity=Granularity(axes, size, None if block is None else place[block]),
            shape=tuple(self.shape[axis] for axis in order),
            order=tuple(self.order[axis] if self.order else axis for axis in order),
        )  # fmt: skip

    def codes(self, dtype: np.dtype) -> jax.Array:
        """The codes as numbers of `dtype`, of the tensor's shape."""
        codes = self.codes_as_stored(dtype)
        return codes.transpose(*self.order) if self.order else codes

    def codes_as_stored(self, dtype: np.dtype) -> jax.Array:
        """The codes as numbers of `dtype`, with the axes in the order of `data`."""
        if self.fmt in STORAGE_DTYPES:
            return self.data.astype(dtype)
        place = {axis: own for own, axis in enumerate(self.order)}
        shape = tuple(self.shape[place.get(axis, axis)] for axis in range(self.ndim))
        count = math.prod(shape[self.row_axes :])
        codes = unpack_codes(self.data, int(self.fmt.bits), count).reshape(shape)
        if not is_integer(self.fmt):
            return jnp.take(jnp.asarray(code_values(self.fmt), dtype), codes.astype(jnp.int32))
        if self.fmt.min_value == 0:
            return codes.astype(dtype)
        sign_bit = np.uint8(2 ** (self.fmt.bits - 1))
        magnitude = (codes & (sign_bit - np.uint8(1))).astype(dtype)
        return jnp.where(codes >= sign_bit, -magnitude, magnitude)

    def scales(self, dtype: np.dtype) -> jax.Array | None:
        """The factors from codes to values, of shape `granularity.scale_shape`."""
        if self.scale is None:
            return None
        scale = self.scale.astype(dtype)
        return scale if self.tensor_scale is None else scale * self.tensor_scale.astype(dtype)

    def dequantize(self, dtype: np.dtype | None = None) -> jax.Array:
        """The represented values, of the original shape and dtype, or in another one."""
        carrier, dtype = carrier_dtype(self.dtype), self.dtype if dtype is None else dtype
        values, scales = self.codes(carrier), self.scales(carrier)
        if scales is None:
            return values.astype(dtype)
        values = split_blocks(values, self.granularity)
        if self.zero_point is not None:
            values = values - _beside_blocks(self.zero_point, self.granularity)
        if self.centred:
            values = values - carrier.type(0.5 * (self.fmt.min_value + self.fmt.max_value))
        values = values * _beside_blocks(scales, self.granularity)
        return join_blocks(values, self.granularity, self.shape).astype(dtype)

    def take(self, indices: jax.Array) -> jax.Array:
        """Rows `dequantize()[indices]`, of which only those taken are dequantized.

        A row beyond the tensor is NaN. Packed data of `row_axes=0` is dequantized as a whole.
        """
        numbers = jnp.arange(self.shape[0])
        return self.rows(jnp.take(numbers, widened(indices), mode="fill", fill_value=-1), jnp.nan)

    def of_rows(self, taken: Callable[[jax.Array], jax.Array], count: int) -> QTensor:
        """The `count` rows that `taken` takes of all that has rows; data are stored row by row."""

        def own(part: jax.Array | None) -> jax.Array | None:
            if part is None or part.ndim == 0 or part.shape[0] != self.shape[0]:
                return part  # one for all rows
            return taken(part)

        return dataclasses.replace(
            self, data=taken(self.data), scale=own(self.scale), zero_point=own(self.zero_point),
            shape=(count, *self.shape[1:]),
        )  # fmt: skip

    def rows(self, numbers: jax.Array, fill: float) -> jax.Array:
        """The rows of these numbers, int32 of any shape; `fill` where a number is negative."""
        packed = self.row_axes == 0 and self.fmt not in STORAGE_DTYPES
        flat = numbers.reshape(-1)

        def taken(part: jax.Array) -> jax.Array:
            return jnp.take(part, flat, axis=0, mode="clip")

        if packed or self.order or self.granularity.block_axis == 0:
            values = taken(self.dequantize())
        else:
            values = self.of_rows(taken, flat.size).dequantize()
        values = values.reshape(*numbers.shape, *self.shape[1:])
        inside = numbers.reshape(*numbers.shape, *(1,) * (self.ndim - 1)) >= 0
        return jnp.where(inside, values, jnp.asarray(fill, values.dtype))


def widened(indices: jax.typing.ArrayLike) -> jax.Array:
    """Indices in a dtype that holds the length of any axis, so that they may count from its end."""
    indices = jnp.asarray(indices)
    narrow = jnp.issubdtype(indices.dtype, jnp.signedinteger) and indices.dtype.itemsize < 4
    return indices.astype(np.int32) if narrow else indices


def _beside_blocks(scale: jax.Array, granularity: Granularity) -> jax.Array:
    """A scale in the shape that broadcasts against a tensor split into blocks."""
    axis = granularity.block_axis
    return scale if axis is None else jnp.expand_dims(scale, axis + 1)


def concrete_format(fmt: NumericFormat, caller: str) -> NumericFormat:
    """The format with Python numbers as fields.

    Raises:
      FormatError: the format is traced.
    """
    if is_traced(fmt):
        raise FormatError(f"{caller} needs a concrete format: storage is fixed when traced.")
    return NumericFormat(
        int(fmt.mantissa_bits), int(fmt.min_exponent), float(fmt.min_value), float(fmt.max_value),
        int(fmt.bits),
    )  # fmt: skip


def _storable(fmt: NumericFormat) -> NumericFormat:
    fmt = concrete_format(fmt, "quantize_tensor")
    if fmt.bits > 8 and fmt not in STORAGE_DTYPES:
        raise FormatError(
            f"{fmt} has {fmt.bits} bits and no storage dtype: store at most 8 bits, or bf16, fp16"
            " or fp32."
        )
    return fmt


def quantize_tensor(
    x: jax.typing.ArrayLike,
    fmt: str | NumericFormat | Quantizer,
    channel_axes: Sequence[int] = (),
    *,
    bounds: Bounds | None = None,
    row_axes: int = 0,
    order: Sequence[int] = (),
) -> QTensor:
    """Stores `x` in a format; its `dequantize()` equals `fake_quant(x, fmt, channel_axes)`.

    Args:
      x: any shape, floating point, finite.
      fmt: a name, a concrete `NumericFormat` or a `Quantizer` of one: the storage dtype is fixed by
        it, so it cannot be traced.
      channel_axes: axes along which every index has its own scale.
      bounds: as a calibration with state gave them.
      row_axes: leading axes of the data whose every index starts a byte of its own, so that rows
        can be taken out of packed data.
      order: the axes of x in the order that they lie in the data; () as they are. Products read
        weights fastest along their last axis: store [k, n] of x @ w in the order (1, 0).

    Raises:
      FormatError: unknown or traced format, or one wider than 8 bits without a storage dtype.
      TypeError: x is not floating point.
      ValueError: an axis is out of range, two granularities, or no bounds for a calibration with
        state.
    """
    x = floating_array(x, "quantize_tensor")
    q = quantizer(fmt)
    fmt = _storable(q.fmt)
    x, q, how = prepare(x, q, channel_axes, None, "quantize_tensor")
    lying = tuple(order) or tuple(range(x.ndim))
    if sorted(lying) != list(range(x.ndim)):
        raise ValueError(
            f"order is {tuple(order)}; expected the axes of x, 0 to {x.ndim - 1}, each once."
        )
    if bounds is None and q.calibration.read is not None:
        raise ValueError(
            "This calibration has state: pass bounds, as calibration.read(state) gives them."
        )

    def store(tensor):
        found = codes_of_tensor(tensor, tensor.grid())
        codes = join_blocks(found.codes, how.granularity, x.shape).transpose(lying)
        if fmt in STORAGE_DTYPES:
            data = codes.astype(STORAGE_DTYPES[fmt])
        else:
            data = codes_of(codes, fmt).reshape(*codes.shape[:row_axes], -1)
            data = pack_codes(data, int(fmt.bits)) if fmt.bits < 8 else data
        return data, (None, None, None) if fmt.bits >= 16 else _stored_scale(found.scale, q, how)

    sharding = jax.typeof(x).sharding
    whole = replicated(sharding)
    of_data = sharding if fmt in STORAGE_DTYPES and not order else whole
    tensor = in_one_format(x, dataclasses.replace(q, fmt=fmt), how, bounds)
    data, (scale, tensor_scale, zero_point) = sharded_as(store, of_data, whole)(tensor)
    centred = q.calibration.centred and bool(is_integer(fmt))
    return QTensor(
        data, scale, tensor_scale, zero_point, fmt, how.granularity._replace(rows=False), x.shape,
        x.dtype, row_axes, centred, tuple(int(axis) for axis in np.argsort(lying)) if order else (),
    )  # fmt: skip


def _stored_scale(
    scale: Scale, q: Quantizer, how: Recipe
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    axis = how.granularity.block_axis

    def joined(part):
        return part if part is None or axis is None else jnp.squeeze(part, axis + 1)

    block = joined(scale.block)
    if q.scale_format in _SCALE_DTYPES:
        block = block.astype(_SCALE_DTYPES[q.scale_format])
    tensor = None if scale.tensor is None else scale.tensor.reshape((1,) * block.ndim)
    zero = None if q.calibration.centred else joined(scale.zero_point)
    return block, tensor, zero
