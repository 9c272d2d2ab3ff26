"""The policy gradient of the one-shot search, on given evaluations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aqt_search.search import policy as policies
from aqt_search.search.cost_table import CostTable
from aqt_search.search.policy import PolicyState
from aqt_search.search.reward import entropy_weight, penalty
from aqt_search.search.searchers.learned_policy import learn, updates_of
from aqt_search.search.searchers.outcome import Evaluate, Outcome, cost_limit
from aqt_search.search.searchers.points import sample_points, tilted_log_probabilities

_LOWEST_LOG_PROBABILITY = -5.0  # at the start: an option that is never drawn is never learned of


def policy_gradient(
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
    final_entropy_weight: float = 0.1,
) -> Outcome:
    """REINFORCE with the absolute reward Q - beta * |cost / target - 1| (TuNAS, FLIQS).

    As `one_shot.make_search_step` with its defaults, on weights that stay as they are: an update
    judges `samples` points of the policy, its advantages are centred over them, the gradient of
    the penalty comes from `cost_samples` points that are not judged, and the weight of the entropy
    rises as a cosine. There is no delay: the policy starts as `tilted_log_probabilities`, so that
    the first points cost about the target already.

    Every sample counts as an evaluation, met before or not. The last evaluation is kept for the
    most probable point; the best judged point that fits wins. A quality that is not finite counts
    as the lowest of its update.

    Raises:
      SpaceError: the target is outside of the space.
      ValueError: fewer evaluations than one update and the last point take, fewer than two samples
        or cost samples, or no judged point that fits has a finite quality.
    """
    limit = cost_limit(costs, target, tolerance)
    if cost_samples < 2:
        raise ValueError(
            f"cost_samples {cost_samples} is too few; expected at least 2: those of one update are"
            " compared."
        )
    updates = updates_of(evaluations, samples)
    state = policies.init_policy(costs.mask, optax.adam(learning_rate))
    tilted = np.maximum(tilted_log_probabilities(costs, target), _LOWEST_LOG_PROBABILITY)
    state = state._replace(logits=jnp.float32(tilted))
    weights = entropy_weight(
        "cosine", np.arange(updates), start=0, total=updates, end_weight=final_entropy_weight
    )
    rng = np.random.default_rng(seed)

    def with_log_p(state):
        return state, np.asarray(_log_probabilities(state.logits, costs.mask))

    def update(state, choices, quality, number, log_p):
        points = sample_points(rng, log_p, cost_samples)
        ratios = np.float32(costs.of_many(points) / target)[:, None]
        groups = (
            (choices, quality, weights[number]),
            (points, -penalty("absolute", ratios, beta), 0.0),
        )
        return with_log_p(_update(state, groups, costs.mask, learning_rate))

    return learn(
        evaluate, costs, limit, with_log_p(state), update, updates=updates, samples=samples, rng=rng
    )


_log_probabilities = jax.jit(policies.log_probabilities)


@jax.jit
def _update(state: PolicyState, groups, mask, learning_rate) -> PolicyState:
    """One step of Adam by groups of (choices [n, decisions], rewards [n], entropy weight)."""

    def loss(logits):
        total = 0.0
        for choices, rewards, weight in groups:
            losses = jax.vmap(
                lambda chosen, advantage, weight=weight: policies.reinforce_loss(
                    logits, chosen, advantage, weight, mask, temperature=1.0, reduce=jnp.sum
                )
            )(choices, policies.centred(rewards))
            total += jnp.mean(losses)
        return total

    updates, opt_state = optax.adam(learning_rate).update(
        jax.grad(loss)(state.logits), state.opt_state
    )
    logits = optax.apply_updates(state.logits, updates)
    return state._replace(logits=logits, opt_state=opt_state, updates=state.updates + 1)
