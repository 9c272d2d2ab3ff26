"""Products of quantized operands: `dot_general`, `conv_general_dilated`, `einsum`; `take`.

Each takes lax's (or numpy's) own arguments plus a format or quantizer per operand, so that a
partial of it fits the `dot_general`, `conv_general_dilated` and `einsum` fields of Flax modules:

    dot_general = functools.partial(aqs.dot_general, lhs_format="int8", rhs_format="int4")
    nn.Dense(64, dot_general=dot_general)

By default the left operand (activations) has one scale and the right one (weights) a scale per
output channel; a `Quantizer` says otherwise. A format of None leaves its operand as it is, and an
operand that is a `QTensor` is used as it is stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from opt_einsum import parser as einsum_parser

from aqt_search.numerics.fake_quant import check_key, fake_quant, with_gradient_rule
from aqt_search.numerics.formats import NumericFormat, floating_array
from aqt_search.numerics.granularity import PER_CHANNEL, PER_TENSOR, Granularity, resolve
from aqt_search.numerics.qtensor import QTensor, widened
from aqt_search.numerics.quantized import Quantized, in_one_format
from aqt_search.numerics.quantizer import Quantizer, quantizer, recipe
from aqt_search.products.carriers import holding
from aqt_search.products.derivatives import Bind, check_residuals
from aqt_search.products.layout import Layout, conv_layout, dot_layout, einsum_layout
from aqt_search.products.operands import OperandValue
from aqt_search.products.product import product

Format = str | NumericFormat | Quantizer | None


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _operand(
    x: Any, fmt: Format, default: Granularity, contracting: Sequence[int], side: str
) -> OperandValue:
    if isinstance(x, QTensor):
        if fmt is not None:
            raise ValueError(
                f"The {side} operand is a QTensor and has its format: leave {side}_format out."
            )
        return x
    if fmt is None:
        return jnp.asarray(x)
    q = quantizer(fmt)
    array = floating_array(x, "A quantized product")
    return _quantized(array, array.ndim, q, default, contracting)


def _quantized(
    x: jax.Array | None, ndim: int, q: Quantizer, default: Granularity, contracting: Sequence[int]
) -> Quantized:
    check_key(q)
    if q.calibration.read is not None:
        raise ValueError(
            "A calibration with state has no place in a single product: use"
            " aqt_search.quantize_with_state for the whole function, or fake_quant_with_state."
        )
    granularity = resolve(q.granularity or default, ndim, contracting)
    tensor = in_one_format(x, q, recipe(q, granularity))
    return tensor if x is None else with_gradient_rule(tensor)  # None: a gradient


def _gradient(fmt: Format, layout: Layout, side: int) -> Quantized | None:
    """How the gradient of the result is quantized in the product for the gradient of `side`."""
    if fmt is None:
        return None
    contracting = layout.gradient_contracting(side)
    return _quantized(None, layout.out_ndim, quantizer(fmt), PER_TENSOR, contracting)


def _format_of(x: Any, fmt: Format) -> NumericFormat | None:
    if isinstance(x, QTensor):
        return x.fmt
    return None if fmt is None else quantizer(fmt).fmt


def _product(
    bind: Bind, layout: Layout, lhs: Any, rhs: Any, formats: tuple[Format, Format],
    gradients: tuple[Format, Format], execution: str, residuals: str,
) -> jax.Array:  # fmt: skip
    check_residuals(residuals)
    known = (_format_of(lhs, formats[0]), _format_of(rhs, formats[1]))
    kept = [None if fmt is None else holding([fmt]) for fmt in known]
    operands = (
        _operand(lhs, formats[0], PER_TENSOR, layout.contracting[0], "lhs"),
        _operand(rhs, formats[1], PER_CHANNEL, layout.contracting[1], "rhs"),
    )
    return product(
        bind, layout, operands, known, execution,
        (_gradient(gradients[0], layout, 0), _gradient(gradients[1], layout, 1)), residuals, kept,
    )  # fmt: skip


def dot_general(
    lhs: jax.Array | QTensor,
    rhs: jax.Array | QTensor,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    lhs_format: Format = None,
    rhs_format: Format = None,
    lhs_gradient: Format = None,
    rhs_gradient: Format = None,
    execution: str = "emulated",
    residuals: str = "values",
    **lax_arguments: Any,
) -> jax.Array:
    """`lax.dot_general` on quantized operands.

    Args:
      lhs, rhs: floating-point arrays, or `QTensor`s (which take no format and have no gradient).
      dimension_numbers, precision, preferred_element_type, lax_arguments: as in lax.
      lhs_format, rhs_format: name, `NumericFormat`, `Quantizer` (formats may be traced) or None.
      lhs_gradient, rhs_gradient: how the gradient of the result is quantized in the product that
        gives the gradient of lhs (of rhs). None leaves it in floating point; otherwise the function
        has a reverse derivative only.
      execution: "emulated" multiplies quantized values in floating point; "int8", "fp8" and "bf16"
        multiply codes held in that dtype and scale the result; "native" takes the first of them
        that holds both formats; "auto" takes what was measured to be fastest. Equal up to the order
        of summation and, with scales that are no powers of two, float32 rounding.
      residuals: what is kept of quantized operands for the backward pass. "values" are in the
        operands' dtype; "codes" are what these are computed from again (a quarter of float32 for
        int8), with the same gradients and, then, a first derivative in reverse mode alone. Formats
        that are traced, or of more than 8 bits but bf16, keep values.

    Raises:
      FormatError: unknown format name; a format that does not fit the execution.
      TypeError: a quantized operand is not floating point.
      ValueError: an execution that is unknown or does not apply; an axis out of range; a
        calibration with state; stochastic rounding without a key.
    """

    def bind(a, b, accumulate, numbers=None):
        return jax.lax.dot_general(
            a, b, numbers or dimension_numbers, precision=precision,
            preferred_element_type=accumulate or preferred_element_type, **lax_arguments,
        )  # fmt: skip

    layout = dot_layout(lhs.ndim, rhs.ndim, dimension_numbers)
    return _product(
        bind, layout, lhs, rhs, (lhs_format, rhs_format), (lhs_gradient, rhs_gradient), execution,
        residuals,
    )  # fmt: skip


def conv_general_dilated(
    lhs: jax.Array | QTensor,
    rhs: jax.Array | QTensor,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    lhs_format: Format = None,
    rhs_format: Format = None,
    lhs_gradient: Format = None,
    rhs_gradient: Format = None,
    execution: str = "emulated",
    residuals: str = "values",
    **lax_arguments: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` on quantized operands.

    One scale per output feature of the kernel and one for the images, unless a `Quantizer` says
    otherwise; blocks run along the input features. A transposed convolution is one with an
    `lhs_dilation`. `PER_CHANNEL` and `PER_TOKEN` give the images a scale for each, and with a
    `batch_group_count`, where an image's place in the result depends on its group, one for all.

    Args:
      lhs ... preferred_element_type, lax_arguments: as in lax.
      lhs_format, rhs_format, lhs_gradient, rhs_gradient, execution, residuals: as for
        `dot_general`.

    Raises:
      As `dot_general`.
    """

    def bind(a, b, accumulate, numbers=None):
        return jax.lax.conv_general_dilated(
            a, b, window_strides, padding, lhs_dilation, rhs_dilation, numbers or dimension_numbers,
            feature_group_count, batch_group_count, precision,
            accumulate or preferred_element_type, **lax_arguments,
        )  # fmt: skip

    axes = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    parameters = None
    # As lax writes them: strides, padding and dilation in full.
    if execution != "emulated" or feature_group_count > 1:
        traced = jax.make_jaxpr(lambda a, b: bind(a, b, None))(*map(_abstract, (lhs, rhs)))
        parameters = traced.eqns[0].params
    layout = conv_layout(axes, feature_group_count, batch_group_count, parameters)
    return _product(
        bind, layout, lhs, rhs, (lhs_format, rhs_format), (lhs_gradient, rhs_gradient), execution,
        residuals,
    )  # fmt: skip


