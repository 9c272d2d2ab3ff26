"""Sites: the products and table lookups of a function, found in its jaxpr and named.

`analyze` walks a closed jaxpr once, abstractly. It follows which values come from parameters, which
from data, and which can never be negative, enters every call-like primitive, and lists the products
and lookups whose results are used. `aqt_search.tracing.transform` runs the same jaxpr with those
quantized.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.granularity import free_axes
from aqt_search.tracing.nonnegative import is_nonnegative_constant, is_unsigned, nonnegative_results

SITE_PRIMITIVES = ("dot_general", "conv_general_dilated")
LOOKUP_PRIMITIVES = ("gather",)  # sites where they take rows of a weight: see `lookup_axis`
# Products that exist as primitives of their own and that we cannot quantize: refused, not skipped.
_FOREIGN_PRODUCTS = ("ragged_dot", "ragged_dot_general", "scaled_matmul", "scaled_dot")
# Primitives with one sub-jaxpr that takes the equation's own operands and returns its results.
INLINED_CALLS = ("jit", "pjit", "closed_call", "core_call")
REMAT_CALLS = ("remat2", "checkpoint", "remat")
_CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")

Path = tuple[int, ...]  # indices of equations and, between them, of their sub-jaxprs


class SiteError(ValueError):
    """A site that does not exist, or that cannot be quantized where it stands."""


class SiteFormats(NamedTuple):
    """How a site is quantized: each field a `NumericFormat` of scalars, a `Quantizer` or None.

    None leaves an operand, or the gradient in a gradient product, in floating point.
    """

    lhs: object | None = None
    rhs: object | None = None
    lhs_gradient: object | None = None  # of the result, in the product for the gradient of lhs
    rhs_gradient: object | None = None  # and of rhs


def is_unquantized(formats: SiteFormats) -> bool:
    """Whether formats leave their site as it is."""
    return all(fmt is None for fmt in formats)


@dataclasses.dataclass(frozen=True)
class Operand:
    """One side of a product, or the table or the indices of a lookup."""

    shape: tuple[int, ...]
    dtype: np.dtype
    role: str  # "weight" (parameters only), "activation" (depends on data), "constant" (neither)
    parameter: str | None  # the parameter leaf a weight comes from
    channel_axes: tuple[int, ...]  # axes with a scale of their own: output channels; () activations
    copies: int = 1  # how many of this shape are stored: the iterations of the scan it is sliced by
    nonnegative: bool = False  # whether no element can be negative (False: that is not known)
    contracting: tuple[int, ...] = ()  # axes the product sums over; blocks run along the last

    @property
    def size(self) -> int:
        """Number of stored elements."""
        return self.copies * math.prod(self.shape)

    @property
    def scales(self) -> int:
        """Number of stored scales once the operand is quantized."""
        return self.copies * math.prod(self.shape[axis] for axis in self.channel_axes)


@dataclasses.dataclass(frozen=True)
class Site:
    """A product or a table lookup that quantization applies to.

    The equation of a product has the operands (lhs, rhs). That of a lookup, of kind "gather", has
    them the other way round: it is (table, indices) = (rhs, lhs). The table is a weight with one
    scale per row; the indices are integers, which are never quantized.
    """

    name: str
    kind: str  # "dot_general", "conv_general_dilated" or "gather"
    lhs: Operand
    rhs: Operand
    macs: int  # multiply-accumulates of one execution, at the trace's batch size; lookups have 0
    repeats: int | None  # executions per call: the length of a scan; None in a while loop
    scope: str  # the name scopes it was traced under
    refused: str | None = None  # why it cannot be quantized

    @property
    def lhs_shape(self) -> tuple[int, ...]:
        """Shape of the left operand."""
        return self.lhs.shape

    @property
    def rhs_shape(self) -> tuple[int, ...]:
        """Shape of the right operand."""
        return self.rhs.shape

    @property
    def weight(self) -> Operand | None:
        """The operand that is a weight (the right one if both are not data), None if neither is."""
        for operand in (self.rhs, self.lhs):
            if operand.role == "weight":
                return operand
        return None


class _Origin(NamedTuple):
    parameters: frozenset[int]  # indices of the parameter leaves a value depends on
    data: bool  # whether it depends on a data argument
    copies: int = 1  # how many slices of this shape the scans around it go through
    nonnegative: bool = False  # whether it is known never to be negative

    def join(self, other: _Origin) -> _Origin:
        """The origin of a value that is either of two."""
        return _Origin(
            self.parameters | other.parameters,
            self.data or other.data,
            max(self.copies, other.copies),
            self.nonnegative and other.nonnegative,
        )

    def chosen_by(self, decision: _Origin) -> _Origin:
        """The origin of a value that depends on a decision, but takes no element from it."""
        return self.join(decision._replace(nonnegative=True))


_NOWHERE = _Origin(frozenset(), False)


def _join(origins: Sequence[_Origin]) -> _Origin:
    """What a value computed from others depends on; its sign is not known."""
    joined = _NOWHERE
    for origin in origins:
        joined = joined.join(origin)
    return joined


def _results(eqn: jex_core.JaxprEqn, inputs: Sequence[_Origin]) -> list[_Origin]:
    """The origins of the results of an equation that is not entered."""
    flags = nonnegative_results(eqn, [o.nonnegative for o in inputs])
    return [_join(inputs)._replace(nonnegative=flag) for flag in flags]


def _constant(value) -> _Origin:
    return _NOWHERE._replace(nonnegative=is_nonnegative_constant(value))


class _Found(NamedTuple):
    path: Path
    eqn: jex_core.JaxprEqn
    origins: tuple[_Origin, ...]
    repeats: int | None
    scope: str
    refused: str | None


# --- Which equations are used ---------------------------------------------------------------------


def _closed_parts(jaxpr) -> tuple[jex_core.Jaxpr, Sequence]:
    """A jaxpr with its constants, whether it came open or closed."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def sub_jaxprs(eqn: jex_core.JaxprEqn) -> list[tuple[jex_core.Jaxpr, Sequence]]:
    """The jaxprs an equation holds, each with its constants, in the order of their parameters."""
    found = []
    for _, value in sorted(eqn.params.items()):
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (jex_core.Jaxpr, jex_core.ClosedJaxpr)):
                found.append(_closed_parts(item))
    return found


