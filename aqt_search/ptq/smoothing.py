"""SmoothQuant: moves outliers of activations into the weights that they are multiplied by.

Source: Xiao et al. 2022 (arXiv 2211.10438), section 4. Y = (X diag(s)^-1) (diag(s) W), where the
division by s goes into the LayerNorm that X comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.ptq.affine_producers import Producer, affine_producers
from aqt_search.ptq.captures import site_values
from aqt_search.ptq.dataflow import Consumer, SiteFlow, site_flows
from aqt_search.ptq.errors import PTQError
from aqt_search.ptq.rewriting import Rewriting, warn_skipped
from aqt_search.ptq.site_weights import Axes, SiteWeight, known_axis
from aqt_search.ptq.static_bounds import check_batches
from aqt_search.ptq.unrolling import unroll
from aqt_search.tracing import static_leaves
from aqt_search.tracing.flat_graph import trace_graph


def smooth(apply: Callable, variables: Any, batches: Sequence[Any], strength: float = 0.5) -> Any:
    """Shares the ranges of input channels between activations and weights; keeps the function.

    For input channel j of all sites that read one LayerNorm (query, key and value, for example):

        s_j = max|X_j|^strength / max|W_j|^(1 - strength)         (equation 4)
        scale' = scale / s    bias' = bias / s    W_j' = s_j W_j

    with the maxima over all batches and over those sites. A channel that is zero on either side
    keeps s = 1. Any affine operation by parameters that an activation comes from is served as
    LayerNorm is; an elementwise function in between has to have f(s x) = s f(x) for s > 0.
    The layers of a scan are served one by one.
    A site whose activation comes from elsewhere stays, with a `SkippedSite` warning; so do all
    sites of a LayerNorm that something else reads, too, or a kernel whose input channels are
    several axes, as those of the last layer of Flax's own attention. Output channels may be any.

    Args:
      apply: `apply(variables, batch) -> outputs`, in evaluation mode.
      variables: its first argument, concrete.
      batches: calibration data; batches of equal shape are compiled once.
      strength: 0 leaves weights even, 1 activations.

    Returns:
      Variables of the same tree, shapes and dtypes.

    Raises:
      PTQError: no data, a strength out of [0, 1], or activations or weights that are not finite.
    """
    check_batches(batches)
    if not 0 <= strength <= 1:
        raise PTQError(f"The strength of smoothing lies in [0, 1]; got {strength}.")
    model = unroll(apply, variables, batches[0])
    if model is not None:
        apply, variables = model.apply, model.variables
    graph = trace_graph(apply, variables, batches[0])
    flows, (producers, reasons) = site_flows(graph), affine_producers(graph)
    served = []
    for producer in producers:
        reason = _why_not(producer, flows)
        if reason is None:
            served.append(producer)
        reasons |= {consumer.site: reason for consumer in producer.consumers if reason}
    for name in flows:
        if name in reasons:
            warn_skipped("smooth", name, reasons[name])
    axes = {c.site: flows[c.site].axes for producer in served for c in producer.consumers}
    largest = _largest_inputs(apply, axes, variables, batches) if axes else {}
    rewriting = Rewriting(variables)
    weights = {name: flow.weight for name, flow in flows.items() if flow.weight is not None}
    for producer in served:
        _smooth_one(rewriting, producer, weights, largest, strength)
    found = rewriting.variables()
    return found if model is None else model.restacked(found)


def _why_not(producer: Producer, flows: Mapping[str, SiteFlow]) -> str | None:
    if producer.obstacles:
        return f"of what its activation comes from: {producer.obstacles[0]}"
    for consumer in producer.consumers:
        flow = flows[consumer.site]
        if flow.weight is None or flow.weight.axes.inputs is None:
            return f"of site {flow.name!r}: {flow.reason or 'its inputs are several axes'}"
        for function in consumer.functions:
            if not function.positive_homogeneous:
                return f"f(s x) = s f(x) does not hold for {function.name}, in front of it"
    return None


def _largest_inputs(
    apply: Callable, axes: Mapping[str, Axes], variables: Any, batches: Sequence[Any]
) -> dict[str, np.ndarray]:
    """max|X| of every input channel of some sites, over all batches: [inputs]."""
    values = site_values(apply, list(axes))

    @static_leaves.jit
    def largest(variables, batch):
        found = values({}, {}, variables, batch)
        return {
            name: of(found[name][1 - a.side], known_axis(a.activation)) for name, a in axes.items()
        }

    def of(x: jax.Array, axis: int) -> jax.Array:
        others = tuple(a for a in range(x.ndim) if a != axis)
        return jnp.max(jnp.abs(x.astype(jnp.float32)), others)

    found = jax.device_get([largest(variables, batch) for batch in batches])
    maxima = {name: np.max([batch[name] for batch in found], axis=0) for name in axes}
    for name, value in maxima.items():
        if not np.isfinite(value).all():
            raise PTQError(f"Site {name!r}: its activations are not finite on these data.")
    return maxima


def _smooth_one(
    rewriting: Rewriting,
    producer: Producer,
    weights: Mapping[str, SiteWeight],
    largest: Mapping[str, np.ndarray],
    strength: float,
) -> None:
    activation_range = np.zeros(producer.channels.count)
    weight_range = np.zeros(producer.channels.count)
    for consumer in producer.consumers:
        weight = weights[consumer.site]
        elements = _elements(consumer, weight)
        ranges = weight.input_ranges(rewriting.read(weight.leaf))
        np.maximum.at(activation_range, elements, largest[consumer.site])
        np.maximum.at(weight_range, elements, ranges)
    s = np.ones_like(activation_range)
    counts = (activation_range > 0) & (weight_range > 0)
    s[counts] = activation_range[counts] ** strength / weight_range[counts] ** (1 - strength)
    for leaf in (producer.gain, *producer.shifts):
        rewriting.multiply(leaf, 1 / s)
    for consumer in producer.consumers:
        weight = weights[consumer.site]
        inputs = s[_elements(consumer, weight)]
        rewriting.write(weight.leaf, weight.scaled(rewriting.read(weight.leaf), inputs=inputs))


def _elements(consumer: Consumer, weight: SiteWeight) -> np.ndarray:
    """The channel of every input of a site."""
    return consumer.channels.of_elements(weight.inputs)
