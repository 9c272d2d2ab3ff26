"""Quantization as a function transformation: `find_sites` and `quantize`.

    sites = find_sites(apply, params, x)                   # what there is to quantize; no FLOPs
    logits = quantize(apply)(assignment, params, x)        # apply with formats as one more argument

`apply` is any JAX function of parameters and data. It is traced to a jaxpr, the operands of its
products are fake-quantized, and everything else runs as it was written, so the result can be
jitted, differentiated, vmapped (over assignments, too) and pmapped like any other function.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from aqt_search.numerics.calibration import moving_average
from aqt_search.numerics.formats import NumericFormat, numeric_format
from aqt_search.numerics.granularity import PER_TOKEN
from aqt_search.numerics.quantizer import Quantizer, quantizer
from aqt_search.products.carriers import check_execution
from aqt_search.products.derivatives import check_residuals
from aqt_search.tracing.interpreter import Held
from aqt_search.tracing.layers import (
    layer_indices,
    layer_name,
    layer_sites,
    split_layer,
    stack_of,
)
from aqt_search.tracing.matching import for_sites, unknown_site
from aqt_search.tracing.planned_sites import Residuals, run_planned
from aqt_search.tracing.plans import Plan, init_states, make_plans, stacks_of
from aqt_search.tracing.signature import named_after
from aqt_search.tracing.sites import Key, Site, SiteError, SiteFormats, is_unquantized
from aqt_search.tracing.trace import Trace, trace_function

Assignment = Mapping[str, SiteFormats]
CalibrationState = dict[str, dict[str, Any]]  # what calibrations remember, by site and operand


def find_sites(
    fun: Callable,
    params: Any,
    *args: Any,
    axis_sizes: Mapping[Hashable, int] | None = None,
    **kwargs: Any,
) -> dict[str, Site]:
    """Lists the products of `fun(params, *args, **kwargs)` that can be quantized.

    A site is a `dot_general` or `conv_general_dilated` on floating-point operands, at least one of
    which depends on data, and whose result is used. An operand is a weight if it depends on
    parameters and on no data; its site is named by the parameter leaf it comes from
    (`stage1/conv/kernel`). A product of two activations is named by its place: its name scopes and
    the primitive (`encoder/attention/dot_general`). Sites of equal name are numbered in program
    order: `embedding#1`, `embedding#2`. A lookup of whole rows of a weight is a site of its own,
    wherever the indices come from: `table[tokens]` and `positions[jnp.arange(n)]`; rows that are
    gathered to be the weight of a product are part of that site.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`. Arguments that are no arrays (bools,
    strings, numbers, functions) are passed on as they are.

    Args:
      fun: a function of parameters and data, such as a Linen module's `apply`.
      params: its first argument: parameters (with other variables, if `fun` takes them together).
      *args: the data; use a batch of one to count multiply-accumulates per example.
      axis_sizes: sizes of mapped axes that `fun` names, to trace it outside of their pmap.
      **kwargs: keyword arguments of `fun`.

    Returns:
      The sites by name, in program order. A site with `refused` set cannot be quantized.

    Raises:
      SiteError: `fun` names a mapped axis that is not bound.
    """
    return trace_function(fun, params, args, kwargs, axis_sizes or {}).sites


def residuals_of(residuals: str, options: Sequence[str | NumericFormat]) -> Residuals:
    """What sites keep for their backward products, as `quantize` takes it."""
    check_residuals(residuals)
    if isinstance(options, str):
        raise TypeError(f"options is {options!r}: expected a sequence of formats, [{options!r}].")
    return Residuals(residuals, tuple(map(numeric_format, options)))


def quantize(
    fun: Callable,
    *,
    axis_name: Hashable | None = None,
    execution: str | Mapping[str, str] = "emulated",
    residuals: str = "values",
    options: Sequence[str | NumericFormat] = (),
) -> Callable:
    """Returns `qfun(assignment, params, *args, **kwargs)`: `fun` with its products quantized.

    At a site with formats (f, g) the product of lhs and rhs becomes that of `fake_quant(lhs, f)`
    and `fake_quant(rhs, g)`: one scale per output channel for weights and constants, one per tensor
    for activations; integer formats of activations that are never negative (`Operand.nonnegative`)
    become unsigned. A `Quantizer` in place of a format says otherwise. Where the assignment has no
    entry, or None, the operand is left as it is; with an empty assignment `qfun` is exactly `fun`.
    The assignment may be of another function of these parameters, such as a whole model for its
    encoder: what is said of sites that `fun` has not is passed over.

    The layers of a scan are one site, with one format for all of them, or they are named one by
    one, `kernel[3]` (`layer_sites`); then they may differ in their formats, and in nothing else.

    Formats may be traced: a jitted `qfun` is compiled once for all formats. It is traced anew only
    if operands change between a format and None, or quantizers in more than their format.

    Args:
      fun: a function of parameters and data; see `find_sites`.
      axis_name: a mapped axis that shards the batch; activation scales are then shared over it, so
        that the result does not depend on the number of devices.
      execution: how products are run, as in `ops.dot_general`; "auto" falls back to "emulated"
        site by site. Or a mapping of sites to these, as `measure_executions` finds it, in which
        "auto" holds for sites that are not named.
      residuals: what products keep of their operands for the backward pass: "values", or the
        "codes" that these are computed from again, as in `ops.dot_general`.
      options: formats that traced ones are among. With them the codes of these, too, are kept, in
        the narrowest dtype that holds all; one that this does not hold gives NaN.

    Raises:
      FormatError: an unknown format among the options.
      ValueError: unknown execution or residuals.

    Raises (when called):
      SiteError: the assignment names a site that does not exist, holds something other than
        `SiteFormats`, quantizes a site that is refused, or uses a calibration with state; layers of
        a scan differ in more than their formats; a format is a table of several.
      FormatError, ValueError: a site that `execution` does not apply to.
    """
    check_execution(execution)
    kept = residuals_of(residuals, options)

    @named_after(fun, "assignment", "params")
    def quantized(assignment: Assignment, params: Any, *args: Any, **kwargs: Any) -> Any:
        trace = trace_function(fun, params, args, kwargs, {})
        assignment = for_sites(assignment, trace)
        check_assignment(assignment, trace.sites)
        plans = make_plans(trace, assignment, axis_name)
        for (name, field), plan in plans.items():
            if plan.quantizer.calibration.read is not None:
                raise SiteError(
                    f"Site {name!r}: the calibration of {field} has state, which quantize does not"
                    " carry. Use quantize_with_state."
                )
        outputs, _ = run_planned(trace, plans, execution=execution, update=False, residuals=kept)
        return jax.tree_util.tree_unflatten(trace.out_tree, outputs)

    return quantized


class StatefulFunction(NamedTuple):
    """A quantized function whose calibrations have state: pure functions, as in optax."""

    init: Callable  # (assignment, params, *args, **kwargs) -> state; computes nothing
    apply: Callable  # (assignment, state, params, *args, **kwargs) -> (outputs, next state)
    evaluate: Callable  # the same arguments -> outputs; bounds are read from the state alone


def quantize_with_state(
    fun: Callable,
    *,
    axis_name: Hashable | None = None,
    execution: str | Mapping[str, str] = "emulated",
    residuals: str = "values",
    options: Sequence[str | NumericFormat] = (),
) -> StatefulFunction:
    """`quantize` for quantizers whose calibrations have state, such as `moving_average(absmax())`.

        qfun = quantize_with_state(apply)
        state = qfun.init(assignment, params, x)
        y, state = qfun.apply(assignment, state, params, x)     # moves the bounds on
        y = qfun.evaluate(assignment, state, params, x)         # static scales: no reductions

    A site inside of a scan has one state for each iteration if the scan goes through layers, slices
    of weights; else one for all, which every iteration moves on. `evaluate` takes a scale of each
    batch where a state was never told anything. Arguments and errors are those of `quantize`; a
    calibration with state cannot stand in a while loop (SiteError).
    """
    check_execution(execution)
    kept = residuals_of(residuals, options)

    def prepare(assignment, params, args, kwargs):
        trace = trace_function(fun, params, args, kwargs, {})
        assignment = for_sites(assignment, trace)
        check_assignment(assignment, trace.sites)
        return trace, make_plans(trace, assignment, axis_name), stacks_of(trace.sites, assignment)

    def init(assignment: Assignment, params: Any, *args: Any, **kwargs: Any) -> CalibrationState:
        trace, plans, _ = prepare(assignment, params, args, kwargs)
        return _nested(init_states(trace, plans))

    def run(update, assignment, state, params, args, kwargs):
        trace, plans, stacks = prepare(assignment, params, args, kwargs)
        held = checked_state(state, trace, plans)
        outputs, states = run_planned(
            trace,
            plans,
            Held(held, {}, stacks),
            execution=execution,
            update=update,
            residuals=kept,
        )
        return jax.tree_util.tree_unflatten(trace.out_tree, outputs), _nested(held | states)

    def apply(assignment: Assignment, state: CalibrationState, params: Any, *args: Any, **kwargs):
        return run(True, assignment, state, params, args, kwargs)

    def evaluate(
        assignment: Assignment, state: CalibrationState, params: Any, *args: Any, **kwargs: Any
    ):
        return run(False, assignment, state, params, args, kwargs)[0]

    return StatefulFunction(init, apply, evaluate)


def with_static_activations(
    assignment: Assignment, sites: Mapping[str, Site]
) -> dict[str, SiteFormats]:
    """The assignment with bounds of activations that are averaged over all batches seen.

    For calibration after training: `quantize_with_state(fun).apply` on some batches, then
    `.evaluate` or `freeze` with the state. Calibrations that have a state already stay, and so does
    `PER_TOKEN`: a row's scale is of that row alone, whatever batch it is in.
    """

    def of(name: str, side: str, spec):
        if spec is None or getattr(stack_of(name, sites), side).role != "activation":
            return spec
        q = quantizer(spec)
        if q.calibration.read is not None or q.granularity == PER_TOKEN:
            return q
        return dataclasses.replace(q, calibration=moving_average(q.calibration, None))

    return {
        name: formats._replace(**{s: of(name, s, getattr(formats, s)) for s in ("lhs", "rhs")})
        for name, formats in assignment.items()
    }


def _nested(states: Mapping[Key, Any]) -> CalibrationState:
    nested: CalibrationState = {}
    for (name, field), state in states.items():
        nested.setdefault(name, {})[field] = state
    return nested


def flat_state(state: CalibrationState) -> dict[Key, Any]:
    """Calibration states by (site, operand)."""
    return {(name, field): s for name, fields in state.items() for field, s in fields.items()}


def checked_state(
    state: CalibrationState, trace: Trace, plans: Mapping[Key, Plan]
) -> dict[Key, Any]:
    """Calibration states by (site, operand).

    Raises:
      SiteError: they are not those that the plans need.
    """
    held, expected = flat_state(state), init_states(trace, plans)
    if held.keys() != expected.keys():
        raise SiteError(
            "The calibration state is not of this assignment: it is for"
            f" {_listed(held)}, the assignment needs it for {_listed(expected)}. Make it with init."
        )
    return held


def _listed(states: Mapping[Key, Any]) -> str:
    return ", ".join(f"{name} ({field})" for name, field in sorted(states)[:4]) or "nothing"


def with_keys(assignment: Assignment, key: jax.Array) -> dict[str, SiteFormats]:
    """The assignment with a key, derived from `key`, for each quantizer with stochastic rounding.

    The same key gives the same rounding, however a batch is sharded; fold in the step's number.
    Inside a scan every iteration draws the same numbers.
    """
    number = itertools.count()

    def keyed(spec):
        if not isinstance(spec, Quantizer) or spec.rounding != "stochastic":
            return spec
        return dataclasses.replace(spec, key=jax.random.fold_in(key, next(number)))

    return {name: SiteFormats(*map(keyed, formats)) for name, formats in assignment.items()}


def _are_formats(value: Any) -> bool:
    return isinstance(value, SiteFormats) and all(
        fmt is None or isinstance(fmt, (NumericFormat, Quantizer)) for fmt in value
    )


def check_assignment(assignment: Assignment, sites: Mapping[str, Site]) -> None:
    """Raises SiteError for an assignment that is not of these sites."""
    for name, formats in assignment.items():
        stack, layer = split_layer(name, sites)
        if stack not in sites:
            raise unknown_site(name, sites)
        site = sites[stack]
        if layer and layer not in [layer_name("", index) for index in layer_indices(site)]:
            raise unknown_site(name, layer_sites(sites))
        if not _are_formats(formats):
            raise SiteError(
                f"Site {name!r} is assigned {formats!r}; expected SiteFormats(lhs, rhs) of a"
                " NumericFormat, a Quantizer or None each. Use aqt_search.assign to build one."
            )
        if site.refused and not is_unquantized(formats):
            raise SiteError(
                f"Site {name!r} cannot be quantized: {site.refused}. Assign it None, or move"
                " the product out of there."
            )
