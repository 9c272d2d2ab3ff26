"""Runs a traced function again, with other functions in place of its sites.

Training, evaluation and serving run it (`run_flow`); those that look for the weights of sites visit
what can be known without data (`visit_bodies`). Values that are not there (weights that are stored
in codes only, or data while weights are looked for) are `MISSING`; what would be computed from them
is missing, too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp

from aqt_search.numerics.explicit_axes import entered, in_mesh_of
from aqt_search.numerics.mixed_stack import MixedStack
from aqt_search.numerics.qtensor import QTensor
from aqt_search.tracing.control_flow import (
    Body,
    Call,
    Cond,
    Path,
    Remat,
    Scan,
    While,
    control_flow,
)
from aqt_search.tracing.sites import Key
from aqt_search.tracing.trace import Trace

MISSING = object()


Stacks = frozenset[tuple[Key, Path]]  # what has an entry for each iteration of which scan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """What sites hold beside their operands; inside a scan, one slice of what is stacked by it."""

    states: dict[Key, Any]  # of calibrations
    weights: dict[Key, QTensor | MixedStack]  # operands in storage
    # Of what is held, and of what sites tell: by the scans that are not yet entered.
    stacks: Stacks = dataclasses.field(metadata={"static": True})
    # Of scans whose sites ask for it: the numbers of all iterations, inside of one its own.
    numbers: dict[Path, jax.Array] = dataclasses.field(default_factory=dict)

    def where(self, wanted: Callable[[Key], bool]) -> Held:
        """A part of it, by site and operand."""
        states, weights = (
            {key: value for key, value in part.items() if wanted(key)}
            for part in (self.states, self.weights)
        )
        stacks = frozenset(pair for pair in self.stacks if wanted(pair[0]))
        return Held(states, weights, stacks, self.numbers)

    def stacked(self, scan: Path, yes: bool = True) -> Held:
        """What is stacked by a scan, or else what is not."""
        part = self.where(lambda key: ((key, scan) in self.stacks) == yes)
        numbers = {path: n for path, n in self.numbers.items() if (path == scan) == yes}
        return dataclasses.replace(part, numbers=numbers)

    def is_stacked(self, key: Key) -> bool:
        """Whether an operand has an entry for each iteration of a scan that is not yet entered."""
        return any(key == stacked for stacked, _ in self.stacks)

    def inside(self, scan: Path) -> Held:
        """The same, seen by an iteration of a scan."""
        stacks = frozenset(pair for pair in self.stacks if pair[1] != scan)
        return dataclasses.replace(self, stacks=stacks)

    def with_states(self, states: Mapping[Key, Any]) -> Held:
        """With these states in place of its own."""
        return dataclasses.replace(self, states=dict(states))

    def beside(self, other: Held) -> Held:
        """Both."""
        states, weights = self.states | other.states, self.weights | other.weights
        numbers = self.numbers | other.numbers
        return Held(states, weights, self.stacks | other.stacks, numbers)


EMPTY = Held({}, {}, frozenset())


# What a site, or an equation that holds some, gives: its results, and what sites tell, by key.
Outcome = tuple[list, dict[Key, Any]]
# (name of the site, its equation, operands, held) -> outcome
AtSite = Callable[[str, jex_core.JaxprEqn, Sequence, Held], Outcome]
# (body, what it is called on, its path, held) -> outcome
Evaluate = Callable[[Body, Sequence, Path, Held], Outcome]
# (how to evaluate bodies, equation, operands, its path, held) -> outcome
Enter = Callable[[Evaluate, jex_core.JaxprEqn, Sequence, Path, Held], Outcome]


class Interpreter:
    """Evaluates a trace, its sites by a function that sees them.

    Args:
      trace: the function.
      visited: the sites that `at_site` is called for. The others, and all else that holds none of
        these, run as they were traced.
      at_site: gives the results of a site, and tells what it likes: that is collected, inside of
        scans in a stack of one entry for each iteration. Inside of a cond that is run it may tell
        of what is held for it alone.
      enter: `run_flow` or `visit_bodies`.
    """

    def __init__(self, trace: Trace, visited: Collection[str], at_site: AtSite, enter: Enter):
        self._trace = trace
        self._at_site = at_site
        self._enter = enter
        self._site_paths = {p: name for p, name in trace.site_paths.items() if name in visited}
        self._sites_under: dict[Path, set[str]] = {}
        for path, name in self._site_paths.items():
            for end in range(len(path)):
                self._sites_under.setdefault(path[:end], set()).add(name)

    def run(self, held: Held = EMPTY) -> Outcome:
        """The function's outputs, and what its sites told."""
        closed = self._trace.closed
        return self._evaluate(Body(closed.jaxpr, closed.consts), self._trace.inputs, (), held)

    def _evaluate(self, body: Body, args: Sequence, path: Path, held: Held) -> Outcome:
        jaxpr = body.jaxpr
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*body.consts, *args)))
        told: dict[Key, Any] = {}

        def read(atom):
            return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

        last_use = _last_uses(jaxpr)
        for start, stop in self._runs(jaxpr, path):
            eqn, here = jaxpr.eqns[start], path + (start,)
            operands = [read(v) for v in eqn.invars]
            new: dict[Key, Any] = {}
            if here in self._site_paths:
                visit = functools.partial(self._at_site, self._site_paths[here], eqn, operands)
                outputs, new = _in_its_mesh(eqn, visit, held)
            elif here in self._sites_under:
                inner = held.where(lambda key, names=self._sites_under[here]: key[0] in names)
                visit = functools.partial(self._enter, self._evaluate, eqn, operands, here)
                outputs, new = _in_its_mesh(eqn, visit, inner)
            else:
                env.update(_run_equations(jaxpr, start, stop, env, last_use))
                continue
            told |= new
            env.update(zip(eqn.outvars, outputs))
        return [read(v) for v in jaxpr.outvars], told

    def _runs(self, jaxpr: jex_core.Jaxpr, path: Path) -> list[tuple[int, int]]:
        """Splits equations into those that are or hold sites, and what lies between them."""
        here = (self._site_paths, self._sites_under)
        special = [
            index for index in range(len(jaxpr.eqns)) if any(path + (index,) in h for h in here)
        ]
        edges = sorted({0, len(jaxpr.eqns), *special, *(index + 1 for index in special)})
        return list(itertools.pairwise(edges))


