"""Plans: how each tensor of a traced function's sites is quantized."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.explicit_axes import entered
from aqt_search.numerics.fake_quant import check_key
from aqt_search.numerics.formats import NumericFormat, is_known_integer, is_traced
from aqt_search.numerics.granularity import PER_TENSOR, Granularity, per_channel, resolve
from aqt_search.numerics.quantized import (
    Quantized,
    built_in_format,
    carrier_dtype,
    init_bounds,
    pack_grids,
)
from aqt_search.numerics.quantizer import Quantizer, Recipe, operand_format, quantizer, recipe
from aqt_search.products.layout import Layout, conv_layout, dot_layout, ragged_layout
from aqt_search.tracing.control_flow import Path, equations_along
from aqt_search.tracing.interpreter import Stacks
from aqt_search.tracing.layers import by_stack, filled, layer_indices, layer_name
from aqt_search.tracing.origins import array_type
from aqt_search.tracing.sites import GRADIENTS, SIDES, Key, Site, SiteError, SiteFormats
from aqt_search.tracing.trace import Trace

_OF_GRADIENTS = np.dtype(np.float32)  # the dtype that gradients are rounded in


class Plan(NamedTuple):
    """How one tensor of a site is quantized, before there are arrays."""

    # With the tensor's own format (an unsigned twin where it takes that) and granularity.
    quantizer: Quantizer
    how: Recipe
    twin: bool = False  # whether the twin of the format, which is traced, is still to be taken
    # Of the layers of a stack, where they differ; what is static is the same in all.
    layers: tuple[Plan, ...] = ()

    @property
    def each(self) -> tuple[Plan, ...]:
        """Those of all layers, or the one that there is."""
        return self.layers or (self,)


def site_layout(eqn: jex_core.JaxprEqn) -> Layout:
    """The layout of a site's product."""
    params = eqn.params
    if eqn.primitive.name == "dot_general":
        lhs, rhs = (array_type(v) for v in eqn.invars)
        return dot_layout(lhs.ndim, rhs.ndim, params["dimension_numbers"])
    if eqn.primitive.name == "ragged_dot_general":
        lhs, rhs = (array_type(v) for v in eqn.invars[:2])
        return ragged_layout(lhs.ndim, rhs.ndim, params["ragged_dot_dimension_numbers"])
    groups = params["feature_group_count"], params["batch_group_count"]
    return conv_layout(params["dimension_numbers"], *groups, params)


def site_equations(
    jaxpr: jex_core.Jaxpr, paths: Mapping[Path, str]
) -> dict[str, jex_core.JaxprEqn]:
    """The equation of every site."""
    return {name: [eqn for _, eqn in equations_along(jaxpr, p)][-1] for p, name in paths.items()}


def make_plans(
    trace: Trace, assignment: Mapping[str, SiteFormats], axis_name: Hashable | None
) -> dict[Key, Plan]:
    """The plan of every tensor that the assignment quantizes."""
    equations = site_equations(trace.closed.jaxpr, trace.site_paths)
    plans = {}
    for name, layers in by_stack(assignment, trace.sites).items():
        site, eqn = trace.sites[name], equations[name]
        for field in SiteFormats._fields:
            specs = [getattr(formats, field) for formats in layers]
            if any(spec is not None for spec in specs):
                dtype = _OF_GRADIENTS if field in GRADIENTS else getattr(site, field).dtype
                found = [_plan(site, eqn, field, q, axis_name) for q in filled(specs, dtype)]
                plans[name, field] = _of_stack(site, field, found)
    return plans


def _of_stack(site: Site, field: str, layers: Sequence[Plan]) -> Plan:
    """The plan of a tensor that has one in each layer of a stack, or in all of them."""
    first = layers[0]
    for index, plan in zip(layer_indices(site), layers):
        ways = zip(Recipe._fields, first.how, plan.how)
        differing = [what for what, one, other in ways if one != other]
        if differing:
            raise SiteError(
                f"Site {layer_name(site.name, index)!r}: the {differing[0]} of {field} is not that"
                f" of {layer_name(site.name, layer_indices(site)[0])!r}. The layers of a scan are"
                " one program: their quantizers may differ in their formats alone."
            )
    return first._replace(layers=tuple(layers)) if len(layers) > 1 else first


