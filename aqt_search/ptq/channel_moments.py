"""Mean, deviation and range of every channel, from BatchNorm's parameters and without data.

Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2.1: what leaves a BatchNorm
is taken for normal, and is followed through the function from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from aqt_search.ptq.affine import Factor
from aqt_search.ptq.captures import check_site_names
from aqt_search.ptq.dataflow import SiteFlow, Tail, site_flows
from aqt_search.ptq.elementwise import Elementwise, elementwise, single
from aqt_search.ptq.errors import PTQError
from aqt_search.ptq.rewriting import Rewriting
from aqt_search.tracing.channels import MOVES, POOLS, SUMS, Channels, moved
from aqt_search.tracing.flat_graph import FlatGraph, Node, Value, trace_graph

DEVIATIONS = 6.0  # how many of them a normal variable is taken to reach
_POINTS = 2001  # of the midpoint rule over +-8 deviations


class Moments(NamedTuple):
    """Of every channel; all float64, shape [channels]. NaN for what is not known."""

    mean: np.ndarray
    deviation: np.ndarray
    low: np.ndarray  # the range, taken to be that of values within some deviations
    high: np.ndarray


class Located(NamedTuple):
    """Moments of a value, and where its channels are."""

    moments: Moments
    channels: Channels


class NormalStatistics(NamedTuple):
    """Of what leaves the BatchNorm behind a site; float64, shape [channels]."""

    mean: np.ndarray
    deviation: np.ndarray

    def divided_by(self, s: np.ndarray) -> NormalStatistics:
        """Those after `equalize`, whose scales `equalization_scales` gives."""
        return NormalStatistics(self.mean / s, self.deviation / s)


def batch_norm_statistics(
    apply: Callable, variables: Any, *args: Any
) -> dict[str, NormalStatistics]:
    """Mean bias and deviation |scale| sqrt(var / (var + eps)) of what leaves every BatchNorm.

    By the definition of BatchNorm, as far as its running statistics are right. Folding leaves no
    trace of them: take them before `fold_batch_norm`.

    Args:
      apply: a function of variables and data, in evaluation mode.
      variables: its first argument, concrete.
      *args: the data; only shapes matter.

    Returns:
      Statistics by the name of the site before the BatchNorm.
    """
    rewriting, found = Rewriting(variables), {}
    for name, flow in site_flows(trace_graph(apply, variables, *args)).items():
        tail = flow.tail
        if tail is not None and (variance := _variance(tail)) is not None:
            found[name] = _statistics(rewriting, tail, variance)
    return found


def _variance(tail: Tail) -> Factor | None:
    """(var + eps)^-1/2 of the one BatchNorm in a tail."""
    factors = [f for f in tail.gain.factors if f.power == -0.5 and f.offset > 0]
    return factors[0] if len(factors) == 1 else None


def _statistics(rewriting: Rewriting, tail: Tail, variance: Factor) -> NormalStatistics:
    # The product and what is added to it in front of the normalization have mean 0 behind it.
    behind = [s.value(rewriting) for s in tail.shifts if variance not in s.through.factors]
    gain = np.abs(tail.gain.value(rewriting))
    deviation = gain * np.sqrt(rewriting.read(variance.leaf).reshape(-1))
    return NormalStatistics(sum(behind, np.zeros_like(deviation)), deviation)


def normal_moments(statistics: NormalStatistics, deviations: float = DEVIATIONS) -> Moments:
    """A normal variable, with a range of `deviations` to both sides."""
    mean, deviation = statistics
    reach = deviations * deviation
    return Moments(mean, deviation, mean - reach, mean + reach)


def moments_through(function: Callable, moments: Moments) -> Moments:
    """Moments of f(x), x normal: integrals over x within 8 deviations; the range of f on x's.

    For relu the mean is that of a clipped normal variable (equation 19):
    deviation * pdf(mean / deviation) + mean * cdf(mean / deviation).
    """
    edges = np.linspace(-8, 8, _POINTS)
    density = np.exp(-(edges**2) / 2)
    weights = density / density.sum()

    def of(x: np.ndarray) -> np.ndarray:  # [channels, points]
        return np.asarray(function(jnp.asarray(x, jnp.float32)), np.float64)

    y = of(moments.mean[:, None] + moments.deviation[:, None] * edges)
    mean = y @ weights
    deviation = np.sqrt(np.maximum(((y - mean[:, None]) ** 2) @ weights, 0))
    share = np.linspace(0, 1, _POINTS)
    values = of(moments.low[:, None] * (1 - share) + moments.high[:, None] * share)
    return Moments(mean, deviation, values.min(1), values.max(1))


def propagate(
    graph: FlatGraph, statistics: Mapping[str, NormalStatistics], deviations: float = DEVIATIONS
) -> dict[Value, Located]:
    """Moments of all values that follow from what leaves the BatchNorms.

    Through elementwise functions, sums of two values (taken for independent), pooling and moves of
    elements. The mean of a maximum is not known (NaN); its range is.
    """
    flows = site_flows(graph)
    check_site_names(list(statistics), flows)
    found = _seeds(flows, statistics, deviations)
    for node in graph.nodes.values():
        value = node.outputs[0]
        if value in found:
            continue
        located = _result(graph, node, found, deviations)
        if located is not None:
            found[value] = located
        # Where a function of several equations ends, what it computes from its source is known.
        source = next((v for v in node.inputs if v in found), None)
        function = None if source is None else elementwise(graph, source)
        if function is not None and function.result not in found:
            found[function.result] = _of_function(function, found[function.source])
    return found


def _seeds(flows: Mapping[str, SiteFlow], statistics, deviations: float) -> dict[Value, Located]:
    found = {}
    for name, normal in statistics.items():
        tail = flows[name].tail
        if tail is None:
            raise PTQError(
                f"Statistics are given of site {name!r}, of which nothing follows:"
                f" {flows[name].reason}. Take those of `batch_norm_statistics`."
            )
        found[tail.value] = Located(normal_moments(normal, deviations), tail.channels)
    return found


def _of_function(function: Elementwise, located: Located) -> Located:
    return located._replace(moments=moments_through(function, located.moments))


def _result(graph: FlatGraph, node: Node, found, deviations: float) -> Located | None:
    """Moments of the result of one equation."""
    known = [found.get(value) for value in node.inputs]
    if known and known[0] is not None and node.primitive in (*MOVES, *POOLS):
        channels = moved(graph, node, known[0].channels)
        if channels is None:
            return None
        return Located(_pooled(graph, node, known[0].moments), channels)
    if node.primitive in ("add", "add_any"):
        first, second = known
        if first is not None and second is not None:
            return _sum(first, second, deviations) if first.channels == second.channels else None
    function = single(graph, node)
    if function is None or function.source not in found:
        return None
    return _of_function(function, found[function.source])


def _sum(first: Located, second: Located, deviations: float) -> Located:
    a, b = first.moments, second.moments
    mean, deviation = a.mean + b.mean, np.hypot(a.deviation, b.deviation)
    low, high = a.low + b.low, a.high + b.high
    reach = deviations * deviation  # fmax: a mean that is not known tells nothing
    moments = Moments(mean, deviation, np.fmax(low, mean - reach), np.fmin(high, mean + reach))
    return first._replace(moments=moments)


def _pooled(graph: FlatGraph, node: Node, moments: Moments) -> Moments:
    if node.primitive in SUMS:
        count = _summed(graph, node)
        return Moments(*(count * part for part in moments))
    unknown = np.full_like(moments.mean, np.nan)
    if "max" in node.primitive or "min" in node.primitive:
        return moments._replace(mean=unknown, deviation=unknown)
    if node.primitive == "pad":
        low, high = np.minimum(moments.low, 0), np.maximum(moments.high, 0)
        return Moments(unknown, unknown, low, high)
    return moments


def _summed(graph: FlatGraph, node: Node) -> float:
    """How many elements are summed up into one."""
    if node.primitive == "reduce_window_sum":
        return float(math.prod(node.eqn.params["window_dimensions"]))
    sizes = [math.prod(graph.shape(v)) for v in (node.inputs[0], node.outputs[0])]
    return sizes[0] / sizes[1]
