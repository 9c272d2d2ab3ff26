"""Freezing: a quantized function's weights in real low-precision storage.

frozen = freeze(apply, assignment, params, x, state=state)    # codes, scales; no float copy
logits = serve(apply)(frozen, x)                              # through the same function
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.calibration import tells_nothing
from aqt_search.numerics.formats import NumericFormat, as_grid, stack_formats
from aqt_search.numerics.mixed_stack import MixedStack
from aqt_search.numerics.qtensor import QTensor, concrete_format, quantize_tensor
from aqt_search.numerics.quantized import calibrated
from aqt_search.numerics.quantizer import Quantizer, quantizer
from aqt_search.products.stored_order import storage_order
from aqt_search.tracing.control_flow import Call, Cond, Path, Remat, Scan, While, control_flow
from aqt_search.tracing.interpreter import MISSING, Held, Interpreter, Outcome, visit_bodies
from aqt_search.tracing.layers import equal_specs, layer_indices, split_layer
from aqt_search.tracing.liveness import scan_liveness
from aqt_search.tracing.matching import for_sites
from aqt_search.tracing.plans import (
    Plan,
    init_states,
    make_plans,
    quantized_by,
    site_layout,
    stacks_of,
)
from aqt_search.tracing.shared_weights import Shared, shared_weights
from aqt_search.tracing.sites import SIDES, Key, SiteError, SiteFormats
from aqt_search.tracing.static_leaves import wrapped
from aqt_search.tracing.trace import Trace, is_array, trace_function
from aqt_search.tracing.transform import (
    Assignment,
    CalibrationState,
    check_assignment,
    flat_state,
)
from aqt_search.tracing.uniform_axes import one_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropped:
    """In place of a parameter that is stored in codes only."""

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a quantized function needs for serving: a pytree of arrays."""

    # Those that are not quantized, `Dropped` in place of the others; what is no array is `Static`.
    params: Any
    # By site and operand; a stack of them where each iteration of a scan has its own, by formats
    # where these differ.
    weights: dict[str, dict[str, QTensor | MixedStack]]
    state: CalibrationState  # bounds of activations; {} where each batch has its own scales
    keys: dict[str, dict[str, jax.Array]]  # of activations that are rounded stochastically
    formats: tuple[tuple[str, SiteFormats], ...] = dataclasses.field(metadata={"static": True})
    # Operands that are stored for another site.
    shared: tuple[Shared, ...] = dataclasses.field(default=(), metadata={"static": True})
    lookups: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})  # sites
    # Whether calibration is known to have told all bounds; else each is asked, and what has none
    # takes a scale of each batch.
    told: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def assignment(self) -> dict[str, SiteFormats]:
        """Formats by site."""
        return dict(self.formats)


