"""Sites under their plans: what training, evaluation and serving run in their place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.fake_quant import fake_quantized, with_gradient_rule
from aqt_search.numerics.formats import NumericFormat, is_traced, unsigned_twin
from aqt_search.numerics.mixed_stack import MixedStack
from aqt_search.numerics.qtensor import QTensor
from aqt_search.numerics.quantized import calibrated
from aqt_search.numerics.symbolic import certainly
from aqt_search.products.carriers import Carrier, Execution, holding
from aqt_search.products.operands import OperandValue
from aqt_search.products.product import product
from aqt_search.tracing.interpreter import EMPTY, MISSING, Held, Interpreter, Outcome, run_flow
from aqt_search.tracing.origins import array_type
from aqt_search.tracing.plans import (
    Plan,
    layer_number,
    numbers_of,
    quantized_by,
    site_layout,
)
from aqt_search.tracing.sites import GRADIENTS, SIDES, Key, Operand, SiteError
from aqt_search.tracing.trace import Trace

_SMALL_WEIGHT = 2**18  # elements of a weight that take less memory than two more kernels are worth


class Residuals(NamedTuple):
    """What sites keep for their backward products."""

    kind: str = "values"  # or "codes"
    options: tuple[NumericFormat, ...] = ()  # what traced formats are among

    def carrier(self, operand: Operand, plan: Plan | None) -> Carrier | None:
        """What holds an operand's codes between the passes; None where its values are kept."""
        if self.kind == "values" or plan is None:
            return None
        if operand.role == "weight" and certainly(lambda: math.prod(operand.shape) < _SMALL_WEIGHT):
            return None
        formats = [layer.quantizer.fmt for layer in plan.each]
        if any(map(is_traced, formats)):
            formats = [unsigned_twin(fmt) if plan.twin else fmt for fmt in self.options]
        return holding(formats) if formats else None


VALUES = Residuals()


def run_planned(
    trace: Trace, plans: Mapping[Key, Plan], held: Held = EMPTY, *, execution: Execution,
    update: bool, told: bool = False, residuals: Residuals = VALUES,
) -> Outcome:  # fmt: skip
    """Runs a trace under plans: its outputs, and the next states of calibrations.

    Args:
      trace, plans: the function.
      held: states of calibrations, and weights that are stored.
      execution: as in `transform.quantize`.
      update, told: as in `quantized.calibrated`.
      residuals: for the backward products.
    """
    sites = PlannedSites(
        trace, plans, execution=execution, update=update, told=told, residuals=residuals
    )
    # Only sites with formats change anything: the rest of the program runs as it is.
    return Interpreter(trace, sites.names, sites.at_site, run_flow).run(sites.with_numbers(held))


def _check_sites(execution: Execution, trace: Trace) -> None:
    named = [] if isinstance(execution, str) else list(execution)
    if named and not any(name in trace.sites for name in named):
        raise SiteError(
            "The execution is by site, and none of its sites is in this function:"
            f" {', '.join(map(repr, named[:3]))}. Measure it for this function."
        )


