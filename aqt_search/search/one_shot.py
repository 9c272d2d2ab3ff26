"""One-shot search: weights and policy learn together in one step (FLIQS, arXiv 2308.03290).

Every replica samples formats for all decisions, takes a weight step under them, measures their
quality on held-out examples, and moves the policy by REINFORCE towards points of high quality near
the cost target. Nothing but metrics leaves the device, and no sample compiles anything.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aqt_search.search import policy as policies
from aqt_search.search.policy import PolicyState
from aqt_search.search.reward import ENTROPY_SCHEDULES, REWARDS, entropy_weight, reward
from aqt_search.search.space import CostTable, Space
from aqt_search.training.batch_norm import batch_statistics, running_statistics
from aqt_search.training.parallel import AXIS
from aqt_search.training.train_step import Batch, TrainState, step_key

QUALITIES = ("held_out", "train")


class SearchState(NamedTuple):
    """Everything a search step reads and writes."""

    train: TrainState
    policy: PolicyState


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """The controls of a search; defaults as in the project's configs."""

    total_steps: int
    target: float  # cost target, in the unit of the cost table
    delay: float = 0.25  # share of the steps in which formats are sampled uniformly
    reward: str = "absolute"
    beta: float = 1.0  # weight of the cost
    quality: str = "held_out"  # accuracy on held-out examples, or on the training batch
    learning_rate: float = 0.05  # Adam's, for the policy
    baseline_momentum: float = 0.95
    entropy_weight: float = 0.1  # at the end
    entropy_schedule: str = "cosine"
    temperature: float = 1.0
    log_probability: str = "sum"  # over decisions: "sum" (TuNAS) or "mean" (FLIQS)

    def __post_init__(self):
        for value, known, what in (
            (self.reward, REWARDS, "reward"),
            (self.quality, QUALITIES, "quality"),
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

    @property
    def start(self) -> int:
        """The first step (from 0) after which the policy moves."""
        return round(self.delay * self.total_steps)


def policy_optimizer(options: SearchOptions) -> optax.GradientTransformation:
    """Adam for the policy's logits."""
    return optax.adam(options.learning_rate)


def make_search_step(
    qapply: Callable,
    update: Callable,
    space: Space,
    costs: CostTable,
    options: SearchOptions,
    momentum: Any,
) -> Callable:
    """Returns `step(state, batch[, held_out]) -> (state, metrics)` for `parallel.pmap_step`.

    With s the state before the step: formats are sampled from the policy (uniformly before
    `options.start`), the weights take one step under them, Q is the accuracy of the weights of s
    under them, on the held-out batch (quality "held_out") or on the training batch ("train", which
    then takes no second argument), both normalised by the statistics of the training batch: the
    running ones fit none of the samples. With reward r and baseline b:

        advantage = r - b;   b <- momentum * b + (1 - momentum) * r      (b starts at the first r)

    Each replica has its own sample; gradients of weights and policy are averaged over replicas.

    Args:
      qapply: `quantize(model.apply)`.
      update: of `training.train_step.make_update` on the same qapply.
      space: the decisions.
      costs: the cost of the space's points.
      options: the controls.
      momentum: of the running statistics, as `training.batch_norm.running_momentum` finds it.

    Raises:
      SpaceError: the cost target is outside of the space's range.
    """
    costs.check_target(options.target)
    adam = policy_optimizer(options)
    mask = space.mask

    def step(state: SearchState, batch: Batch, held_out: Batch | None = None):
        train, policy = state
        searching = train.step >= options.start
        policy_logits = jnp.where(searching, policy.logits, 0.0)
        log_p = policies.log_probabilities(policy_logits, mask, options.temperature)
        choices = policies.sample(jax.random.fold_in(step_key(train), 1), log_p)
        assignment = space.assignment(choices)
        zeros = jax.tree.map(jnp.zeros_like, train.batch_stats)
        new_train, metrics, forward = update(train._replace(batch_stats=zeros), assignment, batch)
        running = running_statistics(train.batch_stats, new_train.batch_stats, momentum)
        new_train = new_train._replace(batch_stats=running)
        logits, labels = forward.logits, batch["label"]
        if held_out is not None:
            stats = batch_statistics(forward.batch_stats, momentum)
            variables = {"params": train.params, "batch_stats": stats}
            logits = qapply(assignment, variables, held_out["image"], train=False)
            labels = held_out["label"]
        quality, agreement = accuracy_and_agreement(logits, labels)
        cost = costs.of(choices)
        found = reward(options.reward, quality, cost, options.target, options.beta)
        new_policy, advantage, weight = _policy_step(
            policy, choices, found, train.step, adam, mask, options
        )
        new_policy = jax.tree.map(
            lambda new, old: jnp.where(searching, new, old), new_policy, policy
        )
        own = {
            "reward": found,
            "quality": quality,
            "prediction_agreement": agreement,
            "cost": cost,
            "advantage": advantage,
        }
        metrics |= jax.lax.pmean(own, AXIS) | {
            "entropy_weight": weight,
            "entropy": jnp.mean(policies.entropy(log_p)),
            "expected_cost": costs.expected(jnp.exp(log_p)),
        }
        return SearchState(new_train, new_policy), metrics

    return step


def accuracy_and_agreement(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Share of correct predictions, and share of the most frequent prediction."""
    predictions = jnp.argmax(logits, -1)
    counts = jnp.zeros(logits.shape[-1], jnp.float32).at[predictions].add(1.0)
    return jnp.mean(predictions == labels), jnp.max(counts) / len(predictions)


def _policy_step(policy, choices, found, step, adam, mask, options: SearchOptions):
    mean = jax.lax.pmean(found, AXIS)
    baseline = jnp.where(policy.updates == 0, mean, policy.baseline)
    advantage = found - baseline
    weight = entropy_weight(
        options.entropy_schedule, step,
        start=options.start, total=options.total_steps, end_weight=options.entropy_weight,
    )  # fmt: skip
    grads = jax.grad(policies.reinforce_loss)(
        policy.logits, choices, advantage, weight, mask,
        temperature=options.temperature,
        reduce=jnp.sum if options.log_probability == "sum" else jnp.mean,
    )  # fmt: skip
    updates, opt_state = adam.update(jax.lax.pmean(grads, AXIS), policy.opt_state)
    logits = optax.apply_updates(policy.logits, updates)
    momentum = options.baseline_momentum
    new_baseline = momentum * baseline + (1 - momentum) * mean
    return PolicyState(logits, opt_state, new_baseline, policy.updates + 1), advantage, weight


def best_choices(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The most probable option of every decision: the search's answer, [decisions], int."""
    return np.argmax(np.where(mask, logits, -np.inf), axis=-1)


class CollapsedSearchError(RuntimeError):
    """The reward no longer depends on quality: the search would go on optimising cost alone."""


class QualityGuard:
    """Stops a search whose quality says nothing about the formats any more.

    Over the last `window` steps after the delay, it raises if every batch got one and the same
    prediction, or if the mean quality is not above chance by three standard errors. (Seen with
    int2: activations all zero, BatchNorm divides by zero variance, accuracy stays at chance.)
    """

    def __init__(self, options: SearchOptions, classes: int, examples: int, window: int = 50):
        self._start = options.start
        chance = 1 / classes
        error = math.sqrt(chance * (1 - chance) / (window * examples))
        self._threshold = chance + 3 * error
        self._qualities: collections.deque = collections.deque(maxlen=window)
        self._agreements: collections.deque = collections.deque(maxlen=window)

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Looks at the metrics of one step (counted from 1)."""
        if step <= self._start:
            return
        self._qualities.append(float(metrics["quality"]))
        self._agreements.append(float(metrics["prediction_agreement"]))
        if len(self._qualities) < self._qualities.maxlen:
            return
        mean = float(np.mean(self._qualities))
        same = min(self._agreements) >= 1
        if same or mean <= self._threshold:
            what = "every batch got one and the same prediction" if same else (
                f"the mean quality {mean:.4f} is not above chance ({self._threshold:.4f})"
            )  # fmt: skip
            raise CollapsedSearchError(
                f"At step {step} the reward no longer depends on quality: over the last"
                f" {len(self._qualities)} steps {what}. Leave the narrowest formats (int2) out of"
                " the space, or lower the learning rate, in a new --workdir. The checkpoint before"
                " this step is kept."
            )
