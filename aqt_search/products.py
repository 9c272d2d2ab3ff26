"""Products of quantized operands: emulated in floating point, or native on codes.

Both run the same product (`bind`, of lax or of a traced equation) and have the same gradients:
those of a product of the operands' quantized values (straight-through).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search import row_convolution
from aqt_search.calibration import Bounds, is_asymmetric
from aqt_search.carriers import (
    Carrier,
    Work,
    accumulator,
    carriers_of,
    check_execution,
    does_not_fit,
    encode_carrier,
    fastest,
)
from aqt_search.fake_quant import (
    codes_of_operand,
    fake_quant_packed,
    quantize_dequantize,
    straight_through,
    unpack_grid,
)
from aqt_search.formats import NumericFormat
from aqt_search.granularity import Granularity, join_blocks
from aqt_search.outline import outline, where
from aqt_search.qtensor import QTensor
from aqt_search.quantizer import Recipe

# bind(lhs, rhs, preferred_element_type); None leaves the result's dtype as it would be.
Bind = Callable[[jax.Array, jax.Array, Any], jax.Array]


class Layout(NamedTuple):
    """How the axes of a product's operands reach its result."""

    kind: str  # "dot_general", "einsum" or "conv_general_dilated"
    contracting: tuple[tuple[int, ...], tuple[int, ...]]  # axes of lhs and rhs summed over
    out_axes: tuple[tuple[int | None, ...], tuple[int | None, ...]]  # of each axis; None: summed
    out_ndim: int
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # axes of lhs and rhs in common
    groups: int = 1
    refused: str | None = None  # why it has no form on codes
    parameters: Mapping[str, Any] | None = None  # of a convolution's primitive, where known

    def gradient_contracting(self, side: int) -> tuple[int, ...]:
        """The result's axes that the product for the gradient of `side` sums over."""
        own = self.out_axes[side]
        return tuple(axis for axis in range(self.out_ndim) if axis not in own)


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


def dot_layout(lhs_ndim: int, rhs_ndim: int, dimension_numbers: Any) -> Layout:
    """The layout of `lax.dot_general`: batch axes, then free axes of lhs, then of rhs."""
    contracting, batch = (tuple(tuple(axes) for axes in pair) for pair in dimension_numbers)
    position = len(batch[0])
    out_axes = []
    for ndim, contracted, batched in zip((lhs_ndim, rhs_ndim), contracting, batch):
        axes: list[int | None] = [None] * ndim
        for out, axis in enumerate(batched):
            axes[axis] = out
        for axis in range(ndim):
            if axis not in contracted and axis not in batched:
                axes[axis], position = position, position + 1
        out_axes.append(tuple(axes))
    return Layout("dot_general", contracting, tuple(out_axes), position, batch)


def conv_layout(
    dimension_numbers: Any, groups: int, batch_groups: int, parameters: Mapping | None = None
) -> Layout:
    """The layout of a convolution from its `lax.ConvDimensionNumbers`."""
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    ndim = len(out_spec)
    lhs, rhs = [None] * ndim, [None] * ndim
    if batch_groups == 1:
        lhs[lhs_spec[0]] = out_spec[0]
    rhs[rhs_spec[0]] = out_spec[1]
    # Kernel axes: spatial first, input features last, which is where blocks run.
    contracting = (*lhs_spec[2:], lhs_spec[1]), (*rhs_spec[2:], rhs_spec[1])
    if batch_groups > 1:
        contracting = ((lhs_spec[0], *contracting[0]), contracting[1])
    return Layout(
        "conv_general_dilated", contracting, (tuple(lhs), tuple(rhs)), ndim,
        groups=max(groups, batch_groups), parameters=parameters,
    )  # fmt: skip


def einsum_layout(lhs: str, rhs: str, output: str) -> Layout:
    """The layout of `jnp.einsum` with one letter for every axis."""
    contracted = [label for label in lhs if label in rhs and label not in output]
    batched = [label for label in lhs if label in rhs and label in output]
    refused = None
    if any(labels.count(label) > 1 for labels in (lhs, rhs, output) for label in labels):
        refused = "a label stands twice in one operand"
    elif any(label not in output and label not in contracted for label in lhs + rhs):
        refused = "a label is summed over in one operand alone"
    return Layout(
        "einsum",
        tuple(
            (
                *(a for a, label in enumerate(labels) if label not in output + other),
                *map(labels.index, contracted),
            )
            for labels, other in ((lhs, rhs), (rhs, lhs))
        ),
        tuple(
            tuple(output.index(label) if label in output else None for label in labels)
            for labels in (lhs, rhs)
        ),
        len(output),
        tuple(tuple(labels.index(label) for label in batched) for labels in (lhs, rhs)),
        refused=refused,
    )


