"""Cross-layer equalization: channels of one layer scaled against those of the next.

Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1. With f(s x) = s f(x) for s > 0,

    W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1),    S = diag(s)

for any s > 0. The ranges of a channel on both sides become equal, and with them those of channels
that share one scale become more alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from aqt_search.ptq.dataflow import (
    OUTPUT,
    Shift,
    SiteFlow,
    dataflow,
    weight_and_tail,
    why_not_changeable,
)
from aqt_search.ptq.errors import PTQError
from aqt_search.ptq.rewriting import Rewriting, warn_skipped
from aqt_search.ptq.site_weights import SiteWeight
from aqt_search.ptq.unrolling import unroll

_FOLDED = 1e-3  # how far from 1 a folded BatchNorm may be
_CONVERGED = 1e-3  # of log s


class Pair(NamedTuple):
    """A site, and the one that alone reads its result."""

    first: str
    second: str
    weights: tuple[SiteWeight, SiteWeight]
    shifts: tuple[Shift, ...]  # of the first
    elements: np.ndarray  # int, [inputs of the second]: the channel of the first it belongs to


def equalize(apply: Callable, variables: Any, *args: Any, iterations: int = 40) -> Any:
    """Equalizes the ranges of weights over pairs and chains of sites; the function stays the same.

    For channel i with the ranges r1 = max|W1[i]| of its output and r2 = max|W2[:, i]| of its input,
    s = sqrt(r1 r2) / r2: both ranges become sqrt(r1 r2). Pairs are visited in program
    order until no s differs from 1 by more than a thousandth, or `iterations` times. A channel that
    is zero on either side keeps s = 1. Of a depthwise convolution the kernel of channel i is both.

    Between the two sites may stand biases, folded BatchNorm, activations for which f(s x) = s f(x),
    s > 0 (identity, relu, leaky relu; not relu6, swish, gelu), pooling and flattening. A site that
    anything else follows stays, with a `SkippedSite` warning; so does one whose BatchNorm is not
    folded: use `fold_batch_norm` before. The layers of a scan are served one by one.

    Args:
      apply: a function of variables and data, in evaluation mode.
      variables: its first argument, concrete, with BatchNorm folded.
      *args: the data; only shapes matter.
      iterations: most passes over all pairs.

    Returns:
      Variables of the same tree, shapes and dtypes.

    Raises:
      PTQError: weights are not finite; `iterations` is below 1.
    """
    model = unroll(apply, variables, *args)
    if model is not None:
        apply, variables = model.apply, model.variables
    pairs = _pairs(apply, variables, args)
    rewriting = Rewriting(variables)
    scales = _scales(rewriting, pairs, iterations)
    for pair in pairs:
        s, (first, second) = scales[pair.first], pair.weights
        rewriting.write(first.leaf, first.scaled(rewriting.read(first.leaf), outputs=1 / s))
        for shift in pair.shifts:
            rewriting.multiply(shift.leaf, 1 / s)
        scaled = second.scaled(rewriting.read(second.leaf), inputs=s[pair.elements])
        rewriting.write(second.leaf, scaled)
    found = rewriting.variables()
    return found if model is None else model.restacked(found)


def equalization_scales(
    apply: Callable, variables: Any, *args: Any, iterations: int = 40
) -> dict[str, np.ndarray]:
    """The s of `equalize`, by first site: float64, shape [output channels].

    The results of a site, statistics of them included, are divided by it. Layers of a scan are
    sites of their own, `kernel[3]`.
    """
    model = unroll(apply, variables, *args)
    if model is not None:
        apply, variables = model.apply, model.variables
    return _scales(Rewriting(variables), _pairs(apply, variables, args), iterations)


def _scales(rewriting: Rewriting, pairs: list[Pair], iterations: int) -> dict[str, np.ndarray]:
    if iterations < 1:
        raise PTQError(f"equalize takes at least one iteration; got {iterations}.")
    weights = {n: w for pair in pairs for n, w in zip((pair.first, pair.second), pair.weights)}
    magnitudes = {name: w.magnitudes(rewriting.read(w.leaf)) for name, w in weights.items()}
    scales = {pair.first: np.ones(pair.weights[0].outputs) for pair in pairs}
    for _ in range(iterations if pairs else 0):
        steps = [_step(pair, magnitudes, scales) for pair in pairs]
        if max(steps) < _CONVERGED:
            break
    return scales


def _step(pair: Pair, magnitudes: dict[str, np.ndarray], scales: Mapping[str, np.ndarray]) -> float:
    """Equalizes a pair; how far s was from 1, as |log s|."""
    first, second, weight = pair.first, pair.second, pair.weights[1]
    output_range = magnitudes[first].max(0)
    input_range = np.zeros_like(output_range)
    np.maximum.at(input_range, pair.elements, weight.per_input(magnitudes[second]))
    s = np.ones_like(output_range)
    counts = (output_range > 0) & (input_range > 0)
    s[counts] = np.sqrt(output_range[counts] / input_range[counts])
    magnitudes[first] = magnitudes[first] / s
    magnitudes[second] = magnitudes[second] * weight.of_inputs(s[pair.elements])
    scales[first][...] *= s
    return float(np.abs(np.log(s)).max(initial=0))


# --- Which sites ----------------------------------------------------------------------------------


def _pairs(apply: Callable, variables: Any, args: tuple) -> list[Pair]:
    flows, found = dataflow(apply, variables, *args), []
    rewriting = Rewriting(variables)
    for name, flow in flows.items():
        if flow.obstacles == (OUTPUT,) and not flow.consumers:
            continue  # a last layer
        reason = why_not_a_pair(flow, flows) or _why_not_folded(flow, rewriting)
        if reason:
            warn_skipped("equalize", name, reason)
            continue
        (consumer,) = flow.consumers
        (weight, tail), second = weight_and_tail(flow), flows[consumer.site].weight
        assert second is not None  # else there were a reason
        elements = consumer.channels.of_elements(second.inputs)
        found.append(Pair(name, consumer.site, (weight, second), tail.shifts, elements))
    return found


def why_not_a_pair(flow: SiteFlow, flows: Mapping[str, SiteFlow]) -> str | None:
    """Why the results of a site cannot be scaled against the weights of the next."""
    if reason := why_not_changeable(flow):
        return reason
    if not weight_and_tail(flow)[0].is_matrix:
        return "its inputs are several axes"
    if flow.obstacles:
        return flow.obstacles[0]
    if len(flow.consumers) != 1:
        names = ", ".join(repr(consumer.site) for consumer in flow.consumers) or "none"
        return f"its result has to enter one site, and enters {names}"
    (consumer,) = flow.consumers
    for function in consumer.functions:
        if not function.positive_homogeneous:
            return f"f(s x) = s f(x) does not hold for its activation, {function.name}"
    second = flows[consumer.site]
    if second.weight is None or not second.weight.is_matrix:
        return f"of the next site {second.name!r}: {second.reason or 'inputs are several axes'}"
    return None


def _why_not_folded(flow: SiteFlow, rewriting: Rewriting) -> str | None:
    _, tail = weight_and_tail(flow)
    gain = tail.gain.value(rewriting) / tail.gain.coefficient
    if np.allclose(gain, 1, rtol=0, atol=_FOLDED):
        return None
    return "its BatchNorm is not folded into its weights; use fold_batch_norm before"
