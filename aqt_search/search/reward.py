"""Rewards of a sampled point, and schedules of the entropy weight: a row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Reward(NamedTuple):
    """The reward of points with quality Q whose costs are ratios r of their targets.

        Q - beta * sum excess(r)           or, where it multiplies,
        Q * product excess(r)^(-beta)

    Sums and products are over the costs.
    """

    excess: Callable[[jax.Array], jax.Array]  # of ratios, elementwise
    one_sided: bool = False  # whether costs below their targets are as good as on them
    multiplies: bool = False  # then the quality is to be non-negative: an accuracy

    def of(self, quality: jax.Array, ratios: jax.Array, beta: float) -> jax.Array:
        """The rewards [...] of `quality` [...] and `ratios` [..., costs], which are positive.

        Raises:
          ValueError: beta, the weight of the costs, is below 0.
        """
        check_beta(beta)
        if self.multiplies:
            return quality * jnp.prod(self.excess(ratios) ** -beta, axis=-1)
        return quality - self.penalty(ratios, beta)

    def penalty(self, ratios: jax.Array, beta: float) -> jax.Array:
        """What an additive reward takes off for `ratios` [..., costs]: [...].

        Raises:
          ValueError: a reward that multiplies has no such term; beta is below 0.
        """
        check_beta(beta)
        if self.multiplies:
            raise ValueError("A reward that multiplies quality and costs has no penalty.")
        return beta * jnp.sum(self.excess(ratios), axis=-1)


REWARDS: Mapping[str, Reward] = {
    "absolute": Reward(lambda r: jnp.abs(r - 1)),  # TuNAS, arXiv 2008.06120
    "one_sided": Reward(lambda r: jnp.maximum(r - 1, 0), one_sided=True),
    "soft": Reward(lambda r: r, multiplies=True),  # MnasNet, arXiv 1807.11626
    "hard": Reward(lambda r: jnp.maximum(r, 1), one_sided=True, multiplies=True),
}

# The share of the final weight at share s (0 to 1) of the steps in which the policy moves.
ENTROPY_SCHEDULES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda s: (1 - jnp.cos(jnp.pi * s)) / 2,  # FLIQS
    "linear": lambda s: s,
    "constant": jnp.ones_like,
    "step": lambda s: jnp.where(s >= 0.5, 1.0, 0.0),
}


def _known(name: str, table: Mapping[str, Any], what: str) -> Any:
    if name not in table:
        raise ValueError(f"Unknown {what} {name!r}: expected one of {', '.join(table)}.")
    return table[name]


def named_reward(reward: str | Reward) -> Reward:
    """The row of `REWARDS` called so; a reward itself as it is.

    Raises:
      ValueError: unknown name.
    """
    return reward if isinstance(reward, Reward) else _known(reward, REWARDS, "reward")


def check_beta(beta: float) -> None:
    """Raises ValueError for a weight of the costs that is below 0 or not finite."""
    check_number("beta, the weight of the costs,", beta)


def check_number(name: str, value: float) -> None:
    """Raises ValueError for a rate or weight that is below 0 or not finite."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}; expected a finite number, at least 0.")


def entropy_weight_at(
    schedule: str, end_weight: float
) -> Callable[[jax.Array | int, tuple[int, int]], jax.Array]:
    """The weight of the entropy term, as a function of the step and of (start, total) steps.

    It is 0 before `start`; with s = (step - start) / (total - start), cut to 0 .. 1,

        cosine     end_weight * (1 - cos(pi s)) / 2   (FLIQS)
        linear     end_weight * s
        constant   end_weight
        step       end_weight from s = 1/2 on, before that 0

    Raises:
      ValueError: unknown name; a weight that is below 0 or not finite.
    """
    check_number("entropy_weight", end_weight)
    share_of_weight = _known(schedule, ENTROPY_SCHEDULES, "entropy schedule")

    def weight(step: jax.Array | int, period: tuple[int, int]) -> jax.Array:
        start, total = period
        share = jnp.clip((step - start) / (total - start), 0.0, 1.0)
        return jnp.where(step < start, 0.0, end_weight * share_of_weight(share))

    return weight
