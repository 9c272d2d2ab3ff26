"""One-shot search: weights and policy learn together in one step (FLIQS, arXiv 2308.03290).

Every replica samples formats for all decisions, takes a weight step under them, measures their
quality on held-out examples, and moves the policy towards points of high quality near the cost
target: by REINFORCE, as FLIQS does, or with a critic (`aqt_search.search.critic`). Nothing but
metrics leaves the device, and no sample compiles anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aqt_search.search import critic
from aqt_search.search import policy as policies
from aqt_search.search.cost_table import CostTable
from aqt_search.search.options import SpaceError
from aqt_search.search.policy import PolicyState
from aqt_search.search.reward import (
    ADDITIVE_REWARDS,
    ENTROPY_SCHEDULES,
    REWARDS,
    entropy_weight,
    penalty,
    reward,
)
from aqt_search.search.space import Space
from aqt_search.training.parallel import AXIS
from aqt_search.training.scales import batch_arguments
from aqt_search.training.train_step import Batch, TrainState, cross_entropy, step_key

SEARCHERS = ("critic", "policy_gradient", "random")
QUALITIES = ("held_out", "train")
MEASURES = ("accuracy", "loss")
ADVANTAGES = ("baseline", "centred")
PENALTIES = ("annealed", "sampled")
_MEMORY = 0.5  # of the critic, as a share of the run: the weights it judged are not today's


class SearchState(NamedTuple):
    """Everything a search step reads and writes."""

    train: TrainState
    policy: PolicyState


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """The controls of a search; defaults as in the project's configs."""

    total_steps: int
    # "policy_gradient" is FLIQS's: beta, advantage, and what stands from cost_samples on are its
    # own. Of reward, "critic" takes on which sides of the target a cost is off. With "random"
    # formats are sampled uniformly to the end.
    searcher: str = "critic"
    delay: float = 0.25  # share of the steps in which formats are sampled uniformly
    reward: str = "absolute"
    beta: float = 1.0  # weight of the cost
    quality: str = "held_out"  # on held-out examples, or on the training batch ("train")
    # Minus the cross-entropy in nats, or "accuracy" (the papers'), which needs many more images.
    measure: str = "loss"
    # The answer is the most probable point whose cost is this near its target; with 0 the most
    # probable, wherever it is.
    tolerance: float = 0.02
    samples: int = 2  # points judged in a step; weights are trained under the first
    advantage: str = "centred"  # over the samples of a step, or against a moving "baseline"
    cost_samples: int = 256  # points whose cost alone is judged; 0: those of `samples`
    penalty: str = "annealed"  # from that of the expected cost to the expected one; or "sampled"
    learning_rate: float = 0.05  # Adam's, for the policy
    baseline_momentum: float = 0.95
    entropy_weight: float = 0.1  # at the end
    entropy_schedule: str = "cosine"
    temperature: float = 1.0
    log_probability: str = "sum"  # over decisions: "sum" (TuNAS) or "mean" (FLIQS)

    def __post_init__(self):
        for value, known, what in (
            (self.searcher, SEARCHERS, "searcher"),
            (self.reward, REWARDS, "reward"),
            (self.quality, QUALITIES, "quality"),
            (self.measure, MEASURES, "measure"),
            (self.advantage, ADVANTAGES, "advantage"),
            (self.penalty, PENALTIES, "penalty"),
            (self.entropy_schedule, ENTROPY_SCHEDULES, "entropy schedule"),
            (self.log_probability, ("sum", "mean"), "log_probability"),
        ):
            if value not in known:
                raise ValueError(f"Unknown {what} {value!r}: expected one of {', '.join(known)}.")
        if not 0 <= self.delay < 1 or not 0 <= self.baseline_momentum < 1 or self.temperature <= 0:
            raise ValueError(
                "delay and baseline_momentum lie in [0, 1), temperature above 0; got"
                f" {self.delay}, {self.baseline_momentum} and {self.temperature}."
            )
        if self.beta < 0:
            raise ValueError(f"beta, the weight of the cost, is {self.beta}; expected at least 0.")
        if self.start >= self.total_steps:
            raise ValueError(
                f"A delay of {self.delay} leaves none of the {self.total_steps} steps to move the"
                " policy in. Shorten the delay or train longer."
            )
        self._check_samples()

    def _check_samples(self):
        if self.samples < 1 or self.cost_samples < 0 or self.cost_samples == 1:
            raise ValueError(
                f"samples is {self.samples}, expected at least 1; cost_samples is"
                f" {self.cost_samples}, expected 0 or at least 2."
            )
        if self.samples > 1 and self.quality == "train":
            raise ValueError(
                f"samples is {self.samples}, but quality 'train' judges the one point that the"
                " weights are trained under. Set samples to 1, or quality to 'held_out'."
            )
        if self.samples == 1 and self.advantage == "centred":
            raise ValueError(
                "advantage 'centred' compares the samples of a step: set samples to 2 or more, or"
                " advantage to 'baseline'."
            )
        if self.reward not in ADDITIVE_REWARDS and (self.cost_samples or self.measure == "loss"):
            raise ValueError(
                f"Reward {self.reward!r} multiplies quality and cost: set cost_samples to 0 (is"
                f" {self.cost_samples}), penalty to 'sampled' and measure to 'accuracy' (is"
                f" {self.measure!r})."
            )
        if self.searcher == "critic" and (self.samples < 2 or self.reward not in ADDITIVE_REWARDS):
            raise ValueError(
                f"searcher 'critic' compares the samples of a step: it needs 2 or more (samples is"
                f" {self.samples}) and reward 'absolute' or 'one_sided' (is {self.reward!r})."
            )
        if self.searcher == "critic" and self.temperature != 1:
            raise ValueError(
                f"searcher 'critic' has a temperature of its own: leave temperature at 1 (is"
                f" {self.temperature})."
            )
        if self.penalty == "annealed" and not self.cost_samples:
            raise ValueError(
                "penalty 'annealed' moves from the expected cost to that of points of its own: set"
                " cost_samples to 2 or more, or penalty to 'sampled'."
            )

    @property
    def start(self) -> int:
        """The first step (from 0) after which the policy moves."""
        return round(self.delay * self.total_steps)


