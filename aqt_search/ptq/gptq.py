"""GPTQ: weights rounded one after another, the rest making up for each error (arXiv 2210.17323).

rounded = gptq(apply, *calibrate(apply, assignment, variables, batches), variables, batches)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aqt_search.ptq.errors import PTQError
from aqt_search.ptq.reconstruction import Moments, StaticGrid, reconstruct
from aqt_search.tracing.transform import Assignment, CalibrationState


def gptq(
    apply: Callable,
    assignment: Assignment,
    state: CalibrationState,
    variables: Any,
    batches: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    damping: float = 0.01,
    by_energy: bool = True,
    asymmetric: bool = False,
) -> Any:
    """Variables whose weights are rounded so that each layer's outputs change least.

    With H = E[x x^T] + damping * mean(diag E[x x^T]) I and U the upper triangular matrix for which
    H^-1 = U^T U, for every element k of a patch, in order:

        q_k = round(w_k);  w_j <- w_j - (w_k - q_k) U_kj / U_kk  for j >= k

    (GPTQ: Frantar et al. 2022, algorithm 1, a column at a time). Elements that are zero in all data
    are rounded to nearest. U is computed in the weight's precision (at least float32), which
    damping keeps positive definite.

    Args:
      apply, assignment, state, variables, batches: as `calibrate` took and returned them.
      names: the sites to round, or layers of them (`kernel[3]`); None for all whose weight has a
        format.
      damping: share of the mean diagonal that is added to it; above 0.
      by_energy: round elements in order of falling E[x_k^2] ("act order" of the authors' code).
      asymmetric: whether the output to keep is that of the float model, so that a site makes up for
        errors of those before it; the paper's is W x. W is then first moved to where the damped
        least squares are.

    Returns:
      `variables` with the weights of these sites on the grid of their static bounds. No output
      channel has a larger error than under nearest rounding. Sites that cannot be served stay as
      they are, under the warning `SkippedSite`; see `adaround`.

    Raises:
      PTQError: no data, unknown names, a weight without static bounds, values that are not finite,
        or damping that is not above 0.
      SiteError: the assignment or the state is not of this function.
    """
    if not damping > 0:
        raise PTQError(f"Damping is above 0, so that H can be inverted; got {damping}.")

    def solve(weight: jax.Array, grid: StaticGrid, moments: Moments) -> jax.Array:
        return _solve(weight, grid, moments, damping, by_energy)

    return reconstruct(
        apply, assignment, state, variables, batches, solve, names=names, asymmetric=asymmetric
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="by_energy")
def _solve(
    weight: jax.Array, grid: StaticGrid, moments: Moments, damping: float, by_energy: bool
) -> jax.Array:
    """The weights [groups, outputs, patch] rounded, every group by itself."""

    def of_group(weight, scale, zero_point, second, slope):
        energy = jnp.diagonal(second)
        order = jnp.argsort(-energy) if by_energy else jnp.arange(energy.size)
        damped = _damped(second, damping)[order][:, order]
        factor = _inverse_factor(damped)
        # E[r x^T] H^-1 added to W brings its output as near to y as can be.
        nearer = functools.reduce(_precise_product, (slope[:, order], factor.T, factor))
        own = StaticGrid(grid.grid, scale[:, order], zero_point[:, order])
        rounded = _round_in_turn(weight[:, order] + nearer, own, factor)
        return jnp.zeros_like(rounded).at[:, order].set(rounded)

    return jax.vmap(of_group)(weight, grid.scale, grid.zero_point, moments.second, moments.slope)


_precise_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _damped(second: jax.Array, damping: float) -> jax.Array:
    """H; a unit diagonal where there was no input at all."""
    mean = jnp.mean(jnp.diagonal(second))
    added = jnp.where(mean > 0, damping * mean, 1)
    return second + added * jnp.eye(second.shape[0], dtype=second.dtype)


def _inverse_factor(damped: jax.Array) -> jax.Array:
    """U, upper triangular, with H^-1 = U^T U.

    H = R R^T with R upper triangular is Cholesky's factorization with both axes reversed; U is the
    inverse of R.
    """
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    identity = jnp.eye(damped.shape[0], dtype=damped.dtype)
    return jax.scipy.linalg.solve_triangular(upper, identity, lower=False)


def _round_in_turn(weight: jax.Array, grid: StaticGrid, factor: jax.Array) -> jax.Array:
    """Rounds column after column and spreads each error over the columns that follow."""

    def step(k, carry):
        weight, rounded = carry
        column = StaticGrid(grid.grid, grid.scale[:, k], grid.zero_point[:, k])
        found = column.nearest(weight[:, k])
        error = (weight[:, k] - found) / factor[k, k]
        # U is upper triangular: columns before k stay.
        weight = weight - error[:, None] * factor[k][None]
        return weight, rounded.at[:, k].set(found)

    return jax.lax.fori_loop(0, weight.shape[1], step, (weight, jnp.zeros_like(weight)))[1]
