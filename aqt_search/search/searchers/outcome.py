"""What every searcher takes and returns: judged points, the best of them, and its regret."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from aqt_search.search.cost_table import CostTable
from aqt_search.search.pareto import pareto_front
from aqt_search.search.searchers.points import distinct

# choices [n, decisions], int -> quality [n]: higher is better, NaN where there is none
Evaluate = Callable[[np.ndarray], ArrayLike]


class Evaluated(NamedTuple):
    """Points in the order in which they were judged."""

    choices: np.ndarray  # [n, decisions], int
    qualities: np.ndarray  # [n], float64
    costs: np.ndarray  # [n], float64


class Outcome(NamedTuple):
    """The best point that a searcher judged, of those within the cost limit."""

    choices: np.ndarray  # [decisions], int
    quality: float
    cost: float
    evaluated: Evaluated
    front: np.ndarray  # [m, decisions]: judged points no other judged one dominates, by cost


def regret(outcome: Outcome, best: Outcome) -> float:
    """quality of `best` - quality of `outcome`: at least 0 where `best` is brute force's."""
    return best.quality - outcome.quality


def cost_limit(costs: CostTable, target: float, tolerance: float) -> float:
    """The largest cost a point may have: target * (1 + tolerance).

    Raises:
      SpaceError: the target lies outside of the space's costs. One above the dearest point would
        bind nothing, and is more often a slip of units; the dearest point's cost does as well.
      ValueError: the tolerance is negative.
    """
    costs.check_target(target)
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; expected a share of the target, at least 0.")
    return target * (1 + tolerance)


def check_evaluations(evaluations: int, needed: int, purpose: str) -> None:
    """Raises ValueError if there are fewer evaluations than a searcher needs."""
    if evaluations < needed:
        raise ValueError(
            f"evaluations is {evaluations}, but {purpose} takes at least {needed}: allow"
            f" {needed} or more, or take another searcher."
        )


def judge(evaluate: Evaluate, costs: CostTable, choices: np.ndarray) -> Evaluated:
    """Calls `evaluate` on `choices` [n, decisions] and looks up their costs.

    Raises:
      ValueError: `evaluate` does not return one number for each point.
    """
    qualities = np.asarray(evaluate(choices), np.float64)
    if qualities.shape != (len(choices),):
        raise ValueError(
            f"evaluate returned shape {qualities.shape} for {len(choices)} points; expected"
            f" ({len(choices)},): one quality for each."
        )
    return Evaluated(choices, qualities, costs.of_many(choices))


def joined(parts: Sequence[Evaluated]) -> Evaluated:
    """The points of all parts, in order."""
    return Evaluated(*(np.concatenate(columns) for columns in zip(*parts)))


def finite_or_lowest(qualities: np.ndarray) -> np.ndarray:
    """float32, the lowest finite quality in place of those that are not; 0 if none is."""
    known = np.isfinite(qualities)
    lowest = qualities[known].min() if known.any() else 0.0
    return np.where(known, qualities, lowest).astype(np.float32)


def best_within(evaluated: Evaluated, limit: float) -> Outcome:
    """The judged point of highest quality with cost <= limit.

    Of equal qualities the cheapest wins, then the first judged. A quality that is not finite
    never wins.

    Raises:
      ValueError: no point within the limit has a finite quality.
    """
    choices, qualities, costs = evaluated
    known = np.isfinite(qualities)
    if not known.any():
        raise ValueError(
            f"evaluate gave none of {len(qualities)} points a finite quality (the first:"
            f" {qualities[0]}): look at the weights or the data that it judges with."
        )
    allowed = np.flatnonzero(known & (costs <= limit))
    if not len(allowed):
        raise ValueError(
            f"None of {len(qualities)} judged points has a finite quality and costs at most"
            f" {limit:.6g} (the cheapest costs {costs.min():.6g}): allow more evaluations, or"
            " raise the target."
        )
    best = allowed[np.lexsort((costs[allowed], -qualities[allowed]))[0]]
    front = choices[pareto_front(costs, np.where(known, qualities, np.nan))]
    return Outcome(
        choices[best], float(qualities[best]), float(costs[best]), evaluated, distinct(front)
    )


def in_batches(evaluate: Evaluate, size: int) -> Evaluate:
    """`evaluate` on `size` points at a time, the last batch filled up with its first point.

    A compiled `evaluate` then sees a single shape, and takes the memory of `size` points.

    Raises:
      ValueError: size below 1.
    """
    if size < 1:
        raise ValueError(f"size, the points of a batch, is {size}; expected at least 1.")

    def batched(choices: np.ndarray) -> np.ndarray:
        qualities = []
        for start in range(0, len(choices), size):
            batch = choices[start : start + size]
            filled = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
            qualities.append(np.asarray(evaluate(filled), np.float64)[: len(batch)])
        return np.concatenate(qualities)

    return batched