def _in_its_mesh(eqn: jex_core.JaxprEqn, visit: Callable[[Held], Outcome], held: Held) -> Outcome:
    """The outcome of an equation, which may be in a region of automatic axes of the function's own.

    Codes stay typed as in the region: outside of it every device would have to have them whole.
    """
    outputs, told = in_mesh_of(eqn.outvars[0].aval, visit, held)
    return outputs, {k: x if isinstance(x, QTensor) else entered(x) for k, x in told.items()}


# --- Equations that hold sites: run ---------------------------------------------------------------


def run_flow(evaluate: Evaluate, eqn, operands: Sequence, here: Path, held: Held) -> Outcome:
    """Runs an equation that holds sites."""
    match control_flow(eqn):
        case Call(body):
            return evaluate(body, operands, body.under(here), held)
        case Remat() as remat:
            return _run_remat(remat, evaluate, eqn, operands, here, held)
        case Cond() as cond:
            return _run_cond(cond, evaluate, eqn, operands, here, held)
        case Scan() as scan:
            return _run_scan(scan, evaluate, eqn, operands, here, held)
        case While() as loop:
            return _run_while(loop, evaluate, eqn, operands, here, held)
        case unknown:
            raise AssertionError(f"{unknown}")  # sites inside of others are refused


def _run_remat(remat: Remat, evaluate: Evaluate, eqn, operands, here: Path, held: Held) -> Outcome:
    body = remat.body

    def run(held, *args):
        outputs, told = evaluate(body, _filled(operands, args), body.under(here), held)
        return _materialized(outputs, eqn.outvars), told

    return remat.again(run)(held, *_present(operands))


def _run_cond(cond: Cond, evaluate: Evaluate, eqn, operands, here: Path, held: Held) -> Outcome:
    def branch(body, values):
        def run(held, *args):
            outputs, states = evaluate(body, _filled(values, args), body.under(here), held)
            return _materialized(outputs, eqn.outvars), held.states | states

        return run

    branches = [branch(body, values) for body, values in cond.calls(operands)]
    index, operands = cond.split(operands)
    return jax.lax.switch(index, branches, held, *_present(operands))


