"""Soft k-means: vectors as mixtures of centroids, with a gradient that takes little memory.

    a_ij = softmax_j(-||v_i - c_j||^2 / temperature);  c_j = sum_i a_ij v_i / sum_i a_ij

The shares a [n, k] are never held: they are worked out part by part (`palette.chunks`), and again
for the gradient, which is written out (reverse mode only) and needs one array of the vectors' size
beside its result at most.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from aqt_search.palette.chunks import Part, over_parts, product, squared_distances

# A centroid whose shares add up to less keeps its place; to divide by them could overflow.
_LEAST_MASS = 1e-6


def _shares(rows: jax.Array, centroids: jax.Array, sharpness: jax.Array) -> jax.Array:
    """a_ij [rows, k] of rows and centroids in units of the layer; sharpness is 1 / temperature."""
    return jax.nn.softmax(-sharpness * squared_distances(rows, centroids), axis=-1)


def _from_shares(
    rows: jax.Array, centroids: jax.Array, sharpness: jax.Array, shares: jax.Array, d_shares
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of `_shares`' arguments, given those of its result.

    With z_ij = -s ||v_i - c_j||^2 and dz_ij = a_ij (da_ij - sum_l a_il da_il), of sum 0 over j,

        dv_i = 2 s sum_j dz_ij c_j;  dc_j = 2 s sum_i dz_ij (v_i - c_j);  ds = sum_ij dz_ij z_ij / s
    """
    d_z = shares * (d_shares - jnp.sum(shares * d_shares, -1, keepdims=True))
    d_rows = 2 * sharpness * product(d_z, centroids)
    from_rows = product(d_z.T, rows) - jnp.sum(d_z, 0)[:, None] * centroids
    d_sharpness = -jnp.sum(d_z * squared_distances(rows, centroids))
    return d_rows, 2 * sharpness * from_rows, d_sharpness


def _sums(vectors, scale, centroids, sharpness):
    """sum_i a_ij v_i [copies, k, d] and sum_i a_ij [copies, k]."""

    def add(part: Part, sums):
        rows = part.take(vectors).astype(centroids.dtype) / scale[part.copy]
        a = _shares(rows, centroids[part.copy], sharpness) * part.fresh[:, None]
        return part.add(sums[0], product(a.T, rows)), part.add(sums[1], jnp.sum(a, 0))

    zeros = jnp.zeros_like(centroids), jnp.zeros_like(centroids[..., 0])
    return over_parts(vectors.shape, centroids.shape[1], add, zeros)


def _moved(vectors, scale, centroids, sharpness):
    """The centroids moved to the vectors; one that nothing is near keeps its place."""
    total, mass = _sums(vectors, scale, centroids, sharpness)
    near = mass[..., None] > _LEAST_MASS
    return jnp.where(near, total / jnp.where(near, mass[..., None], 1), centroids), mass


def _mixed(vectors, scale, centroids, sharpness):
    """sum_j a_ij c_j, in the vectors' units and dtype."""

    def write(part: Part, soft):
        rows = part.take(vectors).astype(centroids.dtype) / scale[part.copy]
        a = _shares(rows, centroids[part.copy], sharpness)
        return part.put(soft, product(a, centroids[part.copy]) * scale[part.copy])

    return over_parts(vectors.shape, centroids.shape[1], write, jnp.zeros_like(vectors))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def soft_copies(vectors, scale, centroids, sharpness, iterations):
    """Vectors [copies, n, d] as mixtures, and the centroids [copies, k, d] moved to them.

    Centroids are in units of scale [copies], which is taken as a constant. The derivative is
    written out: what it adds up it writes over the cotangent that it has read.
    """
    return _soft_forward(vectors, scale, centroids, sharpness, iterations)[0]