def policy_optimizer(options: SearchOptions) -> optax.GradientTransformation:
    """Adam for the policy's logits."""
    return optax.adam(options.learning_rate)


def init_policy(space: Space, options: SearchOptions) -> PolicyState:
    """The policy that a search starts from: uniform."""
    if options.searcher == "critic":
        return critic.init_policy(space.mask)
    return policies.init_policy(space.mask, policy_optimizer(options))


def make_search_step(
    qapply: Callable,
    update: Callable,
    space: Space,
    costs: Mapping[str, CostTable],
    options: SearchOptions,
) -> Callable:
    """Returns `step(state, targets, batch[, held_out]) -> (state, metrics)`, to run inside `AXIS`.

    With s the state before the step: `options.samples` points are sampled from the policy
    (uniformly before `options.start`), and the weights take one step under the first. The quality
    Q of each is measured with the weights of s on one held-out batch, normalised by that batch's
    own statistics, as the running ones fit none of the samples. With quality "train" it is that of
    the training batch, and the step takes no second one. The rewards r, of Q and of the costs
    relative to `targets`, move the policy. With searcher "critic" it follows from the qualities
    as `critic.critic_step` says, and beta, the penalty and the entropy weight have no part in it.
    With "policy_gradient" it is moved by REINFORCE with the advantages

        centred    A_i = r_i - mean of the other r_j
        baseline   A_i = r_i - b;   b <- momentum * b + (1 - momentum) * mean r   (b starts at r)

    With `options.cost_samples`, r is Q alone and the gradient of the expected penalty E[P(C)] comes
    from that many points of its own, always centred: the objective is the same, its noise is not.
    E[P(C)] punishes whatever leaves the cost open, and so decides by cost before quality has been
    seen. With penalty "annealed" it is s E[P(C)] + (1 - s) P(E[C]), where s goes from 0 at the
    delay's end to 1 at the last step: first the expected cost is led to its target, then the
    sampled ones.

    Each replica has its own samples; gradients of weights and policy are averaged over replicas.

    Args:
      qapply: `quantize(model.apply)`.
      update: of `training.train_step.make_update` on the same qapply.
      space: the decisions.
      costs: of the space's points, by name; the first is the one the metrics call "cost".
      options: the controls.

    The step's `targets` are {name: []} in the units of `costs`; they may differ between runs.
    """
    mask = space.mask
    move = (_by_critic if options.searcher == "critic" else _by_gradient)(space, costs, options)

    def step(state: SearchState, targets, batch: Batch, held_out: Batch | None = None):
        train, policy = state
        log_p = policies.log_probabilities(
            jnp.where(train.step >= options.start, policy.logits, 0.0), mask, options.temperature
        )
        sample_key, cost_key, dropout_key = jax.random.split(
            jax.random.fold_in(step_key(train), 1), 3
        )
        samples = policies.sample_many(sample_key, log_p, options.samples)
        new_train, metrics, logits = update(train, space.assignment(samples[0]), batch)
        if held_out is None:
            judged = [_judge(logits, batch["label"], options)]
        else:
            found = [_logits(qapply, space, train, c, held_out, dropout_key) for c in samples]
            judged = [_judge(logits, held_out["label"], options) for logits in found]
        judged = jax.tree.map(lambda *values: jnp.stack(values), *judged)
        ratios = _ratios(costs, targets, samples)
        rewards = reward(options.reward, judged["quality"], ratios, options.beta)
        new_policy, told = move(
            policy, train.step, log_p, samples, judged["quality"], rewards, targets, cost_key
        )
        cost = ratios[:, 0] * targets[next(iter(costs))]
        own = judged | {"reward": rewards, "cost": cost}
        metrics |= jax.lax.pmean(jax.tree.map(jnp.mean, own), AXIS) | told
        metrics |= {"entropy": jnp.mean(policies.entropy(log_p))}
        for number, (name, table) in enumerate(costs.items()):
            suffix = f"/{name}" if number else ""
            metrics["expected_cost" + suffix] = table.expected(jnp.exp(log_p))
        return SearchState(new_train, new_policy), metrics

    return step


