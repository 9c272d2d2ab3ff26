"""The cost of every point of formats and architecture: sums of products over decisions.

What a site costs is a number of its multiply-accumulates, of the elements of its weight, of its
output channels (which have scales) and of itself, for every pair of formats; and a subnet has a
share of each. The numbers are found by asking the cost of whole subnets' sites, and checked by it.
A cost that is no such sum, such as a latency, is asked for every shape that a site can have: one
term each, whose shares are 1 for that shape and 0 for all others.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aqt_search.architecture.elastic import Elastic
from aqt_search.architecture.subnet_sites import (
    Shares,
    SiteShares,
    site_shares,
    subnet_site,
    subnet_sites,
)
from aqt_search.search.cost_table import CostTable
from aqt_search.search.options import SpaceError

_EXACT = 1e-9  # of the largest cost: rounding in float64
_PROBES = 256  # architectures that tell the parts of a site's cost apart: all if there are no more
_CHECKS = 16  # random points whose cost is asked
_MOST_SHAPES = 4096  # of a site
# Parts of a site's cost, simplest first: the first that explains it is taken.
_PARTS = (
    ("macs",), ("elements",), ("present",), ("elements", "channels"), ("elements", "present"),
    ("macs", "elements"), ("macs", "elements", "channels", "present"),
)  # fmt: skip


class Term(NamedTuple):
    """Part of a site's cost."""

    table: np.ndarray  # [max_options, max_options], by the formats of its decisions
    pair: tuple[int, int]  # these decisions
    shares: Shares


class FormatCosts(NamedTuple):
    """What a site's formats are under every pair of options of its decisions."""

    pair: tuple[int, int] | None  # None: they are fixed
    options: list[tuple[int, int]]
    assignments: Sequence[Mapping[str, Any]]


def elastic_cost_table(
    net: Elastic,
    mask: np.ndarray,
    formats_of: Callable[[str], FormatCosts],
    cost: Callable[[Mapping[str, Any], Mapping[str, Any]], Any],
    concrete: Callable[[np.ndarray], Mapping[str, Any]],
) -> CostTable:
    """Tabulates a cost that is a sum over sites.

    Args:
      net: whose decisions are the first of the space's.
      mask: of the space, [decisions, max_options].
      formats_of: a site's formats.
      cost: of sites and an assignment, such as `cost.gbops`.
      concrete: the assignment of a known point.

    Raises:
      SpaceError: a cost that is not of this form, as where several sites share a weight; or one
        that is not linear in the sizes of a site, which can have too many shapes.
    """
    rng = np.random.default_rng(0)
    terms, fixed = [], 0.0
    for name in net.sites:
        shares, formats = site_shares(net, name), formats_of(name)
        ask = functools.partial(_costs_in, net, name, cost, formats)
        probes = _probes(net, shares, rng)
        costs = np.array([ask(probe) for probe in probes])
        if not np.isfinite(costs).all():
            raise SpaceError(f"The cost of site {name!r} is not finite in some subnet.")
        found_terms = _linear_terms(shares, formats, costs, probes, mask.shape[1])
        if found_terms is None:
            found_terms = _terms_of_shapes(net, name, shares, formats, ask, mask.shape[1])
        for found in found_terms:
            if found.shares or formats.pair is not None:
                terms.append(found)
            else:
                fixed += float(found.table[0, 0])
    table = _stacked(terms, fixed, mask)
    _check(table, net, cost, concrete, _random_points(mask, _CHECKS, rng))
    return table


def _costs_in(
    net: Elastic, name: str, cost: Callable, formats: FormatCosts, choices: np.ndarray
) -> list[float]:
    """What a site costs in a subnet, under every pair of options."""
    site = subnet_site(net, name, choices)
    return [0.0 if site is None else float(cost({name: site}, a)) for a in formats.assignments]


def _random_points(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, mask.sum(axis=1), (count, len(mask)))