def _is_variable(atom) -> bool:
    return not isinstance(atom, jex_core.Literal)


def used_equations(jaxpr: jex_core.Jaxpr, used_outputs: Sequence[bool]):
    """Which results of every equation are used, and which inputs of the jaxpr.

    Returns (one tuple of bools per equation, all False if it is dead; a list of bools).
    """
    used = {v for v, u in zip(jaxpr.outvars, used_outputs) if u and _is_variable(v)}
    results: list[tuple[bool, ...]] = [()] * len(jaxpr.eqns)
    for index in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[index]
        results[index] = tuple(v in used for v in eqn.outvars)
        if any(results[index]) or eqn.effects:
            inputs = _used_inputs(eqn, results[index])
            used.update(v for v, u in zip(eqn.invars, inputs) if u and _is_variable(v))
    return results, [v in used for v in jaxpr.invars]


def _used_inputs(eqn: jex_core.JaxprEqn, used: Sequence[bool]) -> Sequence[bool]:
    name = eqn.primitive.name
    if name in INLINED_CALLS + REMAT_CALLS:
        ((body, _),) = sub_jaxprs(eqn)
        return used_equations(body, used)[1]
    if name == "scan":
        return scan_liveness(eqn, used)[1]
    return [True] * len(eqn.invars)


