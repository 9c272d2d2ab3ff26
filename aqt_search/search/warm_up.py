"""Warm-up of widths: at first the whole model trains, then more and more of its subnets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.search.one_shot import Search, SearchState
from aqt_search.search.space import Space


def widths_warmed_up(search: Search, space: Space, steps: int) -> Search:
    """`search`, whose samples have the largest widths with a probability that falls from 1 to 0.

    Narrow subnets share the first channels, which are trained in every step; the last ones would
    start late (filter warm-up of TuNAS: Bender et al. 2020, arXiv 2008.06120, section 4).

    Args:
      search: over `space`.
      space: with an elastic network.
      steps: after which samples are the search's own.
    """
    if space.net is None:
        raise ValueError("the space has no architecture whose widths could be warmed up")
    net, count = space.net, len(space.decisions)
    is_width, largest = np.zeros(count, bool), np.zeros(count, int)
    is_width[: len(net.decisions)] = [d.kind in ("width", "expansion") for d in net.decisions]
    largest[: len(net.decisions)] = net.largest

    def sample(state: SearchState, key: jax.Array) -> jax.Array:
        own, whole = jax.random.split(key)
        choices = search.sample(state, own)
        probability = jnp.clip(1 - state.step / max(steps, 1), 0.0, 1.0)
        warms = jax.random.uniform(whole, (len(choices), 1)) < probability
        return jnp.where(warms & is_width[None], largest[None], choices)

    return search._replace(sample=sample)
