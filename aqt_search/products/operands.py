"""Operands of a product: an array, a tensor to be quantized on the way in, or a stored one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from aqt_search.numerics.calibration import Bounds
from aqt_search.numerics.fake_quant import fake_quant_packed, with_gradient_rule
from aqt_search.numerics.granularity import Granularity
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantizer import Recipe
from aqt_search.numerics.quantizer import has_zero_point as calibrates_zero_point


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An operand that is quantized on the way into the product."""

    x: jax.Array
    grids: jax.Array  # [n, 7], of `pack_grids`
    row: jax.typing.ArrayLike  # of the operand's format in `grids`
    bounds: Bounds | None  # as a calibration with state gave them
    key: jax.Array | None
    how: Recipe = dataclasses.field(metadata={"static": True})


Operand = jax.Array | Quantized | QTensor  # an array is used as it is


def granularity_of(operand: Quantized | QTensor) -> Granularity:
    """Which of an operand's elements share a scale."""
    return operand.granularity if isinstance(operand, QTensor) else operand.how.granularity


def dtype_of(operand: Operand) -> np.dtype:
    """The dtype of an operand's values."""
    return operand.x.dtype if isinstance(operand, Quantized) else operand.dtype


def values_of(operand: Operand) -> jax.Array:
    """The operand as the emulated product takes it."""
    if isinstance(operand, QTensor):
        return operand.dequantize()
    if isinstance(operand, Quantized):
        o = operand
        return fake_quant_packed(o.x, o.grids, o.row, o.bounds, o.key, o.how)
    return operand


def has_zero_point(operand: Quantized | QTensor) -> bool:
    """Whether 0 may have another code than 0."""
    if isinstance(operand, QTensor):
        return operand.zero_point is not None or operand.centred
    return calibrates_zero_point(operand.how.calibration)


def is_centred(operand: Quantized | QTensor) -> bool:
    """Whether 0 may lie between two codes."""
    return operand.centred if isinstance(operand, QTensor) else operand.how.calibration.centred


def quantized_operand(
    x: jax.Array,
    grids: jax.Array,
    row: jax.typing.ArrayLike,
    bounds: Bounds | None,
    key: jax.Array | None,
    how: Recipe,
) -> Quantized:
    """An operand to be quantized; its gradient follows `how.gradient`."""
    x = with_gradient_rule(x, grids, row, bounds, key, how)
    return Quantized(x, grids, row, bounds, key, how)


def abstract(operand: Operand) -> jax.ShapeDtypeStruct:
    """An operand's shape and dtype."""
    x = operand.x if isinstance(operand, Quantized) else operand
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