def _by_critic(space: Space, costs: Mapping[str, CostTable], options: SearchOptions) -> Callable:
    """How a step's samples move the policy of a critic."""
    alike = critic.groups_of([(d.role, d.labels) for d in space.decisions])
    period = critic.Period(options.start, options.total_steps)

    def move(policy, step, log_p, samples, quality, rewards, targets, key):
        return critic.critic_step(
            policy, samples, quality, costs, targets, step, period, alike, space.mask,
            keep=1 - 1 / (_MEMORY * options.total_steps),
            tolerance=options.tolerance, one_sided=options.reward == "one_sided",
        )  # fmt: skip

    return move


def _by_gradient(space: Space, costs: Mapping[str, CostTable], options: SearchOptions) -> Callable:
    """How a step's samples move the policy by REINFORCE; not at all in a random search."""
    adam = policy_optimizer(options)

    def move(policy, step, log_p, samples, quality, rewards, targets, key):
        groups = [(samples, quality if options.cost_samples else rewards)]
        further = None
        if options.cost_samples:
            own, further = cost_terms(costs, targets, log_p, key, step, space.mask, options)
            groups.append(own)
        moved, told = _policy_step(policy, groups, further, step, adam, space.mask, options)
        searching = (step >= options.start) & (options.searcher != "random")
        return jax.tree.map(lambda new, old: jnp.where(searching, new, old), moved, policy), told

    return move


def check_targets(costs: Mapping[str, CostTable], targets: Mapping[str, float]) -> None:
    """Raises SpaceError if no point of the space can meet a target."""
    for name, target in targets.items():
        try:
            costs[name].check_target(target)
        except SpaceError as error:
            raise SpaceError(f"{name}: {error}") from error


def _ratios(costs, targets, choices: jax.Array) -> jax.Array:
    """Cost over target of `choices` [n, decisions]: [n, costs]."""
    ratios = [jax.vmap(table.of)(choices) / targets[name] for name, table in costs.items()]
    return jnp.stack(ratios, axis=-1)