# --- Codes of an operand --------------------------------------------------------------------------


class _Encoded(NamedTuple):
    codes: jax.Array  # the carrier's dtype, the operand's shape
    scale: jax.Array  # float, as `granularity.scale_shape`
    zero: jax.Array | None  # what stands for 0, after the carrier's shift
    inside: jax.Array | None  # where the gradient passes; None: everywhere


@functools.partial(outline, static_argnums=(5, 6))
def _encode(x, grids, row, bounds, key, how: Recipe, carrier: Carrier) -> _Encoded:
    grid = unpack_grid(grids, row)
    found = codes_of_operand(x, grid, bounds, key, how)
    axis = how.granularity.block_axis

    def joined(part):
        return part if axis is None else jnp.squeeze(part, axis + 1)

    scale, zero = found.scale.value(), found.scale.zero_point
    if found.inside is not None:
        # Codes of NaN do not survive in integers, so their scale tells of them.
        bad = jnp.any(jnp.isnan(found.codes), how.over(x.ndim).axes, keepdims=True)
        scale = where(bad, jnp.nan, scale)
    scale = where(does_not_fit(carrier, grid), jnp.nan, scale)
    if carrier.shift:
        zero = jnp.full_like(scale, -carrier.shift) if zero is None else zero - carrier.shift
    codes = join_blocks(encode_carrier(found.codes, carrier), how.granularity, x.shape)
    inside = found.inside
    if inside is not None:
        inside = join_blocks(inside, how.granularity, x.shape)
    return _Encoded(codes, joined(scale), None if zero is None else joined(zero), inside)


def _encode_stored(q: QTensor, carrier: Carrier) -> _Encoded:
    dtype = np.dtype(np.float32)
    codes = q.codes(np.int16 if carrier.shift else carrier.dtype)
    if carrier.shift:
        codes = (codes - np.int16(carrier.shift)).astype(np.int8)
    scale = q.scales(dtype)
    if scale is None:
        scale = jnp.ones((1,) * q.ndim, dtype)
    zero = q.zero_point
    if carrier.shift:
        zero = jnp.full_like(scale, -carrier.shift) if zero is None else zero - carrier.shift
    return _Encoded(codes, scale, zero, None)


def _granularity(operand: Operand) -> Granularity:
    return operand.granularity if isinstance(operand, QTensor) else operand.how.granularity


def _dtype(operand: Operand) -> np.dtype:
    return operand.x.dtype if isinstance(operand, Quantized) else operand.dtype


def _values(operand: Operand) -> jax.Array:
    """The operand as the emulated product takes it."""
    if isinstance(operand, QTensor):
        return operand.dequantize()
    if isinstance(operand, Quantized):
        o = operand
        return fake_quant_packed(o.x, o.grids, o.row, o.bounds, o.key, o.how)
    return operand


# --- Native products ------------------------------------------------------------------------------


def _to_result(part: jax.Array, out_axes: tuple[int | None, ...], out_ndim: int) -> jax.Array:
    """Scales of an operand in the shape that broadcasts against the product's result."""
    axes = range(part.ndim)
    kept = sorted((a for a in axes if out_axes[a] is not None), key=lambda a: out_axes[a])
    shape = [1] * out_ndim
    for axis in kept:
        shape[out_axes[axis]] = part.shape[axis]
    return part.transpose(*kept, *(a for a in axes if out_axes[a] is None)).reshape(shape)


def _has_zero_point(operand: Operand) -> bool:
    if isinstance(operand, QTensor):
        return operand.zero_point is not None
    return is_asymmetric(operand.how.calibration)


