"""The sites of a subnet: those of the whole model with the sizes that are left of them.

`subnet_sites` gives them for one architecture, exactly as they are found in the model that is built
like it, so every cost holds for a subnet. `site_shares` says the same as products over decisions:
what is left of a site's multiply-accumulates, of its weight and of its output channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from aqt_search.architecture.decisions import Factors, known_value
from aqt_search.architecture.elastic import Elastic
from aqt_search.tracing.sites import Operand, Site

Shares = dict[int, np.ndarray]  # by decision: float64 [options], of 1 each


class SiteShares(NamedTuple):
    """What a subnet has of a site, as products over decisions of a share for each option.

    The share of a part is the product of `part[decision][option]` over the decisions in it.
    """

    macs: Shares
    elements: Shares  # of its weight
    channels: Shares  # of the weight's axes with a scale of their own
    present: Shares  # 0 or 1


def site_shares(net: Elastic, name: str) -> SiteShares:
    """The shares of a site; those of one that no decision is about are empty."""
    site, gates = net.sites[name], net.gates.get(name, ())
    loops = [loop.group for loop in net.channels.of_site(name)]
    taps = [(size, factors) for size, factors in _taps(net, name)]
    weight = _weight_groups(net, name)
    macs = [(net.channels.groups[g].size, net.widths[g]) for g in loops if g in net.widths]
    elements = [(net.channels.groups[g].size, net.widths[g]) for _, g in weight]
    scaled = () if site.weight is None else site.weight.channel_axes
    channels = [
        (net.channels.groups[g].size, net.widths[g]) for axis, g in weight if axis in scaled
    ]
    present = [(1, factors) for factors in gates]
    return SiteShares(
        *(
            _product([*parts, *present])
            for parts in ([*macs, *taps], [*elements, *taps], channels, ())
        )
    )


def _product(parts: Iterable[tuple[int, Factors]]) -> Shares:
    """The factors of numbers over their size in the whole model, by decision."""
    shares: Shares = {}
    for size, factors in parts:
        for place, (decision, of_option) in enumerate(factors):
            one = shares.get(decision, np.ones(len(of_option)))
            shares[decision] = one * of_option / (size if place == 0 else 1)
    return shares


def _taps(net: Elastic, name: str) -> list[tuple[int, Factors]]:
    """The size of every axis of a site's window, and what is left of it."""
    if name not in net.windows:
        return []
    return [(net.channels.size_of(*tap), net.windows[name]) for tap in net.channels.taps(name)]


def _weight_groups(net: Elastic, name: str) -> list[tuple[int, str]]:
    """The axes of a site's weight whose channels are decided about, and their groups."""
    site = net.sites[name]
    side = "rhs" if site.weight is site.rhs else "lhs"
    return [] if site.weight is None else net.groups_of(name, side)


def subnet_sites(net: Elastic, choices: np.ndarray) -> dict[str, Site]:
    """The sites of one subnet, by their names in the whole model; those it has not are left out.

    Args:
      net: the elastic network.
      choices: int [decisions], known numbers.
    """
    choices = np.asarray(choices)
    found = {name: subnet_site(net, name, choices) for name in net.sites}
    return {name: site for name, site in found.items() if site is not None}


def subnet_site(net: Elastic, name: str, choices: np.ndarray) -> Site | None:
    """A site of one subnet; None if it has it not."""
    site, macs = net.sites[name], net.sites[name].macs
    if not all(known_value(factors, choices) for factors in net.gates.get(name, ())):
        return None
    widths = [
        (net.channels.groups[loop.group].size, net.widths[loop.group])
        for loop in net.channels.of_site(name)
        if loop.group in net.widths
    ]
    parts = [*widths, *_taps(net, name)]
    macs = macs * math.prod(known_value(factors, choices) for _, factors in parts)
    macs //= math.prod(size for size, _ in parts)
    shapes = {side: _shape(net, name, side, choices) for side in ("lhs", "rhs", "out")}
    return dataclasses.replace(
        site, macs=macs, out_shape=shapes["out"], lhs=_cut(site.lhs, shapes["lhs"]),
        rhs=_cut(site.rhs, shapes["rhs"]),
    )  # fmt: skip


def _cut(operand: Operand, shape: tuple[int, ...]) -> Operand:
    return operand if operand.shape == shape else dataclasses.replace(operand, shape=shape)


def _shape(net: Elastic, name: str, side: str, choices: np.ndarray) -> tuple[int, ...]:
    site = net.sites[name]
    shape = list(site.out_shape if side == "out" else getattr(site, side).shape)
    for axis, group in net.groups_of(name, side):
        shape[axis] = known_value(net.widths[group], choices)
    if side == "rhs" and name in net.windows:
        for axis in net.channels.window_axes(name):
            shape[axis] = known_value(net.windows[name], choices)
    return tuple(shape)
