"""Liveness: which equations of a jaxpr, and which of its inputs, its used results depend on."""

from __future__ import annotations

from collections.abc import Sequence

import jax.extend.core as jex_core

from aqt_search.tracing.control_flow import Call, Remat, Scan, control_flow


def used_equations(
    jaxpr: jex_core.Jaxpr, used_outputs: Sequence[bool]
) -> tuple[list[tuple[bool, ...]], list[bool]]:
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


def _is_variable(atom) -> bool:
    return not isinstance(atom, jex_core.Literal)


def _used_inputs(eqn: jex_core.JaxprEqn, used: Sequence[bool]) -> Sequence[bool]:
    match control_flow(eqn):
        case Call(body) | Remat(body):
            return used_equations(body.jaxpr, used)[1]
        case Scan() as scan:
            return scan_liveness(scan, used)[1]
    return [True] * len(eqn.invars)


def scan_liveness(scan: Scan, used: Sequence[bool]) -> tuple[list[bool], list[bool]]:
    """Which results of a scan's body are used, by a fixed point over the carry; which inputs."""
    used = list(used)
    while True:
        inputs = used_equations(scan.body.jaxpr, used)[1]
        _, next_carry, _ = scan.split(inputs)
        carried = [u or v for u, v in zip(used[: scan.carries], next_carry)]
        if carried == used[: scan.carries]:
            return used, inputs
        used[: scan.carries] = carried
