"""Native products: codes are multiplied in a low-precision dtype, and the result is scaled."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.granularity import resolved_channel_axes
from aqt_search.numerics.outline import outline
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantized import Codes, Quantized
from aqt_search.numerics.scale import Scale
from aqt_search.products import row_convolution
from aqt_search.products.carriers import Carrier, accumulator
from aqt_search.products.derivatives import Bind, Forward
from aqt_search.products.encoding import encode_stored, encode_tensor, values_of_codes
from aqt_search.products.int32_sums import Part, in_parts, most_terms, unknown_place
from aqt_search.products.layout import Layout, dot_layout
from aqt_search.products.matrices import product_of_matrices, products_of_matrices
from aqt_search.products.measured_facts import (
    LEAST_ROWS,
    convolves_over_rows,
    has_few_rows,
    work_of,
)
from aqt_search.products.operands import (
    OperandValue,
    dtype_of,
    granularity_of,
    has_zero_point,
    is_centred,
)

# --- Native products ------------------------------------------------------------------------------


def _to_result(part: jax.Array, out_axes: tuple[int | None, ...], out_ndim: int) -> jax.Array:
    """Scales of an operand in the shape that broadcasts against the product's result."""
    kept = sorted((out, axis) for axis, out in enumerate(out_axes) if out is not None)
    summed = (axis for axis, out in enumerate(out_axes) if out is None)
    shape = [1] * out_ndim
    for out, axis in kept:
        shape[out] = part.shape[axis]
    return part.transpose(*(axis for _, axis in kept), *summed).reshape(shape)


def refusal(layout: Layout, operands: tuple[OperandValue, OperandValue]) -> str | None:
    """Why a product cannot run on codes; None if it can."""
    if layout.refused:
        return layout.refused
    quantized = []
    for operand, out_axes, side in zip(operands, layout.out_axes, ("left", "right")):
        if not isinstance(operand, (Quantized, QTensor)):
            return f"the {side} operand is not quantized"
        if dtype_of(operand) == np.float64:
            return f"the {side} operand is float64"
        granularity = granularity_of(operand)
        axis = granularity.block_axis
        if axis is not None and layout.kind != "dot_general":
            return "blocks have such a form in dot_general only"
        if any(out_axes[a] is None and a != axis for a in resolved_channel_axes(granularity)):
            return f"the {side} operand has a scale along an axis that the product sums over"
        quantized.append(operand)
    if any(map(is_centred, quantized)):
        return "no code of a centred grid stands for 0"
    if layout.kind == "conv_general_dilated" and has_zero_point(quantized[1]):
        return "the kernel of a convolution has a zero point"
    return _block_refusal(layout, quantized)


def _block_refusal(layout: Layout, operands: Sequence[Quantized | QTensor]) -> str | None:
    places = []
    for operand, contracting in zip(operands, layout.contracting):
        size, axis = granularity_of(operand).block_size, granularity_of(operand).block_axis
        if axis is not None:
            if axis not in contracting:
                return "blocks run along an axis that the product does not sum over"
            places.append((size, contracting.index(axis)))
    if len(set(places)) > 1:
        return "the operands have different blocks"
    if places and any(has_zero_point(o) for o in operands):
        return "one operand has blocks and one a zero point"
    return None


class _Operand(NamedTuple):
    """An operand of a native product."""

    part: Part
    scale: Scale


def _operand(encoded: Codes, layout: Layout, side: int, ones: bool) -> _Operand:
    counting = _ones_in_place_of(encoded.codes, layout, side) if ones else None
    return _Operand(Part(encoded.codes, counting), encoded.scale)


def _ones_in_place_of(codes: jax.Array, layout: Layout, side: int) -> jax.Array:
    """Ones that an operand's zero point is multiplied by, one index for every free axis."""
    if side == 1 and layout.groups > 1:  # every group has features of its own
        return jnp.ones_like(codes)
    shape = [
        1 if out is not None and axis not in layout.batch[side] else n
        for axis, (n, out) in enumerate(zip(codes.shape, layout.out_axes[side]))
    ]
    return jnp.ones(shape, codes.dtype)


