"""BatchNorm folding: the gain of every BatchNorm moves into the weights of the site before it.

Source: Jacob et al. 2017 (arXiv 1712.05877), section 3.2, for a BatchNorm in evaluation mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from aqt_search.ptq.affine import Factor, Reader, Term
from aqt_search.ptq.dataflow import Tail, site_flows, weight_and_tail, why_not_changeable
from aqt_search.ptq.errors import PTQError, SkippedSite
from aqt_search.ptq.rewriting import Rewriting, warn_skipped
from aqt_search.ptq.site_weights import SiteWeight
from aqt_search.ptq.unrolling import unroll
from aqt_search.tracing.flat_graph import FlatGraph, trace_graph


def fold_batch_norm(apply: Callable, variables: Any, *args: Any) -> Any:
    """Moves the gain of every BatchNorm into the weights before it; the function stays the same.

    With g = scale / sqrt(var + eps), for every output channel:

        w' = w g    mean' = mean g    var' = 1 - eps    scale' = 1    bias' = bias

    so that BatchNorm adds bias - mean g and multiplies by 1, up to rounding. The bias of a
    convolution becomes bias g. Any other gains by parameters behind a product are folded, too.

    What cannot be folded stays, with a `SkippedSite` warning: a BatchNorm that does not follow a
    product, one whose parameters something else reads, weights that are computed from their leaf.
    The layers of a scan are served one by one.

    Args:
      apply: a function of variables and data, in evaluation mode.
      variables: its first argument, concrete.
      *args: the data; only shapes matter.

    Returns:
      Variables of the same tree, shapes and dtypes.

    Raises:
      PTQError: parameters are not finite, or a variance + eps is not above 0.
    """
    model = unroll(apply, variables, *args)
    if model is not None:
        apply, variables = model.apply, model.variables
    graph = trace_graph(apply, variables, *args)
    rewriting, tails = Rewriting(variables), set()
    for name, flow in site_flows(graph).items():
        if flow.tail is None or not flow.tail.has_gain:
            continue
        tails |= flow.tail.nodes
        reason = why_not_changeable(flow)
        if reason:
            warn_skipped("fold_batch_norm", name, reason)
        else:
            _fold(rewriting, name, *weight_and_tail(flow))
    _warn_of_others(graph, tails)
    found = rewriting.variables()
    return found if model is None else model.restacked(found)


def _fold(rewriting: Rewriting, site: str, weight: SiteWeight, tail: Tail) -> None:
    factors = tail.gain.factors
    for factor in factors:
        _check(rewriting, site, factor)
    gain = np.asarray(Term(1.0, factors).value(rewriting))
    shifts = [(s.leaf, s.through.value(rewriting)) for s in tail.shifts]
    rewriting.write(weight.leaf, weight.scaled(rewriting.read(weight.leaf), outputs=gain))
    for leaf, through in shifts:
        rewriting.multiply(leaf, through)
    for factor in factors:
        ones = np.ones_like(rewriting.read(factor.leaf))
        rewriting.write(factor.leaf, ones - factor.offset)


def _check(rewriting: Rewriting, site: str, factor: Factor) -> None:
    value = rewriting.read(factor.leaf) + factor.offset
    if factor.power < 0 and not (value > 0).all():
        raise PTQError(
            f"The BatchNorm behind site {site!r} cannot be folded: {factor.leaf.name!r} +"
            f" {factor.offset:.3g} has to be above 0, and is {value.min():.3g} at the least."
        )


def _warn_of_others(graph: FlatGraph, tails: set[int]) -> None:
    """Warns of roots of variances that are in no tail."""
    for node in graph.nodes.values():
        if node.primitive not in ("rsqrt", "sqrt") or node.index in tails:
            continue
        found = Reader(graph).expression(node.outputs[0])
        for factor in found.terms[0].factors if found and len(found.terms) == 1 else ():
            if factor.offset:
                warnings.warn(
                    f"fold_batch_norm leaves the BatchNorm of {factor.leaf.name!r} as it is: it"
                    " does not follow the product of a site, with nothing in between.",
                    SkippedSite,
                    stacklevel=3,
                )
