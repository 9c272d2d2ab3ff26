"""Products of quantized operands: emulated in floating point, or native on codes.

Both run the same product (`bind`, of lax or of a traced equation) and have the same gradients:
those of a product of the operands' quantized values (straight-through).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.explicit_axes import sharded_as
from aqt_search.numerics.fake_quant import quantize_dequantize, straight_through
from aqt_search.numerics.formats import NumericFormat
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantized import Quantized, carrier_dtype
from aqt_search.products import depthwise
from aqt_search.products.carriers import Carrier, carriers_of, check_execution, fastest
from aqt_search.products.layout import Layout
from aqt_search.products.measured_facts import work_of
from aqt_search.products.native import Bind, Forward, block_place, native_forward, refusal
from aqt_search.products.operands import OperandValue, abstract, dtype_of, values_of

# Quantizers of the gradient in the products that give the gradients of lhs and of rhs: `Quantized`
# without a tensor; None leaves it in floating point.
Gradients = tuple[Quantized | None, Quantized | None]


def _through(operand: OperandValue, value: jax.Array, inside: jax.Array | None) -> jax.Array:
    """The operand's value, with the derivative of its quantization."""
    if isinstance(operand, Quantized):
        return straight_through(operand, value, inside)
    return value if isinstance(operand, QTensor) else operand


def _back_through(operand: Quantized, value, inside, gradient: jax.Array) -> Quantized:
    """The gradient of a quantized operand, and of its bounds, from that of its value."""

    def through(x, bounds):
        return _through(dataclasses.replace(operand, x=x, bounds=bounds), value, inside)

    _, pull = jax.vjp(through, operand.x, operand.bounds)
    x, bounds = pull(gradient)
    none: Any = None  # no gradient
    return dataclasses.replace(
        operand, x=x, grids=none, row=none, bounds=bounds, key=none, active=none
    )


def _stopped(operand: OperandValue) -> OperandValue:
    if isinstance(operand, Quantized):
        x, bounds = jax.lax.stop_gradient((operand.x, operand.bounds))
        return dataclasses.replace(operand, x=x, bounds=bounds)
    return operand


def _with_forward_derivative(forward: Callable, bind: Bind) -> Callable:
    """A product of two operands with the derivatives of `bind` on their quantized values."""
    differentiated = _differentiated(forward, bind)

    @jax.custom_jvp
    def run(lhs, rhs):
        return forward((lhs, rhs), told=False).result

    def rule(primals, tangents):
        leaves, tree = jax.tree.flatten(primals)
        slopes = jax.tree.leaves(tangents)
        moved = [
            n
            for n, slope in enumerate(slopes)
            if not isinstance(slope, jax.custom_derivatives.SymbolicZero)
        ]

        def of_moved(*values):
            own = dict(zip(moved, values))
            operands = [own.get(n, leaf) for n, leaf in enumerate(leaves)]
            return differentiated(*jax.tree.unflatten(tree, operands))

        return jax.jvp(of_moved, [leaves[n] for n in moved], [slopes[n] for n in moved])

    run.defjvp(rule, symbolic_zeros=True)
    return run


def _differentiated(forward: Callable, bind: Bind) -> Callable:
    """The product together with what its derivative needs."""

    @jax.custom_jvp
    def differentiable(result, lhs, rhs):
        return result

    def rule(primals, tangents):
        result, lhs, rhs = primals
        _, of_lhs, of_rhs = tangents
        terms = [
            bind(a, b, None).astype(result.dtype)
            for a, b, tangent in ((of_lhs, rhs, of_lhs), (lhs, of_rhs, of_rhs))
            if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        ]
        slope = sum(terms[1:], terms[0]) if terms else jnp.zeros_like(result)
        return differentiable(*primals), slope

    differentiable.defjvp(rule, symbolic_zeros=True)

    def run(lhs, rhs):
        found = forward((_stopped(lhs), _stopped(rhs)), told=True)
        values = (
            _through(operand, value, inside)
            for operand, value, inside in zip((lhs, rhs), found.values, found.inside)
        )
        return differentiable(found.result, *values)

    return run