def refusal(layout: Layout, operands: tuple[Operand, Operand]) -> str | None:
    """Why a product cannot run on codes; None if it can."""
    if layout.refused:
        return layout.refused
    for operand, out_axes, side in zip(operands, layout.out_axes, ("left", "right")):
        if not isinstance(operand, (Quantized, QTensor)):
            return f"the {side} operand is not quantized"
        if _dtype(operand) == np.float64:
            return f"the {side} operand is float64"
        granularity = _granularity(operand)
        axis = granularity.block_axis
        if axis is not None and layout.kind != "dot_general":
            return "blocks have such a form in dot_general only"
        if any(out_axes[a] is None and a != axis for a in granularity.channel_axes):
            return f"the {side} operand has a scale along an axis that the product sums over"
    if layout.kind == "conv_general_dilated" and _has_zero_point(operands[1]):
        return "the kernel of a convolution has a zero point"
    return _block_refusal(layout, operands)


def _block_refusal(layout: Layout, operands: tuple[Operand, Operand]) -> str | None:
    places = []
    for operand, contracting in zip(operands, layout.contracting):
        _, size, axis = _granularity(operand)
        if axis is not None:
            if axis not in contracting:
                return "blocks run along an axis that the product does not sum over"
            places.append((size, contracting.index(axis)))
    if len(set(places)) > 1:
        return "the operands have different blocks"
    if places and any(_has_zero_point(o) for o in operands):
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


def _without_zero_points(product, bind_codes, layout: Layout, lhs: _Encoded, rhs: _Encoded):
    """sum (l - zl)(r - zr) = sum l r - zl sum r - zr sum l + zl zr sum 1; padding counts as 0."""

    def term(zero, side):
        return _to_result(zero, layout.out_axes[side], layout.out_ndim).astype(product.dtype)

    ones = [_ones_in_place_of(o.codes, layout, side) for side, o in enumerate((lhs, rhs))]
    if lhs.zero is not None:
        product = product - term(lhs.zero, 0) * bind_codes(ones[0], rhs.codes)
    if rhs.zero is not None:
        product = product - term(rhs.zero, 1) * bind_codes(lhs.codes, ones[1])
    if lhs.zero is not None and rhs.zero is not None:
        product = product + term(lhs.zero, 0) * term(rhs.zero, 1) * bind_codes(*ones)
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
    product = jax.lax.dot_general(*sides, numbers, preferred_element_type=accumulate)
    axes = [(a, 0, axis) for axis in (*layout.batch[0], *free[0])]
    axes += [(b, 1, axis) for axis in free[1]]
    product = product.reshape([x.shape[axis] for x, _, axis in axes])
    order = [layout.out_axes[side][axis] for _, side, axis in axes]
    return product.transpose(np.argsort(order))


def _native(bind: Bind, layout: Layout, lhs: _Encoded, rhs: _Encoded, accumulate) -> jax.Array:
    """The product of codes times the scales, in float32."""

    in_rows = (
        layout.parameters is not None
        and accumulate == np.int32
        and jax.default_backend() == "cpu"
        and row_convolution.applies(layout.parameters)
    )

    def bind_codes(a, b):
        if in_rows:
            return row_convolution.row_convolution(a, b, layout.parameters, accumulate)
        if layout.kind != "conv_general_dilated" and a.dtype == jnp.bfloat16:
            return _as_matrices(a, b, layout, accumulate)
        return bind(a, b, accumulate)

    product = bind_codes(lhs.codes, rhs.codes)
    if lhs.zero is not None or rhs.zero is not None:
        product = _without_zero_points(product, bind_codes, layout, lhs, rhs)
    # The smaller scale first, so that only results beyond float32 overflow.
    scales = [
        _to_result(operand.scale, layout.out_axes[side], layout.out_ndim)
        for side, operand in enumerate((lhs, rhs))
    ]
    product = product.astype(np.float32) * jnp.minimum(*scales)
    return product * jnp.maximum(*scales)


def _native_blocks(layout: Layout, lhs, rhs, place: int, size: int, accumulate) -> jax.Array:
    """The product of codes in blocks along the contracting axes at `place`: a batch axis more."""
    contracting, batch = layout.contracting, layout.batch
    split, new_contracting, new_batch = [], [], []
    for side, operand in enumerate((lhs, rhs)):
        axis = contracting[side][place]
        codes = jnp.moveaxis(operand.codes, axis, -1)
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % size)])
        codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // size, size)
        scale, zero = (
            None if part is None else jnp.moveaxis(part, axis, -1)[..., None]
            for part in (operand.scale, operand.zero)
        )
        split.append(_Encoded(codes, scale, zero, None))

        def moved(a, axis=axis):
            return a - (a > axis)

        ndim = operand.codes.ndim
        rest = [a for n, a in enumerate(contracting[side]) if n != place]
        new_contracting.append((*map(moved, rest), ndim))
        new_batch.append((*map(moved, batch[side]), ndim - 1))
    dimensions = tuple(new_contracting), tuple(new_batch)

    def bind(a, b, accumulate):
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulate)

    blocks = dot_layout(*(side.codes.ndim for side in split), dimensions)
    return jnp.sum(_native(bind, blocks, *split, accumulate), len(batch[0]))


