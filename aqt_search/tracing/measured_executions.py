"""Which execution is fastest for each site of a function, measured on the machine at hand.

    record = measure_executions(apply, assignment, params, x)
    served = serve(apply, execution=record["executions"])

The record is data for a JSON file: kept beside a run, it makes the run's program the same again.
"""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import jaxlib
import numpy as np

from aqt_search.numerics.formats import FormatError
from aqt_search.numerics.qtensor import quantize_tensor
from aqt_search.numerics.quantized import calibrated
from aqt_search.products.measured_facts import chip
from aqt_search.products.stored_order import storage_order
from aqt_search.tracing.interpreter import EMPTY, Held
from aqt_search.tracing.matching import for_sites
from aqt_search.tracing.origins import array_type
from aqt_search.tracing.planned_sites import PlannedSites, Residuals
from aqt_search.tracing.plans import Plan, make_plans, quantized_by, site_equations, site_layout
from aqt_search.tracing.sites import SIDES, Key, Site
from aqt_search.tracing.trace import Trace, trace_function
from aqt_search.tracing.transform import (
    Assignment,
    CalibrationState,
    check_assignment,
    checked_state,
)

PURPOSES = ("serving", "training")
# "auto" is one more where it is none of the others: values of stored weights, read as they lie.
_CANDIDATES = ("emulated", "int8", "fp8", "bf16", "auto")
_HOPELESS = 5.0  # times the fastest: measured no further


def measure_executions(
    fun: Callable,
    assignment: Assignment,
    params: Any,
    *args: Any,
    purpose: str = "serving",
    state: CalibrationState | None = None,
    seconds: float = 60.0,
    **kwargs: Any,
) -> dict[str, Any]:
    """Times the executions of every site on this machine, one site at a time.

    Products of equal shapes, formats and quantizers are measured once. Operands are normal numbers
    (their absolute values where the site's are never negative), whatever the data is.

    Args:
      fun, assignment, params, args, kwargs: as for `quantize(fun)(assignment, params, *args)`, with
        data of the batch size that is to be run. Arrays may be abstract.
      purpose: "serving" times products with stored weights, "training" the product and both of its
        gradients, with codes as residuals.
      state: of calibrations that have one, as `quantize_with_state(fun)` gives it.
      seconds: of timed runs, about; compiling comes to that.

    Returns:
      {"executions": {site: the fastest execution, "auto" if that is the values of stored weights,
      read as they lie}, which `execution=` takes, "milliseconds":
      {site: {execution: median}} of one product, "purpose", and the "backend", "chip", "jax" and
      "jaxlib" it was measured on}.

    Raises:
      ValueError: an unknown purpose; seconds not above 0; inside of jit.
      SiteError: as for `quantize`; the state is not of this assignment.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"Unknown purpose {purpose!r}: expected one of {', '.join(PURPOSES)}.")
    if seconds <= 0:
        raise ValueError(f"seconds is {seconds}: expected a positive number.")
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, args, kwargs))):
        raise ValueError(
            "measure_executions runs programs to time them: call it outside of jit and of other"
            " transformations, and pass what it returns to `execution=`."
        )
    trace = trace_function(fun, params, args, kwargs, {})
    assignment = for_sites(assignment, trace)
    check_assignment(assignment, trace.sites)
    plans = make_plans(trace, assignment, None)
    states = checked_state(state or {}, trace, plans)
    # The layers of a stack are one program: the first stands for all.
    plans = {key: plan.each[0]._replace(layers=()) for key, plan in plans.items()}
    equations = site_equations(trace.closed.jaxpr, trace.site_paths)
    groups = _alike(trace, plans, equations)
    milliseconds: dict[str, dict[str, float]] = {}
    for names in groups:
        name, share = names[0], seconds / len(groups)
        found = _times_of(trace, plans, states, name, equations[name], purpose, share)
        milliseconds |= dict.fromkeys(names, found)
    return {
        "executions": {name: _fastest(found) for name, found in milliseconds.items()},
        "milliseconds": milliseconds,
        "purpose": purpose,
        "backend": jax.default_backend(),
        "chip": _chip(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def _fastest(times: Mapping[str, float]) -> str:
    return min(times, key=lambda execution: times[execution])


def _chip() -> str:
    """The name of the default backend's device; of a CPU where Linux tells it."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    names = re.findall(r"^model name\s*:\s*(.+)$", chip(), re.MULTILINE)
    return names[0] if names else platform.machine()


