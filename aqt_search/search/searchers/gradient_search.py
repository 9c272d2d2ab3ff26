"""The policy gradient of the one-shot search, on given evaluations."""

from __future__ import annotations

from typing import NamedTuple

from aqt_search.search.cost_table import CostTable
from aqt_search.search.one_shot import Search
from aqt_search.search.policy_gradient import policy_gradient
from aqt_search.search.searchers.learned_policy import learn, updates_of
from aqt_search.search.searchers.outcome import Evaluate, Outcome

_LOWEST_LOG_PROBABILITY = -5.0


class _PolicyGradient(NamedTuple):
    """A policy gradient that does not wait, and whose sampled costs count from the start."""

    total_steps: int
    samples: int
    tolerance: float
    cost_samples: int
    learning_rate: float
    beta: float
    entropy_weight: float

    def __call__(self, costs: CostTable) -> Search:
        return policy_gradient(costs, {"cost": costs}, **self._asdict(), delay=0.0, annealed=False)


def gradient_search(
    evaluate: Evaluate,
    costs: CostTable,
    target: float,
    evaluations: int,
    seed: int,
    *,
    tolerance: float = 0.02,
    samples: int = 8,
    cost_samples: int = 256,
    learning_rate: float = 0.3,
    beta: float = 1.0,
    entropy_weight: float = 0.1,
) -> Outcome:
    """REINFORCE with the absolute reward Q - beta * |cost / target - 1| (TuNAS, FLIQS).

    As `search.policy_gradient`, on weights that stay as they are: an update judges `samples` points
    of the policy, its advantages are centred over them, the gradient of the penalty comes from
    `cost_samples` points that are not judged, and the weight of the entropy rises as a cosine.
    There is no delay.

    Every sample counts as an evaluation, met before or not. The last evaluation is kept for the
    answer; the best judged point that fits wins. A quality that is not finite counts as the lowest
    of its update.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: fewer evaluations than one update and the last point take, fewer than two samples
        or cost samples, or no judged point that fits has a finite quality.
    """
    if cost_samples < 2:
        raise ValueError(
            f"cost_samples is {cost_samples}; expected at least 2: those of one update are"
            " compared."
        )
    updates = updates_of(evaluations, samples)
    factory = _PolicyGradient(
        updates, samples, tolerance, cost_samples, learning_rate, beta, entropy_weight
    )
    return learn(
        evaluate, costs, target, seed, factory,
        updates=updates, tolerance=tolerance, lowest=_LOWEST_LOG_PROBABILITY,
    )  # fmt: skip
