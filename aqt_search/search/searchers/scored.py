"""Search by values that are known beforehand: one point is taken, and judged."""

from __future__ import annotations

import numpy as np

from aqt_search.search.allocation import allocate
from aqt_search.search.cost_table import CostTable
from aqt_search.search.searchers.outcome import (
    Evaluate,
    Outcome,
    best_within,
    cost_limit,
    judge,
)


def scored(
    evaluate: Evaluate,
    costs: CostTable,
    target: float,
    evaluations: int,
    seed: int,
    *,
    values: np.ndarray,
    tolerance: float = 0.02,
) -> Outcome:
    """The point of largest total value within the limit (`allocate`), judged once.

    Args:
      evaluate, costs, target, tolerance: as of every searcher.
      evaluations, seed: not used; one point is judged, and nothing is drawn.
      values: [decisions, max_options], of `aqt_search.search.score`.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: values of another shape; the point has no finite quality.
    """
    limit = cost_limit(costs, target, tolerance)
    point = allocate(values, {"cost": costs}, {"cost": limit})
    return best_within(judge(evaluate, costs, point[None]), limit)
