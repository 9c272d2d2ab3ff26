"""Products of fake-quantized operands: `dot_general`, `conv_general_dilated` and `einsum`.

Each takes lax's (or numpy's) own arguments plus a format per operand, so that a partial of it fits
the `dot_general` and `conv_general_dilated` fields of Flax modules:

    dot_general = functools.partial(aqs.dot_general, lhs_format="int8", rhs_format="int4")
    nn.Dense(64, dot_general=dot_general)

By default the left operand (activations) has one scale and the right one (weights) a scale per
output channel. A format of None leaves its operand as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from opt_einsum import parser as einsum_parser

from aqt_search.fake_quant import fake_quant
from aqt_search.formats import NumericFormat


def free_axes(ndim: int, contracting: Sequence[int]) -> tuple[int, ...]:
    """The axes that survive a contraction: along them a scale can be taken out of the product."""
    contracted = {axis % ndim for axis in contracting}
    return tuple(axis for axis in range(ndim) if axis not in contracted)


def _quantize(
    x: jax.Array, fmt: str | NumericFormat | None, per_channel: bool, channel_axes: tuple[int, ...]
) -> jax.Array:
    if fmt is None:
        return x
    return fake_quant(x, fmt, channel_axes if per_channel else ())


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    lhs_format: str | NumericFormat | None = None,
    rhs_format: str | NumericFormat | None = None,
    lhs_per_channel: bool = False,
    rhs_per_channel: bool = True,
    **lax_arguments: Any,
) -> jax.Array:
    """`lax.dot_general(fake_quant(lhs), fake_quant(rhs), ...)`.

    Args:
      lhs, rhs, dimension_numbers, precision, preferred_element_type, lax_arguments: as in lax.
      lhs_format, rhs_format: name, `NumericFormat` (may be traced) or None.
      lhs_per_channel, rhs_per_channel: one scale for every index of the operand's batch and free
        axes, instead of one for the tensor.

    Raises:
      FormatError: unknown format name.
    """
    (lhs_contracting, rhs_contracting), _ = dimension_numbers
    lhs = _quantize(lhs, lhs_format, lhs_per_channel, free_axes(lhs.ndim, lhs_contracting))
    rhs = _quantize(rhs, rhs_format, rhs_per_channel, free_axes(rhs.ndim, rhs_contracting))
    return jax.lax.dot_general(
        lhs, rhs, dimension_numbers, precision=precision,
        preferred_element_type=preferred_element_type, **lax_arguments,
    )  # fmt: skip


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
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
    lhs_format: str | NumericFormat | None = None,
    rhs_format: str | NumericFormat | None = None,
    rhs_per_channel: bool = True,
    **lax_arguments: Any,
) -> jax.Array:
    """`lax.conv_general_dilated(fake_quant(lhs), fake_quant(rhs), ...)`.

    Args:
      lhs ... preferred_element_type, lax_arguments: as in lax.
      lhs_format, rhs_format: name, `NumericFormat` (may be traced) or None.
      rhs_per_channel: one scale per output feature of the kernel, instead of one for the kernel.

    Raises:
      FormatError: unknown format name.
    """
    axes = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    return jax.lax.conv_general_dilated(
        _quantize(lhs, lhs_format, False, ()),
        _quantize(rhs, rhs_format, rhs_per_channel, (axes.rhs_spec[0],)),
        window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
        feature_group_count, batch_group_count, precision, preferred_element_type,
        **lax_arguments,
    )  # fmt: skip


def einsum(
    subscripts: str,
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    lhs_format: str | NumericFormat | None = None,
    rhs_format: str | NumericFormat | None = None,
    lhs_per_channel: bool = False,
    rhs_per_channel: bool = True,
    **einsum_arguments: Any,
) -> jax.Array:
    """`jnp.einsum(subscripts, fake_quant(lhs), fake_quant(rhs))`; two operands.

    Args:
      subscripts: as in numpy, with or without an ellipsis and an explicit output.
      lhs, rhs: floating-point arrays.
      lhs_format, rhs_format: name, `NumericFormat` (may be traced) or None.
      lhs_per_channel, rhs_per_channel: one scale for every index of the operand's axes that appear
        in the output, instead of one for the tensor.

    Raises:
      FormatError: unknown format name.
      ValueError: subscripts that do not fit two operands. A product of three is written as two,
        since each intermediate result is an operand with a scale of its own.
    """
    if subscripts.split("->")[0].count(",") != 1:
        raise ValueError(
            f"einsum takes subscripts for two operands, such as 'bi,io->bo'; got {subscripts!r}."
        )
    shapes = (tuple(lhs.shape), tuple(rhs.shape))
    inputs, output, _ = einsum_parser.parse_einsum_input((subscripts, *shapes), shapes=True)
    lhs_axes, rhs_axes = (
        tuple(axis for axis, label in enumerate(labels) if label in output)
        for labels in inputs.split(",")
    )
    lhs = _quantize(lhs, lhs_format, lhs_per_channel, lhs_axes)
    rhs = _quantize(rhs, rhs_format, rhs_per_channel, rhs_axes)
    return jnp.einsum(subscripts, lhs, rhs, **einsum_arguments)
