"""Native products: codes are multiplied in a low-precision dtype, and the result is scaled."""

from __future__ import annotations

import functools
import math
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
from aqt_search.products.carriers import Carrier, accumulator, does_not_fit, encode_carrier
from aqt_search.products.layout import Layout, dot_layout
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


@functools.partial(outline, static_argnums=(1,))
def _encode(q: Quantized, carrier: Carrier) -> Codes:
    """A tensor's codes in a carrier; the zero point is what stands for 0 after its shift."""
    grid, how = q.grid(), q.how
    found = codes_of_tensor(q, grid)
    axis = how.granularity.block_axis

    def joined(part):
        return part if part is None or axis is None else jnp.squeeze(part, axis + 1)

    scale, zero = found.scale.value(), found.scale.zero_point
    if found.inside is not None:
        # Codes of NaN do not survive in integers, so their scale tells of them.
        bad = jnp.any(jnp.isnan(found.codes), how.over(q.x.ndim).axes, keepdims=True)
        scale = where(bad, jnp.nan, scale)
    scale = where(does_not_fit(carrier, grid), jnp.nan, scale)
    if carrier.shift:
        zero = jnp.full_like(scale, -carrier.shift) if zero is None else zero - carrier.shift
    codes = join_blocks(encode_carrier(found.codes, carrier), how.granularity, q.x.shape)
    inside = found.inside
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
        _, size, axis = granularity_of(operand)
        if axis is not None:
            if axis not in contracting:
                return "blocks run along an axis that the product does not sum over"
            places.append((size, contracting.index(axis)))
    if len(set(places)) > 1:
        return "the operands have different blocks"
    if places and any(has_zero_point(o) for o in operands):
        return "one operand has blocks and one a zero point"
    return None


def _ones_in_place_of(codes: jax.Array, layout: Layout, side: int) -> jax.Array:
    """Ones that an operand's zero point is multiplied by, one index for every free axis."""
    if side == 1 and layout.groups > 1:  # every group has features of its own
        return jnp.ones_like(codes)
    shape = [
        1 if out is not None and axis not in layout.batch[side] else n
        for axis, (n, out) in enumerate(zip(codes.shape, layout.out_axes[side]))
    ]
    return jnp.ones(shape, codes.dtype)


def _without_zero_points(product, bind_codes, layout: Layout, lhs: Codes, rhs: Codes):
    """sum (l - zl)(r - zr) = sum l r - zl sum r - zr sum l + zl zr sum 1; padding counts as 0."""

    def term(zero, side):
        return _to_result(zero, layout.out_axes[side], layout.out_ndim).astype(product.dtype)

    ones = [_ones_in_place_of(o.codes, layout, side) for side, o in enumerate((lhs, rhs))]
    left, right = lhs.scale.zero_point, rhs.scale.zero_point
    if left is not None:
        product = product - term(left, 0) * bind_codes(ones[0], rhs.codes)
    if right is not None:
        product = product - term(right, 1) * bind_codes(lhs.codes, ones[1])
    if left is not None and right is not None:
        product = product + term(left, 0) * term(right, 1) * bind_codes(*ones)
    return product


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


def _row_parameters(layout: Layout, accumulate: np.dtype) -> Mapping[str, Any] | None:
    """The parameters of a convolution that runs over rows; None for any other product."""
    params = layout.parameters
    if params is None or accumulate != np.int32 or jax.default_backend() != "cpu":
        return None
    return params if row_convolution.applies(params) else None


def _native(bind: Bind, layout: Layout, lhs: Codes, rhs: Codes, accumulate: np.dtype) -> jax.Array:
    """The product of codes times the scales, in float32."""
    row_params = _row_parameters(layout, accumulate)

    def bind_codes(a, b):
        if row_params is not None:
            return row_convolution.row_convolution(a, b, row_params, accumulate)
        if layout.kind != "conv_general_dilated" and a.dtype == jnp.bfloat16:
            return _as_matrices(a, b, layout, accumulate)
        return bind(a, b, accumulate)

    product = bind_codes(lhs.codes, rhs.codes)
    if any(operand.scale.zero_point is not None for operand in (lhs, rhs)):
        product = _without_zero_points(product, bind_codes, layout, lhs, rhs)
    # The smaller scale first, so that only results beyond float32 overflow.
    scales = [
        _to_result(operand.scale.block, layout.out_axes[side], layout.out_ndim)
        for side, operand in enumerate((lhs, rhs))
    ]
    product = product.astype(np.float32) * jnp.minimum(*scales)
    return product * jnp.maximum(*scales)


def _native_blocks(
    layout: Layout, lhs: Codes, rhs: Codes, place: int, size: int, accumulate: np.dtype
) -> jax.Array:
    """The product of codes in blocks along the contracting axes at `place`: a batch axis more."""
    contracting, batch = layout.contracting, layout.batch
    split, new_contracting, new_batch = [], [], []
    for side, operand in enumerate((lhs, rhs)):
        axis = contracting[side][place]
        codes = jnp.moveaxis(operand.codes, axis, -1)
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % size)])
        codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // size, size)
        scale = jax.tree.map(
            lambda part, a=axis: jnp.moveaxis(part, a, -1)[..., None], operand.scale
        )
        split.append(Codes(codes, scale, None))

        def moved(a, axis=axis):
            return a - (a > axis)

        ndim = operand.codes.ndim
        rest = [a for n, a in enumerate(contracting[side]) if n != place]
        new_contracting.append((*map(moved, rest), ndim))
        new_batch.append((*map(moved, batch[side]), ndim - 1))
    dimensions = tuple(new_contracting), tuple(new_batch)

    def bind(a, b, accumulate):
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulate)

    lhs, rhs = split
    blocks = dot_layout(lhs.codes.ndim, rhs.codes.ndim, dimensions)
    return jnp.sum(_native(bind, blocks, lhs, rhs, accumulate), len(batch[0]))


def block_place(layout: Layout, operands) -> tuple[int, int] | None:
    """Which contracting axes have blocks, and of what size."""
    for operand, contracting in zip(operands, layout.contracting):
        _, size, axis = granularity_of(operand)
        if size is not None and axis is not None:
            return contracting.index(axis), size
    return None


def _encoded_values(encoded: Codes, operand: Quantized | QTensor) -> jax.Array:
    """What codes stand for, in the operand's dtype."""
    if isinstance(operand, QTensor):
        return operand.dequantize()
    codes = encoded.codes.astype(np.float32)
    _, size, axis = operand.how.granularity

    def spread(part):
        if size is None or axis is None:
            return part
        return jax.lax.slice_in_dim(jnp.repeat(part, size, axis), 0, codes.shape[axis], axis=axis)

    scale = encoded.scale
    if scale.zero_point is not None:
        codes = codes - spread(scale.zero_point)
    return (codes * spread(scale.block)).astype(operand.x.dtype)


def native_forward(
    bind: Bind, layout: Layout, carriers: Sequence[Carrier], dtype: np.dtype, operands
) -> Forward:
    """The product of two operands on codes held in `carriers`, as `dtype`."""
    lhs, rhs = (
        (_encode_stored if isinstance(o, QTensor) else _encode)(o, carrier)
        for o, carrier in zip(operands, carriers)
    )
    accumulate = accumulator(carriers[0])
    place = block_place(layout, operands)
    if place is None:
        result = _native(bind, layout, lhs, rhs, accumulate)
    else:
        result = _native_blocks(layout, lhs, rhs, *place, accumulate)
    left, right = map(_encoded_values, (lhs, rhs), operands)
    return Forward(result.astype(dtype), (left, right), (lhs.inside, rhs.inside))
