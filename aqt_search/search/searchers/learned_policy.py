"""The loop of the searchers that learn a policy: draw points, judge them, update, answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from aqt_search.search.cost_table import CostTable
from aqt_search.search.searchers.outcome import (
    Evaluate,
    Outcome,
    best_within,
    check_evaluations,
    finite_or_lowest,
    joined,
    judge,
)
from aqt_search.search.searchers.points import sample_points

State = TypeVar("State")


def updates_of(evaluations: int, samples: int) -> int:
    """How many updates of `samples` points leave one evaluation for the answer.

    Raises:
      ValueError: none do, or `samples` is below 2.
    """
    if samples < 2:
        raise ValueError(
            f"samples is {samples}; expected at least 2: those of one update are compared."
        )
    check_evaluations(evaluations, samples + 1, f"an update of {samples} samples and a last point")
    return (evaluations - 1) // samples


def learn(
    evaluate: Evaluate,
    costs: CostTable,
    limit: float,
    start: tuple[State, np.ndarray],
    update: Callable[[State, np.ndarray, np.ndarray, int, np.ndarray], tuple[State, np.ndarray]],
    *,
    updates: int,
    samples: int,
    rng: np.random.Generator,
) -> Outcome:
    """The best judged point that costs at most `limit`, the last being the most probable one.

    Args:
      start: the state and its log probabilities [decisions, max_options].
      update: (state, choices [samples, decisions], qualities [samples], float32, number of the
        update, log probabilities drawn from) -> (state, its log probabilities). A quality that is
        not finite counts as the lowest of its update.

    Raises:
      ValueError: no judged point that fits has a finite quality.
    """
    state, log_p = start
    parts = []
    for number in range(updates):
        choices = sample_points(rng, log_p, samples)
        parts.append(judge(evaluate, costs, choices))
        quality = finite_or_lowest(parts[-1].qualities)
        state, log_p = update(state, choices, quality, number, log_p)
    parts.append(judge(evaluate, costs, np.argmax(log_p, axis=-1)[None]))
    return best_within(joined(parts), limit)