def scan_counts(eqn: jex_core.JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many the carry.

    Read off the shapes, since the parameters that tell it changed between JAX 0.10 and 0.11: what
    is scanned over, and what is stacked up, has one axis more outside of the body than inside.
    """
    body, _ = _closed_parts(eqn.params["jaxpr"])

    def unsliced(outside, inside) -> int:
        return sum(o.aval.ndim == i.aval.ndim for o, i in zip(outside, inside, strict=True))

    carries = unsliced(eqn.outvars, body.outvars)
    return unsliced(eqn.invars, body.invars) - carries, carries


def scan_liveness(eqn: jex_core.JaxprEqn, used: Sequence[bool]):
    """Which results of a scan's body are used, by a fixed point over the carry; which inputs."""
    body, _ = _closed_parts(eqn.params["jaxpr"])
    consts, carries = scan_counts(eqn)
    used = list(used)
    while True:
        inputs = used_equations(body, used)[1]
        carried = [u or v for u, v in zip(used[:carries], inputs[consts : consts + carries])]
        if carried == used[:carries]:
            return used, inputs
        used[:carries] = carried


# --- The walk -------------------------------------------------------------------------------------


class _Walk:
    """Lists the sites of a jaxpr in program order."""

    def __init__(self):
        self.found: list[_Found] = []

    def run(self, body, origins, used, path: Path, repeats: int | None, scope: str):
        """Follows origins through a body (a jaxpr and its constants) to those of its outputs."""
        jaxpr, consts = body
        env = {v: _constant(value) for v, value in zip(jaxpr.constvars, consts)}
        env.update(zip(jaxpr.invars, origins))

        def origin(atom) -> _Origin:
            found = env.get(atom, _NOWHERE) if _is_variable(atom) else _constant(atom.val)
            return found._replace(nonnegative=found.nonnegative or is_unsigned(atom.aval))

        results, _ = used_equations(jaxpr, used)
        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [origin(v) for v in eqn.invars]
            if any(results[index]) or eqn.effects:
                inner_scope = _join_scope(scope, _scope_name(eqn.source_info.name_stack))
                handler = self._handler(eqn)
                outputs = handler(
                    eqn, inputs, results[index], path + (index,), repeats, inner_scope
                )
            else:
                outputs = [_join(inputs)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outputs))
        return [origin(v) for v in jaxpr.outvars]

    def _handler(self, eqn) -> Callable:
        name = eqn.primitive.name
        if name in SITE_PRIMITIVES:
            return self._product
        if name in LOOKUP_PRIMITIVES:
            return self._lookup
        if name in INLINED_CALLS + REMAT_CALLS:
            return self._call
        return {"scan": self._scan, "while": self._while, "cond": self._cond}.get(name, self._other)

    def _product(self, eqn, inputs, used, path, repeats, scope):
        floating = all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.invars)
        # A product of parameters and constants alone is part of a weight: it is folded at serving.
        if floating and any(o.data for o in inputs):
            self.found.append(_Found(path, eqn, tuple(inputs), repeats, scope, None))
        return _results(eqn, inputs)

    def _lookup(self, eqn, inputs, used, path, repeats, scope):
        table, indices = inputs
        floating = jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
        is_weight = floating and table.parameters and not table.data
        if is_weight and indices.data and lookup_axis(eqn) is not None:
            self.found.append(_Found(path, eqn, tuple(inputs), repeats, scope, None))
        return _results(eqn, inputs)

    def _call(self, eqn, inputs, used, path, repeats, scope):
        (body,) = sub_jaxprs(eqn)
        return self.run(body, inputs, used, path + (0,), repeats, scope)

    def _scan(self, eqn, inputs, used, path, repeats, scope):
        body = _closed_parts(eqn.params["jaxpr"])
        consts, carries = scan_counts(eqn)
        used, _ = scan_liveness(eqn, used)
        repeats = None if repeats is None else repeats * eqn.params["length"]

        def once(origins):
            return self.run(body, origins, used, path + (0,), repeats, scope)

        sliced = [
            o._replace(copies=o.copies * eqn.params["length"]) for o in inputs[consts + carries :]
        ]
        inputs = [*inputs[: consts + carries], *sliced]
        outputs = once(self._carry_fixed_point(once, inputs, consts, carries))
        if eqn.params["length"] == 0:  # the carry comes out as it went in
            outputs[:carries] = inputs[consts : consts + carries]
        # What leaves a scan is one value or a stack of all its slices.
        return [o._replace(copies=1) for o in outputs]

    def _carry_fixed_point(self, once, inputs, first: int, carries: int):
        """Widens the origins of loop carries until an iteration adds nothing; finds no sites."""
        while True:
            found = len(self.found)
            outputs = once(inputs)
            del self.found[found:]
            carried = inputs[first : first + carries]
            widened = [a.join(b) for a, b in zip(carried, outputs)]
            if widened == carried:
                return inputs
            inputs[first : first + carries] = widened

    def _while(self, eqn, inputs, used, path, repeats, scope):
        test = _closed_parts(eqn.params["cond_jaxpr"])
        body = _closed_parts(eqn.params["body_jaxpr"])
        split = eqn.params["cond_nconsts"]
        consts = eqn.params["body_nconsts"]
        carry_count = len(inputs) - split - consts

        def once(origins):
            return self.run(body, origins, [True] * carry_count, path + (1,), None, scope)

        inner = self._carry_fixed_point(once, list(inputs[split:]), consts, carry_count)
        carry = inner[consts:]
        decides = self.run(test, list(inputs[:split]) + carry, [True], path + (0,), None, scope)
        once(inner)
        return [o.chosen_by(decides[0]) for o in carry]

    def _cond(self, eqn, inputs, used, path, repeats, scope):
        index, operands = inputs[0], inputs[1:]
        branches = [
            self.run(body, operands, used, path + (number,), repeats, scope)
            for number, body in enumerate(sub_jaxprs(eqn))
        ]
        return [functools.reduce(_Origin.join, o).chosen_by(index) for o in zip(*branches)]

    def _other(self, eqn, inputs, used, path, repeats, scope):
        joined = _join(inputs)
        name = eqn.primitive.name
        if name in _FOREIGN_PRODUCTS and joined.data:
            reason = f"{name} has no quantized form yet"
            self.found.append(_Found(path, eqn, tuple(inputs), repeats, scope, reason))
        outputs = _results(eqn, inputs)
        for number, body in enumerate(sub_jaxprs(eqn)):
            jaxpr, inner = body[0], _Walk()
            is_primal = name in _CUSTOM_CALLS and len(jaxpr.invars) == len(inputs)
            # How operands reach an unknown primitive's jaxpr is unknown: any may be data.
            origins = [joined] * len(jaxpr.invars)
            if is_primal:
                origins = [joined._replace(nonnegative=o.nonnegative) for o in inputs]
            every = [True] * len(jaxpr.outvars)
            results = inner.run(body, origins, every, path + (number,), repeats, scope)
            if is_primal:
                outputs = [joined._replace(nonnegative=o.nonnegative) for o in results]
            reason = _CUSTOM_RULE if name in _CUSTOM_CALLS else f"it is inside {name!r}"
            self.found.extend(f._replace(refused=f.refused or reason) for f in inner.found)
        return outputs


