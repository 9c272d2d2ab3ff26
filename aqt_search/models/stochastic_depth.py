"""Stochastic depth: whole residual branches left out at random in training.

Source: Huang et al. 2016 (arXiv 1603.09382), drawn per example as EfficientNet and DeiT do.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError if a probability of leaving something out is not in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(
            f"{name} is {rate!r}; expected a probability of at least 0 and below 1, such as 0.1"
        )


class StochasticDepth(nn.Module):
    """The branch of each example, kept with probability 1 - rate and then enlarged.

        y[n] = keep[n] / (1 - rate) * branch[n],  keep[n] ~ Bernoulli(1 - rate)

    so that E[y] = branch. The identity at rate 0 and in evaluation. The random numbers are of the
    collection "dropout", which is asked for only if they are needed.

    Attributes:
        rate: probability of leaving out an example's branch, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, branch: jax.Array, train: bool = False) -> jax.Array:
        """Apply to a residual branch [batch, ...]; shape and dtype stay.

        Raises:
            ValueError: the rate is not in [0, 1).
        """
        check_rate("rate", self.rate)
        if not train or self.rate == 0:
            return branch
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(keep, branch / (1 - self.rate), jnp.zeros((), branch.dtype))
