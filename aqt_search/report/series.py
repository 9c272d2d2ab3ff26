"""Compares the fronts of a sweep: one per series of points, pair by pair."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from aqt_search.report.against_uniform import seed_gains
from aqt_search.report.front import Group, group_points
from aqt_search.report.records import Record
from aqt_search.search.pareto import (
    Front,
    cost_ratio,
    dominates,
    hypervolume,
    hypervolume_interval,
)


@dataclasses.dataclass(frozen=True)
class Series:
    """The points of one front: means over the seeds, cheapest first, all with an accuracy.

    The hypervolume is the area that the points dominate in the plane of log10 GBOPs and accuracy (a
    fraction), up to the (log10 GBOPs, accuracy) of `reference_point`; the interval is its 95 %
    bootstrap interval over seeds, NaN with one seed.
    """

    name: str
    groups: tuple[Group, ...]
    hypervolume: float
    interval: tuple[float, float]

    @property
    def front(self) -> Front:
        """Mean costs in GBOPs and mean accuracies of all points."""
        return [g.gbops for g in self.groups], [g.accuracy for g in self.groups]

    @property
    def members(self) -> list[Record]:
        """The runs of all points."""
        return [member for group in self.groups for member in group.members]

    @property
    def seeds(self) -> int:
        """The number of different seeds among the runs."""
        return len({member.seed for member in self.members})


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two series; `first` dominates at least as large a share of the other as the other of it."""

    first: Series
    second: Series

    @cached_property
    def dominated(self) -> tuple[int, int]:
        """How many points of the second the first dominates, and the other way round."""
        first, second = self.first, self.second
        return (
            round(dominates(first.front, second.front) * len(second.groups)),
            round(dominates(second.front, first.front) * len(first.groups)),
        )

    @cached_property
    def accuracy_gain(self) -> float:
        """Mean accuracy of the first less that of the second at equal cost, a fraction.

        The mean over the seeds that both have, as that of `gains_over_uniform`; NaN where their
        fronts share no range of cost.
        """
        gains = seed_gains(self.first.members, self.second.members)
        return float(np.mean(gains)) if gains else math.nan

    @cached_property
    def cost_ratio(self) -> float:
        """Mean cost of the first over that of the second at equal accuracy, by the mean points."""
        return cost_ratio(self.first.front, self.second.front)

    @property
    def sentence(self) -> str:
        """The comparison in words."""
        first, second = _quoted(self.first.name), _quoted(self.second.name)
        won, lost = self.dominated
        of_second, of_first = len(self.second.groups), len(self.first.groups)
        if won == of_second:
            told = f"{first} dominates {second}: {won} of {of_second} points"
        elif won:
            told = f"{first} dominates {won} of {of_second} points of {second}"
        else:
            told = f"neither {first} nor {second} dominates a point of the other"
        if lost:
            told += f", and {second} {lost} of {of_first} points of {first}"
        ratio, points = self.cost_ratio, 100 * self.accuracy_gain
        at_accuracy, at_cost = "they share no range of accuracy", "they share no range of cost"
        if math.isfinite(ratio):
            at_accuracy = f"at equal accuracy {first} costs {ratio:.3g} x as much"
        if math.isfinite(points):
            more = "more" if points >= 0 else "less"
            at_cost = (
                f"at equal cost {first} is {abs(points):.2f} percentage points {more} accurate"
            )
        return f"{told}; {at_accuracy}; {at_cost}."


def _quoted(name: str) -> str:
    """A name with a comma in quotes, for a sentence."""
    return f'"{name}"' if "," in name else name


def all_series(records: Sequence[Record]) -> tuple[Series, ...]:
    """The series of a sweep, largest hypervolume first; points without accuracy left out."""
    members: dict[str, list[Group]] = {}
    groups = [g for g in group_points(records) if math.isfinite(g.accuracy)]
    for group in groups:
        members.setdefault(group.series, []).append(group)
    series = [
        Series(name, tuple(m), *_hypervolume(m, *reference_point(groups)))
        for name, m in members.items()
    ]
    return tuple(sorted(series, key=lambda s: (-s.hypervolume, s.name)))


def compare_all(series: Sequence[Series]) -> tuple[Comparison, ...]:
    """Every pair of the series that have at least two points."""
    fronts = [s for s in series if len(s.groups) > 1]
    return tuple(_compare(a, b) for a, b in itertools.combinations(fronts, 2))


def reference_point(groups: Sequence[Group]) -> tuple[float, float]:
    """(log10 of twice the greatest GBOPs, least accuracy) of all runs: common to every series."""
    cost = max(group.gbops_range[1] for group in groups)
    return math.log10(2 * cost), min(group.accuracy_range[0] for group in groups)


def _compare(a: Series, b: Series) -> Comparison:
    by_a, by_b = dominates(a.front, b.front), dominates(b.front, a.front)
    return Comparison(a, b) if by_a >= by_b else Comparison(b, a)


def _hypervolume(
    groups: Sequence[Group], reference_cost: float, reference_accuracy: float
) -> tuple[float, tuple[float, float]]:
    """Of the means over seeds (of log10 GBOPs, and of accuracy), and the interval over seeds."""
    rows = {seed: i for i, seed in enumerate(sorted({m.seed for g in groups for m in g.members}))}
    costs, accuracies = np.full((2, len(rows), len(groups)), np.nan)
    for column, group in enumerate(groups):
        for member in group.members:
            costs[rows[member.seed], column] = math.log10(member.gbops)
            accuracies[rows[member.seed], column] = member.accuracy
    reference = (reference_cost, reference_accuracy)
    means = np.nanmean(costs, axis=0), np.nanmean(accuracies, axis=0)
    return hypervolume(*means, *reference), hypervolume_interval(costs, accuracies, *reference)
