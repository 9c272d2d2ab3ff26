"""k-means of weights: Lloyd's iterations, jitted, from scikit-learn's k-means++.

    minimise sum_i min_j ||w_i - c_j||^2 over the centroids c_j

(Lloyd 1982; k-means++: Arthur and Vassilvitskii 2007.) Memory is bounded: see `palette.chunks`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.palette.chunks import Part, over_parts, product, squared_distances
from aqt_search.palette.rules import PaletteError

_STARTING_VECTORS = 2**15  # as many distinct ones, at most, are what k-means++ chooses from


class Clusters(NamedTuple):
    """Vectors and the centroids that stand for them."""

    centroids: np.ndarray  # [k, d], float32, in lexicographic order
    indices: np.ndarray  # [n], uint8: of every vector its nearest centroid
    inertia: float  # sum of squared distances


@jax.jit
def nearest(vectors: jax.Array, centroids: jax.Array) -> jax.Array:
    """The index [n], uint8, of each vector's [n, d] nearest centroid [k, d], the lowest of equals.

    Both are divided by the largest centroid first, so that squares neither overflow nor vanish.
    """
    largest = jnp.max(jnp.abs(centroids))
    scale = jnp.where(largest > 0, largest, 1.0)
    vectors = vectors[None]

    def look(part: Part, indices):
        distances = squared_distances(part.take(vectors) / scale, centroids / scale)
        return part.put(indices, jnp.argmin(distances, -1)[:, None])

    indices = jnp.zeros((1, vectors.shape[1], 1), jnp.uint8)
    return over_parts(vectors.shape, len(centroids), look, indices).reshape(-1)


@functools.partial(jax.jit, static_argnames="iterations")
def _lloyd(vectors: jax.Array, start: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Centroids [k, d] and inertia after at most `iterations`, or when no centroid moves."""
    vectors = vectors[None]

    def sums_under(centroids):
        def add(part: Part, sums):
            rows = part.take(vectors)
            distances = squared_distances(rows, centroids)
            own = jax.nn.one_hot(jnp.argmin(distances, -1), len(centroids)) * part.fresh[:, None]
            inertia = jnp.sum(jnp.min(distances, -1) * part.fresh)
            return jax.tree.map(jnp.add, sums, (product(own.T, rows), jnp.sum(own, 0), inertia))

        zeros = jnp.zeros_like(centroids), jnp.zeros(len(centroids)), jnp.float32(0)
        return over_parts(vectors.shape, len(centroids), add, zeros)

    def step(carry):
        number, _, centroids = carry
        total, count, _ = sums_under(centroids)
        # An empty cluster keeps its centroid.
        new = jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1)[:, None], centroids)
        return number + 1, jnp.any(new != centroids), new

    carry = jax.lax.while_loop(lambda c: (c[0] < iterations) & c[1], step, (0, True, start))
    return carry[2], sums_under(carry[2])[2]


def _starts(vectors: np.ndarray, clusters: int, seed: int, restarts: int) -> list[np.ndarray]:
    """Centroids [k, d] by k-means++, whose choice goes by how often each distinct vector occurs."""
    from sklearn.cluster import kmeans_plusplus  # takes a second to import

    random = np.random.RandomState(seed)
    distinct, counts = np.unique(vectors, axis=0, return_counts=True)
    if len(distinct) > _STARTING_VECTORS:
        some = random.choice(len(distinct), _STARTING_VECTORS, replace=False)
        distinct, counts = distinct[some], counts[some]
    exact = distinct.astype(np.float64)
    return [
        # pyrefly: ignore[unexpected-keyword]  # seen through scikit-learn's decorator
        kmeans_plusplus(exact, clusters, sample_weight=counts, random_state=random)[0]
        for _ in range(restarts)
    ]


def check_finite(vectors: np.ndarray, name: str) -> None:
    """Raises PaletteError for a NaN or infinite weight."""
    if not np.isfinite(vectors).all():
        raise PaletteError(f"Site {name!r} has weights that are NaN or infinite; train it again.")


def _check_distinct(vectors: np.ndarray, clusters: int, name: str) -> None:
    distinct = len(np.unique(vectors, axis=0))
    if distinct < clusters:
        what = "weights" if vectors.shape[-1] == 1 else f"vectors of {vectors.shape[-1]} weights"
        raise PaletteError(
            f"Site {name!r} has only {distinct} distinct {what} for {clusters} clusters. Give it a"
            " rule of its own, with fewer bits or None."
        )


def kmeans(
    vectors: np.ndarray,
    clusters: int,
    *,
    seed: int = 0,
    restarts: int = 3,
    iterations: int = 100,
    name: str = "",
) -> Clusters:
    """Clusters vectors by Lloyd's iterations; the best of several starts by k-means++.

    Equal arguments give equal clusters. A cluster that loses all its vectors keeps its centroid.

    Args:
      vectors: [n, d], floating point, finite; not traced.
      clusters: k, at most 256 and at most as many as there are distinct vectors.
      seed: of the starts.
      restarts: starts, of which the one that ends in the smallest inertia is kept.
      iterations: at most as many for each start; fewer once no centroid moves.
      name: of the site, for errors.

    Raises:
      PaletteError: more clusters than distinct vectors, a NaN or infinite weight, or a number out
        of range.
    """
    if restarts < 1 or iterations < 1 or not 1 <= clusters <= 256:
        raise PaletteError(
            f"k-means takes 1 to 256 clusters, and restarts and iterations of at least 1; got"
            f" {clusters}, {restarts} and {iterations}."
        )
    vectors = np.asarray(vectors, np.float32)
    check_finite(vectors, name)
    _check_distinct(vectors, clusters, name)
    # So that squares neither overflow nor vanish; a power of two keeps distinct vectors distinct.
    scale = np.ldexp(np.float32(1), np.frexp(np.abs(vectors).max())[1] - 1)
    scaled = vectors / scale
    ends = [
        _lloyd(scaled, jnp.asarray(start, jnp.float32), iterations)
        for start in _starts(scaled, clusters, seed, restarts)
    ]
    best, inertia = min(ends, key=lambda end: float(end[1]))
    best = np.asarray(best)
    best = best[np.lexsort(best.T[::-1])]
    indices = np.asarray(nearest(scaled, best))
    return Clusters(best * scale, indices, float(inertia) * float(scale) ** 2)