def cost_terms(
    costs: Mapping[str, CostTable],
    targets: Mapping[str, jax.Array],
    log_p: jax.Array,
    key: jax.Array,
    step: jax.Array,
    mask: np.ndarray,
    options: SearchOptions,
) -> tuple[tuple[jax.Array, jax.Array], Callable[[jax.Array], jax.Array]]:
    """The penalty's two parts at `step`: of sampled points, and of the expected cost.

    Returns:
      (points [cost_samples, decisions] drawn from `log_p`, their rewards -s P(C)), and a function
      of the logits, (1 - s) P(E[C]). See `make_search_step`; s is 1 with penalty "sampled".
    """
    annealed = 1.0
    if options.penalty == "annealed":
        steps = options.total_steps - options.start
        annealed = jnp.clip((step - options.start) / steps, 0.0, 1.0)
    points = policies.sample_many(key, log_p, options.cost_samples)
    penalties = penalty(options.reward, _ratios(costs, targets, points), options.beta)

    def of_expected(logits: jax.Array) -> jax.Array:
        p = jnp.exp(policies.log_probabilities(logits, mask, options.temperature))
        ratios = [table.expected(p) / targets[name] for name, table in costs.items()]
        return (1 - annealed) * penalty(options.reward, jnp.stack(ratios), options.beta)

    return (points, -annealed * penalties), of_expected


def _logits(qapply, space: Space, train: TrainState, choices, batch: Batch, key) -> jax.Array:
    """Logits of a batch under `choices`, normalised by the batch's own statistics."""
    # One key for all samples of a step: what is dropped does not tell them apart.
    arguments = batch_arguments(train.variables, key)
    logits = qapply(space.assignment(choices), train.variables, batch["image"], **arguments)
    return logits[0] if "mutable" in arguments else logits


def _judge(logits: jax.Array, labels: jax.Array, options: SearchOptions) -> dict[str, jax.Array]:
    accuracy, agreement = accuracy_and_agreement(logits, labels)
    by_loss = options.measure == "loss"
    quality = -jnp.mean(cross_entropy(logits, labels, 0.0)) if by_loss else accuracy
    return {"quality": quality, "sample_accuracy": accuracy, "prediction_agreement": agreement}


def accuracy_and_agreement(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Share of correct predictions, and share of the most frequent prediction."""
    predictions = jnp.argmax(logits, -1)
    counts = jnp.zeros(logits.shape[-1], jnp.float32).at[predictions].add(1.0)
    return jnp.mean(predictions == labels), jnp.max(counts) / len(predictions)


def _policy_step(policy, groups, further, step, adam, mask, options: SearchOptions):
    """One update by groups of (choices [n, decisions], rewards [n]); the first has the baseline."""
    mean = jax.lax.pmean(jnp.mean(groups[0][1]), AXIS)
    baseline = jnp.where(policy.updates == 0, mean, policy.baseline)
    weight = entropy_weight(
        options.entropy_schedule, step,
        start=options.start, total=options.total_steps, end_weight=options.entropy_weight,
    )  # fmt: skip

    def loss(logits):
        total = 0.0 if further is None else further(logits)
        for number, (choices, rewards) in enumerate(groups):
            compared = number > 0 or options.advantage == "centred"
            advantages = policies.centred(rewards) if compared else rewards - baseline
            losses = jax.vmap(
                lambda chosen, advantage, number=number: policies.reinforce_loss(
                    logits, chosen, advantage, 0.0 if number else weight, mask,
                    temperature=options.temperature,
                    reduce=jnp.sum if options.log_probability == "sum" else jnp.mean,
                )
            )(choices, advantages)  # fmt: skip
            total += jnp.mean(losses)
        return total

    updates, opt_state = adam.update(
        jax.lax.pmean(jax.grad(loss)(policy.logits), AXIS), policy.opt_state
    )
    logits = optax.apply_updates(policy.logits, updates)
    momentum = options.baseline_momentum
    new_baseline = momentum * baseline + (1 - momentum) * mean
    told = {"entropy_weight": weight, "advantage": mean - baseline}
    return PolicyState(logits, opt_state, new_baseline, policy.updates + 1), told