class PlannedSites:
    """Evaluates sites under plans."""

    def __init__(
        self, trace: Trace, plans: Mapping[Key, Plan], *, execution: Execution, update: bool,
        told: bool = False, residuals: Residuals = VALUES,
    ):  # fmt: skip
        self.names = {name for name, _ in plans}
        self._sites = trace.sites
        self._plans = plans
        self._execution = execution
        self._update = update
        self._told = told
        self._residuals = residuals
        _check_sites(execution, trace)
        # Outside of a program, one that serves every format is compiled for each operation.
        in_program = any(isinstance(x, jax.core.Tracer) for x in trace.inputs)
        self._quantized = quantized_by(trace, plans, built_in=in_program)
        self._numbers = numbers_of(trace, plans)

    def with_numbers(self, held: Held) -> Held:
        """With what the sites need to know of the iterations that they are in."""
        return dataclasses.replace(held, numbers=held.numbers | self._numbers)

    def at_site(self, name: str, eqn: jex_core.JaxprEqn, operands: Sequence, held: Held) -> Outcome:
        """The result of a site, and the next states of its calibrations."""
        with jax.named_scope(name):
            if self._sites[name].kind == "gather":
                return [self._lookup(name, eqn, operands, held)], {}
            return self._product(name, eqn, operands, held)

    def _product(self, name: str, eqn, operands: Sequence, held: Held) -> Outcome:
        values, states, formats = [], {}, []
        for side, x in zip(SIDES, operands):
            value, state = self.operand((name, side), x, held)
            values.append(value)
            states |= state
            mixed = isinstance(held.weights.get((name, side)), MixedStack)
            plan = self._plans.get((name, side))
            of_plan = None if plan is None else _known_format(plan)
            formats.append(value.fmt if mixed and isinstance(value, QTensor) else of_plan)

        def bind(lhs, rhs, accumulate, numbers=None):
            more = {} if accumulate is None else {"preferred_element_type": accumulate}
            more |= {} if numbers is None else {"dimension_numbers": numbers}
            return eqn.primitive.bind(lhs, rhs, *operands[2:], **(eqn.params | more))

        keys = ((name, field) for field in GRADIENTS)
        of_lhs, of_rhs = (
            self._quantized(k, None, held.numbers) if k in self._plans else None for k in keys
        )
        (lhs, rhs), (lhs_format, rhs_format) = values, formats
        site = self._sites[name]
        kept = [
            self._residuals.carrier(getattr(site, side), self._plans.get((name, side)))
            for side in SIDES
        ]
        result = product(
            bind, site_layout(eqn), (lhs, rhs), (lhs_format, rhs_format), self._execution_of(name),
            (of_lhs, of_rhs), self._residuals.kind, kept,
        )  # fmt: skip
        return [result], states

    def _execution_of(self, name: str) -> str:
        if isinstance(self._execution, str):
            return self._execution
        return self._execution.get(name, "auto")

    def operand(self, key: Key, x: jax.Array, held: Held) -> tuple[OperandValue, dict[Key, Any]]:
        """An operand as its site takes it, and the next state of its calibration, if it has one."""
        if key in held.weights:
            return _in_shape(self._stored(key, held), getattr(self._sites[key[0]], key[1])), {}
        if x is MISSING:
            raise SiteError(
                f"The function reads a parameter that was stored in codes only, at a site that the"
                f" frozen function has not: {key[0]} ({key[1]}). Freeze the function that is"
                " served, or one that reads as much."
            )
        if key not in self._plans:
            return x, {}
        state = held.states.get(key, ())
        tensor = self._quantized(key, x, held.numbers)
        tensor, state = calibrated(tensor, state, update=self._update, told=self._told)
        return with_gradient_rule(tensor), {key: state} if key in held.states else {}

    def _stored(self, key: Key, held: Held) -> QTensor:
        """A stored weight; of layers in formats of their own this one's."""
        weight = held.weights[key]
        if isinstance(weight, MixedStack):
            return weight.layer(layer_number(self._sites[key[0]], held.numbers))
        return weight

    def _lookup(self, name: str, eqn, operands: Sequence, held: Held) -> jax.Array:
        table, indices = operands
        key = (name, "rhs")
        if key in held.weights:
            stored = self._stored(key, held)
            if _takes_leading_rows(eqn):
                return _rows_of(stored, eqn, indices)
            table = stored.dequantize()
        elif key in self._plans:
            table = fake_quantized(self._quantized(key, table, held.numbers))
        return eqn.primitive.bind(table, indices, **eqn.params)


def _in_shape(weight: QTensor, operand: Operand) -> OperandValue:
    """A stored weight as its site takes it: where the batch repeats it, its values are repeated."""
    if weight.shape == operand.shape:
        return weight
    return jnp.broadcast_to(weight.dequantize().reshape(operand.stored_shape), operand.shape)


def _known_format(plan: Plan) -> NumericFormat:
    """What is known of an operand's format before the program runs."""
    # A twin that is traced is not yet taken, but known not to be negative.
    formats = [
        p.quantizer.fmt._replace(min_value=0.0) if p.twin else p.quantizer.fmt for p in plan.each
    ]
    return _covering(formats) if plan.layers else formats[0]


def _covering(formats: Sequence[NumericFormat]) -> NumericFormat:
    """A format whose grid has every number of these; numbers that are traced stay so."""

    def of(choose, numbers):
        traced = [n for n in numbers if isinstance(n, jax.core.Tracer)]
        return traced[0] if traced else choose(np.asarray(numbers)).item()

    mantissas, exponents, lows, highs, bits = zip(*formats)
    most = of(np.max, mantissas)
    finest = of(np.min, [e - m for e, m in zip(exponents, mantissas)])  # spacing, as an exponent
    return NumericFormat(most, finest + most, of(np.min, lows), of(np.max, highs), of(np.max, bits))


def _takes_leading_rows(eqn: jex_core.JaxprEqn) -> bool:
    """Whether a lookup's result is [*indices, *row] for rows along the table's first axis."""
    numbers, ndim = eqn.params["dimension_numbers"], array_type(eqn.outvars[0]).ndim
    row_ndim = array_type(eqn.invars[0]).ndim - 1
    return numbers.start_index_map == (0,) and numbers.offset_dims == tuple(
        range(ndim - row_ndim, ndim)
    )


def _rows_of(table: QTensor, eqn: jex_core.JaxprEqn, indices: jax.Array) -> jax.Array:
    """The rows a lookup takes, dequantized after they are taken.

    The same lookup in a table of the rows' numbers tells which they are, whatever its mode and the
    dtype of its indices, and where there is none.
    """
    numbers = jax.lax.gather(
        jnp.arange(table.shape[0]), indices, jax.lax.GatherDimensionNumbers((), (0,), (0,)), (1,),
        mode=eqn.params["mode"], fill_value=-1,
    )  # fmt: skip
    fill = eqn.params["fill_value"]
    return table.rows(numbers, jnp.nan if fill is None else fill)
