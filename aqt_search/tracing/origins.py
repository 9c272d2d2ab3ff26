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

SITE_PRIMITIVES = ("dot_general", "conv_general_dilated")
LOOKUP_PRIMITIVES = ("gather",)  # sites where they take rows of a weight: see `lookup_axis`
# Products that exist as primitives of their own and that we cannot quantize: refused, not skipped.
FOREIGN_PRODUCTS = ("ragged_dot", "ragged_dot_general", "scaled_matmul", "scaled_dot")


class Origin(NamedTuple):
    """What a value is computed from."""

    parameters: frozenset[int]  # indices of the parameter leaves a value depends on
    data: bool  # whether it depends on a data argument
    copies: int = 1  # how many slices of this shape the scans around it go through
    nonnegative: bool = False  # whether it is known never to be negative

    def join(self, other: Origin) -> Origin:
        """The origin of a value that is either of two."""
        return Origin(
            self.parameters | other.parameters,
            self.data or other.data,
            max(self.copies, other.copies),
            self.nonnegative and other.nonnegative,
        )

    def chosen_by(self, decision: Origin) -> Origin:
        """The origin of a value that depends on a decision, but takes no element from it."""
        return self.join(decision._replace(nonnegative=True))


_NOWHERE = Origin(frozenset(), False)


def _join(origins: Sequence[Origin]) -> Origin:
    """What a value computed from others depends on; its sign is not known."""
    joined = _NOWHERE
    for origin in origins:
        joined = joined.join(origin)
    return joined


def _results(eqn: jex_core.JaxprEqn, inputs: Sequence[Origin]) -> list[Origin]:
    """The origins of the results of an equation that is not entered."""
    flags = nonnegative_results(eqn, [o.nonnegative for o in inputs])
    return [_join(inputs)._replace(nonnegative=flag) for flag in flags]


def _constant(value) -> Origin:
    return _NOWHERE._replace(nonnegative=is_nonnegative_constant(value))


class Place(NamedTuple):
    """Where in the program equations stand."""

    path: Path  # of the equation, or of the body that they are in
    repeats: int | None  # how often they run; None: that is not known
    scope: str  # name scopes

    def inside(self, body: Body, repeats: int | None) -> Place:
        """That of a body of the equation."""
        return Place(body.under(self.path), repeats, self.scope)


class Found(NamedTuple):
    """A product or lookup."""

    eqn: jex_core.JaxprEqn
    origins: tuple[Origin, ...]  # of its operands
    place: Place
    refused: str | None = None  # why it cannot be quantized


def find_products(body: Body, origins: Sequence[Origin]) -> list[Found]:
    """The products and lookups of a whole program in program order, given the inputs' origins."""
    walk = _Walk()
    walk.run(body, origins, [True] * len(body.jaxpr.outvars), Place((), 1, ""))
    return walk.found


class _Walk:
    def __init__(self):
        self.found: list[Found] = []

    def run(
        self, body: Body, origins: Sequence[Origin], used: Sequence[bool], place: Place
    ) -> list[Origin]:
        """Follows origins through a body to those of its outputs."""
        jaxpr = body.jaxpr
        env = {v: _constant(value) for v, value in zip(jaxpr.constvars, body.consts)}
        env.update(zip(jaxpr.invars, origins))

        def origin(atom) -> Origin:
            is_literal = isinstance(atom, jex_core.Literal)
            found = _constant(atom.val) if is_literal else env.get(atom, _NOWHERE)
            return found._replace(nonnegative=found.nonnegative or is_unsigned(atom.aval))

        results, _ = used_equations(jaxpr, used)
        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [origin(v) for v in eqn.invars]
            if any(results[index]) or eqn.effects:
                scope = join_scope(place.scope, _scope_name(eqn.source_info.name_stack))
                here = Place((*place.path, index), place.repeats, scope)
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
                for body in opaque.bodies if opaque else ():
                    # How operands reach an unknown primitive's jaxpr is unknown: any may be data.
                    origins = [_join(inputs)] * len(body.jaxpr.invars)
                    self._refused(body, origins, here, f"it is inside {eqn.primitive.name!r}")
                return _results(eqn, inputs)

    def _scan(self, scan: Scan, inputs: list[Origin], used, here: Place) -> list[Origin]:
        consts, carry, xs = scan.split(inputs)
        xs = [o._replace(copies=o.copies * scan.length) for o in xs]
        used, _ = scan_liveness(scan, used)
        repeats = None if here.repeats is None else here.repeats * scan.length

        def once(carry):
            inside = here.inside(scan.body, repeats)
            return self.run(scan.body, [*consts, *carry, *xs], used, inside)

        carry = self._widened(once, carry)
        outputs = once(carry)
        if scan.length == 0:  # the carry comes out as it went in
            outputs[: scan.carries] = carry
        # What leaves a scan is one value or a stack of all its slices.
        return [o._replace(copies=1) for o in outputs]

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
        origins = [joined._replace(nonnegative=o.nonnegative) for o in inputs]
        results = self._refused(body, origins, here, _CUSTOM_RULE)
        return [joined._replace(nonnegative=o.nonnegative) for o in results]

    def _refused(self, body: Body, origins, here: Place, reason: str) -> list[Origin]:
        """Follows origins through a body whose products cannot be quantized."""
        inner, every = _Walk(), [True] * len(body.jaxpr.outvars)
        results = inner.run(body, origins, every, here.inside(body, here.repeats))
        self.found += [f._replace(refused=f.refused or reason) for f in inner.found]
        return results


def _is_product(eqn: jex_core.JaxprEqn, inputs: Sequence[Origin]) -> bool:
    """Whether an equation is a product of data, or takes rows of a weight as data says."""
    name, floating = eqn.primitive.name, [_is_inexact(v) for v in eqn.invars]
    # A product of parameters and constants alone is part of a weight: it is folded at serving.
    if name in SITE_PRIMITIVES:
        return all(floating) and any(o.data for o in inputs)
    if name in LOOKUP_PRIMITIVES:
        table, indices = inputs
        is_weight = floating[0] and bool(table.parameters) and not table.data
        return is_weight and indices.data and lookup_axis(eqn) is not None
    return name in FOREIGN_PRODUCTS and any(o.data for o in inputs)


def _is_inexact(atom) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _no_form(eqn: jex_core.JaxprEqn) -> str | None:
    name = eqn.primitive.name
    if name in FOREIGN_PRODUCTS:
        return f"{name} has no quantized form yet"
    for dtype in (array_type(atom).dtype for atom in eqn.invars):
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
