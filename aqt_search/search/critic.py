"""A policy from a learned additive model of quality: what one sample a step tells is kept.

REINFORCE moves the policy by the noise of every step's quality and forgets what it has seen. The
critic keeps it: a value for every decision and option, learned by regression on the differences
between the samples of a step, and from these values the policy in closed form,

    p(o | d) proportional to exp((value[d, o] - sum over costs k of lambda_k m_k[d, o]) / tau)

the distribution of largest mean value plus tau times entropy whose expected costs are their targets
(m_k: the marginal costs of the options over the target). tau falls over the run; lambda_k is found
by bisection at every step. So the expected cost is on its target from the first step on, and no
weight of the cost has to be chosen. For the last tenth of the search the policy is the answer: the
most probable point on target, under which the weights train to the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.search import policy as policies
from aqt_search.search.answer import most_probable_on_target
from aqt_search.search.cost_table import CostTable
from aqt_search.search.policy import PolicyState
from aqt_search.training.parallel import AXIS

# Of the root mean square of the values' differences: nearly open, and all but decided.
_TEMPERATURES = (4.0, 0.02)
_BISECTIONS = 30
_LARGEST_MULTIPLIER = 12.0  # lambda / tau = sinh of up to this: 8e4
_SWEEPS = 3  # over the multipliers, where there are several costs
SETTLED = 0.9  # the share of the search after which the answer is sampled alone
_CERTAIN = 50.0  # logit of the options of the answer: the others have probability 0 in float32


class CriticState(NamedTuple):
    """What the critic has learned."""

    value: jax.Array  # [decisions, max_options], float32: quality above the decision's mean
    count: jax.Array  # [decisions, max_options], float32: what was seen of each option
    variance: jax.Array  # [], float32: of a sample's quality about the model
    steps: jax.Array  # [], float32: that the variance is a mean over


def init_critic(mask: np.ndarray) -> CriticState:
    """A critic that has seen nothing."""
    zeros = jnp.zeros(mask.shape, jnp.float32)
    return CriticState(zeros, zeros, jnp.float32(0), jnp.float32(0))


def init_policy(mask: np.ndarray) -> PolicyState:
    """A uniform policy with a critic in place of an optimizer's state."""
    logits = jnp.zeros(mask.shape, jnp.float32)
    return PolicyState(logits, init_critic(mask), jnp.float32(0.0), jnp.int32(0))


