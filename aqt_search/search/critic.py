"""A policy from a learned additive model of quality: what one sample a step tells is kept.

REINFORCE moves the policy by the noise of every step's quality and forgets what it has seen. The
critic keeps it: a value for every decision and option, learned by regression on the differences
between the samples of a step, and from these values the policy in closed form,

    p(o | d) proportional to exp((value[d, o] - sum over costs k of lambda_k m_k[d, o]) / tau)

the distribution of largest mean value plus tau times entropy whose expected costs are their targets
(m_k: the marginal costs of the options over the target). tau falls over the run; lambda_k is found
anew at every step. So the expected cost is on its target from the first step on, and no weight of
the cost has to be chosen. Decisions about the architecture have a tau of their own, which falls
first: weights stand another format well, but have to be trained for what a network is. For the
last tenth of the steps after the delay the policy is the answer: the most probable point on target,
under which the weights train to the end.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.search import policy as policies
from aqt_search.search import replicas
from aqt_search.search.answer import most_probable, most_probable_on_target
from aqt_search.search.cost_table import CostTable
from aqt_search.search.one_shot import (
    Active,
    Period,
    Search,
    SearchState,
    active_of,
    answer_of,
    check_costs,
    check_judged,
    check_samples,
    check_tolerance,
    first_state,
    log_probabilities,
    period,
    told_of_step,
)
from aqt_search.search.space import Space

# Of the root mean square of the values' differences: nearly open, and all but decided.
_TEMPERATURES = (4.0, 0.02)
# Multipliers tried at once, and how often between two of them: a bisection would be a loop, and a
# step of it a round trip on a GPU.
_MULTIPLIERS, _REFINEMENTS = 32, 4
_ARCHITECTURE_FIRST = 0.5  # the share of the steps after the delay in which its tau falls
_LARGEST_MULTIPLIER = 12.0  # lambda / tau = sinh of up to this: 8e4
_ANSWER_POINTS = 2**10  # that the answer is looked for among, at every step
_SWEEPS = 3  # over the multipliers, where there are several costs
_CERTAIN = 50.0  # logit of the options of the answer: the others have probability 0 in float32


def critic(
    space: Space,
    costs: Mapping[str, CostTable],
    *,
    total_steps: int,
    delay: float = 0.25,
    samples: int = 2,
    tolerance: float = 0.02,
    one_sided: bool = False,
    memory: float = 0.5,
    axis_name: Hashable | None = None,
) -> Search:
    """The search by a learned model of quality: on its targets from the first step on.

    Before the delay is over the critic learns and the policy is uniform. Decisions whose options
    have the same names learn from one another. The metrics are those of `one_shot.told_of_step`,
    "temperature" (tau) and "quality_noise" (nats, or the unit of the quality: the standard
    deviation of a sample about the model).

    Args:
      space: the decisions.
      costs: of the space's points, by name; the first is the one the metrics call "cost".
      total_steps: updates in the whole search.
      delay: share of the steps before the policy moves, in [0, 1).
      samples: points judged in a step, at least 2: they are compared.
      tolerance: the answer is the most probable point with |C / T - 1| at most this, for all
        costs; of none is so near, one of the nearest. 0: the most probable, wherever it is.
      one_sided: whether costs below their targets are as good as on them.
      memory: of the critic, as a share of the run: the weights it judged are not today's. Infinity
        where they are.
      axis_name: the mapped axis of the replicas; None without one.

    Raises:
      ValueError: an argument out of its range.
    """
    groups = groups_of([(d.role, d.labels) for d in space.decisions])
    paces = np.ones(len(space.decisions))
    paces[: len(space.net.decisions) if space.net is not None else 0] = 1 / _ARCHITECTURE_FIRST
    return critic_over(
        space.mask, groups, costs, total_steps=total_steps, delay=delay, samples=samples,
        tolerance=tolerance, one_sided=one_sided, memory=memory, axis_name=axis_name,
        active=active_of(space), paces=paces,
    )  # fmt: skip


def critic_over(
    mask: np.ndarray,
    groups: np.ndarray,
    costs: Mapping[str, CostTable],
    *,
    total_steps: int,
    delay: float,
    samples: int,
    tolerance: float,
    one_sided: bool,
    memory: float,
    axis_name: Hashable | None,
    active: Active = None,
    paces: np.ndarray | None = None,
) -> Search:
    """`critic` for decisions known by their options alone.

    Args:
      mask: [decisions, max_options], bool.
      groups: [groups, decisions], as of `groups_of`.
      active: which decisions decide anything under some choices; None: always all.
      paces: [decisions], how much faster than the search the temperature of a decision falls;
        None: as fast.
    """
    steps = period(total_steps, delay)
    check_samples(samples, 2, ": a critic compares the points of a step")
    check_tolerance(tolerance)
    check_costs(mask, costs)
    if not memory > 0:
        raise ValueError(f"memory is {memory}; expected a share of the run, above 0.")
    keep = max(0.0, 1 - 1 / (memory * total_steps))
    paces = np.ones(len(mask)) if paces is None else paces
    rule = _Rule(
        mask, groups, costs, steps, keep, tolerance, one_sided, axis_name, active, paces[:, None]
    )

    def sample(state: SearchState, key: jax.Array) -> jax.Array:
        return policies.sample_many(key, log_probabilities(state, mask, steps.start), samples)

    def update(state: SearchState, choices, quality, key):
        check_judged(choices, quality, samples, len(mask))
        log_p = log_probabilities(state, mask, steps.start)
        new, own = critic_step(rule, state, choices, quality)
        shared = told_of_step(costs, state.targets, log_p, choices, quality, axis_name, active)
        return new, shared | own

    def answer(state: SearchState) -> jax.Array:
        log_p = policies.log_probabilities(state.policy.logits, mask)
        found = answer_of(log_p, costs, state.targets, tolerance, one_sided)
        return jnp.where(state.step > steps.settles, most_probable(log_p), found)

    def init(targets: Mapping[str, Any]) -> SearchState:
        return first_state(costs, targets, init_critic(mask))

    return Search(init, sample, update, answer)


class CriticState(NamedTuple):
    """What the critic has learned, and the policy of it."""

    logits: jax.Array  # [decisions, max_options], float32
    value: jax.Array  # [decisions, max_options], float32: quality above the decision's mean
    count: jax.Array  # [decisions, max_options], float32: what was seen of each option
    variance: jax.Array  # [], float32: of a sample's quality about the model
    steps: jax.Array  # [], float32: that the variance is a mean over


def init_critic(mask: np.ndarray) -> CriticState:
    """A critic that has seen nothing."""
    # Arrays of their own, as the state may be donated.
    logits, value, count = (jnp.zeros(mask.shape, jnp.float32) for _ in range(3))
    return CriticState(logits, value, count, jnp.float32(0), jnp.float32(0))


def observe(
    critic: CriticState,
    choices: jax.Array,
    quality: jax.Array,
    keep: float,
    axis_name: Hashable | None = None,
    active: Active = None,
) -> CriticState:
    """One step of regression on the samples of a step, over all replicas.

    With r the quality above the model's prediction and x the one-hot choices, both centred over
    the samples, which share a batch and so its difficulty:

        count <- keep * count + sum x^2;   value <- value + sum r x / (count + 2 * decisions)

    the diagonal of recursive least squares with forgetting. The constant keeps the decisions, which
    all correct the same residual, from overshooting. Where a quality is not finite, nothing is
    learned. Decisions that are not active under some choices have an x of 0 there.

    Args:
      critic: before.
      choices: [samples, decisions], int; at least two samples.
      quality: [samples].
      keep: what is kept of the past at a step, in (0, 1].
      axis_name: the mapped axis of the replicas; None without one.
      active: which decisions decide anything under some choices; None: always all.
    """
    samples, decisions = choices.shape
    chosen = jax.nn.one_hot(choices, critic.value.shape[-1])
    if active is not None:
        chosen = chosen * jax.vmap(active)(choices)[..., None]
    residual = quality - jnp.einsum("sda,da->s", chosen, critic.value)
    residual = residual - jnp.mean(residual)
    x = chosen - jnp.mean(chosen, axis=0, keepdims=True)
    found = {
        "step": jnp.einsum("s,sda->da", residual, x),
        "count": jnp.sum(jnp.square(x), axis=0),
        "variance": jnp.sum(jnp.square(residual)) / (samples - 1),
    }
    found = replicas.total(found, axis_name)
    count_of_replicas = replicas.count(axis_name)
    count = keep * critic.count + found["count"]
    value = critic.value + found["step"] / (count + 2 * decisions * count_of_replicas)
    steps = keep * critic.steps + 1
    variance = critic.variance + (found["variance"] / count_of_replicas - critic.variance) / steps
    seen = CriticState(critic.logits, value, count, variance, steps)
    finite = jnp.isfinite(found["variance"])  # then so is every quality, of all replicas
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), seen, critic)


def groups_of(options: Sequence[Any]) -> np.ndarray:
    """[groups, decisions], 0 or 1: decisions with the same options, whose values are pooled."""
    keys = list(options)
    distinct = list(dict.fromkeys(keys))
    return np.array([[float(key == other) for key in keys] for other in distinct])


def _centred(values: jax.Array, mask: np.ndarray) -> jax.Array:
    """Values less the mean over the decision's options; 0 where there is no option."""
    mean = jnp.sum(jnp.where(mask, values, 0.0), axis=-1, keepdims=True)
    return jnp.where(mask, values - mean / mask.sum(axis=-1, keepdims=True), 0.0)


