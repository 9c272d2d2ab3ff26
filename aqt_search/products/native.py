"""Native products: codes are multiplied in a low-precision dtype, and the result is scaled."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.granularity import join_blocks, resolved_channel_axes
from aqt_search.numerics.outline import outline, where
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantized import Codes, Quantized, codes_of_tensor
from aqt_search.numerics.scale import Scale
from aqt_search.products import row_convolution
from aqt_search.products.carriers import (
    Carrier,
    accumulator,
    bad_sums,
    does_not_fit,
    encode_carrier,
)
from aqt_search.products.int32_sums import Part, in_parts, most_terms, unknown_place
from aqt_search.products.layout import Layout, dot_layout
from aqt_search.products.measured_facts import convolves_over_rows, work_of
from aqt_search.products.operands import (
    OperandValue,
    dtype_of,
    granularity_of,
    has_zero_point,
    is_centred,
)

# bind(lhs, rhs, preferred_element_type); None leaves the result's dtype as it would be.
Bind = Callable[[jax.Array, jax.Array, Any], jax.Array]


class Forward(NamedTuple):
    """A product with what its derivative needs."""

    result: jax.Array
    values: tuple[jax.Array, jax.Array]  # of the operands, for the gradient
    inside: tuple[jax.Array | None, jax.Array | None]


# --- Codes of an operand --------------------------------------------------------------------------


@functools.partial(outline, static_argnums=(1, 2, 3))
def _encode(q: Quantized, carrier: Carrier, summed: tuple[int, ...], told: bool) -> Codes:
    """A tensor's codes in a carrier; the zero point is what stands for 0 after its shift.

    Args:
      q: the tensor.
      carrier: of the codes.
      summed: the axes that the product sums over: one bad number is in all of these sums.
      told: whether to tell which elements lie within the bounds.
    """
    grid, how = q.grid(), q.how
    found = codes_of_tensor(q, grid)
    axis = how.granularity.block_axis

    def joined(part):
        return part if part is None or axis is None else jnp.squeeze(part, axis + 1)

    scale, zero = found.scale.value(), found.scale.zero_point
    codes = encode_carrier(found.codes, carrier)
    if carrier.dtype == np.int8 and not how.calibration.covers:  # else the scale is NaN already
        bad = bad_sums(codes, found.codes, carrier, summed if axis is None else (axis + 1,))
        scale = where(bad, jnp.nan, scale)
    scale = where(does_not_fit(carrier, grid), jnp.nan, scale)
    if carrier.shift:
        zero = jnp.full_like(scale, -carrier.shift) if zero is None else zero - carrier.shift
    codes = join_blocks(codes, how.granularity, q.x.shape)
    inside = found.inside if told else None
    if inside is not None:
        inside = join_blocks(inside, how.granularity, q.x.shape)
    return Codes(codes, Scale(joined(scale), zero_point=joined(zero)), inside)


def _encode_stored(q: QTensor, carrier: Carrier) -> Codes:
    dtype = np.dtype(np.float32)
    codes = q.codes(np.dtype(np.int16) if carrier.shift else carrier.dtype)
    if carrier.shift:
        codes = (codes - np.int16(carrier.shift)).astype(np.int8)
    scale = q.scales(dtype)
    if scale is None:
        scale = jnp.ones((1,) * q.ndim, dtype)
    zero = q.zero_point
    if carrier.shift:
        zero = jnp.full_like(scale, -carrier.shift) if zero is None else zero - carrier.shift
    return Codes(codes, Scale(scale, zero_point=zero), None)


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
    product = bind_codes(lhs.codes, rhs.codes)
    left, right = (zero if zero is None else zero.astype(product.dtype) for zero in zeros)
    if left is not None:
        product = product - left * bind_codes(lhs.ones, rhs.codes)
    if right is not None:
        product = product - right * bind_codes(lhs.codes, rhs.ones)
    if left is not None and right is not None:
        product = product + left * right * bind_codes(lhs.ones, rhs.ones)
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


def _as_matrices(a: jax.Array, b: jax.Array, layout: Layout, accumulate) -> jax.Array:
    """A dot as one of [batch, rows, terms] and [batch, terms, columns].

    XLA:CPU of jaxlib 0.10.2 has no bfloat16 product for some other orders of axes.
    """
    sides, free = [], []
    for x, contracting, batch, order in zip((a, b), layout.contracting, layout.batch, (1, -1)):
        rest = [axis for axis in range(x.ndim) if axis not in (*contracting, *batch)]
        groups = (list(batch), *[rest, list(contracting)][::order])
        flat = x.transpose([axis for group in groups for axis in group])
        sides.append(flat.reshape([math.prod(x.shape[axis] for axis in g) for g in groups]))
        free.append(rest)
    if not layout.batch[0]:
        sides = [x[0] for x in sides]
    last, batched = sides[0].ndim - 1, tuple(range(sides[0].ndim - 2))
    numbers = (((last,), (last - 1,)), (batched, batched))
    lhs, rhs = sides
    product = jax.lax.dot_general(lhs, rhs, numbers, preferred_element_type=accumulate)
    axes = [(a, 0, axis) for axis in (*layout.batch[0], *free[0])]
    axes += [(b, 1, axis) for axis in free[1]]
    product = product.reshape([x.shape[axis] for x, _, axis in axes])
    order = [layout.out_axes[side][axis] for _, side, axis in axes]
    return product.transpose(np.argsort(np.array(order)))


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

    def bind_codes(a, b):
        if row_params is not None:
            return row_convolution.row_convolution(a, b, row_params, accumulate)
        if layout.kind == "einsum":
            a, b = _of_equal_sizes(a, b, layout)
        if layout.kind != "conv_general_dilated" and a.dtype == jnp.bfloat16:
            return _as_matrices(a, b, layout, accumulate)
        return bind(a, b, accumulate)

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


def _encoded_values(encoded: Codes, operand: Quantized | QTensor) -> jax.Array:
    """What codes stand for, in the operand's dtype."""
    if isinstance(operand, QTensor):
        return operand.dequantize()
    codes = encoded.codes.astype(np.float32)
    size, axis = operand.how.granularity.block_size, operand.how.granularity.block_axis

    def spread(part):
        if size is None or axis is None:
            return part
        return jax.lax.slice_in_dim(jnp.repeat(part, size, axis), 0, codes.shape[axis], axis=axis)

    scale = encoded.scale
    if scale.zero_point is not None:
        codes = codes - spread(scale.zero_point)
    return (codes * spread(scale.block)).astype(operand.x.dtype)


def native_forward(
    bind: Bind, layout: Layout, carriers: Sequence[Carrier], dtype: np.dtype, operands, told: bool
) -> Forward:
    """The product of two operands on codes held in `carriers`, as `dtype`.

    `told` says whether its derivative is wanted: without, `inside` is not computed.
    """

    def encode(operand, carrier: Carrier, out_axes) -> Codes:
        if isinstance(operand, QTensor):
            return _encode_stored(operand, carrier)
        summed = tuple(axis for axis, out in enumerate(out_axes) if out is None)
        return _encode(operand, carrier, summed, told)

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
    left, right = map(_encoded_values, encoded, operands)
    inside = encoded[0].inside, encoded[1].inside
    return Forward(result.astype(dtype), (left, right), inside)
