"""A one-shot search on given evaluations: draw points, judge them, update, answer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from aqt_search.search.cost_table import CostTable
from aqt_search.search.one_shot import Search, SearchState
from aqt_search.search.searchers.outcome import (
    Evaluate,
    Outcome,
    best_within,
    check_evaluations,
    cost_limit,
    finite_or_lowest,
    joined,
    judge,
)
from aqt_search.search.searchers.points import tilted_log_probabilities

# Makes the search of a cost table, which is called "cost". Hashable: what is equal compiles once.
Factory = Callable[[CostTable], Search]


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
    target: float,
    seed: int,
    factory: Factory,
    *,
    updates: int,
    tolerance: float,
    lowest: float = -np.inf,
) -> Outcome:
    """The best judged point that costs at most target * (1 + tolerance); the last is the answer.

    The policy starts as `tilted_log_probabilities`, so that the first points cost about the target
    already. A quality that is not finite counts as the lowest of its update.

    Args:
      lowest: log-probability at the start: an option that is never drawn is never learned of.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: no judged point that fits has a finite quality.
    """
    limit = cost_limit(costs, target, tolerance)
    state = factory(costs).init({"cost": target})
    tilted = np.maximum(tilted_log_probabilities(costs, target), lowest)
    logits = jax.numpy.float32(np.where(costs.mask, tilted, 0.0))
    state = state._replace(policy=state.policy._replace(logits=logits))
    parts = []
    for key in jax.random.split(jax.random.key(seed), updates):
        choices = np.asarray(_sample(factory, costs, state, key))
        parts.append(judge(evaluate, costs, choices))
        quality = finite_or_lowest(parts[-1].qualities)
        state = _update(factory, costs, state, choices, quality, jax.random.fold_in(key, 1))
    parts.append(judge(evaluate, costs, np.asarray(_answer(factory, costs, state))[None]))
    return best_within(joined(parts), limit)


# Costs are data: searches of other numbers in tables of one shape share these programs.


@functools.partial(jax.jit, static_argnums=0)
def _sample(factory: Factory, costs: CostTable, state: SearchState, key: jax.Array) -> jax.Array:
    return factory(costs).sample(state, key)


@functools.partial(jax.jit, static_argnums=0)
def _update(factory: Factory, costs: CostTable, state, choices, quality, key) -> SearchState:
    return factory(costs).update(state, choices, quality, key)[0]


@functools.partial(jax.jit, static_argnums=0)
def _answer(factory: Factory, costs: CostTable, state: SearchState) -> jax.Array:
    return factory(costs).answer(state)
