"""Passes over the vectors of weights that hold the distances of a part of them at a time.

Vectors are [copies, n, d], each copy with k centroids [k, d] of its own. What a pass writes, it
writes in place of what it has read, so that no second array of the weights' size is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ELEMENTS = 2**18  # of the distances [rows, k] that are in memory at once


class Part(NamedTuple):
    """Rows of one copy that a pass is at."""

    copy: jax.Array  # [], int32
    start: jax.Array  # [], int32: the first row
    fresh: jax.Array  # [rows], bool: False for rows that an earlier part has had

    def take(self, array: jax.Array) -> jax.Array:
        """The part's rows [rows, d] of an array [copies, n, d]."""
        sizes = (1, len(self.fresh), array.shape[-1])
        return jax.lax.dynamic_slice(array, (self.copy, self.start, 0), sizes)[0]

    def put(self, array: jax.Array, rows: jax.Array) -> jax.Array:
        """The array [copies, n, d] with these rows in it, where they are fresh."""
        rows = jnp.where(self.fresh[:, None], rows.astype(array.dtype), self.take(array))
        return jax.lax.dynamic_update_slice(array, rows[None], (self.copy, self.start, 0))

    def add(self, sums: jax.Array, terms: jax.Array) -> jax.Array:
        """The sums [copies, ...] with the terms [...] added to those of the part's copy."""
        return sums.at[self.copy].add(terms)


def over_parts(
    shape: tuple[int, ...], clusters: int, body: Callable[[Part, Any], Any], carry: Any
) -> Any:
    """Runs `carry = body(part, carry)` over vectors of shape [copies, n, d].

    All parts have the same number of rows; the last one of a copy starts early where they do not
    divide n, and its rows that are not fresh have to be left out.
    """
    copies, n, _ = shape
    count = math.ceil(n * clusters / ELEMENTS)
    rows = math.ceil(n / count)

    def step(index, carry):
        copy, begin = index // count, index % count * rows
        start = jnp.minimum(begin, n - rows)
        return body(Part(copy, start, start + jnp.arange(rows) >= begin), carry)

    return jax.lax.fori_loop(0, copies * count, step, carry)


def squared_distances(vectors: jax.Array, centroids: jax.Array) -> jax.Array:
    """||v_i - c_j||^2 [rows, k] of vectors [rows, d] and centroids [k, d].

    From the differences, not as v^2 - 2 v c + c^2, which cancels for vectors near a centroid.
    """
    return jnp.sum(jnp.square(vectors[:, None, :] - centroids[None, :, :]), -1)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in full precision on every chip."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