def _probes(net: Elastic, shares: SiteShares, rng: np.random.Generator) -> list[np.ndarray]:
    """Architectures that tell the parts of a site's cost apart: the largest subnet comes first."""
    about = sorted({decision for part in shares for decision in part})
    found = [net.largest]
    for decision in about:
        for option in range(len(net.decisions[decision].options)):
            found.append(net.largest)
            found[-1][decision] = option
    sizes = [decision for decision in about if net.decisions[decision].kind != "depth"]
    counts = [len(net.decisions[decision].options) for decision in sizes]
    # Between few shapes all are asked: some sum may fit every other one.
    every = math.prod(counts) <= _PROBES
    drawn = (
        itertools.product(*map(range, counts))
        if every
        else rng.integers(0, counts, (_PROBES, len(counts)))
    )
    for options in drawn:
        found.append(net.largest)
        found[-1][sizes] = options
    return found


def _linear_terms(
    shares: SiteShares, formats: FormatCosts, costs: np.ndarray, probes, width: int
) -> list[Term] | None:
    """The parts of a site's cost; None if it is no sum of them. costs: [probes, option pairs]."""
    values = {
        part: np.array([_share(getattr(shares, part), probe) for probe in probes])
        for part in SiteShares._fields
    }
    largest = max(np.abs(costs).max(), np.finfo(float).tiny)
    for parts in _PARTS:
        columns = np.stack([values[part] for part in parts], axis=1)
        numbers, *_ = np.linalg.lstsq(columns, costs, rcond=None)
        if np.abs(columns @ numbers - costs).max() <= _EXACT * largest:
            break
    else:
        return None
    if len(parts) == 1:
        numbers = costs[:1] / columns[:1]  # exactly: of the largest subnet, which mostly has all
    found = []
    for part, row in zip(parts, numbers):
        if np.abs(row).max() > _EXACT * largest:
            found.append(_term(getattr(shares, part), formats, row, width))
    return found


def _terms_of_shapes(
    net: Elastic, name: str, shares: SiteShares, formats: FormatCosts, ask: Callable, width: int
) -> Iterator[Term]:
    """A term for every shape that a site can have."""
    about = sorted(set(shares.macs | shares.elements | shares.channels) - set(shares.present))
    counts = [len(net.decisions[decision].options) for decision in about]
    if math.prod(counts) > _MOST_SHAPES:
        raise SpaceError(
            f"The cost of site {name!r} is not linear in its sizes, so that each of the"
            f" {math.prod(counts)} shapes it can have would have to be asked, and at most"
            f" {_MOST_SHAPES} are: offer fewer widths and windows, or another cost, such as gbops."
        )
    for options in itertools.product(*map(range, counts)):
        choices = net.largest
        choices[about] = options
        here = {d: np.eye(n)[option] for d, n, option in zip(about, counts, options)}
        yield _term(shares.present | here, formats, np.array(ask(choices)), width)


def _share(shares: Shares, choices: np.ndarray) -> float:
    return float(np.prod([of_option[choices[d]] for d, of_option in shares.items()]))


def _term(shares: Shares, formats: FormatCosts, row: np.ndarray, width: int) -> Term:
    if formats.pair is None:
        return Term(np.full((width, width), row[0]), (0, 0), shares)
    table = np.zeros((width, width))
    for (i, j), number in zip(formats.options, row):
        table[i, j] = number
    return Term(table, formats.pair, shares)


def _stacked(terms: list[Term], fixed: float, mask: np.ndarray) -> CostTable:
    factors = max([1, *(len(term.shares) for term in terms)])
    shares = np.ones((len(terms), factors, mask.shape[1]))
    sharing = np.zeros((len(terms), factors), int)
    for number, term in enumerate(terms):
        for place, (decision, of_option) in enumerate(term.shares.items()):
            shares[number, place, : len(of_option)] = of_option
            sharing[number, place] = decision
    first, second = np.array([term.pair for term in terms]).T
    table = np.stack([term.table for term in terms])
    return CostTable(table, first, second, fixed, mask, shares, sharing)


def _check(table: CostTable, net: Elastic, cost, concrete, points: np.ndarray) -> None:
    """Raises SpaceError unless the table has the costs of points."""
    for point, found in zip(points, table.of_many(points)):
        sites = subnet_sites(net, point[: len(net.decisions)])
        expected = float(cost(sites, concrete(point)))
        if abs(found - expected) > 1e3 * _EXACT * abs(expected):
            raise SpaceError(
                f"The cost of a subnet is {expected:.9g}, the sum over its sites {found:.9g}: what"
                " is no sum over them, as where several share a weight, cannot be tabulated for a"
                " space that decides about the architecture."
            )