def freeze(
    fun: Callable,
    assignment: Assignment,
    params: Any,
    *args: Any,
    state: CalibrationState | None = None,
    **kwargs: Any,
) -> Frozen:
    """Stores the weights of quantized sites as `QTensor`s and keeps no float copy of them.

    What is computed from parameters alone on the way to a site (casts, transposes, weight
    standardization, LoRA sums) is folded: the operand itself is stored, once for all sites that
    take it in one format, transposed or not. Parameters that nothing else reads are dropped. Under
    `jax.eval_shape` this gives the abstract `Frozen` that orbax restores into.

    Args:
      fun, assignment, params, args, kwargs: as for `quantize(fun)(assignment, params, *args)`;
        formats must be concrete. Data may be abstract.
      state: of `quantize_with_state(fun)`: activations then have static scales, from it alone. One
        that no calibration has told anything of takes a scale of each batch, under the warning
        `NotCalibrated`. Freeze outside of jit: else that is not known, and is asked at each call.

    Raises:
      SiteError: the assignment is not of this function; a calibration has state and none is given;
        a weight depends on what an earlier iteration of a loop left.
      FormatError: a format is traced, or has more than 8 bits and no storage dtype.
    """
    assignment = {name: _map_formats(_concrete, formats) for name, formats in assignment.items()}
    trace = trace_function(fun, params, args, kwargs, {})
    assignment = for_sites(assignment, trace)
    check_assignment(assignment, trace.sites)
    plans = make_plans(trace, assignment, None)
    stacks, held = stacks_of(trace.sites, assignment), flat_state(state or {})
    shared = shared_weights(trace.sites, plans, stacks)
    _check_state(held, init_states(trace, plans))
    leaves, tree = jax.tree.flatten(params)
    counted = sum(map(is_array, leaves))

    @jax.jit
    def find(known, held):
        inputs = [*known, *[MISSING] * (len(trace.inputs) - counted)]
        own = {key: plan for key, plan in plans.items() if key not in elsewhere}
        return _stored_in_groups(trace._replace(inputs=inputs), own, Held(held, {}, stacks))

    elsewhere = {one.key for one in shared}
    found = find(trace.inputs[:counted], held)
    weights: dict[str, dict[str, QTensor | MixedStack]] = {}
    for (name, field), weight in found.items():
        weights.setdefault(name, {})[field] = weight
    stored = {*found, *elsewhere}
    needed = iter(_needed_leaves(trace, stored))
    kept = [leaf if not is_array(leaf) or next(needed) else _dropped(leaf) for leaf in leaves]
    activations = {
        name: {f: s for f, s in fields.items() if (name, f) not in stored}
        for name, fields in (state or {}).items()
    }
    told = _told(trace, plans, activations)
    keys: dict[str, dict[str, jax.Array]] = {}
    for name, formats in assignment.items():
        stack, _ = split_layer(name, trace.sites)
        for field in SIDES:
            spec = getattr(formats, field)
            if spec is not None and spec.key is not None and (stack, field) not in stored:
                keys.setdefault(name, {})[field] = spec.key
    static = tuple((name, _map_formats(_without_key, f)) for name, f in assignment.items())
    params = wrapped(jax.tree.unflatten(tree, kept))
    stacks_named = dict.fromkeys(split_layer(name, trace.sites)[0] for name in assignment)
    lookups = tuple(name for name in stacks_named if trace.sites[name].kind == "gather")
    return Frozen(params, weights, activations, keys, static, shared, lookups, told)


def _stored_in_groups(
    trace: Trace, plans: Mapping[Key, Plan], held: Held
) -> dict[Key, QTensor | MixedStack]:
    """The weights of sites in storage; layers of a stack by the formats that they have."""
    ways = {key: _distinct(plan) for key, plan in plans.items()}
    found: dict[Key, QTensor | MixedStack] = {}
    groups: dict[Key, list[QTensor]] = {}
    for number in range(max((len(kinds) for kinds, _ in ways.values()), default=0)):
        # The whole stack in one of its formats: of it, the layers that have this one are kept.
        alike = {key: kinds[number] for key, (kinds, _) in ways.items() if number < len(kinds)}
        for key, weight in _stored_weights(trace, alike, held).items():
            groups.setdefault(key, []).append(weight)
    for key, stacks in groups.items():
        kinds, kind_of = ways[key]
        found[key] = stacks[0] if len(kinds) == 1 else _mixed(trace, held, key, stacks, kind_of)
    return found


def _distinct(plan: Plan) -> tuple[list[Plan], list[int]]:
    """The plans that the layers of a stack have, without repetition, and which each layer has."""
    kinds: list[Plan] = []
    kind_of = []
    for own in plan.each:
        known = (n for n, kind in enumerate(kinds) if equal_specs(kind.quantizer, own.quantizer))
        number = next(known, len(kinds))
        if number == len(kinds):
            kinds.append(own)
        kind_of.append(number)
    return kinds, kind_of


