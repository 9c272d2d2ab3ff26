"""The order in which the axes of stored weights lie, and products that read them as they lie.

A product of codes reads both operands along the axis that it sums over, so weights lie with that
axis last: [n, k] for x [m, k], which XLA multiplies faster than [k, n] (int8 on an H100 in 0.45
instead of 0.76 of bfloat16's time at 8192^3, in 0.88 of the other's on a CPU with jax 0.12). The
kernels of convolutions lie so on GPUs alone: XLA's CPU backend has fast ones for [*spatial, I, O].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from aqt_search.numerics.qtensor import QTensor
from aqt_search.products.derivatives import Bind
from aqt_search.products.layout import Layout
from aqt_search.products.matrices import product_of_matrices
from aqt_search.products.operands import OperandValue


def storage_order(layout: Layout, side: int) -> tuple[int, ...]:
    """The axes of an operand as its data should lie; () as they are."""
    out_axes, batch = layout.out_axes[side], layout.batch[side]
    axes = tuple(range(len(out_axes)))
    if layout.kind == "conv_general_dilated":
        turned = jax.default_backend() == "gpu"
    else:
        turned = layout.kind == "dot_general"
    if not turned:
        return ()
    free = tuple(axis for axis in axes if out_axes[axis] is not None and axis not in batch)
    order = (*batch, *free, *layout.contracting[side])
    return () if order == axes or len(order) < len(axes) else order


def in_stored_order(
    bind: Bind, layout: Layout, operands: tuple[OperandValue, OperandValue]
) -> tuple[Bind, Layout, tuple[OperandValue, OperandValue]]:
    """The same product of operands whose axes are those of their data: nothing is transposed."""
    lhs, rhs = operands
    orders = [o.order if isinstance(o, QTensor) else () for o in operands]
    if layout.numbers is None or not any(orders):
        return bind, layout, operands
    found = layout
    for side, order in enumerate(orders):
        found = _reordered(found, side, order) if order else found

    def bind_stored(a, b, accumulate):
        if found.kind == "dot_general":
            return product_of_matrices(a, b, found, accumulate, bind)
        return bind(a, b, accumulate, found.numbers)

    return bind_stored, found, (_as_stored(lhs), _as_stored(rhs))


def _reordered(layout: Layout, side: int, order: Sequence[int]) -> Layout:
    """The layout where axis a of one operand is axis order[a]."""

    def moved(axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(order[axis] for axis in axes)

    def of_side(pair, own):
        return (own, pair[1]) if side == 0 else (pair[0], own)

    out_axes: list[int | None] = [None] * len(order)
    for axis, out in enumerate(layout.out_axes[side]):
        out_axes[order[axis]] = out
    contracting = of_side(layout.contracting, moved(layout.contracting[side]))
    batch = of_side(layout.batch, moved(layout.batch[side]))
    numbers, parameters = (contracting, batch), layout.parameters
    if layout.kind == "conv_general_dilated":
        which = ("lhs_spec", "rhs_spec")[side]
        numbers = layout.numbers._replace(**{which: moved(getattr(layout.numbers, which))})
        parameters = parameters and {**parameters, "dimension_numbers": numbers}
    return layout._replace(
        contracting=contracting, batch=batch, numbers=numbers, parameters=parameters,
        out_axes=of_side(layout.out_axes, tuple(out_axes)),
    )  # fmt: skip


def _as_stored(operand: OperandValue) -> OperandValue:
    if not isinstance(operand, QTensor) or not operand.order:
        return operand
    lying = operand.transposed([int(axis) for axis in np.argsort(operand.order)])
    return dataclasses.replace(lying, order=())
