"""Captures: what named sites of a model take in and give out, without changing the model.

    values = site_values(apply, ["stem/kernel", "head/kernel"])

    @jax.jit
    def means(assignment, state, variables, x):
        return {n: v.out.mean(0) for n, v in values(assignment, state, variables, x).items()}

Compute what is wanted of the values under the same jit, as here: XLA then leaves out everything
that is not asked for, the rest of the model behind the last site included.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core

from aqt_search.products.operands import OperandValue
from aqt_search.ptq.errors import PTQError
from aqt_search.tracing.control_flow import Cond, Scan, While, control_flow, equations_along
from aqt_search.tracing.interpreter import Held, Interpreter, run_flow
from aqt_search.tracing.matching import for_sites
from aqt_search.tracing.planned_sites import PlannedSites
from aqt_search.tracing.plans import make_plans, stacks_of
from aqt_search.tracing.sites import SIDES, Site
from aqt_search.tracing.trace import Trace, trace_function
from aqt_search.tracing.transform import (
    Assignment,
    CalibrationState,
    check_assignment,
    checked_state,
)


class SiteValues(NamedTuple):
    """The operands and the product of a site.

    Of a lookup, lhs are the indices and rhs is the table, as in `Site`.
    """

    lhs: jax.Array  # as it enters the site, before the site quantizes it
    rhs: jax.Array
    out: jax.Array  # the product of the operands as the site takes them
    # As the site takes them: `operands.values_of` gives values.
    operands: tuple[OperandValue, OperandValue]


def nearest_names(name: str, names: Collection[str]) -> str:
    """Up to three names close to one that is not among them, for an error."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or list(names)[:3]
    return ", ".join(near) or "there are none"


def check_site_names(names: Sequence[str], sites: Collection[str]) -> None:
    """Raises PTQError for a name that is not of a site."""
    if isinstance(names, str):
        raise PTQError(f"Sites are given as a sequence of names; got the string {names!r}.")
    for name in names:
        if name not in sites:
            raise PTQError(
                f"The function has no site {name!r}. Nearest: {nearest_names(name, sites)}."
            )


def equations_to(trace: Trace, name: str) -> Iterator[tuple[jex_core.Jaxpr, jex_core.JaxprEqn]]:
    """The equations that lead to a site, its own last, each with the jaxpr that it stands in."""
    (path,) = (path for path, site in trace.site_paths.items() if site == name)
    return equations_along(trace.closed.jaxpr, path)


def why_out_of_reach(trace: Trace, name: str) -> str | None:
    """Why the values of a site cannot be captured; None where they can."""
    if trace.sites[name].refused:
        return trace.sites[name].refused
    for _, eqn in equations_to(trace, name):
        if isinstance(control_flow(eqn), (Scan, While, Cond)):
            return (
                f"it is inside a {eqn.primitive.name}, out of which its values cannot be taken;"
                " unroll it"
            )
    return None


def reachable_sites(
    apply: Callable, variables: Any, *args: Any, **kwargs: Any
) -> tuple[dict[str, Site], dict[str, str]]:
    """The sites of `apply`, and for those whose values cannot be captured the reason."""
    trace = trace_function(apply, variables, args, kwargs, {})
    reasons = {name: why_out_of_reach(trace, name) for name in trace.sites}
    return trace.sites, {name: reason for name, reason in reasons.items() if reason}


def site_values(apply: Callable, names: Sequence[str]) -> Callable:
    """Returns `values(assignment, state, variables, *args, **kwargs) -> {name: SiteValues}`.

    The model runs as `quantize_with_state(apply).evaluate` runs it, so what enters a site comes
    from earlier sites in the formats of the assignment; {} for both is the float model. Jit it
    together with what is made of the values, and it is compiled once for batches of a shape.

    Args:
      apply: a function of variables and data.
      names: of sites, as `find_sites` gives them. Sites under jit and remat are reached.

    Raises (when called):
      PTQError: a name is not of a site (the message has the nearest), or of one whose values cannot
        be taken out: inside of a scan, cond, while or a function with a derivative rule of its own.
      SiteError: the assignment or the state is not of this function.
    """

    def values(
        assignment: Assignment, state: CalibrationState, variables: Any, *args: Any, **kwargs: Any
    ) -> dict[str, SiteValues]:
        trace = trace_function(apply, variables, args, kwargs, {})
        assignment = for_sites(assignment, trace)
        check_assignment(assignment, trace.sites)
        check_site_names(names, trace.sites)
        for name in names:
            if reason := why_out_of_reach(trace, name):
                raise PTQError(f"The values of site {name!r} cannot be captured: {reason}.")
        plans = make_plans(trace, assignment, None)
        stacks = stacks_of(trace.sites, assignment)
        held = Held(checked_state(state, trace, plans), {}, stacks)
        sites = PlannedSites(trace, plans, execution="emulated", update=False)

        def at_site(name, eqn, operands, held):
            outputs, _ = sites.at_site(name, eqn, operands, held)
            if name not in names:
                return outputs, {}
            entering = dict(zip(trace.sites[name].equation_sides, operands))
            lhs, rhs = (sites.operand((name, side), entering[side], held)[0] for side in SIDES)
            found = SiteValues(entering["lhs"], entering["rhs"], outputs[0], (lhs, rhs))
            return outputs, {(name, "values"): found}

        _, found = Interpreter(trace, {*names, *sites.names}, at_site, run_flow).run(
            sites.with_numbers(held)
        )
        return {name: found[name, "values"] for name in names}

    return values
