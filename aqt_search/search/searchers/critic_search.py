"""The critic of the one-shot search, on given evaluations."""

from __future__ import annotations

import math
from typing import NamedTuple

from aqt_search.search.cost_table import CostTable
from aqt_search.search.critic import critic_over, groups_of
from aqt_search.search.one_shot import Search
from aqt_search.search.searchers.learned_policy import learn, updates_of
from aqt_search.search.searchers.outcome import Evaluate, Outcome


class _Critic(NamedTuple):
    """A critic of weights that stay as they are: it forgets nothing, and does not wait."""

    total_steps: int
    samples: int
    tolerance: float

    def __call__(self, costs: CostTable) -> Search:
        return critic_over(
            costs.mask, groups_of(range(len(costs.mask))), {"cost": costs}, **self._asdict(),
            delay=0.0, one_sided=False, memory=math.inf, axis_name=None,
        )  # fmt: skip


def critic_search(
    evaluate: Evaluate,
    costs: CostTable,
    target: float,
    evaluations: int,
    seed: int,
    *,
    tolerance: float = 0.02,
    samples: int = 8,
) -> Outcome:
    """Regression of quality on the options, and points of the policy that follows from it.

    As `search.critic`, on weights that stay as they are: so nothing is forgotten, and there is no
    delay. An update judges `samples` points. A cost table does not tell which decisions have the
    same options: each keeps its own values.

    Every sample counts as an evaluation, met before or not. The last evaluation is kept for the
    critic's answer; the best judged point that fits wins. A quality that is not finite counts as
    the lowest of its update.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: fewer evaluations than one update and the last point take, fewer than two samples,
        or no judged point that fits has a finite quality.
    """
    updates = updates_of(evaluations, samples)
    factory = _Critic(updates, samples, tolerance)
    return learn(evaluate, costs, target, seed, factory, updates=updates, tolerance=tolerance)
