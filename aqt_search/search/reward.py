"""Rewards of a sampled point, and schedules of the entropy weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

REWARDS = ("absolute", "one_sided", "soft", "hard")
ADDITIVE_REWARDS = ("absolute", "one_sided")  # a quality minus a penalty of the costs alone
ENTROPY_SCHEDULES = ("cosine", "linear", "constant", "step")


def reward(name: str, quality: jax.Array, ratios: jax.Array, beta: float) -> jax.Array:
    """The reward of points with quality Q whose costs are `ratios` r of their targets.

        absolute   Q - beta * sum |r - 1|            (TuNAS, arXiv 2008.06120)
        one_sided  Q - beta * sum max(r - 1, 0)
        soft       Q * product r^(-beta)             (MnasNet, arXiv 1807.11626)
        hard       Q * product max(r, 1)^(-beta)

    Sums and products are over the costs that have a target.

    Args:
      name: one of `REWARDS`.
      quality: [...], non-negative (an accuracy) for "soft" and "hard", which scale it.
      ratios: [..., costs], positive.
      beta: weight of the costs, at least 0.

    Returns:
      [...].

    Raises:
      ValueError: unknown name, or beta below 0.
    """
    if name in ADDITIVE_REWARDS:
        return quality - penalty(name, ratios, beta)
    _check_beta(beta)
    if name == "soft":
        return quality * jnp.prod(ratios**-beta, axis=-1)
    if name == "hard":
        return quality * jnp.prod(jnp.maximum(ratios, 1) ** -beta, axis=-1)
    raise ValueError(f"Unknown reward {name!r}: expected one of {', '.join(REWARDS)}.")


def penalty(name: str, ratios: jax.Array, beta: float) -> jax.Array:
    """What an additive reward takes off for costs that are `ratios` [..., costs] of their targets.

    Raises:
      ValueError: a reward that has no such term, or beta below 0.
    """
    _check_beta(beta)
    if name == "absolute":
        return beta * jnp.sum(jnp.abs(ratios - 1), axis=-1)
    if name == "one_sided":
        return beta * jnp.sum(jnp.maximum(ratios - 1, 0), axis=-1)
    raise ValueError(f"Reward {name!r} has no penalty: {', '.join(ADDITIVE_REWARDS)} have one.")


def _check_beta(beta: float) -> None:
    if beta < 0:
        raise ValueError(f"beta, the weight of the costs, is {beta}; expected at least 0.")


def entropy_weight(
    name: str, step: jax.Array, *, start: int, total: int, end_weight: float
) -> jax.Array:
    """The weight of the entropy term at `step`; 0 before `start`.

    With s = (step - start) / (total - start):

        cosine     end_weight * (1 - cos(pi s)) / 2   (FLIQS)
        linear     end_weight * s
        constant   end_weight
        step       end_weight from s = 1/2 on, before that 0

    Raises:
      ValueError: unknown name, or no steps between start and total.
    """
    if not 0 <= start < total:
        raise ValueError(
            f"The policy starts to move at step {start} of {total}: it never would. Shorten the"
            " delay or train longer."
        )
    share = jnp.clip((step - start) / (total - start), 0.0, 1.0)
    if name == "cosine":
        weight = end_weight * (1 - jnp.cos(jnp.pi * share)) / 2
    elif name == "linear":
        weight = end_weight * share
    elif name == "constant":
        weight = jnp.full_like(share, end_weight)
    elif name == "step":
        weight = jnp.where(share >= 0.5, end_weight, 0.0)
    else:
        raise ValueError(
            f"Unknown entropy schedule {name!r}: expected one of {', '.join(ENTROPY_SCHEDULES)}."
        )
    return jnp.where(step < start, 0.0, weight)
