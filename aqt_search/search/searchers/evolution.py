"""Evolutionary search: NSGA-II over (quality, cost)."""

from __future__ import annotations

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.problems.static import StaticProblem

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
from aqt_search.search.searchers.points import (
    distinct,
    option_costs,
    sample_points,
    tilted_log_probabilities,
)

_IDLE_GENERATIONS = 8  # generations in a row without a point not judged before


def evolution(
    evaluate: Evaluate,
    costs: CostTable,
    target: float,
    evaluations: int,
    seed: int,
    *,
    tolerance: float = 0.02,
    population: int | None = None,
) -> Outcome:
    """NSGA-II (Deb et al. 2002) over -quality and cost, the cost constrained to what is allowed.

    The searcher of BatchQuant (arXiv 2105.08952), with a constraint: a point that costs too much
    loses against any that does not, and is never judged, as its cost is known. The points judged
    thus hold a front up to the target.

    A gene is a decision; its value is the rank of the option by cost, from 0 to the options it has
    less one, so that near values are near formats. Simulated binary crossover and polynomial
    mutation, both with eta 3 and rounded. The first generation is the cheapest point and points
    drawn from `tilted_log_probabilities`. A point met again is neither judged nor counted again. A
    quality that is not finite counts as the lowest so far. The search ends early where generations
    bring nothing new.

    Args:
      evaluate, costs, target, evaluations, seed, tolerance: as of every searcher.
      population: points of a generation; by default a fifth of `evaluations`.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: evaluations below 4, a population below 4 or above `evaluations`, or no point
        that fits has a finite quality.
    """
    limit = cost_limit(costs, target, tolerance)
    check_evaluations(evaluations, 4, "evolution")
    size = max(4, evaluations // 5) if population is None else population
    if not 4 <= size <= evaluations:
        raise ValueError(f"population is {size}; expected 4 to {evaluations}, the evaluations.")
    order = np.argsort(np.where(costs.mask, option_costs(costs), np.inf), axis=1)  # by rank
    problem = Problem(
        n_var=len(order), n_obj=2, n_ieq_constr=1, vtype=int,
        xl=np.zeros(len(order)), xu=costs.mask.sum(axis=1) - 1.0,
    )  # fmt: skip
    algorithm = _nsga2(_first_generation(costs, order, target, size, seed), size)
    algorithm.setup(problem, termination=NoTermination(), seed=seed)
    return best_within(_evolved(algorithm, order, evaluate, costs, limit, evaluations), limit)


def _evolved(algorithm, order, evaluate, costs, limit: float, evaluations: int) -> Evaluated:
    """Runs the algorithm until the evaluations or the new points are used up."""
    parts: list[Evaluated] = []
    known: dict[bytes, float] = {}  # qualities of the points judged
    idle = 0
    while idle < _IDLE_GENERATIONS and (generation := algorithm.ask()) is not None:
        points = _options_of(order, generation.get("X"))
        generation_costs = costs.of_many(points)
        allowed = distinct(points[generation_costs <= limit])
        new = [point for point in allowed if point.tobytes() not in known]
        new = new[: evaluations - len(known)]
        if new:
            parts.append(judge(evaluate, costs, np.array(new)))
            known |= {p.tobytes(): q for p, q in zip(new, parts[-1].qualities)}
        if len(known) == evaluations:
            break
        idle = 0 if new else idle + 1
        objectives = np.stack([-_finite(points, known), generation_costs], axis=1)
        static = StaticProblem(
            algorithm.problem, F=objectives, G=(generation_costs - limit)[:, None]
        )
        Evaluator().eval(static, generation)
        algorithm.tell(generation)
    if not parts:
        raise ValueError(f"No generation held a point that costs at most {limit:.6g}: raise it.")
    return joined(parts)


def _nsga2(first: np.ndarray, size: int) -> NSGA2:
    """`first` [n, decisions]: ranks."""
    return NSGA2(
        pop_size=size,
        sampling=first,
        crossover=SBX(eta=3, vtype=float, repair=RoundingRepair()),
        mutation=PM(eta=3, vtype=float, repair=RoundingRepair()),
    )


def _first_generation(costs, order, target: float, size: int, seed: int) -> np.ndarray:
    """The cheapest point and points that cost about the target, as ranks [size, decisions]."""
    rng = np.random.default_rng(seed)
    drawn = sample_points(rng, tilted_log_probabilities(costs, target), size - 1)
    rank = np.argsort(order, axis=1)  # of every option
    ranks = np.take_along_axis(rank[None], drawn[:, :, None], 2)[:, :, 0]
    return np.concatenate([np.zeros_like(ranks[:1]), ranks])


def _options_of(order: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The options of `ranks` [n, decisions]."""
    return np.take_along_axis(order[None], ranks.astype(int)[:, :, None], 2)[:, :, 0]


def _finite(points: np.ndarray, known: dict[bytes, float]) -> np.ndarray:
    """Qualities of points; the lowest known one where it is not finite, or was not judged."""
    lowest = min((q for q in known.values() if np.isfinite(q)), default=0.0)
    qualities = np.array([known.get(p.tobytes(), lowest) for p in points])
    return np.where(np.isfinite(qualities), qualities, lowest)
