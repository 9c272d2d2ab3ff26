"""The policy gradient of FLIQS (arXiv 2308.03290): REINFORCE on quality and costs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aqt_search.search import policy as policies
from aqt_search.search import replicas
from aqt_search.search.cost_table import CostTable
from aqt_search.search.one_shot import (
    Active,
    Decisions,
    Period,
    Search,
    SearchState,
    active_of,
    answer_of,
    check_costs,
    check_judged,
    check_samples,
    check_tolerance,
    cost_ratios,
    first_state,
    log_probabilities,
    period,
    told_of_step,
)
from aqt_search.search.policy import PolicyState
from aqt_search.search.reward import (
    Reward,
    check_beta,
    check_number,
    entropy_weight_at,
    named_reward,
)

REDUCTIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {"sum": jnp.sum, "mean": jnp.mean}


def policy_gradient(
    space: Decisions,
    costs: Mapping[str, CostTable],
    *,
    total_steps: int,
    reward: str | Reward = "absolute",
    beta: float = 1.0,
    delay: float = 0.25,
    samples: int = 2,
    baseline_momentum: float | None = None,
    cost_samples: int = 256,
    annealed: bool = True,
    learning_rate: float = 0.05,
    entropy_weight: float = 0.1,
    entropy_schedule: str = "cosine",
    temperature: float = 1.0,
    log_probability: str = "sum",
    tolerance: float = 0.02,
    axis_name: Hashable | None = None,
) -> Search:
    """The search by REINFORCE: the policy's logits follow sampled rewards by Adam.

    The advantages A of a step's rewards r are

        A_i = r_i - mean of the other r_j          (Kool et al. 2019), or with a momentum
        A_i = r_i - b;   b <- momentum * b + (1 - momentum) * mean r      (b starts at r)

    With `cost_samples`, r is the quality alone and the gradient of the expected penalty E[P(C)]
    comes from that many points of its own, always by the first: the objective is the same, its
    noise is not. E[P(C)] punishes whatever leaves the cost open, and so decides by cost before
    quality has been seen. Annealed it is s E[P(C)] + (1 - s) P(E[C]), where s goes from 0 at the
    delay's end to 1 at the last step: first the expected cost is led to its target, then the
    sampled ones. The weight of the entropy, which is minimised, rises along its schedule.

    The metrics are those of `one_shot.told_of_step`, "reward" (with `cost_samples` too it has the
    costs of the judged points in it), "entropy_weight" and, with a momentum, "advantage": mean
    reward less baseline.

    Args:
      space: the decisions; a `CostTable` knows enough of them.
      costs: of the space's points, by name; the first is the one the metrics call "cost".
      total_steps: updates in the whole search.
      reward: the name of one of `reward.REWARDS`, or one of your own.
      beta: weight of the costs, at least 0, in units of the quality.
      delay: share of the steps in which points are sampled uniformly, in [0, 1).
      samples: points judged in a step; without a momentum at least 2.
      baseline_momentum: of a moving baseline, in [0, 1); None compares the samples of a step.
      cost_samples: points whose cost alone is judged, at least 2; 0: those of `samples`.
      annealed: whether the penalty moves from that of the expected cost to the expected one.
      learning_rate: Adam's.
      entropy_weight: at the end; `entropy_schedule` is one of `reward.ENTROPY_SCHEDULES`.
      temperature: of the softmax, above 0.
      log_probability: its "sum" over decisions (TuNAS) or their "mean" (FLIQS).
      tolerance: as for `critic`. Costs below a target are as good as on it where the reward says.
      axis_name: the mapped axis of the replicas; None without one.

    Raises:
      ValueError: an argument out of its range, or arguments that exclude one another.
    """
    mask = space.mask
    check_number("learning_rate", learning_rate)
    rule = _Rule(
        mask, costs, period(total_steps, delay), named_reward(reward), beta, baseline_momentum,
        cost_samples, annealed, optax.adam(learning_rate),
        entropy_weight_at(entropy_schedule, entropy_weight), temperature, log_probability,
        axis_name, active_of(space),
    )  # fmt: skip
    _check(rule, samples)
    check_tolerance(tolerance)
    check_costs(mask, costs)
    start = rule.period.start

    def sample(state: SearchState, key: jax.Array) -> jax.Array:
        log_p = log_probabilities(state, mask, start, temperature)
        return policies.sample_many(key, log_p, samples)

    def answer(state: SearchState) -> jax.Array:
        log_p = policies.log_probabilities(state.policy.logits, mask, temperature)
        one_sided = rule.reward.one_sided
        return answer_of(log_p, costs, state.targets, tolerance, one_sided)

    def init(targets: Mapping[str, Any]) -> SearchState:
        return first_state(costs, targets, policies.init_policy(mask, rule.adam))

    def update(state: SearchState, choices, quality, key):
        check_judged(choices, quality, samples, len(mask))
        return gradient_step(rule, state, choices, quality, key)

    return Search(init, sample, update, answer)


class _Rule(NamedTuple):
    """What the steps of a policy gradient have in common."""

    mask: np.ndarray  # [decisions, max_options], bool
    costs: Mapping[str, CostTable]
    period: Period
    reward: Reward
    beta: float
    baseline_momentum: float | None
    cost_samples: int
    annealed: bool
    adam: optax.GradientTransformation
    entropy_weight: Callable[[jax.Array, Period], jax.Array]
    temperature: float
    log_probability: str
    axis_name: Hashable | None
    active: Active = None


def _check(rule: _Rule, samples: int) -> None:
    """Raises ValueError for arguments that cannot be, or not together."""
    check_beta(rule.beta)
    momentum = rule.baseline_momentum
    if momentum is None:
        check_samples(samples, 2, ", or 1 with a baseline_momentum: those of a step are compared")
    else:
        check_samples(samples, 1, "")
        if not 0 <= momentum < 1:
            raise ValueError(f"baseline_momentum is {momentum}; expected a number in [0, 1).")
    if not 0 < rule.temperature < float("inf"):
        raise ValueError(f"temperature is {rule.temperature}; expected a finite number above 0.")
    if rule.log_probability not in REDUCTIONS:
        raise ValueError(
            f"Unknown log_probability {rule.log_probability!r}: expected one of"
            f" {', '.join(REDUCTIONS)}."
        )
    if rule.cost_samples < 0 or rule.cost_samples == 1:
        raise ValueError(f"cost_samples is {rule.cost_samples}; expected 0 or at least 2.")
    if rule.reward.multiplies and rule.cost_samples:
        raise ValueError(
            "A reward that multiplies quality and costs has no penalty that points of their own"
            f" could tell: set cost_samples to 0 (is {rule.cost_samples}) and annealed to False."
        )
    if rule.annealed and not rule.cost_samples:
        raise ValueError(
            "An annealed penalty moves from the expected cost to that of points of its own: set"
            " cost_samples to 2 or more, or annealed to False."
        )


def gradient_step(
    rule: _Rule, state: SearchState, choices: jax.Array, quality: jax.Array, key: jax.Array
) -> tuple[SearchState, dict[str, jax.Array]]:
    """The state after a step's samples.

    The policy stays before the delay is over, and where a quality is not finite.
    """
    step, policy, targets = state.step, state.policy, state.targets
    log_p = log_probabilities(state, rule.mask, rule.period.start, rule.temperature)
    ratios = cost_ratios(rule.costs, targets, choices)
    rewards = rule.reward.of(quality, ratios, rule.beta)
    groups = [(choices, quality if rule.cost_samples else rewards)]
    further = None
    if rule.cost_samples:
        own, further = cost_terms(rule, targets, log_p, key, step)
        groups.append(own)
    moved, told = _policy_step(rule, policy, groups, further, step)
    searching = (step >= rule.period.start) & jnp.all(jnp.isfinite(moved.logits))
    kept = jax.tree.map(lambda new, old: jnp.where(searching, new, old), moved, policy)
    told["reward"] = replicas.mean(jnp.mean(rewards), rule.axis_name)
    shared = told_of_step(rule.costs, targets, log_p, choices, quality, rule.axis_name, rule.active)
    return SearchState(step + 1, kept, targets), shared | told


def cost_terms(
    rule: _Rule, targets: Mapping[str, jax.Array], log_p: jax.Array, key: jax.Array, step: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Callable[[jax.Array], jax.Array]]:
    """The penalty's two parts at `step`: of sampled points, and of the expected cost.

    Returns:
      (points [cost_samples, decisions] drawn from `log_p`, their rewards -s P(C)), and a function
      of the logits, (1 - s) P(E[C]). See `policy_gradient`; s is 1 where it is not annealed.
    """
    annealed = 1.0
    if rule.annealed:
        start, total = rule.period
        annealed = jnp.clip((step - start) / (total - start), 0.0, 1.0)
    points = policies.sample_many(key, log_p, rule.cost_samples)
    penalties = rule.reward.penalty(cost_ratios(rule.costs, targets, points), rule.beta)

    def of_expected(logits: jax.Array) -> jax.Array:
        p = jnp.exp(policies.log_probabilities(logits, rule.mask, rule.temperature))
        ratios = [table.expected(p) / targets[name] for name, table in rule.costs.items()]
        return (1 - annealed) * rule.reward.penalty(jnp.stack(ratios), rule.beta)

    return (points, -annealed * penalties), of_expected


def _policy_step(rule: _Rule, policy: PolicyState, groups, further, step: jax.Array):
    """One update by groups of (choices [n, decisions], rewards [n]); the first has the baseline."""
    mean = replicas.mean(jnp.mean(groups[0][1]), rule.axis_name)
    baseline = jnp.where(policy.updates == 0, mean, policy.baseline)
    weight = rule.entropy_weight(step, rule.period)

    def loss(logits):
        total = 0.0 if further is None else further(logits)
        for number, (choices, rewards) in enumerate(groups):
            compared = number > 0 or rule.baseline_momentum is None
            advantages = policies.centred(rewards) if compared else rewards - baseline
            losses = jax.vmap(
                lambda chosen, advantage, number=number: policies.reinforce_loss(
                    logits, chosen, advantage, 0.0 if number else weight, rule.mask,
                    temperature=rule.temperature, reduce=REDUCTIONS[rule.log_probability],
                    active=None if rule.active is None else rule.active(chosen),
                )
            )(choices, advantages)  # fmt: skip
            total += jnp.mean(losses)
        return total

    gradient = replicas.mean(jax.grad(loss)(policy.logits), rule.axis_name)
    updates, opt_state = rule.adam.update(gradient, policy.opt_state)
    logits: Any = optax.apply_updates(policy.logits, updates)
    momentum = rule.baseline_momentum or 0.0
    new_baseline = momentum * baseline + (1 - momentum) * mean
    told = {"entropy_weight": weight}
    if rule.baseline_momentum is not None:
        told["advantage"] = mean - baseline
    return PolicyState(logits, opt_state, new_baseline, policy.updates + 1), told