def pooled_values(critic: CriticState, groups: np.ndarray, mask: np.ndarray) -> jax.Array:
    """Values [decisions, max_options] shrunk towards those of the decisions with equal options.

    A value is the mean over its group plus its deviation d from it times t / (t + v), where v is
    the variance of the estimate and t that of true deviations, estimated as mean(d^2 - v): the
    empirical Bayes estimate (Efron and Morris 1973). Where little was seen all decisions of a group
    are taken to be alike, and the policy stays uniform among them.
    """
    value = _centred(critic.value, mask)
    weight = jnp.where(mask, critic.count, 0.0)
    total = jnp.maximum(jnp.einsum("gd,da->ga", groups, weight), 1e-9)
    mean = jnp.einsum("gd,da->ga", groups, weight * value) / total
    mean = jnp.einsum("gd,ga->da", groups, mean)
    deviation = value - mean
    variance = 2 * critic.variance / jnp.maximum(critic.count, 1e-9)
    shared = mask & (groups.T @ groups.sum(axis=1) > 1)[:, None]
    excess = jnp.where(shared, jnp.square(deviation) - variance, 0.0)
    true = jnp.maximum(jnp.sum(excess) / jnp.maximum(jnp.sum(shared), 1), 1e-12)
    return mean + deviation * true / (true + variance)


