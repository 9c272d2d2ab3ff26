"""Origins: which values of a jaxpr come from parameters and which from data, and its products.

A walk in program order follows them through every primitive that holds jaxprs, and lists the
products and lookups of data whose results are used. `aqt_search.tracing.sites` names them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from aqt_search.tracing.control_flow import (
    Body,
    Call,
    Cond,
    Custom,
    Path,
    Remat,
    Scan,
    While,
    control_flow,
)
from aqt_search.tracing.liveness import scan_liveness, used_equations
from aqt_search.tracing.nonnegative import is_nonnegative_constant, is_unsigned, nonnegative_results
from aqt_search.tracing.uniform_axes import Axes, every_axis, uniform_results
from aqt_search.tracing.value_numbers import ValueNumbers

SITE_PRIMITIVES = ("dot_general", "conv_general_dilated", "ragged_dot_general")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
LOOKUP_PRIMITIVES = ("gather",)  # sites where they take rows of a weight: see `lookup_axis`
# Products that exist as primitives of their own and that we cannot quantize: refused, not skipped.
FOREIGN_PRODUCTS = ("ragged_dot", "scaled_matmul", "scaled_dot")


Loop = tuple[Path, int]  # a scan's path and length


class Origin(NamedTuple):
    """What a value is computed from."""

    parameters: frozenset[int]  # indices of the parameter leaves a value depends on
    data: bool  # whether it depends on a data argument
    nonnegative: bool = False  # whether it is known never to be negative
    sliced_by: frozenset[Loop] = frozenset()  # the scans that give it a slice in each iteration
    number: int | None = None  # of its value, where that is known (`ValueNumbers`)
    uniform: Axes = frozenset()  # axes along which all elements are known to be equal
    multiplied: frozenset[int] = frozenset()  # parameters that came through a product of such
    random: str = ""  # of data: "bits" if they are random ones, "mask" if these were compared
    rows: frozenset[Path] = frozenset()  # lookups in a table, of rows that do not depend on data

    def join(self, other: Origin) -> Origin:
        """The origin of a value that is either of two, or computed from both.

        A weight under a random mask, as in dropout, stays a weight: so it is without the mask.
        """
        parameters = self.parameters | other.parameters
        randoms = {o.random for o in (self, other) if o.data}
        data = bool(randoms - {"mask"}) or (bool(randoms) and not parameters)
        return Origin(
            parameters,
            data,
            self.nonnegative and other.nonnegative,
            self.sliced_by | other.sliced_by,
            self.number if self.number == other.number else None,
            self.uniform & other.uniform,
            self.multiplied | other.multiplied,
            "" if not data or "" in randoms else "bits" if "bits" in randoms else "mask",
            self.rows | other.rows,
        )

    def of_parts(self, whole: Origin) -> Origin:
        """What is known of the value alone, and the rest as of a whole it belongs to."""
        known = {name: getattr(self, name) for name in ("nonnegative", "number", "uniform")}
        return whole._replace(**known)

    def chosen_by(self, decision: Origin) -> Origin:
        """The origin of a value that depends on a decision, but takes no element from it."""
        return self.join(decision._replace(nonnegative=True, number=None))._replace(number=None)


_NOWHERE = Origin(frozenset(), False)


def _join(origins: Sequence[Origin]) -> Origin:
    """What a value computed from others depends on; of the value itself nothing is known."""
    joined = _NOWHERE
    for origin in origins:
        joined = joined.join(origin)
    return joined


def _constant(value, number: int) -> Origin:
    uniform = frozenset(range(np.ndim(value))) if np.size(value) == 1 else frozenset()
    nonnegative = is_nonnegative_constant(value)
    return _NOWHERE._replace(nonnegative=nonnegative, number=number, uniform=uniform)


class Place(NamedTuple):
    """Where in the program equations stand."""

    path: Path  # of the equation, or of the body that they are in
    repeats: int | None  # how often they run; None: that is not known
    scope: str  # name scopes
    layers: tuple[Loop, ...] = ()  # the scans around it that go through slices of weights

    def inside(self, body: Body, repeats: int | None, layers: Sequence[Loop] = ()) -> Place:
        """That of a body of the equation."""
        return Place(body.under(self.path), repeats, self.scope, (*self.layers, *layers))


class Found(NamedTuple):
    """A product or lookup."""

    eqn: jex_core.JaxprEqn
    origins: tuple[Origin, ...]  # of its operands
    place: Place
    refused: str | None = None  # why it cannot be quantized


def find_products(body: Body, origins: Sequence[Origin]) -> tuple[list[Found], ValueNumbers]:
    """The products and lookups of a whole program in program order, given the inputs' origins."""
    walk = _Walk(ValueNumbers())
    walk.run(body, origins, [True] * len(body.jaxpr.outvars), Place((), 1, ""))
    part_of_weights = walk.fixed_rows - walk.met
    return [f for f in walk.found if f.place.path not in part_of_weights], walk.numbers


