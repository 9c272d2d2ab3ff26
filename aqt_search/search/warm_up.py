"""Warm-up of architectures: at first the whole model trains, then more and more of its subnets."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.architecture.decisions import KINDS
from aqt_search.search.one_shot import Search, SearchState
from aqt_search.search.space import Space


def warmed_up(search: Search, space: Space, steps: int, kinds: Collection[str] = KINDS) -> Search:
    """`search`, whose samples are the largest network with a probability that falls from 1 to 0.

    Subnets share their weights with the largest, whose own would start late: narrow subnets train
    the first channels in every step, and a network of random depth learns to do without its later
    blocks. Of widths and expansions alone it is the filter warm-up of TuNAS (Bender et al. 2020,
    arXiv 2008.06120, section 4); of all kinds, what progressive shrinking is in Once-for-all.

    Args:
      search: over `space`.
      space: with an elastic network.
      steps: after which samples are the search's own.
      kinds: of the decisions that are warmed up; the others are the search's from the first step.

    Raises:
      ValueError: the space has no elastic network, or there is no such kind.
    """
    if space.net is None:
        raise ValueError("the space has no architecture that could be warmed up")
    if not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds to warm up are {tuple(kinds)}; expected some of {KINDS}")
    net, count = space.net, len(space.decisions)
    is_warmed, largest = np.zeros(count, bool), np.zeros(count, int)
    is_warmed[: len(net.decisions)] = [d.kind in kinds for d in net.decisions]
    largest[: len(net.decisions)] = net.largest

    def sample(state: SearchState, key: jax.Array) -> jax.Array:
        own, whole = jax.random.split(key)
        choices = search.sample(state, own)
        probability = jnp.clip(1 - state.step / max(steps, 1), 0.0, 1.0)
        warms = jax.random.uniform(whole, (len(choices), 1)) < probability
        return jnp.where(warms & is_warmed[None], largest[None], choices)

    return search._replace(sample=sample)
