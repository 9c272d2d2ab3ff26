"""The critic of the one-shot search, on given evaluations."""

from __future__ import annotations

import functools

import jax
import numpy as np

from aqt_search.search import critic
from aqt_search.search import policy as policies
from aqt_search.search.cost_table import CostTable
from aqt_search.search.policy import PolicyState
from aqt_search.search.searchers.outcome import (
    Evaluate,
    Evaluated,
    Outcome,
    best_within,
    check_evaluations,
    cost_limit,
    finite,
    joined,
    judge,
)
from aqt_search.search.searchers.points import sample_points, tilted_log_probabilities
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
    if samples < 2:
        raise ValueError(
            f"samples is {samples}; expected at least 2: the critic compares those of one update."
        )
    check_evaluations(evaluations, samples + 1, f"an update of {samples} samples and a last point")
    updates = (evaluations - 1) // samples
    period, mask = critic.Period(0, updates - 1), tuple(map(tuple, costs.mask.tolist()))
    table = costs.table, costs.first, costs.second, costs.fixed
    state = critic.init_policy(costs.mask)
    log_p = np.asarray(tilted_log_probabilities(costs, target))
    rng = np.random.default_rng(seed)
    parts: list[Evaluated] = []
    for number in range(updates):
        choices = sample_points(rng, log_p, samples)
        parts.append(judge(evaluate, costs, choices))
        quality = finite(parts[-1].qualities)
        state = _update(state, choices, quality, number, table, target, mask, period, tolerance)
        log_p = np.asarray(policies.log_probabilities(state.logits, costs.mask))
    parts.append(judge(evaluate, costs, np.argmax(log_p, axis=-1)[None]))
    return best_within(joined(parts), limit)


@functools.partial(jax.jit, static_argnames=("mask", "period", "tolerance"))
def _update(
    state: PolicyState, choices, quality, number, table, target, mask, period, tolerance
) -> PolicyState:
    """One step of the critic; the last one settles on the answer."""
    groups, mask = critic.groups_of(range(len(mask))), np.array(mask)
    costs = CostTable(*table, mask)

    def update(state):
        return critic.critic_step(
            state, choices, quality, {"cost": costs}, {"cost": target}, number, period, groups,
            mask, keep=1.0, tolerance=tolerance, one_sided=False,
        )[0]  # fmt: skip

    return jax.vmap(update, in_axes=None, out_axes=None, axis_name=AXIS, axis_size=1)(state)
