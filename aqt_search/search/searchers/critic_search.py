"""The critic of the one-shot search, on given evaluations."""

from __future__ import annotations

import functools

import jax
import numpy as np

from aqt_search.search import critic
from aqt_search.search import policy as policies
from aqt_search.search.cost_table import CostTable
from aqt_search.search.policy import PolicyState
from aqt_search.search.searchers.learned_policy import learn, updates_of
from aqt_search.search.searchers.outcome import Evaluate, Outcome, cost_limit
from aqt_search.search.searchers.points import tilted_log_probabilities
from aqt_search.training.parallel import AXIS


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

    As `one_shot.make_search_step` with its defaults, on weights that stay as they are: so nothing
    is forgotten. An update judges `samples` points; the first are of `tilted_log_probabilities`,
    so that they cost about the target already. A cost table does not tell which decisions have the
    same options: each keeps its own values.

    Every sample counts as an evaluation, met before or not. The last evaluation is kept for the
    critic's answer; the best judged point that fits wins. A quality that is not finite counts as
    the lowest of its update.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: fewer evaluations than one update and the last point take, fewer than two samples,
        or no judged point that fits has a finite quality.
    """
    limit = cost_limit(costs, target, tolerance)
    updates = updates_of(evaluations, samples)
    step = functools.partial(_update, period=critic.Period(0, updates - 1), tolerance=tolerance)

    def update(state, choices, quality, number, _):
        state = step(state, choices, quality, number, costs, target)
        return state, np.asarray(policies.log_probabilities(state.logits, costs.mask))

    start = critic.init_policy(costs.mask), tilted_log_probabilities(costs, target)
    return learn(
        evaluate, costs, limit, start, update,
        updates=updates, samples=samples, rng=np.random.default_rng(seed),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("period", "tolerance"))
def _update(
    state: PolicyState, choices, quality, number, costs: CostTable, target, *, period, tolerance
) -> PolicyState:
    """One step of the critic; the last one settles on the answer."""
    groups = critic.groups_of(range(len(costs.mask)))

    def update(state):
        return critic.critic_step(
            state, choices, quality, {"cost": costs}, {"cost": target}, number, period, groups,
            costs.mask, keep=1.0, tolerance=tolerance, one_sided=False,
        )[0]  # fmt: skip

    return jax.vmap(update, in_axes=None, out_axes=None, axis_name=AXIS, axis_size=1)(state)