def einsum(
    subscripts: str,
    lhs: jax.Array | QTensor,
    rhs: jax.Array | QTensor,
    *,
    lhs_format: Format = None,
    rhs_format: Format = None,
    lhs_gradient: Format = None,
    rhs_gradient: Format = None,
    execution: str = "emulated",
    residuals: str = "values",
    preferred_element_type: Any = None,
    **einsum_arguments: Any,
) -> jax.Array:
    """`jnp.einsum` on quantized operands; two of them.

    `PER_CHANNEL` is every index of the operand's axes that appear in the output.

    Args:
      subscripts: as in numpy, with or without an ellipsis and an explicit output.
      lhs, rhs: floating-point arrays, or `QTensor`s.
      lhs_format, rhs_format, lhs_gradient, rhs_gradient, execution, residuals: as for
        `dot_general`.
      preferred_element_type, einsum_arguments: as in `jnp.einsum`.

    Raises:
      ValueError: subscripts that do not fit two operands. A product of three is written as two,
        since each intermediate result is an operand with a scale of its own.
      Else as `dot_general`.
    """
    if subscripts.split("->")[0].count(",") != 1:
        raise ValueError(
            f"einsum takes subscripts for two operands, such as 'bi,io->bo'; got {subscripts!r}."
        )
    shapes = (tuple(lhs.shape), tuple(rhs.shape))
    inputs, output, _ = einsum_parser.parse_einsum_input((subscripts, *shapes), shapes=True)

    def bind(a, b, accumulate):
        return jnp.einsum(
            subscripts, a, b, preferred_element_type=accumulate or preferred_element_type,
            **einsum_arguments,
        )  # fmt: skip

    lhs_labels, rhs_labels = inputs.split(",")
    layout = einsum_layout(lhs_labels, rhs_labels, output)
    return _product(
        bind, layout, lhs, rhs, (lhs_format, rhs_format), (lhs_gradient, rhs_gradient), execution,
        residuals,
    )  # fmt: skip


def take(
    table: jax.Array | QTensor, indices: jax.Array, *, table_format: Format = None
) -> jax.Array:
    """Rows of a quantized table: an embedding lookup, `fake_quant(table)[indices]`.

    Each row has its own scale unless a `Quantizer` says otherwise. Of a `QTensor` only the rows
    taken are dequantized; store it with `quantize_tensor(table, fmt, (0,), row_axes=1)`.

    Args:
      table: [rows, ...], floating point, or a `QTensor`.
      indices: integers of any shape; beyond the table they give NaN, as `jnp.take` does.
      table_format: name, `NumericFormat`, `Quantizer` or None.

    Returns:
      [*indices.shape, *table.shape[1:]], in the table's dtype.
    """
    if isinstance(table, QTensor):
        return table.take(indices)
    indices = widened(indices)
    if table_format is None:
        return jnp.take(table, indices, axis=0)
    q = quantizer(table_format)
    granularity = resolve(q.granularity or PER_CHANNEL, table.ndim, range(1, table.ndim))
    values = fake_quant(table, dataclasses.replace(q, granularity=granularity))
    return jnp.take(values, indices, axis=0)