_CUSTOM_RULE = (
    "it is inside a function with a custom derivative rule (custom_jvp or custom_vjp), which would"
    " not see the quantization"
)


_FORWARD_TRANSFORM = re.compile(r"\b(?:vmap|jvp)\(([^()]*)\)")


def _scope_name(name_stack) -> str:
    """The scopes as written, `vmap(encoder)/attention` as `encoder/attention`; `transpose` stays.

    A product keeps its name if the function is batched or differentiated; its gradients differ.
    """
    scope, count = str(name_stack), 1
    while count:
        scope, count = _FORWARD_TRANSFORM.subn(r"\1", scope)
    return _join_scope(*scope.split("/"))


def _join_scope(*scopes: str) -> str:
    return "/".join(s for s in scopes if s)


# --- Names ----------------------------------------------------------------------------------------


def parameter_name(path: Sequence) -> str:
    """The path of a leaf, without Flax's leading collection 'params' and NNX's last 'value'."""
    parts = [jax.tree_util.keystr((key,), simple=True, separator="/") for key in path]
    if len(parts) > 1 and parts[0] == "params":
        parts = parts[1:]
    if len(parts) > 1 and parts[-1] in ("value", "raw_value"):
        parts = parts[:-1]
    return "/".join(parts) or "params"


def lookup_axis(eqn: jex_core.JaxprEqn) -> int | None:
    """The axis that a gather indexes if it takes whole rows along it (`table[ids]`), else None.

    vmap of an indexed row writes a start for every axis and keeps the row's axis of length 1.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    partial = [axis for axis, size in enumerate(sizes) if size != shape[axis]]
    axes = {*numbers.collapsed_slice_dims, *partial}
    if len(shape) < 2 or len(axes) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = axes
    return axis if sizes[axis] == 1 and axis in numbers.start_index_map else None


def _lhs_rhs(eqn: jex_core.JaxprEqn, values: Sequence) -> tuple:
    """Of values by operand of a site's equation those of (lhs, rhs)."""
    first, second = values[:2]
    return (second, first) if eqn.primitive.name in LOOKUP_PRIMITIVES else (first, second)


