"""Sensitivity-greedy search: one-at-a-time losses, spent where they save the most cost."""

from __future__ import annotations

import numpy as np

from aqt_search.search.cost_table import CostTable
from aqt_search.search.searchers.outcome import (
    Evaluate,
    Evaluated,
    Outcome,
    best_within,
    check_evaluations,
    cost_limit,
    joined,
    judge,
)
from aqt_search.search.searchers.points import single_changes

_COST_RESOLUTION = 1e-9  # float64 sums of the same costs differ in their last digits


def greedy(
    evaluate: Evaluate,
    costs: CostTable,
    target: float,
    evaluations: int,
    seed: int,
    *,
    tolerance: float = 0.02,
) -> Outcome:
    """Orders the options by their own sensitivity and walks down from the dearest point.

    With Q[d, o] the quality of the dearest point with decision d set to option o, the quality of
    any point is taken to be additive in these: a move of d from o to o' loses Q[d, o] - Q[d, o'].
    From the dearest point it takes, until the cost is allowed, the move to lower cost of least
    loss per cost saved; then, while one fits, the move that gains most. A Hessian-free form of the
    sensitivity ordering of HAWQ (arXiv 1905.03696) and HAWQ-V2 (arXiv 1911.03852).

    It judges the table, 1 + sum over decisions of (options - 1) points, and the point found; the
    best of them that fits wins. An option that has no finite quality alone is never taken.

    Args:
      evaluate, costs, target, evaluations, tolerance: as of every searcher.
      seed: not used; nothing is drawn.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: too few evaluations for the table, the dearest point has no finite quality, or no
        options with a finite quality cost as little as allowed.
    """
    limit = cost_limit(costs, target, tolerance)
    needed = int(costs.mask.sum()) - len(costs.mask) + 2
    check_evaluations(evaluations, needed, "greedy's table of options and one point found by it")
    start = costs.dearest
    table, sensitivity = _table(evaluate, costs, start)
    point = _climb(costs, sensitivity, _descend(costs, sensitivity, start, limit), limit)
    if (table.choices == point).all(axis=1).any():
        return best_within(table, limit)
    return best_within(joined([table, judge(evaluate, costs, point[None])]), limit)


def _table(evaluate, costs: CostTable, start: np.ndarray) -> tuple[Evaluated, np.ndarray]:
    """The points judged, and Q[d, o] [decisions, max_options]: NaN where there is none."""
    others = costs.mask.copy()
    others[np.arange(len(start)), start] = False
    choices = np.concatenate([start[None], single_changes(start, costs.mask)[others]])
    judged = judge(evaluate, costs, choices)
    if not np.isfinite(judged.qualities[0]):
        raise ValueError(
            f"The dearest point {start.tolist()} has quality {judged.qualities[0]}, but greedy"
            " measures every option against it: look at the weights that evaluate judges with."
        )
    sensitivity = np.full(costs.mask.shape, np.nan)
    sensitivity[others] = judged.qualities[1:]
    sensitivity[np.arange(len(start)), start] = judged.qualities[0]
    sensitivity[~np.isfinite(sensitivity)] = np.nan
    return judged, sensitivity


def _moves(costs: CostTable, sensitivity: np.ndarray, point: np.ndarray) -> tuple:
    """Of every single change: points [n, decisions], cost added [n] and quality gained [n]."""
    known = np.isfinite(sensitivity)
    points = single_changes(point, costs.mask)[known]
    now = sensitivity[np.arange(len(point)), point]
    added = costs.of_many(points) - costs.of_many(point[None])
    return points, added, (sensitivity - now[:, None])[known]


def _descend(costs, sensitivity, point: np.ndarray, limit: float) -> np.ndarray:
    """Down by least loss per cost saved, until the cost is at most `limit`."""
    while costs.of_many(point[None])[0] > limit:
        points, added, gained = _moves(costs, sensitivity, point)
        down = added < -_COST_RESOLUTION * limit
        if not down.any():
            raise ValueError(
                f"The options that have a finite quality alone cost at least"
                f" {costs.of_many(point[None])[0]:.6g}, above the {limit:.6g} allowed: raise the"
                " target, or find out why evaluate fails for the cheaper ones."
            )
        point = points[down][np.argmax(gained[down] / -added[down])]
    return point


def _climb(costs, sensitivity, point: np.ndarray, limit: float) -> np.ndarray:
    """Spends the slack: the move of largest gain that fits, until none gains."""
    while True:
        points, _, gained = _moves(costs, sensitivity, point)
        fits = (gained > 0) & (costs.of_many(points) <= limit)
        if not fits.any():
            return point
        point = points[fits][np.argmax(gained[fits])]
