"""The subnet and the formats of largest value at a cost, where values add up and costs do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from aqt_search.search.allocation import allocate
from aqt_search.search.cost_table import CostTable
from aqt_search.search.options import SpaceError
from aqt_search.search.searchers.points import distinct, single_changes
from aqt_search.search.space import Space

_TIE = 1e-6  # of the largest difference of values: what the whole target is worth
_BISECTIONS = 30  # of 18 powers of ten


def allocate_subnet(
    values: np.ndarray, space: Space, costs: CostTable, target: float
) -> np.ndarray:
    """Choices [decisions] of largest value among those that cost at most `target`.

    The value of choices c is the sum over decisions d of active(c)[d] * values[d, c[d]]: what is
    not there is worth nothing. What an option costs depends on the widths around it, so this is no
    knapsack; but the formats of one subnet are. So subnets are climbed, by changes of one and of
    two decisions at a time, to the largest of

        max over formats f of value(a, f) - price * cost(a, f),

    which falls apart into sites, and the price is bisected until the cost is the target. The
    formats of the subnets found are then allocated exactly (`allocate`), and those of their
    neighbours whose bound, min over prices of the above + price * target, is above the best so far.
    Of subnets that are worth the same, the dearer.

    Args:
      values: [decisions, max_options], as of `score`.
      space: with an elastic network.
      costs: of the space.
      target: in the units of the costs.

    Raises:
      SpaceError: the target is outside of the space's costs.
    """
    costs.check_target(target)
    tie = _TIE * (np.ptp(values) or 1.0) / target
    subnets = _subnets(values, space, costs, tie)
    nets, prices = _climbed(subnets, target)
    best = None
    while True:
        there, before = subnets.of(nets), best
        bounds = [subnets.priced(there, price)[0] + price * target for price in prices]
        bounds = np.min(bounds, axis=0)
        for number in np.argsort(-bounds, kind="stable"):
            if best is not None and bounds[number] <= best.value + 0.01 * tie * target:
                break
            found = subnets.allocated(nets[number], target)
            if found is not None and (best is None or found.value > best.value):
                best = found
        if best is None:
            raise SpaceError(f"No subnet that was found can cost as little as {target:.6g}.")
        if best is before:
            return best.choices
        nets = _changed_twice(best.choices[: nets.shape[1]], subnets.mask)


class _Point(NamedTuple):
    choices: np.ndarray
    value: float


class _Open(NamedTuple):
    """Subnets [n] whose formats are open: o options of each of the two decisions of a pair."""

    value: np.ndarray  # [n], of the architecture
    cost: np.ndarray  # [n], of sites whose formats are fixed
    values: np.ndarray  # [n, pairs, o, o], of formats
    costs: np.ndarray  # [n, pairs, o, o]
    active: np.ndarray  # [n, decisions], bool


@dataclasses.dataclass(frozen=True)
class _Subnets:
    """Values and costs of subnets [n, architecture decisions]."""

    values: np.ndarray  # [decisions, options]
    costs: CostTable
    tie: float
    mask: np.ndarray  # [architecture decisions, options]
    ends: tuple[np.ndarray, np.ndarray]  # the largest and the smallest
    active: Callable  # of points [n, decisions]
    open: np.ndarray  # [terms]: of sites whose formats are decided
    pairs: np.ndarray  # [pairs, 2]: the decisions about each of these sites
    of_pair: np.ndarray  # [open terms, pairs], 0 or 1
    usable: np.ndarray  # [pairs, o, o]

    def of(self, nets: np.ndarray) -> _Open:
        size = 2 ** int(np.ceil(np.log2(len(nets))))  # few programs
        filled = np.zeros((size, len(self.values)), int)
        filled[:, : nets.shape[1]] = np.resize(nets, (size, nets.shape[1]))
        active = np.asarray(self.active(filled))[: len(nets)]
        own = self.values[np.arange(nets.shape[1]), nets] * active[:, : nets.shape[1]]
        shares = self.costs.shares_of(filled[: len(nets)])
        fixed = self.costs.fixed + shares[:, ~self.open] @ self.costs.table[~self.open, 0, 0]
        costs = np.einsum("nt,tij,tp->npij", shares[:, self.open], self.costs.table[self.open],
                          self.of_pair, optimize=True)  # fmt: skip
        first, second = self.pairs.T
        tied = (first == second)[:, None, None]
        values = self.values[first][:, :, None] + ~tied * self.values[second][:, None, :]
        return _Open(own.sum(1), fixed, values * active[:, first, None, None], costs, active)

    def priced(self, there: _Open, price: float) -> tuple[np.ndarray, np.ndarray]:
        """max over formats of value - price * cost, and the cost there: [n], [n]."""
        price = price - self.tie
        worth = np.where(self.usable, there.values - price * there.costs, -np.inf)
        worth = worth.reshape(*worth.shape[:2], worth.shape[2] ** 2)
        best = worth.argmax(axis=-1)[..., None]
        cost = np.take_along_axis(there.costs.reshape(worth.shape), best, -1).sum((1, 2))
        worth = np.take_along_axis(worth, best, -1).sum((1, 2))
        return there.value - price * there.cost + worth, there.cost + cost

    def allocated(self, net: np.ndarray, target: float) -> _Point | None:
        """With the best formats, exactly; None where no formats cost as little."""
        value, cost, _, costs, active = (leaf[0] for leaf in self.of(net[None]))
        if cost + np.where(self.usable, costs, np.inf).min(axis=(1, 2)).sum() > target:
            return None
        count = len(net)
        if not len(self.pairs):
            return _Point(net, value + self.tie * cost)
        first, second = self.pairs.T - count
        table = CostTable(costs, first, second, float(cost), self.costs.mask[count:])
        own = self.values[count:] * active[count:, None]
        formats = allocate(own, {"cost": table}, {"cost": target})
        total = value + own[np.arange(len(own)), formats].sum()
        total += self.tie * table.of_many(formats[None])[0]
        return _Point(np.concatenate([net, formats]), total)


def _subnets(values: np.ndarray, space: Space, costs: CostTable, tie: float) -> _Subnets:
    assert space.net is not None
    count = len(space.net.decisions)
    terms = np.stack([costs.first, costs.second], axis=1)
    is_open = terms[:, 0] >= count
    pairs, term, pair = np.unique(terms[is_open], axis=0, return_index=True, return_inverse=True)
    return _Subnets(
        values, costs, tie, costs.mask[:count], (space.net.largest, space.net.smallest),
        jax.jit(jax.vmap(space.active)), is_open, pairs, np.eye(len(pairs))[pair],
        costs.pairs[is_open][term],
    )  # fmt: skip


def _climbed(subnets: _Subnets, target: float) -> tuple[np.ndarray, list[float]]:
    """Subnets [n, decisions] that are best at a price, among their neighbours; and the prices."""
    unit = (np.ptp(subnets.values) or 1.0) / target
    low, high = -12.0, 6.0  # log10 of the price in units
    largest, found, prices = subnets.ends[0], list(subnets.ends), [0.0]
    best = largest
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        price = unit * 10**middle
        climbed = np.stack([_climb(subnets, start, price) for start in (largest, best)])
        worth, costs = subnets.priced(subnets.of(climbed), price)
        best, cost = climbed[np.argmax(worth)], costs[np.argmax(worth)]
        found += list(climbed)
        prices.append(price)
        low, high = (middle, high) if cost > target else (low, middle)
    return distinct(np.stack(found)), prices


def _climb(subnets: _Subnets, start: np.ndarray, price: float) -> np.ndarray:
    best, reached = start, subnets.priced(subnets.of(start[None]), price)[0][0]
    while True:
        near = _changed_twice(best, subnets.mask)
        worth, _ = subnets.priced(subnets.of(near), price)
        if worth.max() <= reached + 1e-12 * abs(reached):
            return best
        best, reached = near[np.argmax(worth)], worth.max()


def _changed_twice(start: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Points that differ from `start` in at most two decisions: [n, decisions]."""
    ones = single_changes(start, mask)[mask]
    twos = [single_changes(point, mask)[mask] for point in ones]
    return np.unique(np.concatenate([ones, *twos]), axis=0)