def _contracting(eqn: jex_core.JaxprEqn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of (lhs, rhs) that share one scale at finest: of a product those it sums over."""
    if eqn.primitive.name in LOOKUP_PRIMITIVES:
        return (), free_axes(eqn.invars[0].aval.ndim, (lookup_axis(eqn),))
    if eqn.primitive.name == "dot_general":
        return eqn.params["dimension_numbers"][0]
    lhs_spec, rhs_spec, _ = eqn.params["dimension_numbers"]
    return tuple((*spec[2:], spec[1]) for spec in (lhs_spec, rhs_spec))


def _macs(eqn: jex_core.JaxprEqn) -> int:
    if eqn.primitive.name in LOOKUP_PRIMITIVES:
        return 0
    output = math.prod(eqn.outvars[0].aval.shape)
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    if eqn.primitive.name == "dot_general":
        return output * math.prod(lhs[axis] for axis in _contracting(eqn)[0])
    taps = math.prod(rhs[axis] for axis in _contracting(eqn)[1])
    # A transposed convolution multiplies only what is not an inserted zero.
    return output * taps // math.prod(eqn.params["lhs_dilation"])


def _operand(
    atom, origin: _Origin, contracting, names: Sequence[str], sizes: Sequence[int]
) -> Operand:
    shape, dtype = tuple(atom.aval.shape), np.dtype(atom.aval.dtype)
    contracting = tuple(contracting)
    if origin.data:
        return Operand(shape, dtype, "activation", None, (), 1, origin.nonnegative, contracting)
    axes = free_axes(len(shape), contracting)
    stored = origin.copies, origin.nonnegative, contracting
    if not origin.parameters:
        return Operand(shape, dtype, "constant", None, axes, *stored)
    size = origin.copies * math.prod(shape)
    # A weight computed from several leaves (a LoRA sum, a gain) is named by the one of its size.
    leaf = min(origin.parameters, key=lambda i: (sizes[i] != size, -sizes[i], i))
    return Operand(shape, dtype, "weight", names[leaf], axes, *stored)


def _site(found: _Found, names: Sequence[str], sizes: Sequence[int]) -> Site:
    eqn = found.eqn
    if eqn.primitive.name in _FOREIGN_PRODUCTS:
        lhs, rhs = (
            Operand(tuple(v.aval.shape), np.dtype(v.aval.dtype), "activation", None, ())
            for v in eqn.invars[:2]
        )
        macs = 0
    else:
        sides = _lhs_rhs(eqn, eqn.invars), _lhs_rhs(eqn, found.origins), _contracting(eqn)
        lhs, rhs = (_operand(v, o, c, names, sizes) for v, o, c in zip(*sides))
        macs = _macs(eqn)
    site = Site("", eqn.primitive.name, lhs, rhs, macs, found.repeats, found.scope, found.refused)
    name = site.weight.parameter if site.weight else _join_scope(found.scope, eqn.primitive.name)
    return dataclasses.replace(site, name=name)


def _with_unique_names(sites: Sequence[Site]) -> list[Site]:
    """Numbers sites of equal name in program order: `name#1`, `name#2`; a lone name stays bare."""
    totals = collections.Counter(site.name for site in sites)
    # A lone name may itself end in a number that the numbering must not give again.
    taken = {name for name, total in totals.items() if total == 1}
    named = []
    for site in sites:
        name = site.name
        if totals[name] > 1:
            numbered = (f"{name}#{number}" for number in itertools.count(1))
            name = next(candidate for candidate in numbered if candidate not in taken)
            taken.add(name)
        named.append(dataclasses.replace(site, name=name))
    return named


def analyze(
    jaxpr: jex_core.Jaxpr, names: Sequence[str | None], consts: Sequence = ()
) -> tuple[dict[str, Site], dict[Path, str]]:
    """Finds the sites of a jaxpr.

    Args:
      jaxpr: the function's jaxpr.
      names: for every input of the jaxpr the name of its parameter leaf, or None for data.
      consts: the values of its constants; without them their signs are not known.

    Returns:
      The sites by name in program order, and the name of the site at each path.
    """
    origins = [
        _Origin(frozenset(), True) if name is None else _Origin(frozenset([index]), False)
        for index, name in enumerate(names)
    ]
    walk = _Walk()
    walk.run((jaxpr, consts), origins, [True] * len(jaxpr.outvars), (), 1, "")
    sizes = [math.prod(getattr(v.aval, "shape", ())) for v in jaxpr.invars]
    sites = _with_unique_names([_site(found, names, sizes) for found in walk.found])
    return (
        {site.name: site for site in sites},
        {found.path: site.name for found, site in zip(walk.found, sites)},
    )
