"""Runs a traced function again, with the operands of its sites quantized.

One interpreter serves training, evaluation and serving, and finds the weights to store. Values it
does not have (weights that are stored in codes only, or data while weights are looked for) are
`MISSING`; what would be computed from them is missing, too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.fake_quant import (
    bounds_of,
    carrier_dtype,
    check_key,
    fake_quant_packed,
    init_bounds,
    pack_grids,
)
from aqt_search.numerics.formats import NumericFormat, is_traced
from aqt_search.numerics.granularity import PER_TENSOR, per_channel, resolve
from aqt_search.numerics.qtensor import QTensor, quantize_tensor
from aqt_search.numerics.quantizer import Quantizer, Recipe, operand_format, quantizer, recipe
from aqt_search.products.layout import Layout, conv_layout, dot_layout
from aqt_search.products.operands import Quantized, quantized_operand
from aqt_search.products.product import product
from aqt_search.tracing.control_flow import (
    Body,
    Call,
    Cond,
    Path,
    Remat,
    Scan,
    While,
    control_flow,
    equations_along,
)
from aqt_search.tracing.sites import Site, SiteError, SiteFormats

MISSING = object()

SIDES = ("lhs", "rhs")
GRADIENTS = ("lhs_gradient", "rhs_gradient")
Key = tuple[str, str]  # site, field of SiteFormats


class Trace(NamedTuple):
    """A traced function."""

    closed: jex_core.ClosedJaxpr
    inputs: list[Any]  # the array leaves of params and data, in the jaxpr's order
    out_tree: jax.tree_util.PyTreeDef
    sites: dict[str, Site]
    site_paths: dict[Path, str]


class Held(NamedTuple):
    """What sites hold beside their operands; inside a scan, one slice of it."""

    states: dict[Key, Any]  # of calibrations
    weights: dict[Key, QTensor]  # operands in storage

    def under(self, names: set[str]) -> Held:
        """That of some sites."""
        return Held(*({k: v for k, v in part.items() if k[0] in names} for part in self))


EMPTY = Held({}, {})


class Plan(NamedTuple):
    """How one tensor of a site is quantized."""

    quantizer: Quantizer
    fmt: NumericFormat  # that of the quantizer, or its unsigned twin
    how: Recipe
    row: Any  # of the format among all formats
    twin: bool = False  # whether the twin of `fmt`, which is traced, is still to be taken


def _layout(eqn: jex_core.JaxprEqn) -> Layout:
    params = eqn.params
    if eqn.primitive.name == "dot_general":
        ndims = (v.aval.ndim for v in eqn.invars)
        return dot_layout(*ndims, params["dimension_numbers"])
    groups = params["feature_group_count"], params["batch_group_count"]
    return conv_layout(params["dimension_numbers"], *groups, params)


def site_equations(
    jaxpr: jex_core.Jaxpr, paths: Mapping[Path, str]
) -> dict[str, tuple[jex_core.JaxprEqn, tuple[int, ...]]]:
    """The equation of every site, and the lengths of the scans around it."""
    found = {}
    for path, name in paths.items():
        *around, eqn = (eqn for _, eqn in equations_along(jaxpr, path))
        flows = map(control_flow, around)
        found[name] = (eqn, tuple(flow.length for flow in flows if isinstance(flow, Scan)))
    return found


def make_plans(
    trace: Trace, assignment: Mapping[str, SiteFormats], axis_name: Hashable | None
) -> dict[Key, Plan]:
    """The plan of every tensor that the assignment quantizes."""
    equations = site_equations(trace.closed.jaxpr, trace.site_paths)
    plans: dict[Key, Plan] = {}
    for name, formats in assignment.items():
        for field, spec in zip(SiteFormats._fields, formats):
            if spec is not None:
                made = _plan(trace.sites[name], equations[name][0], field, spec, axis_name)
                plans[name, field] = made._replace(row=np.int32(len(plans)))
    return plans


def _plan(site: Site, eqn, field: str, spec: Any, axis_name: Hashable | None) -> Plan:
    q = quantizer(spec)
    check_key(q)
    if site.kind == "gather":
        return _lookup_plan(site, field, q)
    layout = _layout(eqn)
    if field in GRADIENTS:
        side = GRADIENTS.index(field)
        _check_stateless(q, site, field)
        contracting = layout.gradient_contracting(side)
        granularity = resolve(q.granularity or PER_TENSOR, layout.out_ndim, contracting)
        return Plan(q, q.fmt, recipe(q, granularity, axis_name), None)
    operand = getattr(site, field)
    granularity = q.granularity or per_channel(*operand.channel_axes)
    resolved = resolve(granularity, len(operand.shape), operand.contracting)
    shared = axis_name if operand.role == "activation" else None
    how = recipe(q, resolved, shared)
    if operand.nonnegative and q.unsigned and is_traced(q.fmt):
        return Plan(q, q.fmt, how, None, twin=True)  # for all formats at once
    return Plan(q, operand_format(q, operand.nonnegative), how, None)


def _lookup_plan(site: Site, field: str, q: Quantizer) -> Plan:
    if field != "rhs":
        raise SiteError(
            f"Site {site.name!r} looks up rows of a table: only the table can be quantized. Assign"
            " it SiteFormats(rhs=...), or a rule with {'weight': ...}."
        )
    _check_stateless(q, site, field)
    granularity = q.granularity or per_channel(*site.rhs.channel_axes)
    resolved = resolve(granularity, len(site.rhs.shape), site.rhs.contracting)
    return Plan(q, q.fmt, recipe(q, resolved), None)


def _check_stateless(q: Quantizer, site: Site, field: str) -> None:
    if q.calibration.read is not None:
        raise SiteError(
            f"Site {site.name!r}: {field} takes no calibration with state; use absmax or another"
            " without one."
        )


def init_states(trace: Trace, plans: Mapping[Key, Plan]) -> dict[Key, Any]:
    """The first states of all calibrations that have one; inside scans one for each iteration.

    Raises:
      SiteError: such a site stands in a while loop.
    """
    equations = site_equations(trace.closed.jaxpr, trace.site_paths)
    states = {}
    for (name, field), plan in plans.items():
        if plan.quantizer.calibration.read is None:
            continue
        site, lengths = trace.sites[name], equations[name][1]
        if site.repeats is None:
            raise SiteError(
                f"Site {name!r} is inside a while loop, through which no calibration state can be"
                " carried. Use a calibration without state there, or lax.scan."
            )
        state = init_bounds(getattr(site, field).shape, plan.how)
        states[name, field] = jax.tree.map(
            lambda leaf, lengths=lengths: jnp.broadcast_to(leaf, (*lengths, *leaf.shape)),
            state,
        )
    return states


class Interpreter:
    """Evaluates a trace under plans."""

    def __init__(
        self,
        trace: Trace,
        plans: Mapping[Key, Plan],
        *,
        execution: str,
        update: bool,
        visit: Collection[str] = (),
    ):
        self._trace = trace
        self._plans = plans
        self._execution = execution
        self._update = update
        names = {name for name, _ in plans}
        # Only sites with formats change anything: beside those to `visit`, for a subclass that
        # looks at them, the rest of the program runs as it is.
        visited = names | set(visit)
        self._site_paths = {p: name for p, name in trace.site_paths.items() if name in visited}
        # All formats go into one array: an array per operand would cost a kernel each.
        formats = [plan.fmt for plan in plans.values()]
        operands = [getattr(trace.sites[name], side) for name in names for side in SIDES]
        dtypes = {carrier_dtype(o) for o in operands} | {np.dtype(np.float32)}
        twins = [plan.twin for plan in plans.values()]
        self._grids = {d: pack_grids(formats, d, twins) for d in dtypes} if formats else {}
        self._sites_under: dict[Path, set[str]] = {}
        for path, name in self._site_paths.items():
            for end in range(len(path)):
                self._sites_under.setdefault(path[:end], set()).add(name)

    def run(self, held: Held = EMPTY) -> tuple[list, dict[Key, Any]]:
        """The function's outputs and the next states."""
        closed = self._trace.closed
        return self._evaluate(Body(closed.jaxpr, closed.consts), self._trace.inputs, (), held)

    def _evaluate(self, body: Body, args: Sequence, path: Path, held: Held) -> tuple[list, dict]:
        jaxpr = body.jaxpr
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*body.consts, *args)))
        states: dict[Key, Any] = {}

        def read(atom):
            return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

        last_use = _last_uses(jaxpr)
        for start, stop in self._runs(jaxpr, path):
            eqn, here = jaxpr.eqns[start], path + (start,)
            operands = [read(v) for v in eqn.invars]
            new: dict[Key, Any] = {}
            if here in self._site_paths:
                outputs, new = self._site(self._site_paths[here], eqn, operands, held)
            elif here in self._sites_under:
                inner = held.under(self._sites_under[here])
                outputs, new = self._enter(eqn, operands, here, inner)
            else:
                env.update(_run_equations(jaxpr, start, stop, env, last_use))
                continue
            states |= new
            env.update(zip(eqn.outvars, outputs))
        return [read(v) for v in jaxpr.outvars], states

    def _runs(self, jaxpr: jex_core.Jaxpr, path: Path) -> list[tuple[int, int]]:
        """Splits equations into those that are or hold sites, and what lies between them."""
        here = (self._site_paths, self._sites_under)
        special = [
            index for index in range(len(jaxpr.eqns)) if any(path + (index,) in h for h in here)
        ]
        edges = sorted({0, len(jaxpr.eqns), *special, *(index + 1 for index in special)})
        return list(itertools.pairwise(edges))

    # --- Sites ---

    def _site(self, name: str, eqn, operands: Sequence, held: Held) -> tuple[list, dict]:
        with jax.named_scope(name):
            if self._trace.sites[name].kind == "gather":
                return [self._lookup(name, eqn, operands, held)], {}
            return self._product(name, eqn, operands, held)

    def _product(self, name: str, eqn, operands: Sequence, held: Held) -> tuple[list, dict]:
        states, quantized, formats = {}, [], []
        for side, x in zip(SIDES, operands):
            key = (name, side)
            plan = self._plans.get(key)
            if key in held.weights:
                x = held.weights[key]
            elif plan is not None:
                x, states = self._quantized(key, plan, x, held, states)
            quantized.append(x)
            # A twin that is traced is not yet taken, but known not to be negative.
            fmt = None if plan is None else plan.fmt
            formats.append(fmt._replace(min_value=0.0) if plan is not None and plan.twin else fmt)

        def bind(lhs, rhs, accumulate):
            more = {} if accumulate is None else {"preferred_element_type": accumulate}
            return eqn.primitive.bind(lhs, rhs, **(eqn.params | more))

        gradients = tuple(self._gradient((name, field)) for field in GRADIENTS)
        result = product(
            bind, _layout(eqn), tuple(quantized), tuple(formats), self._execution, gradients
        )
        return [result], states

    def _quantized(self, key: Key, plan: Plan, x, held: Held, states: dict):
        grids, state = self._grids[carrier_dtype(x)], held.states.get(key, ())
        bounds, state = bounds_of(x, grids, plan.row, plan.how, state, self._update)
        if key in held.states:
            states = states | {key: state}
        key = plan.quantizer.key
        return quantized_operand(x, grids, plan.row, bounds, key, plan.how), states

    def _gradient(self, key: Key) -> Quantized | None:
        if key not in self._plans:
            return None
        plan = self._plans[key]
        grids = self._grids[np.dtype(np.float32)]
        return Quantized(None, grids, plan.row, None, plan.quantizer.key, plan.how)

    def _lookup(self, name: str, eqn, operands: Sequence, held: Held) -> jax.Array:
        table, indices = operands
        key = (name, "rhs")
        if key in held.weights:
            if _takes_leading_rows(eqn):
                return _rows_of(held.weights[key], eqn, indices[..., 0])
            table = held.weights[key].dequantize()
        elif key in self._plans:
            plan = self._plans[key]
            grids = self._grids[carrier_dtype(table)]
            table = fake_quant_packed(table, grids, plan.row, None, plan.quantizer.key, plan.how)
        return eqn.primitive.bind(table, indices, **eqn.params)

    # --- Equations that hold sites ---

    def _enter(self, eqn, operands: Sequence, here: Path, held: Held) -> tuple[list, dict]:
        match control_flow(eqn):
            case Call(body):
                return self._evaluate(body, operands, body.under(here), held)
            case Remat() as remat:
                return self._enter_remat(remat, eqn, operands, here, held)
            case Cond() as cond:
                return self._enter_cond(cond, eqn, operands, here, held)
            case Scan() as scan:
                return self._enter_scan(scan, eqn, operands, here, held)
            case While() as loop:
                return self._enter_while(loop, eqn, operands, here, held)
            case unknown:
                raise AssertionError(f"{unknown}")  # sites inside of others are refused

    def _enter_remat(self, remat: Remat, eqn, operands, here: Path, held: Held):
        def run(held, *args):
            values, path = _filled(operands, args), remat.body.under(here)
            outputs, states = self._evaluate(remat.body, values, path, held)
            return _materialized(outputs, eqn.outvars), states

        return remat.again(run)(held, *_present(operands))

    def _enter_cond(self, cond: Cond, eqn, operands, here: Path, held: Held):
        def branch(body, values):
            def run(held, *args):
                filled = _filled(values, args)
                outputs, states = self._evaluate(body, filled, body.under(here), held)
                return _materialized(outputs, eqn.outvars), held.states | states

            return run

        branches = [branch(body, values) for body, values in cond.calls(operands)]
        index, operands = cond.split(operands)
        return jax.lax.switch(index, branches, held, *_present(operands))

    def _enter_scan(self, scan: Scan, eqn, operands, here: Path, held: Held):
        body, carries = scan.body, scan.carries
        consts, carry, xs = scan.split(operands)
        carry = _materialized(carry, eqn.outvars[:carries])

        def step(carry, sliced):
            held, *present = sliced
            args = (*consts, *carry, *_filled(xs, present))
            outputs, states = self._evaluate(body, args, body.under(here), held)
            outputs = _materialized(outputs, body.jaxpr.outvars)
            return tuple(outputs[:carries]), (tuple(outputs[carries:]), states)

        carry, (ys, states) = scan.again(step, tuple(carry), (held, *_present(xs)))
        return [*carry, *ys], states

    def _enter_while(self, loop: While, eqn, operands, here: Path, held: Held):
        test, body = loop.bodies
        test_consts, body_consts, carry = loop.split(operands)

        def decide(carry):
            args = (*test_consts, *carry)
            return self._evaluate(test, args, test.under(here), held)[0][0]

        def step(carry):
            args = (*body_consts, *carry)
            outputs, _ = self._evaluate(body, args, body.under(here), held)
            return tuple(_materialized(outputs, eqn.outvars))

        carry = _materialized(carry, eqn.outvars)
        return list(jax.lax.while_loop(decide, step, tuple(carry))), {}


