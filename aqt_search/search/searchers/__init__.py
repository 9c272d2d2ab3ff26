"""Searchers over the same evaluations: each judges points of a space and returns the best.

Every one is a function `search(evaluate, costs, target, evaluations, seed) -> Outcome`;
`SEARCHERS` has them by name, but for `scored`, which wants to be given values, too.

Args:
  evaluate: choices [n, decisions], int, to quality [n]: higher is better, an accuracy or minus a
    loss, of one fixed evaluation (the same weights and examples for every point). It is called
    with as many points as a searcher has at hand; `in_batches` keeps that number fixed.
  costs: of the space's points.
  target: the largest cost allowed; a point may cost at most target * (1 + tolerance).
  evaluations: the most points that may be judged.
  seed: of everything that is drawn.
"""

from collections.abc import Callable, Mapping

from aqt_search.search.searchers.brute_force import brute_force
from aqt_search.search.searchers.critic_search import critic_search
from aqt_search.search.searchers.evolution import evolution
from aqt_search.search.searchers.gradient_search import gradient_search
from aqt_search.search.searchers.greedy import greedy
from aqt_search.search.searchers.outcome import (
    Evaluate,
    Evaluated,
    Outcome,
    best_within,
    in_batches,
    regret,
)
from aqt_search.search.searchers.random_search import random_search
from aqt_search.search.searchers.scored import scored

SEARCHERS: Mapping[str, Callable[..., Outcome]] = {
    "random": random_search,
    "greedy": greedy,
    "evolution": evolution,
    "critic": critic_search,
    "policy_gradient": gradient_search,
    "brute_force": brute_force,
}

__all__ = [
    "SEARCHERS",
    "Evaluate",
    "Evaluated",
    "Outcome",
    "best_within",
    "brute_force",
    "critic_search",
    "evolution",
    "gradient_search",
    "greedy",
    "in_batches",
    "random_search",
    "regret",
    "scored",
]
