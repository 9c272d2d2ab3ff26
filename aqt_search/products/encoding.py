"""Codes of a product's operands, in the dtype that carries them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.granularity import join_blocks
from aqt_search.numerics.outline import outline, where
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantized import Codes, Quantized, codes_of_tensor
from aqt_search.numerics.quantizer import Recipe
from aqt_search.numerics.scale import Scale
from aqt_search.products.carriers import (
    NOT_A_NUMBER,
    Carrier,
    bad_sums,
    does_not_fit,
    encode_carrier,
)


@functools.partial(outline, static_argnums=(1, 2, 3))
def encode_tensor(q: Quantized, carrier: Carrier, summed: tuple[int, ...], told: bool) -> Codes:
    """A tensor's codes in a carrier; the zero point is what stands for 0 after its shift.

    Args:
      q: the tensor.
      carrier: of the codes.
      summed: the axes that the product sums over: one bad number is in all of these sums.
      told: whether to tell which elements lie within the bounds.
    """
    found = codes_of_tensor(q, q.grid())
    return _in_carrier(q, found if told else found._replace(inside=None), carrier, summed)


@functools.partial(outline, static_argnums=(1, 2))
def values_and_codes(
    q: Quantized, dtype: np.dtype, carrier: Carrier
) -> tuple[jax.Array, jax.Array | None, Codes]:
    """`quantize_dequantize`, and the codes that its values are computed from, here and again."""
    codes = _in_carrier(q, codes_of_tensor(q, q.grid()), carrier, None)
    inside, codes = codes.inside, codes._replace(inside=None)
    return _values_of_codes(codes, q.how, dtype), inside, codes


def _in_carrier(
    q: Quantized, found: Codes, carrier: Carrier, summed: tuple[int, ...] | None
) -> Codes:
    """Codes in a carrier; bad numbers are told by the scales of the sums that they are in.

    Without a product (`summed` is None) by those of their own scale, where no code tells of them.
    """
    how, axis = q.how, q.how.granularity.block_axis

    def joined(part):
        return part if part is None or axis is None else jnp.squeeze(part, axis + 1)

    scale, zero = found.scale.value(), found.scale.zero_point
    codes = encode_carrier(found.codes, carrier)
    told = how.calibration.covers  # by the scale, which is NaN already
    if summed is None:
        told = told or (zero is None and not carrier.shift)
        summed = how.over(q.x.ndim).axes
    if carrier.dtype == np.int8 and not told:
        bad = bad_sums(codes, found.codes, carrier, summed if axis is None else (axis + 1,))
        scale = where(bad, jnp.nan, scale)
    scale = where(does_not_fit(carrier, q.grid()), jnp.nan, scale)
    zero = _zero_point_in(carrier, scale, zero)
    codes, inside = join_blocks(codes, how.granularity, q.x.shape), found.inside
    if inside is not None:
        inside = join_blocks(inside, how.granularity, q.x.shape)
    return Codes(codes, Scale(joined(scale), zero_point=joined(zero)), inside)


def values_of_codes(codes: Codes, how: Recipe, dtype: np.dtype) -> jax.Array:
    """What the codes of a product's operand stand for: (codes - zero_point) * scale."""
    numbers, zero = codes.codes.astype(codes.scale.block.dtype), codes.scale.zero_point
    size, axis = how.granularity.block_size, how.granularity.block_axis

    def spread(part):
        if size is None or axis is None:
            return part
        return jax.lax.slice_in_dim(jnp.repeat(part, size, axis), 0, numbers.shape[axis], axis=axis)

    if zero is not None:
        numbers = numbers - spread(zero)
    elif codes.codes.dtype == np.int8 and not how.calibration.covers:
        numbers = where(codes.codes == NOT_A_NUMBER, jnp.nan, numbers)
    return (numbers * spread(codes.scale.block)).astype(dtype)


# Outlined, so that it reads the codes and does not round anew.
_values_of_codes = outline(values_of_codes, static_argnums=(1, 2))


def encode_stored(q: QTensor, carrier: Carrier) -> Codes:
    """The codes of a stored tensor in a carrier."""
    dtype = np.dtype(np.float32)
    codes = q.codes(np.dtype(np.int16) if carrier.shift else carrier.dtype)
    if carrier.shift:
        codes = (codes - np.int16(carrier.shift)).astype(np.int8)
    scale = q.scales(dtype)
    if scale is None:
        scale = jnp.ones((1,) * q.ndim, dtype)
    return Codes(codes, Scale(scale, zero_point=_zero_point_in(carrier, scale, q.zero_point)), None)


def _zero_point_in(carrier: Carrier, scale: jax.Array, zero: jax.Array | None) -> jax.Array | None:
    """What stands for 0 in a carrier that shifts codes."""
    if not carrier.shift:
        return zero
    return jnp.full_like(scale, -carrier.shift) if zero is None else zero - carrier.shift