class _Walk:
    def __init__(self, numbers: ValueNumbers):
        self.found: list[Found] = []
        self.numbers = numbers
        self.fixed_rows: set[Path] = set()  # lookups of rows that do not depend on data
        self.met: set[Path] = set()  # of those, what data were added to, or the like

    def run(
        self, body: Body, origins: Sequence[Origin], used: Sequence[bool], place: Place
    ) -> list[Origin]:
        """Follows origins through a body to those of its outputs."""
        jaxpr = body.jaxpr
        env = {
            v: _constant(value, self.numbers.of("constant", id(value)))
            for v, value in zip(jaxpr.constvars, body.consts)
        }
        env.update(zip(jaxpr.invars, origins))

        def origin(atom) -> Origin:
            if isinstance(atom, jex_core.Literal):
                found = _constant(atom.val, self.numbers.literal(atom.val))
            else:
                found = env.get(atom, _NOWHERE)
            return found._replace(nonnegative=found.nonnegative or is_unsigned(atom.aval))

        results, _ = used_equations(jaxpr, used)
        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [origin(v) for v in eqn.invars]
            if any(results[index]) or eqn.effects:
                scope = join_scope(place.scope, _scope_name(eqn.source_info.name_stack))
                here = place._replace(path=(*place.path, index), scope=scope)
                outputs = self._equation(eqn, inputs, results[index], here)
            else:
                outputs = [_join(inputs)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outputs))
        return [origin(v) for v in jaxpr.outvars]

    def _equation(self, eqn, inputs: list[Origin], used, here: Place) -> list[Origin]:
        match control_flow(eqn):
            case Call(body) | Remat(body):
                return self.run(body, inputs, used, here.inside(body, here.repeats))
            case Scan() as scan:
                return self._scan(scan, inputs, used, here)
            case While() as loop:
                return self._while(loop, inputs, here)
            case Cond() as cond:
                return self._cond(cond, inputs, used, here)
            case Custom(body):
                return self._custom(body, inputs, here)
            case opaque:
                if _is_product(eqn, inputs):
                    self.found.append(Found(eqn, tuple(inputs), here, _no_form(eqn)))
                    if not any(o.data for o in inputs):
                        self.fixed_rows.add(here.path)
                for body in opaque.bodies if opaque else ():
                    # How operands reach an unknown primitive's jaxpr is unknown: any may be data.
                    origins = [_join(inputs)] * len(body.jaxpr.invars)
                    self._refused(body, origins, here, f"it is inside {eqn.primitive.name!r}")
                return self._results(eqn, inputs, here.path, known=opaque is None)

    def _results(self, eqn, inputs: list[Origin], here: Path, known: bool) -> list[Origin]:
        """The origins of the results of an equation that is not entered."""
        flags = nonnegative_results(eqn, [o.nonnegative for o in inputs])
        joined, name = _join(inputs), eqn.primitive.name
        if name.startswith("random_"):
            joined = joined._replace(data=True, random="bits")
        elif name in _COMPARISONS and joined.random == "bits":
            joined = joined._replace(parameters=frozenset(), random="mask")
        if not known or joined.data:
            if joined.data and name not in SITE_PRIMITIVES:  # of a product they would be a weight
                self.met.update(*(o.rows for o in inputs if not o.data))
            masked = joined.random == "mask"  # it tells no elements apart that are equal without it
            return [
                joined._replace(nonnegative=flag, uniform=every_axis(v) if masked else frozenset())
                for v, flag in zip(eqn.outvars, flags)
            ]
        numbers = self.numbers.results(eqn, [o.number for o in inputs])
        joined = joined._replace(uniform=uniform_results(eqn, [o.uniform for o in inputs]))
        if name in SITE_PRIMITIVES:
            joined = joined._replace(multiplied=joined.parameters)
        if here in self.fixed_rows:
            joined = joined._replace(rows=joined.rows | {here})
        return [joined._replace(nonnegative=f, number=n) for f, n in zip(flags, numbers)]

    def _scan(self, scan: Scan, inputs: list[Origin], used, here: Place) -> list[Origin]:
        consts, carry, xs = scan.split(inputs)
        loop = here.path, scan.length
        layers = [loop] if any(o.parameters and not o.data for o in xs) else []
        xs = [
            o._replace(
                sliced_by=o.sliced_by | {loop},
                number=self.numbers.sliced(o.number, scan.length, scan.reverse),
                uniform=frozenset(axis - 1 for axis in o.uniform if axis),
            )
            for o in xs
        ]
        used, _ = scan_liveness(scan, used)
        repeats = None if here.repeats is None else here.repeats * scan.length

        def once(carry):
            inside = here.inside(scan.body, repeats, layers)
            return self.run(scan.body, [*consts, *carry, *xs], used, inside)

        carry = self._widened(once, carry)
        outputs = once(carry)
        if scan.length == 0:  # the carry comes out as it went in
            outputs[: scan.carries] = carry
        # What leaves a scan is one value or a stack of all its slices.
        left = {"number": None, "uniform": frozenset()}
        return [o._replace(sliced_by=o.sliced_by - {loop}, **left) for o in outputs]

    def _while(self, loop: While, inputs: list[Origin], here: Place) -> list[Origin]:
        test_consts, body_consts, carry = loop.split(inputs)

        def once(carry):
            inside, every = here.inside(loop.body, None), [True] * len(carry)
            return self.run(loop.body, body_consts + carry, every, inside)

        carry = self._widened(once, carry)
        inside = here.inside(loop.test, None)
        (decides,) = self.run(loop.test, test_consts + carry, [True], inside)
        once(carry)
        return [o.chosen_by(decides) for o in carry]

    def _widened(self, once: Callable, carry: list[Origin]) -> list[Origin]:
        """A loop's carry, its origins widened until an iteration adds nothing; finds no sites."""
        while True:
            found = len(self.found)
            outputs = once(carry)
            del self.found[found:]
            widened = [a.join(b) for a, b in zip(carry, outputs)]
            if widened == carry:
                return carry
            carry = widened

    def _cond(self, cond: Cond, inputs: list[Origin], used, here: Place) -> list[Origin]:
        index, _ = cond.split(inputs)
        branches = [
            self.run(body, origins, used, here.inside(body, here.repeats))
            for body, origins in cond.calls(inputs)
        ]
        return [functools.reduce(Origin.join, o).chosen_by(index) for o in zip(*branches)]

    def _custom(self, body: Body, inputs: list[Origin], here: Place) -> list[Origin]:
        joined = _join(inputs)
        origins = [o.of_parts(joined) for o in inputs]
        results = self._refused(body, origins, here, _CUSTOM_RULE)
        return [o.of_parts(joined) for o in results]

    def _refused(self, body: Body, origins, here: Place, reason: str) -> list[Origin]:
        """Follows origins through a body whose products cannot be quantized."""
        inner, every = _Walk(self.numbers), [True] * len(body.jaxpr.outvars)
        results = inner.run(body, origins, every, here.inside(body, here.repeats))
        self.fixed_rows |= inner.fixed_rows
        self.met |= inner.met
        self.found += [f._replace(refused=f.refused or reason) for f in inner.found]
        return results