def _run_scan(scan: Scan, evaluate: Evaluate, eqn, operands, here: Path, held: Held) -> Outcome:
    body, carries = scan.body, scan.carries
    consts, carry, xs = scan.split(operands)
    carry = _materialized(carry, eqn.outvars[:carries])

    stacked, shared = held.stacked(here), held.stacked(here, False)

    def step(carry, sliced):
        (values, states), (part, *present) = carry, sliced
        inner = part.beside(shared.with_states(states)).inside(here)
        args = (*consts, *values, *_filled(xs, present))
        outputs, told = evaluate(body, args, body.under(here), inner)
        outputs = _materialized(outputs, body.jaxpr.outvars)
        states = {key: told.get(key, state) for key, state in states.items()}
        each = {key: value for key, value in told.items() if key not in states}
        return (tuple(outputs[:carries]), states), (tuple(outputs[carries:]), each)

    start = tuple(carry), shared.states
    (carry, states), (ys, told) = scan.again(step, start, (stacked, *_present(xs)))
    return [*carry, *ys], told | states


def _run_while(loop: While, evaluate: Evaluate, eqn, operands, here: Path, held: Held) -> Outcome:
    test, body = loop.bodies
    test_consts, body_consts, carry = loop.split(operands)

    def decide(carry):
        return evaluate(test, (*test_consts, *carry), test.under(here), held)[0][0]

    def step(carry):
        outputs, _ = evaluate(body, (*body_consts, *carry), body.under(here), held)
        return tuple(_materialized(outputs, eqn.outvars))

    carry = _materialized(carry, eqn.outvars)
    return list(jax.lax.while_loop(decide, step, tuple(carry))), {}


# --- Equations that hold sites: visited without data ----------------------------------------------


def visit_bodies(evaluate: Evaluate, eqn, operands: Sequence, here: Path, held: Held) -> Outcome:
    """Visits every body for what its sites tell: a scan's once for each iteration, others once.

    What an iteration of a loop leaves for the next is missing, and so are the results. A site tells
    nothing of what is still stacked (`Held.stacks`).
    """
    told: dict[Key, Any] = {}
    match control_flow(eqn):
        case Call(body) | Remat(body):
            return evaluate(body, operands, body.under(here), held)
        case Scan() as scan:
            told = _visit_scan(scan, evaluate, operands, here, held)
        case Cond() | While() as flow:
            for body, args in flow.calls(_without_carry(flow, operands)):
                told |= evaluate(body, args, body.under(here), held)[1]
    return [MISSING] * len(eqn.outvars), told


def _visit_scan(scan: Scan, evaluate: Evaluate, operands, here: Path, held: Held) -> dict:
    """What no iteration has of its own is told once, the rest in stacks."""
    body, (consts, carry, xs) = scan.body, scan.split(operands)
    stacked, shared = held.stacked(here), held.stacked(here, False)
    missing = [MISSING] * len(carry)
    args = (*consts, *missing, *[MISSING] * len(xs))
    once = evaluate(body, args, body.under(here), shared.beside(_nothing_of(stacked)))[1]
    lost: dict[Key, Any] = {}

    def step(_, sliced):
        part, *present = sliced
        args = (*consts, *missing, *_filled(xs, present))
        inner = part.beside(shared).inside(here)
        told = evaluate(body, args, body.under(here), inner)[1]
        told = {key: value for key, value in told.items() if (key, here) in held.stacks}
        lost.update({key: value for key, value in told.items() if value is MISSING})
        return (), {key: value for key, value in told.items() if value is not MISSING}

    each = jax.lax.scan(step, (), (stacked, *_present(xs)), length=scan.length)[1]
    return once | each | lost


def _nothing_of(held: Held) -> Held:
    """The same stacks, and nothing in them."""
    return Held({}, {}, held.stacks)


def _without_carry(flow: Cond | While, operands: Sequence) -> list:
    """The operands of a loop with its carry missing: what an iteration leaves is not known."""
    if isinstance(flow, Cond):
        return list(operands)
    *consts, carry = flow.split(operands)
    return [*itertools.chain(*consts), *[MISSING] * len(carry)]


# --- Values ---------------------------------------------------------------------------------------


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
