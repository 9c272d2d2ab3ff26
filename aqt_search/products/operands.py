"""Values of a product's operands: an array, a tensor to quantize on the way in, or a stored one."""

from __future__ import annotations

import jax
import numpy as np

from aqt_search.numerics.explicit_axes import type_of
from aqt_search.numerics.fake_quant import fake_quantized
from aqt_search.numerics.granularity import Granularity
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantized import Quantized
from aqt_search.numerics.quantizer import has_zero_point as calibrates_zero_point

OperandValue = jax.Array | Quantized | QTensor  # an array is used as it is


def granularity_of(operand: Quantized | QTensor) -> Granularity:
    """Which of an operand's elements share a scale."""
    return operand.granularity if isinstance(operand, QTensor) else operand.how.granularity


def dtype_of(operand: OperandValue) -> np.dtype:
    """The dtype of an operand's values."""
    return operand.x.dtype if isinstance(operand, Quantized) else operand.dtype


def values_of(operand: OperandValue) -> jax.Array:
    """The operand as the emulated product takes it."""
    if isinstance(operand, QTensor):
        return stored_values(operand)
    if isinstance(operand, Quantized):
        return fake_quantized(operand)
    return operand


def stored_values(operand: QTensor, dtype: np.dtype | None = None) -> jax.Array:
    """`operand.dequantize(dtype)`, written with its axes in their order.

    XLA would read them as they lie, in a product that then adds up in another order.
    """
    values = operand.dequantize(dtype)
    return jax.lax.optimization_barrier(values) if operand.order else values


def has_zero_point(operand: Quantized | QTensor) -> bool:
    """Whether 0 may have another code than 0."""
    if isinstance(operand, QTensor):
        return operand.zero_point is not None or operand.centred
    return calibrates_zero_point(operand.how.calibration)


def is_centred(operand: Quantized | QTensor) -> bool:
    """Whether 0 may lie between two codes."""
    return operand.centred if isinstance(operand, QTensor) else operand.how.calibration.centred


def abstract(operand: OperandValue) -> jax.ShapeDtypeStruct:
    """An operand's type, with its sharding where that is known."""
    if not isinstance(operand, QTensor):
        return type_of(operand.x if isinstance(operand, Quantized) else operand)
    unlike = operand.order or operand.data.shape != operand.shape  # turned, or packed
    sharding = None if unlike else jax.typeof(operand.data).sharding
    return jax.ShapeDtypeStruct(operand.shape, operand.dtype, sharding=sharding)