def _plan(site: Site, eqn, field: str, q: Quantizer, axis_name: Hashable | None) -> Plan:
    check_key(q)
    _check_one(site, field, q.fmt)
    if site.kind == "gather":
        return _lookup_plan(site, field, q)
    layout = site_layout(eqn)
    if field in GRADIENTS:
        side = GRADIENTS.index(field)
        _check_stateless(q, site, field)
        contracting = layout.gradient_contracting(side)
        granularity = resolve(q.granularity or PER_TENSOR, layout.out_ndim, contracting)
        return _resolved(q, q.fmt, granularity, axis_name)
    operand = getattr(site, field)
    granularity = q.granularity or per_channel(*operand.channel_axes)
    shape, contracting = operand.shape, operand.contracting
    resolved = resolve(granularity, len(shape), (*operand.uniform, *contracting))
    shared = axis_name if operand.role == "activation" else None
    if operand.nonnegative and q.unsigned and is_traced(q.fmt):
        return _resolved(q, q.fmt, resolved, shared)._replace(twin=True)  # for all formats at once
    return _resolved(q, operand_format(q, operand.nonnegative), resolved, shared)


def _resolved(
    q: Quantizer, fmt: NumericFormat, granularity: Granularity, axis_name: Hashable | None
) -> Plan:
    own = dataclasses.replace(q, fmt=fmt, granularity=granularity)
    return Plan(own, recipe(own, granularity, axis_name))


def _check_one(site: Site, field: str, fmt: NumericFormat) -> None:
    shape = max((np.shape(number) for number in fmt), key=len)
    if shape:
        named = layer_name(site.name, layer_indices(site)[0]) if any(site.layers) else ""
        hint = f" The layers of this stack have a format each by name: {named!r}." if named else ""
        raise SiteError(
            f"Site {site.name!r}: the format of {field} is a table, its fields have shape {shape};"
            " expected one format. Take one of them, or vmap the quantized function over the"
            f" assignment.{hint}"
        )


def _lookup_plan(site: Site, field: str, q: Quantizer) -> Plan:
    if field != "rhs":
        raise SiteError(
            f"Site {site.name!r} looks up rows of a table: only the table can be quantized. Assign"
            " it SiteFormats(rhs=...), or a rule with {'weight': ...}."
        )
    _check_stateless(q, site, field)
    granularity = q.granularity or per_channel(*site.rhs.channel_axes)
    resolved = resolve(granularity, len(site.rhs.shape), site.rhs.contracting)
    return _resolved(q, q.fmt, resolved, None)


def _check_stateless(q: Quantizer, site: Site, field: str) -> None:
    if q.calibration.read is not None:
        raise SiteError(
            f"Site {site.name!r}: {field} takes no calibration with state; use absmax or another"
            " without one."
        )


def stacks_of(sites: Mapping[str, Site], assignment: Mapping[str, SiteFormats]) -> Stacks:
    """What has an entry for each iteration of which scan, of all that an assignment quantizes.

    A calibration has a state for each layer of a scan through layers. In one that goes through data
    alone (a recurrent network) it has one, which every iteration moves on. What is stored of a
    weight is stacked if each iteration takes a slice of its own, or has bounds of its own for it.
    """
    found = set()
    for name, layers in by_stack(assignment, sites).items():
        for side in SIDES:
            specs = [getattr(formats, side) for formats in layers]
            given = [quantizer(spec) for spec in specs if spec is not None]
            if given:
                stateful = given[0].calibration.read is not None
                loops = sites[name].layers if stateful else getattr(sites[name], side).sliced_by
                found |= {((name, side), path) for path, _ in loops}
    return frozenset(found)


