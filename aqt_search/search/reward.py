"""Rewards of a sampled point, and schedules of the entropy weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

REWARDS = ("absolute", "one_sided", "soft", "hard")
ENTROPY_SCHEDULES = ("cosine", "linear", "constant", "step")


def reward(name: str, quality: jax.Array, cost: jax.Array, target: float, beta: float) -> jax.Array:
    """The reward of a point with quality Q and cost C against the cost target T.

        absolute   Q - beta * |C / T - 1|            (TuNAS, arXiv 2008.06120)
        one_sided  Q - beta * max(C / T - 1, 0)
        soft       Q * (C / T)^(-beta)               (MnasNet, arXiv 1807.11626)
        hard       Q * max(C / T, 1)^(-beta)

    Args:
      name: one of `REWARDS`.
      quality: non-negative (an accuracy) for "soft" and "hard", which scale it.
      cost: positive.
      target: positive, in the unit of the cost.
      beta: weight of the cost, at least 0.

    Raises:
      ValueError: unknown name, or a target or beta out of range.
    """
    if target <= 0 or beta < 0:
        raise ValueError(f"A reward needs target > 0 and beta >= 0; got {target} and {beta}.")
    ratio = cost / target
    if name == "absolute":
        return quality - beta * jnp.abs(ratio - 1)
    if name == "one_sided":
        return quality - beta * jnp.maximum(ratio - 1, 0)
    if name == "soft":
        return quality * ratio**-beta
    if name == "hard":
        return quality * jnp.maximum(ratio, 1) ** -beta
    raise ValueError(f"Unknown reward {name!r}: expected one of {', '.join(REWARDS)}.")


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