def _is_product(eqn: jex_core.JaxprEqn, inputs: Sequence[Origin]) -> bool:
    """Whether an equation is a product of data, or takes rows of a weight."""
    name, floating = eqn.primitive.name, [_is_inexact(v) for v in eqn.invars[:2]]
    # A product of parameters and constants alone is part of a weight: it is folded at serving.
    if name in SITE_PRIMITIVES:
        return all(floating) and any(o.data for o in inputs[:2])
    if name in LOOKUP_PRIMITIVES:
        table = inputs[0]
        is_weight = floating[0] and bool(table.parameters) and not table.data
        return is_weight and lookup_axis(eqn) is not None
    return name in FOREIGN_PRODUCTS and any(o.data for o in inputs)


def _is_inexact(atom) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _no_form(eqn: jex_core.JaxprEqn) -> str | None:
    name = eqn.primitive.name
    if name == "ragged_dot_general" and ragged_groups(eqn) is None:
        return f"a {name} whose groups are not of rows of its left operand has no quantized form"
    if name in FOREIGN_PRODUCTS:
        return f"{name} has no quantized form yet"
    for dtype in (array_type(atom).dtype for atom in eqn.invars[:2]):
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return f"its operand is {dtype}, and formats are of real numbers"
    return None


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
    return join_scope(*scope.split("/"))


def join_scope(*scopes: str) -> str:
    """Scopes as one, the outer first."""
    return "/".join(s for s in scopes if s)


def array_type(atom: jex_core.Var | jex_core.Literal) -> jax.core.ShapedArray:
    """The shape and dtype of an operand or result of a product or lookup: these are arrays."""
    assert isinstance(atom.aval, jax.core.ShapedArray)
    return atom.aval


def ragged_groups(eqn: jex_core.JaxprEqn) -> int | None:
    """The axis of rhs that holds a matrix for every group of rows of lhs; None if it does not."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracting, batch = numbers.dot_dimension_numbers
    (ragged,), groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    of_rows = ragged not in (*contracting[0], *batch[0])
    return groups[0] if of_rows and len(groups) == 1 else None


def lookup_axis(eqn: jex_core.JaxprEqn) -> int | None:
    """The axis that a gather indexes if it takes whole rows along it (`table[ids]`), else None.

    vmap of an indexed row writes a start for every axis and keeps the row's axis of length 1.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = array_type(eqn.invars[0]).shape
    partial = [axis for axis, size in enumerate(sizes) if size != shape[axis]]
    axes = {*numbers.collapsed_slice_dims, *partial}
    if len(shape) < 2 or len(axes) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = axes
    return axis if sizes[axis] == 1 and axis in numbers.start_index_map else None