class WeightFinder(Interpreter):
    """Stores the weights of sites instead of running them; data is missing."""

    def __init__(self, trace: Trace, plans: Mapping[Key, Plan]):
        super().__init__(trace, plans, execution="emulated", update=False)

    def _site(self, name: str, eqn, operands: Sequence, held: Held) -> tuple[list, dict]:
        site, found = self._trace.sites[name], {}
        sides = ("rhs", "lhs") if site.kind == "gather" else SIDES
        for side, x in zip(sides, operands):
            plan = self._plans.get((name, side))
            if plan is None or getattr(site, side).role == "activation":
                continue
            if x is MISSING:
                raise SiteError(
                    f"The {side} weight of site {name!r} is computed inside a loop from what an"
                    " earlier iteration left, so it cannot be stored. Assign it None, or compute it"
                    " outside."
                )
            key = (name, side)
            grids = self._grids[carrier_dtype(x)]
            state = held.states.get(key, ())
            bounds, _ = bounds_of(x, grids, plan.row, plan.how, state, update=False)
            stored = dataclasses.replace(
                plan.quantizer, fmt=plan.fmt, granularity=plan.how.granularity
            )
            rows = int(site.kind == "gather")
            found[key] = quantize_tensor(x, stored, bounds=bounds, row_axes=rows)
        return [MISSING] * len(eqn.outvars), found

    def _enter(self, eqn, operands: Sequence, here: Path, held: Held) -> tuple[list, dict]:
        found = {}
        match control_flow(eqn):
            case Call(body) | Remat(body):
                return self._evaluate(body, operands, body.under(here), held)
            case Scan() as scan:
                found = self._scan_weights(scan, operands, here, held)
            case Cond() | While() as flow:
                for body, args in flow.calls(_without_carry(flow, operands)):
                    found |= self._evaluate(body, args, body.under(here), held)[1]
        return [MISSING] * len(eqn.outvars), found

    def _scan_weights(self, scan: Scan, operands: Sequence, here: Path, held: Held) -> dict:
        body = scan.body
        consts, carry, xs = scan.split(operands)

        def step(_, sliced):
            held, *present = sliced
            args = (*consts, *[MISSING] * len(carry), *_filled(xs, present))
            return (), self._evaluate(body, args, body.under(here), held)[1]

        return jax.lax.scan(step, (), (held, *_present(xs)), length=scan.length)[1]


