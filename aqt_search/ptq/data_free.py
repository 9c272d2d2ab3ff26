"""Post-training quantization without data: static bounds and bias correction from BatchNorm.

    statistics = batch_norm_statistics(apply, variables, x)        # before BatchNorm is folded
    assignment, state = calibrate_data_free(
        apply, assignment, variables, x, statistics, other_bounds={"stem/kernel": 2.5}
    )
    variables = correct_bias_data_free(apply, assignment, state, variables, x, statistics)

Of x only shapes and dtypes matter. Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.calibration import History
from aqt_search.products.operands import values_of
from aqt_search.ptq.bias_correction import why_not_correctable
from aqt_search.ptq.captures import check_site_names, site_values
from aqt_search.ptq.channel_moments import (
    DEVIATIONS,
    Located,
    NormalStatistics,
    propagate,
)
from aqt_search.ptq.dataflow import SiteFlow, site_flows, weight_and_tail
from aqt_search.ptq.errors import PTQError
from aqt_search.ptq.rewriting import Rewriting, warn_skipped
from aqt_search.ptq.static_bounds import static_assignment
from aqt_search.tracing import static_leaves
from aqt_search.tracing.flat_graph import FlatGraph, Value, trace_graph
from aqt_search.tracing.sites import SIDES, SiteFormats, is_unquantized
from aqt_search.tracing.transform import Assignment, CalibrationState, quantize_with_state

Statistics = Mapping[str, NormalStatistics]


def calibrate_data_free(
    apply: Callable,
    assignment: Assignment,
    variables: Any,
    x: Any,
    statistics: Statistics,
    *,
    other_bounds: Mapping[str, float] | None = None,
    deviations: float = DEVIATIONS,
) -> tuple[dict[str, SiteFormats], CalibrationState]:
    """`static_bounds.calibrate` with bounds of activations from BatchNorm's statistics alone.

    An activation that leaves a BatchNorm is taken to lie in mean +- `deviations` * deviation of
    every channel; elementwise functions, sums and pooling are followed from there. Its bounds are
    those of the channel that reaches farthest. Weights have the bounds of their calibration.

    Args:
      apply: a function of variables and data, in evaluation mode.
      assignment: formats by site; activations with one scale per tensor.
      variables: the first argument of `apply`.
      x: the data, or anything with its shape and dtype.
      statistics: as `batch_norm_statistics` gives them.
      other_bounds: max|x| of the activation of sites that no BatchNorm tells of: those that read
        the data itself, or a LayerNorm.
      deviations: how many deviations a channel reaches; the paper has 6.

    Returns:
      The assignment whose calibrations have state, and their state.

    Raises:
      PTQError: an activation of which nothing is known (all such sites are named), or with several
        scales; bounds for a site that does not exist, or that are not above 0.
      SiteError: the assignment is not of this function.
    """
    graph = trace_graph(apply, variables, x)
    other_bounds = _checked(other_bounds or {}, graph)
    static = static_assignment(assignment, graph.sites)
    qfun = quantize_with_state(apply)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
    state = qfun.init(static, variables, zeros)
    bounds = _activation_bounds(graph, state, statistics, other_bounds, deviations)
    # On zeros, which no calibration counts: the bounds of weights alone.
    state = static_leaves.jit(lambda *inputs: qfun.apply(static, *inputs)[1])(
        state, variables, zeros
    )
    found: dict[str, dict[str, Any]] = {name: dict(fields) for name, fields in state.items()}
    for (name, side), (low, high) in bounds.items():
        found[name][side] = _history(name, side, state[name][side], low, high)
    return static, found


def _activation_bounds(
    graph: FlatGraph,
    state: CalibrationState,
    statistics: Statistics,
    other_bounds: Mapping[str, float],
    deviations: float,
) -> dict[tuple[str, str], tuple[float, float]]:
    """(low, high) of every activation whose calibration has state, by site and side."""
    values, nodes = propagate(graph, statistics, deviations), graph.site_nodes()
    found, unknown = {}, []
    for name, site in graph.sites.items():
        for side in state.get(name, ()):
            if getattr(site, side).role != "activation":
                continue
            located = values.get(nodes[name].inputs[SIDES.index(side)]) if name in nodes else None
            bounds = _range(located, other_bounds.get(name))
            if bounds is None:
                unknown.append(name)
            else:
                found[name, side] = bounds
    if unknown:
        raise PTQError(
            f"No BatchNorm tells the range of the activation of {', '.join(map(repr, unknown))}."
            " Give max|x| of each as other_bounds={name: bound}."
        )
    return found


def _checked(bounds: Mapping[str, float], graph: FlatGraph) -> Mapping[str, float]:
    check_site_names(list(bounds), graph.sites)
    for name, bound in bounds.items():
        if not (np.isfinite(bound) and bound > 0):
            raise PTQError(f"The bound of site {name!r} has to be finite and above 0; got {bound}.")
    return bounds


def _range(located: Located | None, given: float | None) -> tuple[float, float] | None:
    """(low, high) of an activation."""
    if given is not None:
        return -given, given
    if located is None:
        return None
    return float(located.moments.low.min()), float(located.moments.high.max())


def _history(site: str, side: str, history: Any, low: float, high: float) -> History:
    """The state of a calibration that has seen these bounds once."""
    if not isinstance(history, History) or history.high.size != 1:
        raise PTQError(
            f"Site {site!r}: {side} has to have one scale for the tensor and a calibration of its"
            " bounds, such as absmax, to be calibrated without data."
        )

    def full(value: float, like: jax.Array) -> jax.Array:
        return jnp.full_like(like, value)

    if history.low is not None:
        bounds = full(max(high, 0.0), history.high), full(min(low, 0.0), history.low)
    else:
        bounds = full(max(high, -low), history.high), None
    return history._replace(high=bounds[0], low=bounds[1], updates=jnp.ones_like(history.updates))


def correct_bias_data_free(
    apply: Callable,
    assignment: Assignment,
    state: CalibrationState,
    variables: Any,
    x: Any,
    statistics: Statistics,
) -> Any:
    """`correct_bias` with the shift that the error of the weights causes in the mean:

        bias' = bias - sum over window and inputs of (W_quantized - W) E[x]

    E[x] follows from BatchNorm's statistics: that of relu(x), x normal, is equation 19's; zeros
    at the borders of images do not count. A site whose E[x] no BatchNorm tells stays, with a
    `SkippedSite` warning; so does one without an additive parameter behind its product.

    Args:
      apply, x, statistics: as for `calibrate_data_free`.
      assignment, state: as `calibrate_data_free` or `static_bounds.calibrate` returns them.
      variables: the first argument of `apply`, concrete.

    Returns:
      Variables of the same tree, shapes and dtypes.
    """
    graph = trace_graph(apply, variables, x)
    flows, values = site_flows(graph), propagate(graph, statistics)
    means = {}
    for name, flow in flows.items():
        if name not in assignment or is_unquantized(assignment[name]):
            continue
        found = _mean_inputs(flow, values)
        if isinstance(found, str):
            warn_skipped("correct_bias_data_free", name, found)
        else:
            means[name] = found
    errors = _weight_errors(apply, assignment, state, variables, x, {n: flows[n] for n in means})
    rewriting = Rewriting(variables)
    for name, mean in means.items():
        weight, tail = weight_and_tail(flows[name])
        shift = weight.matrix(errors[name]) * weight.of_inputs(mean)
        delta = -shift.reshape(-1, weight.outputs).sum(0)
        rewriting.add_to_product(tail, delta)
    return rewriting.variables()


def _mean_inputs(flow: SiteFlow, values: Mapping[Value, Located]) -> np.ndarray | str:
    """E[x] of every input channel of a site; the reason, if it is not known or of no use."""
    reason = flow.reason or why_not_correctable(flow)
    if reason or flow.axes.inputs is None:
        return reason or "its input channels are not a single axis"
    weight, _ = weight_and_tail(flow)
    located = None if flow.activation is None else values.get(flow.activation)
    if located is None or located.channels.axis != flow.axes.activation:
        return "no BatchNorm tells the mean of its activation"
    mean = located.moments.mean[located.channels.of_elements(weight.inputs)]
    return mean if np.isfinite(mean).all() else "the mean of a maximum is not known without data"


def _weight_errors(
    apply: Callable,
    assignment: Assignment,
    state: CalibrationState,
    variables: Any,
    x: Any,
    flows: Mapping[str, SiteFlow],
) -> dict[str, np.ndarray]:
    """W_quantized - W of some sites, in float64."""
    values = site_values(apply, list(flows))

    @static_leaves.jit
    def operands(variables, x):
        found = values(assignment, state, variables, x)
        sides = {name: flow.axes.side for name, flow in flows.items()}
        return {n: (values_of(found[n].operands[s]), found[n][s]) for n, s in sides.items()}

    if not flows:
        return {}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
    pairs = jax.device_get(operands(variables, zeros))
    return {n: np.asarray(q, np.float64) - np.asarray(w, np.float64) for n, (q, w) in pairs.items()}