def _soft_forward(vectors, scale, centroids, sharpness, iterations):
    def move(before, _):
        after, mass = _moved(vectors, scale, before, sharpness)
        return after, (before, after, mass)

    centroids, path = jax.lax.scan(move, centroids, length=iterations)
    soft = _mixed(vectors, scale, centroids, sharpness)
    return (soft, centroids), (vectors, scale, centroids, sharpness, path)


def _soft_backward(iterations, saved, cotangents):
    vectors, scale, centroids, sharpness, path = saved
    d_soft, d_centroids = cotangents
    through = functools.partial(_through_shares, vectors, scale, sharpness)

    def back(carry, moves):
        before, after, mass = moves
        d_vectors, d_after, d_sharpness = carry
        near = mass[..., None] > _LEAST_MASS
        d_total = jnp.where(near, d_after / jnp.where(near, mass[..., None], 1), 0)
        d_mass = -jnp.sum(d_total * after, -1)

        def of_moving(part, rows, a, d_rows):
            total, mass = d_total[part.copy], d_mass[part.copy]
            d_rows += product(a, total) / scale[part.copy]
            return d_rows, product(rows, total.T) + mass[None, :], 0.0

        carry = d_vectors, jnp.where(near, 0, d_after), d_sharpness
        return through(before, of_moving, carry), None

    def of_mixing(part, rows, a, d_soft):
        d_soft = d_soft * scale[part.copy] * part.fresh[:, None]
        return jnp.zeros_like(rows), product(d_soft, centroids[part.copy].T), product(a.T, d_soft)

    carry = d_soft.astype(centroids.dtype), d_centroids, jnp.zeros_like(sharpness)
    carry = through(centroids, of_mixing, carry)
    (d_vectors, d_centroids, d_sharpness), _ = jax.lax.scan(back, carry, path, reverse=True)
    return d_vectors.astype(vectors.dtype), jnp.zeros_like(scale), d_centroids, d_sharpness


def _through_shares(vectors, scale, sharpness, centroids, cotangents_of, carry):
    """Goes back through the shares under `centroids`, and adds to (d vectors, d c, d sharpness).

    `cotangents_of(part, rows, a, d_rows)` gives what d_rows becomes, d a, and what d c gains.
    """

    def step(part: Part, carry):
        d_vectors, d_centroids, d_sharpness = carry
        c = centroids[part.copy]
        rows = part.take(vectors).astype(c.dtype) / scale[part.copy]
        a = _shares(rows, c, sharpness)
        d_rows, d_a, own = cotangents_of(part, rows, a, part.take(d_vectors))
        found = _from_shares(rows, c, sharpness, a, d_a * part.fresh[:, None])
        return (
            part.put(d_vectors, d_rows + found[0] / scale[part.copy]),
            part.add(d_centroids, found[1] + own),
            d_sharpness + found[2],
        )

    return over_parts(vectors.shape, centroids.shape[1], step, carry)


soft_copies.defvjp(_soft_forward, _soft_backward)


def soft_clusters(
    vectors: jax.Array,
    centroids: jax.Array,
    temperature: jax.typing.ArrayLike,
    *,
    iterations: int = 3,
) -> tuple[jax.Array, jax.Array]:
    """Vectors [n, d] as mixtures of centroids [k, d], and the centroids moved to them.

        a_ij = softmax_j(-||v_i - c_j||^2 / temperature);  c_j = sum_i a_ij v_i / sum_i a_ij

    `iterations` times, then soft_i = sum_j a_ij c_j. The gradient (in reverse mode) goes through
    all of it. As temperature -> 0 this is Lloyd's algorithm; a centroid that nothing is near keeps
    its place.

    Args:
      vectors: floating point.
      centroids: float32, or float64 for vectors of it.
      temperature: above 0, in squared units of the vectors; may be traced.
      iterations: of the centroids, at least 0.
    """
    sharpness = 1 / jnp.asarray(temperature, centroids.dtype)
    ones = jnp.ones(1, centroids.dtype)
    soft, moved = soft_copies(vectors[None], ones, centroids[None], sharpness, iterations)
    return soft[0], moved[0]