def temperature(values: jax.Array, mask: np.ndarray, share: jax.Array) -> jax.Array:
    """tau at `share` (0 to 1, of any shape) of the search: a falling multiple of the spread."""
    square = jnp.sum(jnp.square(_centred(values, mask))) / mask.sum()
    first, last = np.log(_TEMPERATURES)
    return jnp.sqrt(square + 1e-12) * jnp.exp(first + share * (last - first))


def logits_on_target(
    scores: jax.Array,
    log_p: jax.Array,
    costs: Mapping[str, CostTable],
    targets: Mapping[str, jax.Array],
    mask: np.ndarray,
    *,
    one_sided: bool = False,
    steepness: jax.Array | float = 1.0,
) -> jax.Array:
    """`scores` less multiples of the marginal costs, such that the expected costs are the targets.

    Marginal costs are those at the policy `log_p`; of a cost that adds up over decisions they are
    the same at every policy. Multipliers are found by trying many, one cost after another.

    Args:
      scores: [decisions, max_options], values over the temperature.
      log_p: [decisions, max_options], the policy before.
      costs, targets: by name.
      mask: [decisions, max_options], bool.
      one_sided: whether expected costs may stay below their targets.
      steepness: [decisions, 1], a factor of the multipliers: of one over the temperature.
    """
    p = jnp.exp(log_p)
    tables = [(table, targets[name]) for name, table in costs.items()]
    marginals = [
        steepness * jnp.where(mask, jax.grad(lambda p, t=table: t.expected(p))(p) / target, 0.0)
        for table, target in tables
    ]

    def shifted(positions):
        return scores - sum(jnp.sinh(x) * m for x, m in zip(positions, marginals))

    def solved(index, positions):
        """The position of one multiplier that meets its target beside the others as they are."""
        table, target = tables[index]

        def is_above(position):
            logits = shifted([*positions[:index], position, *positions[index + 1 :]])
            found = policies.log_probabilities(logits, mask)
            return table.expected(jnp.exp(found)) > target

        low = jnp.float32(0.0 if one_sided else -_LARGEST_MULTIPLIER)
        high = jnp.float32(_LARGEST_MULTIPLIER)
        for _ in range(_REFINEMENTS):
            grid = low + (high - low) * np.linspace(0, 1, _MULTIPLIERS, dtype=np.float32)
            above = jax.vmap(is_above)(grid)
            last = jnp.where(jnp.all(above), _MULTIPLIERS - 1, jnp.argmin(above))
            low, high = grid[jnp.maximum(last - 1, 0)], grid[jnp.maximum(last, 1)]
        return (low + high) / 2

    positions = [jnp.float32(0)] * len(tables)
    for _ in range(_SWEEPS if len(tables) > 1 else 1):
        for index in range(len(tables)):
            positions[index] = solved(index, positions)
    return shifted(positions)