def _mixed(
    trace: Trace, held: Held, key: Key, stacks: Sequence[QTensor], kind_of: Sequence[int]
) -> MixedStack:
    """Of stacks in one format each what the layers of a site take."""
    site = trace.sites[key[0]]
    # Layers that differ in a scan that the weight is not sliced by take the same of it.
    sliced = [(key, path) in held.stacks for path, _ in site.layers]
    lengths = [length for (_, length), is_own in zip(site.layers, sliced) if is_own]
    members: list[dict[int, int]] = [{} for _ in stacks]
    places = []
    for index, kind in zip(layer_indices(site), kind_of):
        own = [i for i, is_own in zip(index, sliced) if is_own]
        row = int(np.ravel_multi_index(own, lengths)) if own else 0
        places.append(members[kind].setdefault(row, len(members[kind])))

    def taken(leaf: jax.Array, rows: Mapping[int, int]) -> jax.Array:
        return leaf.reshape(-1, *leaf.shape[len(lengths) :])[np.array(list(rows))]

    groups = (jax.tree.map(lambda leaf, m=m: taken(leaf, m), s) for s, m in zip(stacks, members))
    return MixedStack(tuple(groups), tuple(kind_of), tuple(places))


def _stored_weights(trace: Trace, plans: Mapping[Key, Plan], held: Held) -> dict[Key, QTensor]:
    """The weights of sites in storage; of the trace's inputs those that are data are missing."""
    quantized = quantized_by(trace, plans)

    def at_site(name: str, eqn, operands: Sequence, held: Held) -> Outcome:
        site, found = trace.sites[name], {}
        for side, x in zip(site.equation_sides, operands):
            key = (name, side)
            if key not in plans or getattr(site, side).role == "activation":
                continue
            if held.is_stacked(key):
                continue  # it is found inside of the scan
            if x is MISSING:
                found[key] = MISSING
                continue
            x = one_of(x, getattr(site, side).uniform)
            state = held.states.get(key, ())
            bounds = calibrated(quantized(key, x, {}), state, update=False)[0].bounds
            rows = int(site.kind == "gather")
            order = () if rows else storage_order(site_layout(eqn), SIDES.index(side))
            found[key] = quantize_tensor(
                x, plans[key].quantizer, bounds=bounds, row_axes=rows, order=order
            )
        return [MISSING] * len(eqn.outvars), found

    found = Interpreter(trace, {name for name, _ in plans}, at_site, visit_bodies).run(held)[1]
    for (name, side), weight in found.items():
        if weight is MISSING:
            raise SiteError(
                f"The {side} weight of site {name!r} is computed inside a loop from what an earlier"
                " iteration left, or from random bits, so it cannot be stored. Assign it None,"
                " compute it outside, or freeze the function as it is in evaluation."
            )
    return found