def _without_carry(flow: Cond | While, operands: Sequence) -> list:
    """The operands of a loop with its carry missing: what an iteration leaves is not known."""
    if isinstance(flow, Cond):
        return list(operands)
    *consts, carry = flow.split(operands)
    return [*itertools.chain(*consts), *[MISSING] * len(carry)]


def _takes_leading_rows(eqn: jex_core.JaxprEqn) -> bool:
    """Whether a lookup's result is [*indices, *row] for rows along the table's first axis."""
    numbers, ndim = eqn.params["dimension_numbers"], eqn.outvars[0].aval.ndim
    row_ndim = eqn.invars[0].aval.ndim - 1
    return numbers.start_index_map == (0,) and numbers.offset_dims == tuple(
        range(ndim - row_ndim, ndim)
    )


def _rows_of(table: QTensor, eqn: jex_core.JaxprEqn, indices: jax.Array) -> jax.Array:
    """The rows a lookup takes, dequantized after they are taken."""
    count = table.shape[0]
    if eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
        return table.take(jnp.clip(indices, 0, count - 1))
    # Indices from the end were made positive before the lookup: what is negative is outside.
    return table.take(jnp.where(indices < 0, count, indices))


def _materialized(values: Sequence, variables: Sequence) -> list:
    """Zeros for what is missing, where JAX wants arrays: nothing that is used reads them."""
    return [
        jnp.zeros(v.aval.shape, v.aval.dtype) if x is MISSING else x
        for x, v in zip(values, variables, strict=True)
    ]


