"""The subnet and the formats of largest value at a cost, where values add up and costs do not."""

from __future__ import annotations

import jax
import numpy as np

from aqt_search.search.cost_table import CostTable
from aqt_search.search.searchers.evolution import evolution
from aqt_search.search.searchers.points import single_changes
from aqt_search.search.space import Space

_TIE = 1e-6  # of the largest difference of values: what the whole target is worth


def allocate_subnet(
    values: np.ndarray,
    space: Space,
    costs: CostTable,
    target: float,
    *,
    evaluations: int = 20_000,
    seed: int = 0,
) -> np.ndarray:
    """Choices [decisions] of largest value among those that cost at most `target`.

    The value of choices c is the sum over decisions d of active(c)[d] * values[d, c[d]]: what is
    not there is worth nothing. What an option costs depends on the widths around it, so this is no
    knapsack: NSGA-II looks for the point, and changes of one and of two decisions at a time improve
    it while they can. Of points that are worth the same, the dearest.

    Args:
      values: [decisions, max_options], as of `score`.
      space: with an elastic network.
      costs: of the space.
      target: in the units of the costs.
      evaluations: of sums, in NSGA-II.
      seed: of NSGA-II.

    Raises:
      ValueError: fewer than 4 evaluations.
      SpaceError: no point costs as little, or the target is above all of them.
    """
    active = jax.jit(jax.vmap(space.active))
    rows = np.arange(len(values))
    tie = _TIE * (np.ptp(values) or 1.0) / target

    def worth(points: np.ndarray) -> np.ndarray:
        size = 2 ** int(np.ceil(np.log2(len(points))))  # few programs
        filled = np.resize(points, (size, points.shape[1]))
        sums = np.where(active(filled), values[rows, filled], 0.0).sum(1)[: len(points)]
        return sums + tie * costs.of_many(points)

    population = max(4, evaluations // 100)
    found = evolution(worth, costs, target, evaluations, seed, tolerance=0.0, population=population)
    best, reached = found.choices, found.quality
    while True:
        near = _changed_twice(best, space.mask)
        near = near[costs.of_many(near) <= target]
        if not len(near):
            return best
        sums = worth(near)
        if sums.max() <= reached + 1e-12:
            return best
        best, reached = near[np.argmax(sums)], sums.max()


def _changed_twice(start: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Points that differ from `start` in one or two decisions: [n, decisions]."""
    ones = single_changes(start, mask)[mask]
    twos = [single_changes(point, mask)[mask] for point in ones]
    return np.unique(np.concatenate([ones, *twos]), axis=0)