def _dropped(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf  # a random key: no weight, and nothing to gain
    return Dropped(tuple(leaf.shape), np.dtype(leaf.dtype))


def _check_state(held: Mapping, expected: Mapping) -> None:
    for name, field in sorted(set(held) ^ set(expected)):
        if (name, field) in expected:
            raise SiteError(
                f"Site {name!r}: the calibration of {field} has state, and none was given. Pass"
                " state=..., as quantize_with_state(fun).apply returned it."
            )
        raise SiteError(
            f"The state is not of this assignment: {field} of site {name!r} has no calibration with"
            " state there."
        )


class NotCalibrated(UserWarning):
    """An operand that calibration has told nothing of takes a scale of each batch."""


def _told(trace: Trace, plans: Mapping[Key, Plan], states: CalibrationState) -> bool:
    """Whether calibration is known to have told something of all these activations."""
    silent, traced = [], False
    for (name, field), state in flat_state(states).items():
        layers, plan = trace.sites[name].layers, plans[name, field]
        lengths = [length for _, length in layers]
        fmt = stack_formats([plan.quantizer.fmt for plan in plan.each])
        fmt = jax.tree.map(
            lambda column, n=lengths: np.broadcast_to(column, math.prod(n)).reshape(n), fmt
        )
        nothing = functools.partial(_tells_nothing, plan)
        for _ in layers:
            nothing = jax.vmap(nothing)
        found = nothing(fmt, state)
        if isinstance(found, jax.core.Tracer):
            traced = True
        elif np.any(found):
            silent.append(f"{name} ({field})")
    if silent:
        warnings.warn(
            f"Calibration has told nothing of {', '.join(silent[:4])}: served with a scale of each"
            " batch, not a static one. Calibrate on data that reach all sites.",
            NotCalibrated,
            stacklevel=3,
        )
    return not silent and not traced


def _tells_nothing(plan: Plan, fmt: NumericFormat, state: Any) -> jax.Array:
    grid, read = as_grid(fmt, np.dtype(np.float32)), plan.how.calibration.read
    assert read is not None  # else it has no state
    return tells_nothing(read(state, grid))


def _map_formats(fun: Callable, formats: SiteFormats) -> SiteFormats:
    """`fun` of both operands' formats; there are no gradients in serving."""
    return SiteFormats(*(None if f is None else fun(f) for f in (formats.lhs, formats.rhs)))


def _concrete(spec: Any) -> Quantizer:
    """A quantizer whose format is Python numbers, so that it can be static.

    Raises:
      SiteError: it is of a subnet.
    """
    q = quantizer(spec)
    if q.active is not None:
        raise SiteError(
            "A subnet is frozen as a model of its own: this assignment says which elements are"
            " `active`. Cut its variables out, `net.extract(choices, variables)`, and freeze the"
            " model that is built like it, under `space.concrete_assignment(choices)`."
        )
    return dataclasses.replace(q, fmt=concrete_format(q.fmt, "freeze"))


def _without_key(q: Quantizer) -> Quantizer:
    return dataclasses.replace(q, key=None)


def _needed_leaves(trace: Trace, stored: Collection[tuple[str, str]]) -> list[bool]:
    """Which inputs of the trace are read if some operands of sites are not."""
    cut = {
        path: [(name, side) not in stored for side in trace.sites[name].equation_sides]
        for path, name in trace.site_paths.items()
    }
    jaxpr = trace.closed.jaxpr
    return _needed_inputs(jaxpr, [True] * len(jaxpr.outvars), (), cut)


def _needed_inputs(
    jaxpr: jex_core.Jaxpr, used: Sequence[bool], path: Path, cut: Mapping[Path, list[bool]]
) -> list[bool]:
    def variables(atoms, flags):
        return {v for v, f in zip(atoms, flags) if f and not isinstance(v, jex_core.Literal)}

    live = variables(jaxpr.outvars, used)
    for index in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[index]
        results = [v in live for v in eqn.outvars]
        if any(results) or eqn.effects:
            live |= variables(eqn.invars, _needed_operands(eqn, results, path + (index,), cut))
    return [v in live for v in jaxpr.invars]


def _needed_operands(eqn, used: Sequence[bool], here: Path, cut: Mapping) -> Sequence[bool]:
    if here in cut:
        return cut[here]
    places = range(len(eqn.invars))
    match flow := control_flow(eqn):
        case Call() | Remat():
            needed = set()
        case Scan() as scan:
            needed, (used, _) = set(), scan_liveness(scan, used)
        case Cond() as cond:
            needed = {cond.split(places)[0]}
        case While() as loop:
            needed = set(loop.split(places)[2])
        case _:
            return [True] * len(eqn.invars)
    for body, called_on in flow.calls(places):
        results = [True] * len(body.jaxpr.outvars) if isinstance(flow, While) else used
        flags = _needed_inputs(body.jaxpr, results, body.under(here), cut)
        needed.update(place for place, flag in zip(called_on, flags) if flag)
    return [place in needed for place in places]