def _block_place(layout: Layout, operands) -> tuple[int, int] | None:
    """Which contracting axes have blocks, and of what size."""
    for operand, contracting in zip(operands, layout.contracting):
        _, size, axis = _granularity(operand)
        if axis is not None:
            return contracting.index(axis), size
    return None


# --- Both ways, with gradients --------------------------------------------------------------------

# Quantizers of the gradient in the products that give the gradients of lhs and of rhs: `Quantized`
# without a tensor; None leaves it in floating point.
Gradients = tuple[Quantized | None, Quantized | None]


class _Forward(NamedTuple):
    result: jax.Array
    values: tuple[jax.Array, jax.Array]  # of the operands, for the gradient
    inside: tuple[jax.Array | None, jax.Array | None]


def _encoded_values(encoded: _Encoded, operand: Operand) -> jax.Array:
    """What codes stand for, in the operand's dtype."""
    if isinstance(operand, QTensor):
        return operand.dequantize()
    codes = encoded.codes.astype(np.float32)
    _, size, axis = operand.how.granularity

    def spread(part):
        if axis is None:
            return part
        return jax.lax.slice_in_dim(jnp.repeat(part, size, axis), 0, codes.shape[axis], axis=axis)

    if encoded.zero is not None:
        codes = codes - spread(encoded.zero)
    return (codes * spread(encoded.scale)).astype(operand.x.dtype)


def _native_forward(bind, layout, carriers, dtype, operands) -> _Forward:
    encoded = tuple(
        _encode_stored(o, carrier)
        if isinstance(o, QTensor)
        else _encode(o.x, o.grids, o.row, o.bounds, o.key, o.how, carrier)
        for o, carrier in zip(operands, carriers)
    )
    accumulate = accumulator(carriers[0])
    place = _block_place(layout, operands)
    if place is None:
        result = _native(bind, layout, *encoded, accumulate)
    else:
        result = _native_blocks(layout, *encoded, *place, accumulate)
    values = tuple(map(_encoded_values, encoded, operands))
    return _Forward(result.astype(dtype), values, tuple(e.inside for e in encoded))


def _masked(tangent: jax.Array, inside: jax.Array | None) -> jax.Array:
    return tangent if inside is None else where(inside, tangent, jnp.zeros_like(tangent))


def _x(operand: Operand) -> jax.Array | None:
    """What a gradient is with respect to; also serves tangents of operands."""
    return None if isinstance(operand, QTensor) else getattr(operand, "x", operand)


def _stopped(operand: Operand) -> Operand:
    if isinstance(operand, Quantized):
        return dataclasses.replace(operand, x=jax.lax.stop_gradient(operand.x))
    return operand


def _with_forward_derivative(forward: Callable, bind: Bind) -> Callable:
    """A product of two operands with the derivatives of `bind` on their quantized values."""

    @jax.custom_jvp
    def differentiable(result, lhs, rhs):
        return result

    def rule(primals, tangents):
        result, *values = primals
        terms = []
        for side, tangent in enumerate(tangents[1:]):
            if not isinstance(tangent, jax.custom_derivatives.SymbolicZero):
                pair = list(values)
                pair[side] = tangent
                terms.append(bind(*pair, None).astype(result.dtype))
        slope = sum(terms[1:], terms[0]) if terms else jnp.zeros_like(result)
        return differentiable(*primals), slope

    differentiable.defjvp(rule, symbolic_zeros=True)

    def run(lhs, rhs):
        found = forward((_stopped(lhs), _stopped(rhs)))
        values = (
            value if isinstance(operand, QTensor) else straight_through(_x(operand), value, inside)
            for operand, value, inside in zip((lhs, rhs), found.values, found.inside)
        )
        return differentiable(found.result, *values)

    return run


