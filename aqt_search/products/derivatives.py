"""Derivatives of products of quantized operands: those of the product of their quantized values.

Residuals, what is kept for the backward pass, are these values; or the codes, from which the values
are computed again when a backward product reads them, so that no float operand outlives the forward
pass (a quarter of its bytes for int8). Codes have first derivatives in reverse mode alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.fake_quant import straight_through
from aqt_search.numerics.outline import outline
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantized import Codes, Quantized
from aqt_search.products.encoding import values_of_codes
from aqt_search.products.operands import OperandValue, abstract, values_of

RESIDUALS = ("values", "codes")

# Quantizers of the gradient in the products that give the gradients of lhs and of rhs: `Quantized`
# without a tensor; None leaves it in floating point.
Gradients = tuple[Quantized | None, Quantized | None]

# bind(lhs, rhs, preferred_element_type[, dimension_numbers]); None leaves the result's dtype, and
# the axes, as they would be.
Bind = Callable[..., jax.Array]


class Forward(NamedTuple):
    """A product with what its derivative needs."""

    result: jax.Array
    values: tuple[jax.Array, jax.Array]  # of the operands
    inside: tuple[jax.Array | None, jax.Array | None]
    codes: tuple[Codes | None, Codes | None] = (None, None)  # that the values are computed from


# forward(operands, told): without `told` nothing but the result is wanted.
ForwardFunction = Callable[..., Forward]


def check_residuals(residuals: str) -> None:
    """Raises ValueError for what cannot be kept."""
    if residuals not in RESIDUALS:
        raise ValueError(
            f"Unknown residuals {residuals!r}: expected one of {', '.join(RESIDUALS)}."
        )


def _through(operand: OperandValue, value: jax.Array, inside: jax.Array | None) -> jax.Array:
    """The operand's value, with the derivative of its quantization."""
    if isinstance(operand, Quantized):
        return straight_through(operand, value, inside)
    return value if isinstance(operand, QTensor) else operand


def _stopped(operand: OperandValue) -> OperandValue:
    if isinstance(operand, Quantized):
        x, bounds = jax.lax.stop_gradient((operand.x, operand.bounds))
        return dataclasses.replace(operand, x=x, bounds=bounds)
    return operand


# --- Values: forward and reverse mode, to every order ---------------------------------------------


def with_forward_derivative(forward: ForwardFunction, bind: Bind) -> Callable:
    """`run(lhs, rhs)`, the product with the derivatives of `bind` on the quantized values."""
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


def _differentiated(forward: ForwardFunction, bind: Bind) -> Callable:
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


# --- Reverse mode alone: quantized gradients, codes as residuals ----------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Residual:
    """What is kept of an operand for the backward pass."""

    codes: Codes | None  # or
    value: jax.Array | None
    inside: jax.Array | None
    operand: OperandValue  # a `Quantized` without its tensor, unless its bounds are learned
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    def values(self) -> jax.Array:
        """The operand's values."""
        if self.value is not None:
            return self.value
        if self.codes is not None:
            assert isinstance(self.operand, Quantized)
            return values_of_codes(self.codes, self.operand.how, self.dtype)
        return values_of(self.operand)


def _residual(
    operand: OperandValue, value: jax.Array, inside: jax.Array | None, codes: Codes | None
) -> _Residual:
    of = abstract(operand)
    if not isinstance(operand, Quantized):
        return _Residual(None, None, None, operand, of.shape, of.dtype)
    if operand.how.calibration.derivative is None:
        operand = _without(operand, x=None, bounds=operand.bounds)
    kept = value if codes is None else None
    return _Residual(codes, kept, inside, operand, of.shape, of.dtype)


def _without(operand: Quantized, x: Any, bounds: Any) -> Quantized:
    """A `Quantized` of nothing but these."""
    none: Any = None
    return dataclasses.replace(
        operand, x=x, grids=none, row=none, bounds=bounds, key=none, active=none
    )


def _back_through(residual: _Residual, gradient: jax.Array) -> Quantized:
    """The gradient of a quantized operand, and of its bounds, from that of its value."""
    operand: Any = residual.operand
    if operand.x is None:
        x = gradient
        if residual.inside is not None:
            x = jnp.where(residual.inside, gradient, jnp.zeros_like(gradient))
        return _without(operand, x, jax.tree.map(jnp.zeros_like, operand.bounds))
    value = residual.values()

    def through(x, bounds):
        moved = dataclasses.replace(operand, x=x, bounds=bounds)
        return straight_through(moved, value, residual.inside)

    _, pull = jax.vjp(through, operand.x, operand.bounds)
    return _without(operand, *pull(gradient))


@jax.custom_jvp
def _with_first_derivatives(gradient: jax.Array) -> jax.Array:
    return gradient


@_with_first_derivatives.defjvp
def _no_second_derivatives(primals, tangents):
    raise NotImplementedError(
        "A product that keeps codes for its backward pass has first derivatives only. Use"
        " residuals='values' for Hessians."
    )


def _values_after(residual: _Residual, gradient: jax.Array) -> jax.Array:
    """The values of a residual, once there is a gradient.

    They would else be computed in the forward pass, and kept. XLA's CPU backend takes barriers out
    before it fuses, so they are the result of a function there that takes the gradient, too.
    """
    if jax.default_backend() != "cpu":
        residual, _ = jax.lax.optimization_barrier((residual, gradient))
        return residual.values()
    return _outlined_values(residual, gradient)


@outline
def _outlined_values(residual: _Residual, after: jax.Array) -> jax.Array:
    residual, _ = jax.lax.optimization_barrier((residual, after))
    return residual.values()


def _gradient(
    side: int, bind: Bind, own: _Residual, other: _Residual, incoming: jax.Array
) -> jax.Array:
    """The gradient of an operand's value."""
    value = other.values() if other.codes is None else _values_after(other, incoming)

    def of_side(x):
        return bind(x, value, None) if side == 0 else bind(value, x, None)

    own_type = jax.ShapeDtypeStruct(own.shape, own.dtype)
    (gradient,) = jax.linear_transpose(of_side, own_type)(incoming)
    return gradient


def with_backward(
    forward: ForwardFunction, bind: Bind, in_codes: tuple[bool, bool] | None
) -> Callable:
    """`run(lhs, rhs, gradients)`: the product, with gradients by products of its own.

    Args:
      forward: the product.
      bind: that of values.
      in_codes: which operand is kept in codes, if the forward pass has them; None: values are.
    """

    @jax.custom_vjp
    def run(lhs, rhs, gradients):
        return forward((lhs, rhs), told=False).result

    def run_forward(lhs, rhs, gradients):
        found = forward((lhs, rhs), told=True)
        codes = [c if own else None for c, own in zip(found.codes, in_codes or (False, False))]
        kept = tuple(map(_residual, (lhs, rhs), found.values, found.inside, codes))
        return found.result, (kept, gradients)

    def run_backward(saved, incoming):
        kept, gradients = saved
        found = []
        for side, (residual, how) in enumerate(zip(kept, gradients)):
            if isinstance(residual.operand, QTensor):
                found.append(None)
                continue
            back = incoming if how is None else values_of(dataclasses.replace(how, x=incoming))
            gradient = _gradient(side, bind, residual, kept[1 - side], back)
            if isinstance(residual.operand, Quantized):
                gradient = _back_through(residual, gradient)
            if in_codes is not None:
                gradient = jax.tree.map(_with_first_derivatives, gradient)
            found.append(gradient)
        return (*found, None)

    run.defvjp(run_forward, run_backward)
    return run