def _alike(
    trace: Trace, plans: Mapping[Key, Plan], equations: Mapping[str, Any]
) -> list[list[str]]:
    """The names of quantized products, those of one program together."""
    groups: dict[str, list[str]] = {}
    for name, site in trace.sites.items():
        own = [plans.get((name, side)) for side in SIDES]
        if site.kind == "gather" or not any(own):
            continue
        eqn = equations[name]
        operands = [(o.shape, o.dtype, o.role, o.nonnegative) for o in (site.lhs, site.rhs)]
        known = (eqn.primitive.name, eqn.params, operands, own)
        groups.setdefault(repr(known), []).append(name)
    return list(groups.values())


def _times_of(
    trace: Trace,
    plans: Mapping[Key, Plan],
    states: Mapping[Key, Any],
    name: str,
    eqn: Any,
    purpose: str,
    seconds: float,
) -> dict[str, float]:
    """Milliseconds of a site's product in each execution that it has a form for."""
    own = {key: plan for key, plan in plans.items() if key[0] == name}
    first = (0,) * len(trace.sites[name].layers)
    own_states = {
        key: jax.tree.map(lambda leaf: leaf[first], value)
        for key, value in states.items()
        if key[0] == name
    }
    held = Held(own_states, {}, EMPTY.stacks)
    operands = _operands(trace.sites[name], eqn)
    if purpose == "serving":
        held = _with_stored_weights(trace, own, held, name, eqn, operands)
    runs, programs = {}, set()
    for execution in _CANDIDATES:

        def product(operands, held, execution=execution):
            sites = PlannedSites(
                trace._replace(inputs=list(operands)), own, execution=execution, update=False,
                residuals=Residuals("codes"),
            )  # fmt: skip
            return sites.at_site(name, eqn, operands, held)[0][0]

        run = _with_gradients(product) if purpose == "training" else product
        try:
            lowered = jax.jit(run).lower(operands, held)
        except (FormatError, ValueError):  # it has no form on such codes
            continue
        text = lowered.as_text()
        if text in programs:
            continue
        programs.add(text)
        compiled = lowered.compile()
        runs[execution] = lambda compiled=compiled: compiled(operands, held)
    return _medians(runs, seconds)


def _with_gradients(product: Callable) -> Callable:
    def run(operands, held):
        floats = operands[:2]
        result, pull = jax.vjp(lambda *pair: product([*pair, *operands[2:]], held), *floats)
        return result, pull(jnp.ones_like(result))

    return run


def _operands(site: Site, eqn: jex_core.JaxprEqn) -> list[Any]:
    """Values for an equation's operands."""
    rng, found = np.random.default_rng(0), []
    sides: Sequence[Any] = (site.lhs, site.rhs)
    for place, variable in enumerate(eqn.invars):
        aval = array_type(variable)
        if not jnp.issubdtype(aval.dtype, jnp.floating):  # the sizes of groups of rows
            share = site.lhs.shape[0] // max(aval.size, 1)
            found.append(jnp.full(aval.shape, share, aval.dtype))
            continue
        values = rng.standard_normal(aval.shape, np.float32)
        if place < 2 and sides[place].nonnegative:
            values = np.abs(values)
        found.append(jnp.asarray(values, aval.dtype))
    return found


def _with_stored_weights(
    trace: Trace, plans: Mapping[Key, Plan], held: Held, name: str, eqn, operands: Sequence[Any]
) -> Held:
    """The weights of a site as `freeze` stores them."""
    quantized, weights = quantized_by(trace, plans), {}
    for place, side in enumerate(SIDES):
        key, site = (name, side), trace.sites[name]
        if key in plans and getattr(site, side).role == "weight":
            state = held.states.get(key, ())
            tensor = quantized(key, operands[place], {})
            bounds = calibrated(tensor, state, update=False)[0].bounds
            order = storage_order(site_layout(eqn), place)
            weights[key] = quantize_tensor(
                operands[place], plans[key].quantizer, bounds=bounds, order=order
            )
    return Held(held.states, weights, held.stacks)


def _medians(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Milliseconds of each run, all in turns; those far behind the fastest but once."""
    for run in runs.values():
        jax.block_until_ready(run())
    found = {name: [_milliseconds(run)] for name, run in runs.items()}
    fastest = min(times[0] for times in found.values())
    going = {name: run for name, run in runs.items() if found[name][0] <= _HOPELESS * fastest}
    round_seconds = sum(found[name][0] for name in going) / 1e3
    for _ in range(min(max(4, round(seconds / max(round_seconds, 1e-6))), 200)):
        for name, run in going.items():
            found[name].append(_milliseconds(run))
    return {name: statistics.median(times) for name, times in found.items()}


def _milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - start)
