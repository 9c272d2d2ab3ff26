"""Control flow in jaxprs: which equations hold jaxprs, what these are called on, and how often.

No other file reads the parameters of these primitives. `control_flow(eqn)` is one of:

              bodies         called on                               how often
    Call      body           all operands                            once
    Remat     body           all operands                            once, and again backward
    Custom    body           all operands                            once; it has its own derivative
    Scan      body           constants, the carry, slices of xs      `length` times
    While     test, body     constants of its own, then the carry    until the test says no
    Cond      branches       all operands but the index              the one that the index picks
    Opaque    any            unknown                                 unknown

The results of the first three are those of their body, those of a scan its last carry and what it
stacks up, those of a while loop its last carry, those of a cond those of its branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core

# Where an equation stands: indices of equations and, between them, the numbers of their bodies.
Path = tuple[int, ...]

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_REMATS = ("remat2", "checkpoint", "remat")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


class Body(NamedTuple):
    """A jaxpr that an equation holds."""

    jaxpr: jex_core.Jaxpr
    consts: Sequence[Any]  # values of its `constvars`
    number: int = 0  # among the bodies of its equation

    def under(self, equation: Path) -> Path:
        """The path of the body, given that of its equation."""
        return (*equation, self.number)


Calls = list[tuple[Body, list]]  # bodies with the operands they are called on


@dataclasses.dataclass(frozen=True)
class _OneBody:
    body: Body

    @property
    def bodies(self) -> tuple[Body, ...]:
        """All bodies, in the order of their numbers."""
        return (self.body,)

    def calls(self, operands: Sequence) -> Calls:
        """The body with what it is called on, at first and as a whole: all operands."""
        return [(self.body, list(operands))]


class Call(_OneBody):
    """A function that is called as a whole: `jax.jit`."""


class Custom(_OneBody):
    """A function with a derivative rule of its own: `jax.custom_jvp`, `jax.custom_vjp`."""


@dataclasses.dataclass(frozen=True)
class Remat(_OneBody):
    """A function that is computed anew for its gradient: `jax.checkpoint`."""

    prevent_cse: Any
    policy: Any

    def again(self, fun: Callable) -> Callable:
        """`fun` under the same checkpoint."""
        return jax.checkpoint(fun, prevent_cse=self.prevent_cse, policy=self.policy)


@dataclasses.dataclass(frozen=True)
class Scan(_OneBody):
    """`jax.lax.scan`: body(constants, carry, slices of xs) -> (carry, slices of the results)."""

    consts: int  # how many of the operands are constants
    carries: int  # and how many the carry
    length: int
    reverse: bool
    unroll: int

    def split(self, operands: Sequence) -> list[list]:
        """Constants, carry and xs."""
        return _split(operands, self.consts, self.carries)

    def again(self, step: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
        """`jax.lax.scan(step, carry, xs)` in the same direction."""
        options = {"length": self.length, "reverse": self.reverse, "unroll": self.unroll}
        return jax.lax.scan(step, carry, xs, **options)


@dataclasses.dataclass(frozen=True)
class While:
    """`jax.lax.while_loop`: while test(constants, carry), carry = body(constants, carry)."""

    test: Body
    body: Body
    test_consts: int  # how many of the operands are constants of the test
    body_consts: int  # and how many of the body

    @property
    def bodies(self) -> tuple[Body, ...]:
        """All bodies, in the order of their numbers."""
        return self.test, self.body

    def calls(self, operands: Sequence) -> Calls:
        """The bodies with what they are called on at first."""
        test_consts, body_consts, carry = self.split(operands)
        return [(self.test, test_consts + carry), (self.body, body_consts + carry)]

    def split(self, operands: Sequence) -> list[list]:
        """Constants of the test, constants of the body, and the carry."""
        return _split(operands, self.test_consts, self.body_consts)


@dataclasses.dataclass(frozen=True)
class Cond:
    """`jax.lax.cond` and `jax.lax.switch`: branches[index](operands); False is 0."""

    bodies: tuple[Body, ...]  # the branches

    def calls(self, operands: Sequence) -> Calls:
        """The branches with what each is called on."""
        _, operands = self.split(operands)
        return [(branch, operands) for branch in self.bodies]

    def split(self, operands: Sequence) -> tuple[Any, list]:
        """The index, and the operands of the branches."""
        return operands[0], list(operands[1:])


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A primitive that holds jaxprs of which nothing else is known."""

    bodies: tuple[Body, ...]


ControlFlow = Call | Custom | Remat | Scan | While | Cond | Opaque


def control_flow(eqn: jex_core.JaxprEqn) -> ControlFlow | None:
    """What an equation does with the jaxprs it holds; None if it holds none."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        body = _body(params["jaxpr"])
        options = (params[key] for key in ("length", "reverse", "unroll"))
        return Scan(body, *_scan_counts(eqn, body.jaxpr), *options)
    if name == "while":
        test, body = _body(params["cond_jaxpr"], 0), _body(params["body_jaxpr"], 1)
        return While(test, body, params["cond_nconsts"], params["body_nconsts"])
    bodies = tuple(_body(jaxpr, number) for number, jaxpr in enumerate(_jaxprs(params)))
    if not bodies:
        return None
    if name == "cond":
        return Cond(bodies)
    if len(bodies) == 1 and len(bodies[0].jaxpr.invars) == len(eqn.invars):
        if name in _CALLS:
            return Call(*bodies)
        if name in _REMATS:
            return Remat(*bodies, params["prevent_cse"], params["policy"])
        if name in _CUSTOM:
            return Custom(*bodies)
    return Opaque(bodies)


def equations_along(
    jaxpr: jex_core.Jaxpr, path: Path
) -> Iterator[tuple[jex_core.Jaxpr, jex_core.JaxprEqn]]:
    """The equations that a path leads through, each with the jaxpr that it stands in."""
    for index, number in zip(path[::2], (*path[1::2], None)):
        eqn = jaxpr.eqns[index]
        yield jaxpr, eqn
        if number is not None:
            flow = control_flow(eqn)
            assert flow is not None  # a path goes on where an equation holds jaxprs
            jaxpr = flow.bodies[number].jaxpr


def _jaxprs(params: dict[str, Any]) -> list:
    """The jaxprs among an equation's parameters, in the order of their names."""
    found = []
    for _, value in sorted(params.items()):
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (jex_core.Jaxpr, jex_core.ClosedJaxpr)):
                found.append(item)
    return found


def _body(jaxpr: Any, number: int = 0) -> Body:
    """A jaxpr with its constants, whether it came open or closed."""
    if isinstance(jaxpr, jex_core.ClosedJaxpr):
        return Body(jaxpr.jaxpr, jaxpr.consts, number)
    return Body(jaxpr, (), number)


def _scan_counts(eqn: jex_core.JaxprEqn, body: jex_core.Jaxpr) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many the carry.

    Read off the shapes, since the parameters that tell it changed between JAX 0.10 and 0.11: what
    is scanned over, and what is stacked up, has one axis more outside of the body than inside.
    """

    def unsliced(outside, inside) -> int:
        return sum(o.aval.ndim == i.aval.ndim for o, i in zip(outside, inside, strict=True))

    carries = unsliced(eqn.outvars, body.outvars)
    return unsliced(eqn.invars, body.invars) - carries, carries


def _split(values: Sequence, *sizes: int) -> list[list]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return [*parts, list(values[start:])]
