"""Products of quantized operands: emulated in floating point, or native on codes.

Both run the same product (`bind`, of lax or of a traced equation) and have the same gradients:
those of a product of the operands' quantized values (straight-through).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from aqt_search.numerics.explicit_axes import sharded_as
from aqt_search.numerics.fake_quant import quantize_dequantize
from aqt_search.numerics.formats import NumericFormat, is_traced
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantized import Codes, Quantized, carrier_dtype
from aqt_search.products import depthwise
from aqt_search.products.carriers import Carrier, carriers_of, check_execution, fastest
from aqt_search.products.derivatives import (
    Bind,
    Forward,
    ForwardFunction,
    Gradients,
    with_backward,
    with_forward_derivative,
)
from aqt_search.products.encoding import values_and_codes
from aqt_search.products.layout import Layout
from aqt_search.products.measured_facts import work_of
from aqt_search.products.native import block_place, native_forward, refusal
from aqt_search.products.operands import OperandValue, abstract, dtype_of, stored_values, values_of
from aqt_search.products.stored_order import in_stored_order
from aqt_search.products.tiled_weights import product_in_tiles, takes_tiles


class _Emulated(NamedTuple):
    """An operand of an emulated product."""

    value: jax.Array
    inside: jax.Array | None = None
    codes: Codes | None = None


def _emulated(
    operand: OperandValue, dtype: np.dtype, carrier: Carrier | None, told: bool
) -> _Emulated:
    if isinstance(operand, Quantized):
        if carrier is None or not told:
            return _Emulated(*quantize_dequantize(operand, dtype, told))
        return _Emulated(*values_and_codes(operand, dtype, carrier))
    if isinstance(operand, QTensor):
        return _Emulated(stored_values(operand, dtype))
    return _Emulated(operand.astype(dtype))


def _emulated_forward(
    bind: Bind, dtype: np.dtype, kept: Sequence[Carrier | None],
    operands: tuple[OperandValue, OperandValue], told: bool,
) -> Forward:  # fmt: skip
    """The product of values as they were before they were rounded to the operands' dtype.

    A step times a scale has more bits than bfloat16: rounded to it, values lie up to a quarter of a
    step off the grid. What is kept for gradients is in the operands' dtype.
    """
    wide = [carrier_dtype(dtype_of(operand)) for operand in operands]
    lhs, rhs = (_emulated(o, w, carrier, told) for o, w, carrier in zip(operands, wide, kept))
    values = lhs.value.astype(dtype_of(operands[0])), rhs.value.astype(dtype_of(operands[1]))
    accumulate = np.float32 if _is_narrow(operands) else None
    result = bind(lhs.value, rhs.value, accumulate).astype(dtype)
    return Forward(result, values, (lhs.inside, rhs.inside), (lhs.codes, rhs.codes))


def _forward_in_tiles(
    bind: Bind, layout: Layout, dtype: np.dtype, kept: Sequence[Carrier | None],
    operands: tuple[OperandValue, OperandValue], told: bool,
) -> Forward:  # fmt: skip
    """`_emulated_forward`, with the values of stored weights tile by tile, unless they are kept."""
    lhs, rhs = operands
    if told:
        return _emulated_forward(bind, dtype, kept, operands, told)
    assert isinstance(rhs, QTensor)
    x = _emulated(lhs, carrier_dtype(dtype_of(lhs)), None, told).value
    accumulate = np.float32 if _is_narrow(operands) else None
    result = product_in_tiles(x, rhs, layout, carrier_dtype(rhs.dtype), accumulate).astype(dtype)
    return Forward(result, (x, x), (None, None))  # nothing but the result is asked for


def _is_narrow(operands: tuple[OperandValue, OperandValue]) -> bool:
    """Whether values are rounded in a wider dtype than an operand has."""
    return any(carrier_dtype(dtype_of(o)) != dtype_of(o) for o in operands)


def _choose(layout: Layout, operands, execution: str, formats) -> str:
    """The execution, with "auto" decided."""
    check_execution(execution)
    if execution == "emulated":
        return execution
    reason = refusal(layout, operands)
    if execution == "auto":
        # Blocks make a product for each: never faster than one.
        if reason or block_place(layout, operands) is not None:
            return "emulated"
        shapes = (abstract(operand).shape for operand in operands)
        return fastest(work_of(layout, *shapes), formats)
    if reason:
        raise ValueError(
            f"Execution {execution!r} runs products on codes, but {reason}. Use 'emulated', or"
            " 'auto', which falls back to it."
        )
    return execution


def _of_values(bind: Bind, layout: Layout, operands, gradients: Gradients) -> Bind:
    """`bind` for quantized values, in floating point: in another form where that is faster.

    A product without any format stays the one of lax, to the last bit.
    """
    params = layout.parameters
    untouched = gradients == (None, None) and not any(
        isinstance(operand, (Quantized, QTensor)) for operand in operands
    )
    if untouched or params is None or jax.default_backend() != "cpu":
        return bind
    if not depthwise.applies(params, *(abstract(operand).shape for operand in operands)):
        return bind
    return lambda lhs, rhs, accumulate: depthwise.shifted_products(lhs, rhs, params)


def _in_codes(
    residuals: str, kept: Sequence[Carrier | None], formats: Sequence[NumericFormat | None]
) -> tuple[bool, bool] | None:
    """Which operands are kept in codes, if those of a native product are; None: values are."""
    if residuals == "values":
        return None
    # A known format that nothing is to carry is that of a small weight.
    left, right = (
        carrier is not None or (fmt is not None and is_traced(fmt))
        for carrier, fmt in zip(kept, formats)
    )
    return left, right


def product(
    bind: Bind,
    layout: Layout,
    operands: tuple[OperandValue, OperandValue],
    formats: tuple[NumericFormat | None, NumericFormat | None],
    execution: str,
    gradients: Gradients = (None, None),
    residuals: str = "values",
    kept: Sequence[Carrier | None] = (None, None),
) -> jax.Array:
    """The product of two operands, on codes or on quantized values as `execution` says.

    Args:
      bind: the product in lax.
      layout: of its axes.
      operands: lhs and rhs.
      formats: of both; None for an array.
      execution: one of `carriers.EXECUTIONS`.
      gradients: how the gradient is quantized in the two gradient products.
      residuals: "values" or "codes", see `derivatives`.
      kept: what holds the codes of either operand between the passes; None keeps its values.

    Raises:
      FormatError: no carrier, or not the one asked for, holds the formats.
      ValueError: unknown execution, or one that this product has no form for.
    """
    plain, own, asked = bind, operands, execution
    if execution != "emulated":  # which adds up in the order of the training step
        bind, layout, operands = in_stored_order(bind, layout, operands)
    execution = _choose(layout, operands, execution, formats)
    known = [fmt for fmt in formats if fmt is not None]  # both, where neither was refused
    carriers = None
    if execution != "emulated":
        carriers = carriers_of(execution, known, alike=layout.kind == "conv_general_dilated")
    if not known and gradients == (None, None):
        lhs, rhs = map(values_of, operands)
        return bind(lhs, rhs, None)  # the one of lax
    # `jax.eval_shape` tells no sharding where only some axes of the mesh are explicit.
    closed = jax.make_jaxpr(lambda a, b: plain(a, b, None))(*map(abstract, own))
    (result,) = closed.out_avals
    forward = None
    if carriers is not None:
        forward = functools.partial(native_forward, bind, layout, carriers, result.dtype)
    elif asked != "emulated" and takes_tiles(layout, operands):
        forward = functools.partial(_forward_in_tiles, bind, layout, result.dtype, kept)
    in_codes = _in_codes(residuals, kept, formats)
    run = functools.partial(_run, bind, layout, forward, result.dtype, in_codes, kept)
    return sharded_as(run, result.sharding)(operands, gradients)


def _run(
    bind: Bind, layout: Layout, forward: ForwardFunction | None, dtype: np.dtype,
    in_codes: tuple[bool, bool] | None, kept: Sequence[Carrier | None],
    operands: tuple[OperandValue, OperandValue], gradients: Gradients,
) -> jax.Array:  # fmt: skip
    """The product as `forward` computes it, or of values without."""
    reverse_alone = gradients != (None, None) or in_codes is not None
    of_values = _of_values(bind, layout, operands, gradients)
    if forward is None and (reverse_alone or _is_narrow(operands)):
        forward = functools.partial(_emulated_forward, of_values, dtype, kept)
    if forward is None:
        lhs, rhs = map(values_of, operands)
        return of_values(lhs, rhs, None)
    if reverse_alone:
        return with_backward(forward, of_values, in_codes)(*operands, gradients)
    return with_forward_derivative(forward, of_values)(*operands)
