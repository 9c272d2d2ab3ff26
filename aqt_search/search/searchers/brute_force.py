"""Brute force: every point of a small space, the reference of all other searchers."""

from __future__ import annotations

import itertools
import math

import numpy as np

from aqt_search.search.cost_table import CostTable
from aqt_search.search.searchers.outcome import (
    Evaluate,
    Outcome,
    best_within,
    cost_limit,
    in_batches,
    judge,
)


def brute_force(
    evaluate: Evaluate,
    costs: CostTable,
    target: float,
    evaluations: int = 100_000,
    seed: int = 0,
    *,
    tolerance: float = 0.02,
    batch_size: int = 64,
) -> Outcome:
    """Judges every point of the space, in the order of the last decision first.

    Args:
      evaluate, costs, target, tolerance: as of every searcher.
      evaluations: the most points that the space may have.
      seed: not used; nothing is drawn.
      batch_size: points that `evaluate` gets at a time, always as many.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: the space has more points than `evaluations`, or none that fits has a finite
        quality.
    """
    limit = cost_limit(costs, target, tolerance)
    options = [np.flatnonzero(row) for row in costs.mask]
    count = math.prod(len(o) for o in options)
    if count > evaluations:
        raise ValueError(
            f"The space has {count:,} points, more than the {evaluations:,} that evaluations"
            " allows: raise it, or take another searcher."
        )
    choices = np.array(list(itertools.product(*options)))
    batched = in_batches(evaluate, min(batch_size, count))
    return best_within(judge(batched, costs, choices), limit)
