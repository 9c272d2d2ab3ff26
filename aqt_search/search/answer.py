"""The point that a searched policy answers with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.search.cost_table import CostTable

# Costs are float32: a hair of slack keeps sums in another order from telling equal ones apart.
_SLACK = 1e-6


def most_probable(log_p: jax.Array) -> jax.Array:
    """The most probable option of every decision; int [decisions].

    Args:
      log_p: [decisions, max_options], -inf where there is no option.
    """
    return jnp.argmax(log_p, axis=-1)


def _ranks(decisions: int, options: int, most: int) -> np.ndarray:
    """[points, decisions], int: which of its options, best first, each decision takes."""
    found = []
    for count in (2, options):
        is_open = min(decisions, int(math.log(most, count) + 1e-9)) if count > 1 else 0
        ranks = np.zeros((count**is_open, decisions), int)
        ranks[:, :is_open] = list(itertools.product(range(count), repeat=is_open))
        found.append(ranks)
    return np.unique(np.concatenate(found), axis=0)


def most_probable_on_target(
    log_p: jax.Array,
    costs: Mapping[str, CostTable],
    targets: Mapping[str, jax.typing.ArrayLike],
    tolerance: float,
    *,
    one_sided: bool = False,
    points: int = 2**13,
    further: bool = True,
) -> jax.Array:
    """The most probable point whose costs are all within `tolerance` of their targets.

    A policy that ends decided may still end a few per cent off its target, where a decision that
    was nearly even fell to the other side. Looked at are the points in which the decisions that are
    least certain take one of their two best options (of 2^13 points, 13 decisions), or any of their
    options (8 decisions of 3), and all others their best. Where none of these is
    within the tolerance, the most probable of those that are nearest, by the largest |C / T - 1|,
    goes on towards the targets by one decision after another, each time by the change that gives up
    least log-probability for what it brings nearer, until no change does: so the answer of a policy
    that has decided little is near its targets, too.

    Args:
      log_p: [decisions, max_options], -inf where there is no option.
      costs: of the space's points, by name.
      targets: of each cost.
      tolerance: largest |C / T - 1|, at least 0; infinity gives the most probable point.
      one_sided: whether costs below their targets are as good as on them.
      points: looked at in each of the two ways.
      further: whether to go on from there decision by decision, which is a loop.

    Returns:
      int [decisions].
    """
    log_p = jnp.asarray(log_p)
    decisions, options = log_p.shape
    best, order = jax.lax.top_k(log_p, options)
    least_certain = jnp.argsort(best[:, 0] - best[:, 1])
    alternatives = _ranks(decisions, options, points)  # of the least certain first
    ranks = jnp.zeros(alternatives.shape, int).at[:, least_certain].set(alternatives)
    rows = np.arange(decisions)[None]
    looked_at = order[rows, ranks]
    lost = jnp.sum((best[:, :1] - best)[rows, ranks], axis=1)
    off = _off(looked_at, costs, targets, one_sided)
    off = jnp.where(jnp.isfinite(lost), off, jnp.inf)  # a second option that does not exist
    fits = off <= jnp.maximum(tolerance, off.min()) + _SLACK
    found = looked_at[jnp.argmin(jnp.where(fits, lost, jnp.inf))]
    return _nearer(found, log_p, costs, targets, tolerance, one_sided) if further else found


def _off(
    points: jax.Array,
    costs: Mapping[str, CostTable],
    targets: Mapping[str, jax.typing.ArrayLike],
    one_sided: bool,
) -> jax.Array:
    """The largest |C / T - 1| of `points` [n, decisions]: [n]."""
    ratios = [jax.vmap(table.of)(points) / targets[name] for name, table in costs.items()]
    excess = jnp.stack(ratios) - 1
    return jnp.max(jnp.maximum(excess, 0) if one_sided else jnp.abs(excess), axis=0)


def _nearer(
    point: jax.Array,
    log_p: jax.Array,
    costs: Mapping[str, CostTable],
    targets: Mapping[str, jax.typing.ArrayLike],
    tolerance: float,
    one_sided: bool,
) -> jax.Array:
    """`point` [decisions], changed decision by decision until it fits or no change brings more."""
    decisions, options = log_p.shape
    rows, columns = np.divmod(np.arange(decisions * options), options)

    def step(state):
        point, off, _ = state
        changed = jnp.tile(point, (len(rows), 1)).at[np.arange(len(rows)), rows].set(columns)
        gained = off - _off(changed, costs, targets, one_sided)
        lost = log_p[rows, point[rows]] - log_p[rows, columns]
        useful = (gained > _SLACK) & jnp.isfinite(lost)
        # Where nothing is given up, the change that brings most.
        price = jnp.where(useful, (jnp.maximum(lost, 0.0) + 1e-6) / gained, jnp.inf)
        best = jnp.argmin(price)
        moves = useful[best]
        return jnp.where(moves, changed[best], point), off - gained[best] * moves, moves

    def goes_on(state):
        _, off, moves = state
        return moves & (off > tolerance + _SLACK)

    off = _off(point[None], costs, targets, one_sided)[0]
    return jax.lax.while_loop(goes_on, step, (point, off, jnp.bool_(True)))[0]
