"""Uniform sampling to the end: weights that belong to no point more than to another."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aqt_search.search import policy as policies
from aqt_search.search.cost_table import CostTable
from aqt_search.search.one_shot import (
    Decisions,
    Search,
    SearchState,
    active_of,
    answer_of,
    check_costs,
    check_judged,
    check_samples,
    check_tolerance,
    first_state,
    period,
    told_of_step,
)


class UniformPolicy(NamedTuple):
    """A policy that learns nothing."""

    logits: jax.Array  # [decisions, max_options], float32: 0


def uniform(
    space: Decisions,
    costs: Mapping[str, CostTable],
    *,
    total_steps: int,
    samples: int = 1,
    tolerance: float = 0.02,
    one_sided: bool = False,
    axis_name: Hashable | None = None,
) -> Search:
    """The search that samples uniformly to the end, to compare others with.

    Its answer is a point near the targets, as `answer.most_probable_on_target` finds one, and no
    better than another: judge points on the weights that it leaves, by one of
    `aqt_search.search.searchers`. The metrics are those of
    `one_shot.told_of_step`.

    Args:
      space, costs, total_steps, samples, tolerance, one_sided, axis_name: as for `critic`; one
        sample a step is enough.

    Raises:
      ValueError: an argument out of its range.
    """
    period(total_steps, 0.0)
    check_samples(samples, 1, "")
    check_tolerance(tolerance)
    mask = space.mask
    check_costs(mask, costs)
    active = active_of(space)

    def init(targets: Mapping[str, Any]) -> SearchState:
        return first_state(costs, targets, UniformPolicy(jnp.zeros(mask.shape, jnp.float32)))

    def log_p(state: SearchState) -> jax.Array:
        return policies.log_probabilities(state.policy.logits, mask)

    def sample(state: SearchState, key: jax.Array) -> jax.Array:
        return policies.sample_many(key, log_p(state), samples)

    def update(state: SearchState, choices, quality, key):
        check_judged(choices, quality, samples, len(mask))
        told = told_of_step(costs, state.targets, log_p(state), choices, quality, axis_name, active)
        return state._replace(step=state.step + 1), told

    def answer(state: SearchState) -> jax.Array:
        return answer_of(log_p(state), costs, state.targets, tolerance, one_sided)

    return Search(init, sample, update, answer)