def observe(
    critic: CriticState, choices: jax.Array, quality: jax.Array, keep: float
) -> CriticState:
    """One step of regression on the samples of a step, over all replicas, inside `AXIS`.

    With r the quality above the model's prediction and x the one-hot choices, both centred over
    the samples, which share a batch and so its difficulty:

        count <- keep * count + sum x^2;   value <- value + sum r x / (count + 2 * decisions)

    the diagonal of recursive least squares with forgetting. The constant keeps the decisions, which
    all correct the same residual, from overshooting.

    Args:
      critic: before.
      choices: [samples, decisions], int; at least two samples.
      quality: [samples].
      keep: what is kept of the past at a step, in (0, 1].
    """
    samples, decisions = choices.shape
    chosen = jax.nn.one_hot(choices, critic.value.shape[-1])
    residual = quality - jnp.einsum("sda,da->s", chosen, critic.value)
    residual = residual - jnp.mean(residual)
    x = chosen - jnp.mean(chosen, axis=0, keepdims=True)
    found = {
        "step": jnp.einsum("s,sda->da", residual, x),
        "count": jnp.sum(jnp.square(x), axis=0),
        "variance": jnp.sum(jnp.square(residual)) / (samples - 1),
    }
    found = jax.lax.psum(found, AXIS)
    replicas = jax.lax.axis_size(AXIS)
    count = keep * critic.count + found["count"]
    value = critic.value + found["step"] / (count + 2 * decisions * replicas)
    steps = keep * critic.steps + 1
    variance = critic.variance + (found["variance"] / replicas - critic.variance) / steps
    return CriticState(value, count, variance, steps)


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
    """tau at `share` (0 to 1) of the search: a falling multiple of the values' spread."""
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
) -> jax.Array:
    """`scores` less multiples of the marginal costs, such that the expected costs are the targets.

    Marginal costs are those at the policy `log_p`; of a cost that adds up over decisions they are
    the same at every policy. Multipliers are found by bisection, one cost after another.

    Args:
      scores: [decisions, max_options], values over the temperature.
      log_p: [decisions, max_options], the policy before.
      costs, targets: by name.
      mask: [decisions, max_options], bool.
      one_sided: whether expected costs may stay below their targets.
    """
    p = jnp.exp(log_p)
    tables = [(table, targets[name]) for name, table in costs.items()]
    marginals = [
        jnp.where(mask, jax.grad(lambda p, t=table: t.expected(p))(p) / target, 0.0)
        for table, target in tables
    ]

    def shifted(positions):
        return scores - sum(jnp.sinh(x) * m for x, m in zip(positions, marginals))

    def solved(index, positions):
        """The position of one multiplier that meets its target beside the others as they are."""
        table, target = tables[index]

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            logits = shifted([*positions[:index], middle, *positions[index + 1 :]])
            found = policies.log_probabilities(logits, mask)
            above = table.expected(jnp.exp(found)) > target
            return jnp.where(above, middle, low), jnp.where(above, high, middle)

        start = 0.0 if one_sided else -_LARGEST_MULTIPLIER
        ends = (jnp.float32(start), jnp.float32(_LARGEST_MULTIPLIER))
        low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, ends)
        return (low + high) / 2

    positions = [jnp.float32(0)] * len(tables)
    for _ in range(_SWEEPS if len(tables) > 1 else 1):
        for index in range(len(tables)):
            positions[index] = solved(index, positions)
    return shifted(positions)


class Period(NamedTuple):
    """The steps of a search: the policy rests before `start`, and is answered at the end."""

    start: int
    total: int

    @property
    def settles(self) -> int:
        """The step after which the answer alone is sampled."""
        return min(self.start + math.ceil(SETTLED * (self.total - self.start)), self.total - 1)


def critic_step(
    policy: PolicyState,
    choices: jax.Array,
    quality: jax.Array,
    costs: Mapping[str, CostTable],
    targets: Mapping[str, jax.Array],
    step: jax.Array,
    period: Period,
    groups: np.ndarray,
    mask: np.ndarray,
    *,
    keep: float,
    tolerance: float,
    one_sided: bool,
) -> tuple[PolicyState, dict[str, jax.Array]]:
    """The critic after a step's samples, and the policy of its values.

    Before the search starts the critic learns and the policy rests. Of `tolerance` and `one_sided`
    see `most_probable_on_target`.
    """
    critic = observe(policy.opt_state, choices, quality, keep)
    values = pooled_values(critic, groups, mask)
    share = (step - period.start) / (period.total - period.start)
    tau = temperature(values, mask, jnp.clip(share, 0.0, 1.0))
    log_p = policies.log_probabilities(policy.logits, mask)

    def searched():
        found = logits_on_target(values / tau, log_p, costs, targets, mask, one_sided=one_sided)
        return jnp.where(mask, found, 0.0)

    def answered():
        options = {"tolerance": tolerance or np.inf, "one_sided": one_sided}
        point = most_probable_on_target(log_p, costs, targets, **options)
        return _CERTAIN * jax.nn.one_hot(point, mask.shape[-1], dtype=jnp.float32)

    searches = (step >= period.start) & (step < period.settles)
    phase = jnp.where(searches, 1, jnp.where(step == period.settles, 2, 0))
    logits = jax.lax.switch(phase, [lambda: policy.logits, searched, answered])
    mean = jax.lax.pmean(jnp.mean(quality), AXIS)
    new = PolicyState(logits, critic, mean, policy.updates + (step >= period.start))
    return new, {"temperature": tau, "quality_noise": jnp.sqrt(critic.variance)}