def _with_quantized_gradients(forward: Callable, bind: Bind) -> Callable:
    """The same with the gradient quantized in either gradient product; reverse mode only."""

    @jax.custom_vjp
    def run(lhs, rhs, gradients):
        return forward((lhs, rhs)).result

    def run_forward(lhs, rhs, gradients):
        found = forward((lhs, rhs))
        return found.result, (found.values, found.inside, (lhs, rhs), gradients)

    def run_backward(saved, gradient):
        values, inside, operands, gradients = saved
        found = []
        for side, (operand, how) in enumerate(zip(operands, gradients)):
            if isinstance(operand, QTensor):
                found.append(None)
                continue
            incoming = gradient if how is None else _values(dataclasses.replace(how, x=gradient))

            def of_side(x, side=side):
                return bind(*(x if s == side else v for s, v in enumerate(values)), None)

            (back,) = jax.linear_transpose(of_side, values[side])(incoming)
            back = _masked(back, inside[side])
            if isinstance(operand, Quantized):
                back = Quantized(back, None, None, None, None, operand.how)
            found.append(back)
        return (*found, None)

    run.defvjp(run_forward, run_backward)
    return run


def _emulated_forward(bind: Bind, operands: tuple[Operand, Operand]) -> _Forward:
    values, inside = [], []
    for operand in operands:
        if isinstance(operand, Quantized):
            o = operand
            value, mask = quantize_dequantize(o.x, o.grids, o.row, o.bounds, o.key, o.how)
        else:
            value, mask = _values(operand), None
        values.append(value)
        inside.append(mask)
    return _Forward(bind(*values, None), tuple(values), tuple(inside))


def _choose(layout: Layout, operands, execution: str, formats) -> str:
    """The execution, with "auto" decided."""
    check_execution(execution)
    if execution == "emulated":
        return execution
    reason = refusal(layout, operands)
    if execution == "auto":
        # Blocks make a product for each: never faster than one.
        if reason or _block_place(layout, operands) is not None:
            return "emulated"
        return fastest(_work(layout, operands), formats)
    if reason:
        raise ValueError(
            f"Execution {execution!r} runs products on codes, but {reason}. Use 'emulated', or"
            " 'auto', which falls back to it."
        )
    return execution


def product(
    bind: Bind,
    layout: Layout,
    operands: tuple[Operand, Operand],
    formats: tuple[NumericFormat | None, NumericFormat | None],
    execution: str,
    gradients: Gradients = (None, None),
) -> jax.Array:
    """The product of two operands, on codes or on quantized values as `execution` says.

    Args:
      bind: the product in lax.
      layout: of its axes.
      operands: lhs and rhs.
      formats: of both; None for an array.
      execution: one of `carriers.EXECUTIONS`.
      gradients: how the gradient is quantized in the two gradient products.

    Raises:
      FormatError: no carrier, or not the one asked for, holds the formats.
      ValueError: unknown execution, or one that this product has no form for.
    """
    execution = _choose(layout, operands, execution, formats)
    quantized_gradients = gradients != (None, None)
    if execution == "emulated":
        if not quantized_gradients:
            return bind(*map(_values, operands), None)
        forward = functools.partial(_emulated_forward, bind)
    else:
        dtype = jax.eval_shape(lambda a, b: bind(a, b, None), *map(_abstract, operands)).dtype
        carriers = carriers_of(execution, formats, alike=layout.kind == "conv_general_dilated")
        forward = functools.partial(_native_forward, bind, layout, carriers, dtype)
    if quantized_gradients:
        return _with_quantized_gradients(forward, bind)(*operands, gradients)
    return _with_forward_derivative(forward, bind)(*operands)


def _abstract(operand: Operand) -> jax.ShapeDtypeStruct:
    x = operand.x if isinstance(operand, Quantized) else operand
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _work(layout: Layout, operands: tuple[Operand, Operand]) -> Work:
    lhs, rhs = (_abstract(o).shape for o in operands)
    terms = int(np.prod([rhs[axis] for axis in layout.contracting[1]]))
    rows = int(np.prod(lhs)) // max(1, int(np.prod([lhs[a] for a in layout.contracting[0]])))
    columns = int(np.prod(rhs)) // max(1, terms)
    return Work(
        layout.kind,
        rows,
        terms,
        columns,
        layout.groups,
        rhs[layout.contracting[1][-1]] if layout.contracting[1] else 1,
    )