def _with_quantized_gradients(forward: Callable, bind: Bind) -> Callable:
    """The same with the gradient quantized in either gradient product; reverse mode only."""

    @jax.custom_vjp
    def run(lhs, rhs, gradients):
        return forward((lhs, rhs), told=False).result

    def run_forward(lhs, rhs, gradients):
        found = forward((lhs, rhs), told=True)
        return found.result, (found.values, found.inside, (lhs, rhs), gradients)

    def run_backward(saved, gradient):
        values, inside, operands, gradients = saved
        found = []
        for side, (operand, how) in enumerate(zip(operands, gradients)):
            if isinstance(operand, QTensor):
                found.append(None)
                continue
            incoming = gradient if how is None else values_of(dataclasses.replace(how, x=gradient))

            def of_side(x, side=side):
                lhs, rhs = (x if s == side else v for s, v in enumerate(values))
                return bind(lhs, rhs, None)

            (back,) = jax.linear_transpose(of_side, values[side])(incoming)
            if isinstance(operand, Quantized):
                back = _back_through(operand, values[side], inside[side], back)
            found.append(back)
        return (*found, None)

    run.defvjp(run_forward, run_backward)
    return run


def _value_and_inside(
    operand: OperandValue, dtype: np.dtype, told: bool
) -> tuple[jax.Array, jax.Array | None]:
    if isinstance(operand, Quantized):
        return quantize_dequantize(operand, dtype, told)
    value = operand.dequantize(dtype) if isinstance(operand, QTensor) else operand.astype(dtype)
    return value, None


def _emulated_forward(
    bind: Bind, dtype: np.dtype, operands: tuple[OperandValue, OperandValue], told: bool
) -> Forward:
    """The product of values as they were before they were rounded to the operands' dtype.

    A step times a scale has more bits than bfloat16: rounded to it, values lie up to a quarter of a
    step off the grid. What is kept for gradients is in the operands' dtype.
    """
    wide = [carrier_dtype(dtype_of(operand)) for operand in operands]
    found = [_value_and_inside(operand, w, told) for operand, w in zip(operands, wide)]
    (lhs, lhs_inside), (rhs, rhs_inside) = found
    values = lhs.astype(dtype_of(operands[0])), rhs.astype(dtype_of(operands[1]))
    accumulate = np.float32 if _is_narrow(operands) else None
    result = bind(lhs, rhs, accumulate).astype(dtype)
    return Forward(result, values, (lhs_inside, rhs_inside))


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


def product(
    bind: Bind,
    layout: Layout,
    operands: tuple[OperandValue, OperandValue],
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
    known = [fmt for fmt in formats if fmt is not None]  # both, where neither was refused
    carriers = None
    if execution != "emulated":
        carriers = carriers_of(execution, known, alike=layout.kind == "conv_general_dilated")
    if not known and gradients == (None, None):
        lhs, rhs = map(values_of, operands)
        return bind(lhs, rhs, None)  # the one of lax
    # `jax.eval_shape` tells no sharding where only some axes of the mesh are explicit.
    plain = jax.make_jaxpr(lambda a, b: bind(a, b, None))(*map(abstract, operands))
    (result,) = plain.out_avals
    run = functools.partial(_run, bind, layout, carriers, result.dtype)
    return sharded_as(run, result.sharding)(operands, gradients)


def _run(
    bind: Bind, layout: Layout, carriers: Sequence[Carrier] | None, dtype: np.dtype,
    operands: tuple[OperandValue, OperandValue], gradients: Gradients,
) -> jax.Array:  # fmt: skip
    """The product on codes in `carriers`, or in floating point without."""
    quantized_gradients = gradients != (None, None)
    of_values = _of_values(bind, layout, operands, gradients)
    if carriers is not None:
        forward = functools.partial(native_forward, bind, layout, carriers, dtype)
    elif quantized_gradients or _is_narrow(operands):
        forward = functools.partial(_emulated_forward, of_values, dtype)
    else:
        lhs, rhs = map(values_of, operands)
        return of_values(lhs, rhs, None)
    if quantized_gradients:
        return _with_quantized_gradients(forward, of_values)(*operands, gradients)
    return _with_forward_derivative(forward, of_values)(*operands)