def _present(values: Sequence) -> list:
    return [v for v in values if v is not MISSING]


def _filled(values: Sequence, present: Sequence) -> list:
    """`values` with those that are present replaced, in order."""
    rest = iter(present)
    return [v if v is MISSING else next(rest) for v in values]


def _variables(atoms: Sequence) -> list:
    return [v for v in atoms if not isinstance(v, jex_core.Literal)]


def _last_uses(jaxpr: jex_core.Jaxpr) -> dict[Any, int]:
    """The last equation that reads each variable; their number for results of the jaxpr."""
    uses = {v: index for index, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    return uses | dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))


def _run_equations(
    jaxpr: jex_core.Jaxpr, start: int, stop: int, env: Mapping, last_use: Mapping
) -> dict:
    """Runs equations `start` to `stop` as they were traced, custom derivative rules included.

    A jaxpr of these equations is evaluated, because binding a call-like primitive again takes
    parameters whose form differs between JAX versions. What depends on missing values is missing.

    Returns:
      What they compute and something after them reads, by variable.
    """
    eqns, missing = [], {}
    for eqn in jaxpr.eqns[start:stop]:
        if any(missing.get(v, env.get(v)) is MISSING for v in _variables(eqn.invars)):
            missing.update(dict.fromkeys(eqn.outvars, MISSING))
        else:
            eqns.append(eqn)
    computed = {v for eqn in eqns for v in eqn.outvars}
    used = dict.fromkeys(v for eqn in eqns for v in _variables(eqn.invars))
    inputs = [v for v in used if v not in computed]
    outputs = [v for eqn in eqns for v in eqn.outvars if last_use.get(v, -1) >= stop]
    effects = set().union(*(eqn.effects for eqn in eqns))
    part = jaxpr.replace(constvars=(), invars=inputs, outvars=outputs, eqns=eqns, effects=effects)
    values = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(part, ()))(*(env[v] for v in inputs))
    return dict(zip(outputs, values)) | missing