def init_states(trace: Trace, plans: Mapping[Key, Plan]) -> dict[Key, Any]:
    """The first states of all calibrations that have one; in scans through layers one for each.

    Raises:
      SiteError: such a site stands in a while loop.
    """
    states = {}
    for (name, field), plan in plans.items():
        if plan.quantizer.calibration.read is None:
            continue
        site = trace.sites[name]
        lengths = tuple(length for _, length in site.layers)
        if site.repeats is None:
            raise SiteError(
                f"Site {name!r} is inside a while loop, through which no calibration state can be"
                " carried. Use a calibration without state there, or lax.scan."
            )
        state = init_bounds(getattr(site, field).stored_shape, plan.how)
        states[name, field] = jax.tree.map(
            lambda leaf, lengths=lengths: jnp.broadcast_to(leaf, (*lengths, *leaf.shape)),
            state,
        )
    return states


def numbers_of(trace: Trace, plans: Mapping[Key, Plan]) -> dict[Path, jax.Array]:
    """The numbers of iterations (`Held.numbers`) by which layers find their own formats."""
    apart = {name for (name, _), plan in plans.items() if plan.layers}
    loops = {loop for name in apart for loop in trace.sites[name].layers}
    return {path: jnp.arange(length, dtype=np.int32) for path, length in sorted(loops)}


def layer_number(site: Site, numbers: Mapping[Path, jax.Array]) -> jax.Array:
    """Which layer of its stack an iteration is: [], int32."""
    number = jnp.int32(0)
    for path, length in site.layers:
        number = number * length + numbers[path]
    return number


def quantized_by(
    trace: Trace, plans: Mapping[Key, Plan], built_in: bool = False
) -> Callable[..., Quantized]:
    """Returns `quantized(key, x, numbers)`: a tensor under its plan, or that of its layer.

    x is None for the gradient of a site; numbers are those of `Held`. Formats that are known are
    part of the program where `built_in`; those of all other plans are packed into one array, as one
    for each tensor would cost a kernel.
    """
    each = [layer for plan in plans.values() for layer in plan.each]
    formats, twins = [plan.quantizer.fmt for plan in each], [plan.twin for plan in each]
    of_plans = {key: [own.quantizer.fmt for own in plan.each] for key, plan in plans.items()}
    known = {k: built_in_format(of_plans[k], p.how) if built_in else None for k, p in plans.items()}
    integers = {key for key in plans if all(map(is_known_integer, of_plans[key]))}
    names = {name for name, _ in plans}
    operands = [getattr(trace.sites[name], side) for name in names for side in SIDES]
    dtypes = {carrier_dtype(o.dtype) for o in operands} | {_OF_GRADIENTS}
    packed = any(fmt is None for fmt in known.values())
    grids = {dtype: pack_grids(formats, dtype, twins) for dtype in dtypes if packed}
    starts = itertools.accumulate((len(plan.each) for plan in plans.values()), initial=0)
    rows = dict(zip(plans, map(np.int32, starts)))

    def quantized(key: Key, x: Any, numbers: Mapping[Path, jax.Array]) -> Quantized:
        plan, dtype = plans[key], _OF_GRADIENTS if x is None else carrier_dtype(x.dtype)
        random_key, active = plan.quantizer.key, plan.quantizer.active
        grid, row = (grids[dtype], rows[key]) if known[key] is None else (None, None)
        if plan.layers:
            number = layer_number(trace.sites[key[0]], numbers)
            row = None if row is None else row + number
            keys = [p.quantizer.key for p in plan.layers if p.quantizer.key is not None]
            random_key = jnp.stack(keys)[number] if keys else None  # of all layers or of none
            active = _of_layers([p.quantizer.active for p in plan.layers], number)
        grid, random_key, active = entered((grid, random_key, active))
        return Quantized(
            x, grid, row, None, random_key, active, plan.how, dtype, known[key], key in integers
        )

    return quantized


def _of_layers(masks: Sequence[jax.Array | None], number: jax.Array) -> jax.Array | None:
    """The mask of layer `number`; None says that all elements count."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    shape = jnp.broadcast_shapes(*map(jnp.shape, given))
    every = [jnp.broadcast_to(True if mask is None else mask, shape) for mask in masks]
    return jnp.stack(every)[number]