class _Rule(NamedTuple):
    """What a critic's steps have in common."""

    mask: np.ndarray  # [decisions, max_options], bool
    groups: np.ndarray  # [groups, decisions]
    costs: Mapping[str, CostTable]
    period: Period
    keep: float  # of the past at a step
    tolerance: float
    one_sided: bool
    axis_name: Hashable | None
    active: Active
    paces: np.ndarray  # [decisions, 1]


def critic_step(
    rule: _Rule, state: SearchState, choices: jax.Array, quality: jax.Array
) -> tuple[SearchState, dict[str, jax.Array]]:
    """The critic after a step's samples, and the policy of its values."""
    mask, step, targets = rule.mask, state.step, state.targets
    seen = observe(state.policy, choices, quality, rule.keep, rule.axis_name, rule.active)
    values = pooled_values(seen, rule.groups, mask)
    share = (step - rule.period.start) / (rule.period.total - rule.period.start)
    tau = temperature(values, mask, jnp.clip(share * rule.paces, 0.0, 1.0))
    log_p = policies.log_probabilities(state.policy.logits, mask)
    found = logits_on_target(
        values / tau, log_p, rule.costs, targets, mask, one_sided=rule.one_sided,
        steepness=jnp.max(tau) / tau,
    )  # fmt: skip
    # All is computed at every step and the phase selects: a branch would be a round trip on a GPU.
    answer = most_probable_on_target(
        log_p, rule.costs, targets, rule.tolerance or np.inf, one_sided=rule.one_sided,
        points=_ANSWER_POINTS, further=False,
    )  # fmt: skip
    settled = _CERTAIN * jax.nn.one_hot(answer, mask.shape[-1], dtype=jnp.float32)
    searches = (step >= rule.period.start) & (step < rule.period.settles)
    logits = jnp.where(step == rule.period.settles, settled, state.policy.logits)
    logits = jnp.where(searches, jnp.where(mask, found, 0.0), logits)
    new = SearchState(step + 1, seen._replace(logits=logits), targets)
    return new, {"temperature": jnp.max(tau), "quality_noise": jnp.sqrt(seen.variance)}
