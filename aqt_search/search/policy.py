"""The policy: an independent categorical distribution for every decision, moved by REINFORCE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class PolicyState(NamedTuple):
    """What the policy learns."""

    logits: jax.Array  # [decisions, max_options], float32
    opt_state: Any  # optax state
    baseline: jax.Array  # [], float32: moving average of the reward
    updates: jax.Array  # [], int32: policy updates done


def init_policy(mask: np.ndarray, optimizer: optax.GradientTransformation) -> PolicyState:
    """A uniform policy over the options that exist (`mask` [decisions, max_options], bool)."""
    logits = jnp.zeros(mask.shape, jnp.float32)
    return PolicyState(logits, optimizer.init(logits), jnp.float32(0.0), jnp.int32(0))


def log_probabilities(logits: jax.Array, mask: np.ndarray, temperature: float = 1.0) -> jax.Array:
    """log p = log_softmax(logits / temperature) over the options that exist, else -inf."""
    return jax.nn.log_softmax(jnp.where(mask, logits / temperature, -jnp.inf), axis=-1)


def sample_many(key: jax.Array, log_p: jax.Array, count: int) -> jax.Array:
    """`count` independent points: [count, decisions], int32."""
    # As jax.random.categorical draws them, whose random bits in several dimensions take LLVM a
    # second longer to compile.
    noise = jax.random.gumbel(key, (count * log_p.size,)).reshape(count, *log_p.shape)
    return jnp.argmax(noise + log_p[None], axis=-1)


def centred(rewards: jax.Array) -> jax.Array:
    """Advantages [n] of samples of one step: each reward minus the mean of the others.

    A = (r - mean(r)) * n / (n - 1). It has no baseline that could lag behind (Kool et al. 2019,
    "Buy 4 REINFORCE samples, get a baseline for free"). Of a single sample it is not defined.
    """
    count = rewards.shape[0]
    return (rewards - jnp.mean(rewards)) * (count / (count - 1))


def entropy(log_p: jax.Array) -> jax.Array:
    """Entropy of every decision in nats: -sum p log p, [decisions]."""
    return -jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isfinite(log_p), log_p, 0.0), axis=-1)


def mean_entropy(log_p: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """The mean entropy of the decisions in nats, by `weight` [decisions] where there is one."""
    found = entropy(log_p)
    if weight is None:
        return jnp.mean(found)
    return jnp.sum(found * weight) / jnp.maximum(jnp.sum(weight), 1)


def log_probability(log_p: jax.Array, choices: jax.Array) -> jax.Array:
    """log p of every choice taken, [decisions]."""
    return jnp.take_along_axis(log_p, choices[:, None], axis=-1)[:, 0]


def reinforce_loss(
    logits: jax.Array,
    choices: jax.Array,
    advantage: jax.Array,
    entropy_weight: jax.typing.ArrayLike,
    mask: np.ndarray,
    *,
    temperature: float,
    reduce: Callable[[jax.Array], jax.Array],
    active: jax.Array | None = None,
) -> jax.Array:
    """The loss whose gradient is the policy gradient (FLIQS, arXiv 2308.03290).

        loss = -advantage * log p(choices) + entropy_weight * mean entropy

    The plus sign minimises the entropy: a rising weight makes the policy decide.

    Args:
      logits: [decisions, max_options].
      choices: [decisions], as sampled.
      advantage: [], reward minus baseline; taken as a constant.
      entropy_weight: [], at this step.
      mask: [decisions, max_options], bool.
      temperature: of the softmax.
      reduce: jnp.sum (TuNAS) or jnp.mean (FLIQS) of log p over decisions.
      active: [decisions], bool: those that decide anything under the choices; the others count
        neither in log p nor in the entropy. None: all.
    """
    log_p = log_probabilities(logits, mask, temperature)
    taken = log_probability(log_p, choices)
    taken = taken if active is None else jnp.where(active, taken, 0.0)
    gain = jax.lax.stop_gradient(advantage) * reduce(taken)
    return -gain + entropy_weight * mean_entropy(log_p, active)