def _sum_of_products(bind_codes, zeros, lhs: Part, rhs: Part) -> jax.Array:
    """sum (l - zl)(r - zr) = sum l r - zl sum r - zr sum l + zl zr sum 1; padding counts as 0.

    Exact in int32 if the left side fits: what wraps on the way there comes back.
    """
    left, right = zeros
    product, *ones = bind_codes([lhs.codes, *([] if left is None else [lhs.ones])], rhs.codes)
    left, right = (zero if zero is None else zero.astype(product.dtype) for zero in zeros)
    if left is not None:
        product = product - left * ones[0]
    if right is not None:
        (sums,) = bind_codes([lhs.codes], rhs.ones)
        product = product - right * sums
    if left is not None and right is not None:
        (terms,) = bind_codes([lhs.ones], rhs.ones)
        product = product + left * right * terms
    return product


def _of_equal_sizes(a: jax.Array, b: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Both with the same length along axes in common: an einsum's may be 1 in one of them."""
    shapes = list(a.shape), list(b.shape)
    for axes in (layout.contracting, layout.batch):
        for left, right in zip(*axes):
            one = shapes[0][left] == 1
            size = shapes[1][right] if one else shapes[0][left]
            shapes[0][left] = shapes[1][right] = size
    return jnp.broadcast_to(a, shapes[0]), jnp.broadcast_to(b, shapes[1])


def _row_parameters(
    layout: Layout, lhs: Part, rhs: Part, accumulate: np.dtype
) -> Mapping[str, Any] | None:
    """The parameters of a convolution that runs over rows; None for any other product."""
    params, shapes = layout.parameters, (lhs.codes.shape, rhs.codes.shape)
    if params is None or accumulate != np.int32:
        return None
    if not convolves_over_rows(work_of(layout, *shapes)):
        return None
    return params if row_convolution.applies(params, *shapes) else None


def _native(
    bind: Bind, layout: Layout, lhs: _Operand, rhs: _Operand, accumulate: np.dtype, most: int
) -> jax.Array:
    """The product of codes times the scales, in float32; at most `most` terms in an int32 sum."""
    row_params = _row_parameters(layout, lhs.part, rhs.part, accumulate)

    # Outlined, or the sums over the rows of the kernel are all kept, and added in each consumer.
    over_rows = outline(
        lambda a, b: row_convolution.row_convolution(a, b, row_params or {}, accumulate)
    )

    def bind_one(a, b):
        if row_params is not None:
            return over_rows(a, b)
        if layout.kind == "einsum":
            a, b = _of_equal_sizes(a, b, layout)
        if layout.kind != "conv_general_dilated" and a.dtype == jnp.bfloat16:
            return product_of_matrices(a, b, layout, accumulate)
        return bind(a, b, accumulate)

    def bind_codes(lefts, b):
        """The products of several left operands with b."""
        few = [has_few_rows(layout, a.shape, accumulate) for a in lefts]
        joined = [a for a, own in zip(lefts, few) if own]
        found = iter(())
        if joined:
            found = iter(products_of_matrices(joined, b, layout, accumulate, least_rows=LEAST_ROWS))
        return [next(found) if own else bind_one(a, b) for a, own in zip(lefts, few)]

    def to_result(part: jax.Array, side: int) -> jax.Array:
        return _to_result(part, layout.out_axes[side], layout.out_ndim)

    operands = (lhs, rhs)
    zeros = [
        None if o.scale.zero_point is None else to_result(o.scale.zero_point, side)
        for side, o in enumerate(operands)
    ]
    parts = [(lhs.part, rhs.part)]
    if accumulate == np.int32:
        parts = in_parts(layout, lhs.part, rhs.part, most)
    sums = [_sum_of_products(bind_codes, zeros, *part).astype(np.float32) for part in parts]
    product = functools.reduce(operator.add, sums)
    # The smaller scale first, so that only results beyond float32 overflow.
    scales = [to_result(o.scale.block, side) for side, o in enumerate(operands)]
    return product * jnp.minimum(*scales) * jnp.maximum(*scales)


def _in_blocks(x: jax.Array, axis: int, size: int) -> jax.Array:
    """An axis as the last two, [..., blocks, size]; zeros fill the last block."""
    x = jnp.moveaxis(x, axis, -1)
    length = x.shape[-1]
    blocks = -(-length // size)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * size - length)])
    return x.reshape(*x.shape[:-1], blocks, size)


def _native_blocks(
    layout: Layout, lhs: _Operand, rhs: _Operand, place: int, size: int, accumulate: np.dtype,
    most: int,
) -> jax.Array:  # fmt: skip
    """The product of codes in blocks along the contracting axes at `place`: a batch axis more."""
    contracting, batch = layout.contracting, layout.batch
    split, new_contracting, new_batch = [], [], []
    for side, operand in enumerate((lhs, rhs)):
        axis = contracting[side][place]
        ndim = operand.part.codes.ndim

        def moved(a, axis=axis):
            return a - (a > axis)

        part = jax.tree.map(lambda x, a=axis: _in_blocks(x, a, size), operand.part)
        scale = jax.tree.map(lambda x, a=axis: jnp.moveaxis(x, a, -1)[..., None], operand.scale)
        split.append(_Operand(part, scale))
        rest = [a for n, a in enumerate(contracting[side]) if n != place]
        new_contracting.append((*map(moved, rest), ndim))
        new_batch.append((*map(moved, batch[side]), ndim - 1))
    dimensions = tuple(new_contracting), tuple(new_batch)

    def bind(a, b, accumulate):
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulate)

    lhs, rhs = split
    blocks = dot_layout(lhs.part.codes.ndim, rhs.part.codes.ndim, dimensions)
    return jnp.sum(_native(bind, blocks, lhs, rhs, accumulate, most), len(batch[0]))


def block_place(layout: Layout, operands) -> tuple[int, int] | None:
    """Which contracting axes have blocks, and of what size."""
    for operand, contracting in zip(operands, layout.contracting):
        size, axis = granularity_of(operand).block_size, granularity_of(operand).block_axis
        if size is not None and axis is not None:
            return contracting.index(axis), size
    return None


def native_forward(
    bind: Bind, layout: Layout, carriers: Sequence[Carrier], dtype: np.dtype, operands, told: bool
) -> Forward:
    """The product of two operands on codes held in `carriers`, as `dtype`.

    `told` says whether its derivative is wanted: without, `inside` is not computed.
    """

    def encode(operand, carrier: Carrier, out_axes) -> Codes:
        if isinstance(operand, QTensor):
            return encode_stored(operand, carrier)
        summed = tuple(axis for axis, out in enumerate(out_axes) if out is None)
        return encode_tensor(operand, carrier, summed, told)

    encoded = [encode(*one) for one in zip(operands, carriers, layout.out_axes)]
    spans = [code.scale.zero_point is not None for code in encoded]  # those of uint8, too
    lhs, rhs = (_operand(code, layout, side, any(spans)) for side, code in enumerate(encoded))
    accumulate, most = accumulator(carriers[0]), most_terms(spans)
    place = block_place(layout, operands)
    if place is None and accumulate == np.int32:
        place = unknown_place(layout, lhs.part.codes.shape, rhs.part.codes.shape, most)
    if place is None:
        result = _native(bind, layout, lhs, rhs, accumulate, most)
    else:
        result = _native_blocks(layout, lhs, rhs, *place, accumulate, most)
    left, right = map(_values, encoded, operands)
    inside = encoded[0].inside, encoded[1].inside
    return Forward(result.astype(dtype), (left, right), inside, (encoded[0], encoded[1]))


def _values(encoded: Codes, operand: Quantized | QTensor) -> jax.Array:
    if isinstance(operand, QTensor):
        return operand.dequantize()
    return values_of_codes(encoded, operand.how, operand.x.dtype)
