"""AdaRound: whether each weight is rounded up or down is learned (arXiv 2004.10568).

rounded = adaround(apply, *calibrate(apply, assignment, variables, batches), variables, batches)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aqt_search.ptq.errors import PTQError
from aqt_search.ptq.reconstruction import Moments, StaticGrid, reconstruct
from aqt_search.tracing.transform import Assignment, CalibrationState

_ZETA, _GAMMA = 1.1, -0.1  # how far the sigmoid is stretched beyond 0 and 1
_WARM_START = 0.2  # share of the steps without the regularizer
_SHARPNESS = 20.0, 2.0  # beta, from its first to its last value
_GAIN = 1e-5  # of the mean cost of a step: the least that turning an element over has to gain


def adaround(
    apply: Callable,
    assignment: Assignment,
    state: CalibrationState,
    variables: Any,
    batches: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    steps: int = 1000,
    learning_rate: float = 0.01,
    regularizer: float = 0.5,
    asymmetric: bool = True,
) -> Any:
    """Variables whose weights are rounded up or down so that each layer's outputs change least.

    With w between the neighbouring grid values low and high, of any format,

        W~ = low + (high - low) h(V),  h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
        minimise E |y - W~ x|^2 + regularizer * sum_k c_k (1 - |2 h(V_k) - 1|^beta)
        c_k = (high_k - low_k)^2 E[x_k^2]

    over V by Adam, from W~ = W, site by site (AdaRound: Nagel et al. 2020, equations 21 to 25); at
    the end h is rounded. beta falls linearly from 20 to 2 after a first fifth without regularizer.

    Three things are not as in the paper. E is the mean over all data, exactly
    (`aqt_search.ptq.reconstruction`), so 1000 steps of 0.01 stand for its 10000 of 0.001 on random
    batches. And c_k, the error of one whole step of the element alone, is 1 there: with it, the
    balance of the two terms depends neither on the units of weights and activations nor on the
    steps of a float format, which differ. And at the very end single elements are turned over, the
    one that lowers an output's error most first, until none does.

    Args:
      apply, assignment, state, variables, batches: as `calibrate` took and returned them.
      names: the sites to round, or layers of them (`kernel[3]`); None for all whose weight has a
        format.
      steps: of Adam at each site.
      learning_rate: of Adam.
      regularizer: its weight; 0.2 to 1 serve equally well.
      asymmetric: whether y is the output of the float model, so that a site makes up for errors of
        those before it; else y = W x.

    Returns:
      `variables` with the weights of these sites on the grid of their static bounds, at most a step
      from where they were. Values on the grid stay. No output channel has a larger error than under
      nearest rounding. Sites that cannot be served stay as they are, under the warning
      `SkippedSite`: lookups, loops (but not the layers of a scan, which are sites of their own),
      weights that no leaf holds alone, all-zero weights.

    Raises:
      PTQError: no data, unknown names, a weight without static bounds, values that are not finite,
        or fewer than one step.
      SiteError: the assignment or the state is not of this function.
    """
    if steps < 1:
        raise PTQError(f"AdaRound takes at least one step; got {steps}.")

    def solve(weight: jax.Array, grid: StaticGrid, moments: Moments) -> jax.Array:
        return _solve(weight, grid, moments, learning_rate, regularizer, steps)

    return reconstruct(
        apply, assignment, state, variables, batches, solve, names=names, asymmetric=asymmetric
    )  # fmt: skip


def _share_up(logits: jax.Array) -> jax.Array:
    """h(V), the rectified sigmoid (equation 23)."""
    return jnp.clip((_ZETA - _GAMMA) * jax.nn.sigmoid(logits) + _GAMMA, 0, 1)


def _logits_of(share: jax.Array) -> jax.Array:
    """V for which h(V) is a share in [0, 1]."""
    inside = (share - _GAMMA) / (_ZETA - _GAMMA)
    return jnp.log(inside) - jnp.log1p(-inside)


def _indecision(share: jax.Array, costs: jax.Array, beta: jax.Array) -> jax.Array:
    """The regularizer (equation 24): 0 where every h is 0 or 1."""
    return jnp.sum(costs * (1 - jnp.abs(2 * share - 1) ** beta))


@functools.partial(jax.jit, static_argnames="steps")
def _solve(
    weight: jax.Array,
    grid: StaticGrid,
    moments: Moments,
    learning_rate: float,
    regularizer: float,
    steps: int,
) -> jax.Array:
    low, high = grid.neighbours(weight)
    gap = high - low
    share = jnp.where(gap > 0, (weight - low) / jnp.where(gap > 0, gap, 1), 0)
    costs = jnp.square(gap) * jnp.diagonal(moments.second, axis1=-2, axis2=-1)[:, None]
    unit = jnp.mean(costs)
    unit = jnp.where(unit > 0, unit, 1)  # brings gradients to where Adam's epsilon is small
    adam = optax.adam(learning_rate)
    warm = int(_WARM_START * steps)

    def step(number, carry):
        logits, memory = carry
        share, pull = jax.vjp(_share_up, logits)
        slope = -gap * moments.slope_of_error(weight - low - gap * share)
        progress = jnp.maximum(number - warm, 0) / (steps - warm)
        beta = _SHARPNESS[0] + (_SHARPNESS[1] - _SHARPNESS[0]) * progress
        decide = jnp.where(number < warm, 0, regularizer) * jax.grad(_indecision)(
            share, costs, beta
        )
        (gradient,) = pull((slope + decide) / unit)
        updates, memory = adam.update(gradient, memory)
        return optax.apply_updates(logits, updates), memory

    logits = _logits_of(jnp.clip(share, 0, 1))
    logits, _ = jax.lax.fori_loop(0, steps, step, (logits, adam.init(logits)))
    up = _share_up(logits) >= 0.5
    slope = moments.slope_of_error(weight - jnp.where(up, high, low))
    return jnp.where(_turned_over(up, slope, gap, costs, moments.second), high, low)


def _turned_over(
    up: jax.Array, slope: jax.Array, gap: jax.Array, costs: jax.Array, second: jax.Array
) -> jax.Array:
    """Which elements are rounded up once no other choice of a single one lowers the error.

    In every round each output turns one element over; there are at most as many rounds as elements.
    """
    enough = _GAIN * jnp.mean(costs)  # so that rounding errors do not turn anything over and back
    groups, elements = jnp.arange(second.shape[0]), jnp.arange(second.shape[-1])

    def search(carry):
        number, up, slope, _ = carry
        move = jnp.where(up, gap, -gap)  # of the change W - W~, were the element turned over
        added = move * slope + costs
        best = jnp.argmin(added, axis=-1)
        turned = (elements[None, None] == best[..., None]) & (added < -enough)
        moved = jnp.sum(jnp.where(turned, move, 0), axis=-1, keepdims=True)
        slope = slope + 2 * moved * second[groups[:, None], best]
        return number + 1, up ^ turned, slope, jnp.any(turned)

    start = (0, up, slope, jnp.array(True))
    return jax.lax.while_loop(lambda c: c[3] & (c[0] < elements.size), search, start)[1]
