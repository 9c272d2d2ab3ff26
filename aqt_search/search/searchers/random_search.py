"""Random search: points drawn near the cost target, all judged, the best taken."""

from __future__ import annotations

import numpy as np

from aqt_search.search.cost_table import CostTable
from aqt_search.search.searchers.outcome import (
    Evaluate,
    Outcome,
    best_within,
    check_evaluations,
    cost_limit,
    judge,
)
from aqt_search.search.searchers.points import distinct, sample_points, tilted_log_probabilities

_DRAWS = 2048  # points of a round, none of them judged
_IDLE_ROUNDS = 20  # rounds without a new point in the window: it holds no more


def random_search(
    evaluate: Evaluate,
    costs: CostTable,
    target: float,
    evaluations: int,
    seed: int,
    *,
    tolerance: float = 0.02,
    spread: float = 0.1,
) -> Outcome:
    """Judges distinct random points that cost between (1 - spread) and (1 + tolerance) * target.

    Of many decisions nearly all points drawn uniformly cost about the same, seldom the target: so
    they are drawn from `tilted_log_probabilities`, whose mean cost is the target, and those
    outside of the window are dropped unjudged. It judges fewer points than allowed where the
    window holds no more.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: no evaluation is allowed, spread or tolerance is out of range, no point is found
        in the window, or none has a finite quality.
    """
    limit = cost_limit(costs, target, tolerance)
    check_evaluations(evaluations, 1, "random search")
    if not 0 <= spread <= 1:
        raise ValueError(f"spread is {spread}; expected a share of the target, 0 to 1.")
    low = (1 - spread) * target
    log_p = tilted_log_probabilities(costs, target)
    choices = _window(costs, log_p, low, limit, evaluations, seed)
    if not len(choices):
        raise ValueError(
            f"None of {_IDLE_ROUNDS * _DRAWS} points drawn costs between {low:.6g} and {limit:.6g}:"
            f" raise spread (it is {spread})."
        )
    return best_within(judge(evaluate, costs, choices), limit)


def _window(costs, log_p, low: float, high: float, count: int, seed: int) -> np.ndarray:
    """Up to `count` distinct points drawn with costs in [low, high], in the order drawn."""
    rng = np.random.default_rng(seed)
    found: dict[bytes, np.ndarray] = {}
    idle = 0
    while len(found) < count and idle < _IDLE_ROUNDS:
        drawn = sample_points(rng, log_p, _DRAWS)
        drawn_costs = costs.of_many(drawn)
        inside = drawn[(low <= drawn_costs) & (drawn_costs <= high)]
        before = len(found)
        for point in distinct(inside):
            found.setdefault(point.tobytes(), point)
        idle = 0 if len(found) > before else idle + 1
    return np.array(list(found.values())[:count])
