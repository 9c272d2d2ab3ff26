"""How far the fronts that a search found lie above that of uniform formats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from aqt_search.report.records import Record
from aqt_search.search.pareto import accuracy_gain

# Series of points in one format each, and of points of a trained network whose formats were chosen
# for it without training (experiments.allocate).
UNIFORM_SERIES, ALLOCATED_SERIES = "uniform", "allocated"
_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Gain:
    """Accuracy of one front less that of uniform formats at equal cost, fractions."""

    series: str
    seeds: int
    mean: float  # over the seeds
    low: float  # of its 95 % interval by Student's t; NaN with one seed
    high: float

    @property
    def sentence(self) -> str:
        """The gain in words."""
        points, low, high = (100 * x for x in (self.mean, self.low, self.high))
        more = "more" if points >= 0 else "less"
        told = (
            f"At equal cost {self.series} is {abs(points):.2f} percentage points {more} accurate"
            " than uniform formats"
        )
        if not math.isfinite(low):
            return f"{told} (one seed, which tells nothing of the spread)."
        beyond = "" if low > 0 or high < 0 else ": the seeds do not tell the two apart"
        return f"{told} (95 % interval {low:+.2f} to {high:+.2f} over {self.seeds} seeds){beyond}."


def gains_over_uniform(records: Sequence[Record]) -> tuple[Gain, ...]:
    """A gain for each series of searched or allocated points that uniform ones can be compared to.

    For each seed it is the mean difference between the front of the series and that of the seed's
    uniform points, over the costs that both cover (`accuracy_gain`: straight lines over log cost).
    The points of a seed share their images, so the differences are paired. Series that share no
    range of costs with uniform points, of which there have to be two, are left out.
    """
    known = [r for r in records if r.error is None and math.isfinite(r.accuracy)]
    uniform = uniform_points(known)
    others: dict[str, list[Record]] = {}
    for record in known:
        allocated = record.kind == "ptq" and record.series == ALLOCATED_SERIES
        if allocated or record.kind in ("search", "random", "retrained"):
            others.setdefault(record.series, []).append(record)
    found = (_gain(series, members, uniform) for series, members in others.items())
    return tuple(gain for gain in found if gain is not None)


def uniform_points(records: Sequence[Record]) -> list[Record]:
    """The points in uniform formats: of the series that is called so, if there is one.

    Else, as over sizes, all that were trained under fixed formats.
    """
    named = [r for r in records if r.series == UNIFORM_SERIES]
    return named or [r for r in records if r.kind == "uniform"]


def seed_gains(first: Sequence[Record], second: Sequence[Record]) -> list[float]:
    """`accuracy_gain` of the first front over the second for each seed that both have.

    Runs of a seed share their images: what these do to both fronts drops out of the difference.
    Seeds whose fronts share no cost are left out.
    """
    seeds = {record.seed for record in first} & {record.seed for record in second}
    gains = [accuracy_gain(_front(first, seed), _front(second, seed)) for seed in sorted(seeds)]
    return [gain for gain in gains if math.isfinite(gain)]


def _gain(series: str, members: Sequence[Record], uniform: Sequence[Record]) -> Gain | None:
    if len({record.gbops for record in uniform}) < 2:
        return None
    gains = seed_gains(members, uniform)
    if not gains:
        return None
    mean, reach = float(np.mean(gains)), math.nan
    if len(gains) > 1:
        from scipy import stats  # takes long

        error = float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
        reach = float(stats.t.ppf((1 + _LEVEL) / 2, len(gains) - 1)) * error
    return Gain(series, len(gains), mean, mean - reach, mean + reach)


def _front(records: Sequence[Record], seed: int) -> tuple[list[float], list[float]]:
    own = [record for record in records if record.seed == seed]
    return [record.gbops for record in own], [record.accuracy for record in own]
