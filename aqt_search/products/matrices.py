"""Dots as products of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.symbolic import certainly
from aqt_search.products.layout import Layout


def product_of_matrices(
    a: jax.Array, b: jax.Array, layout: Layout, accumulate, bind: Callable | None = None
) -> jax.Array:
    """A dot as one of [*batch, rows, terms] and of [*batch, terms, columns].

    Or of [*batch, columns, terms], where b lies so, and is not transposed. XLA:CPU transposes
    operands that have several axes to sum over, or several that are kept, and jaxlib 0.10.2 has no
    bfloat16 product for some orders of axes there.

    Args:
      a, b: the operands.
      layout: of a dot or an einsum.
      accumulate: the dtype that is summed in; None for that of the operands.
      bind: the product in lax, `bind(a, b, accumulate, dimension_numbers)`.
    """
    (product,) = products_of_matrices([a], b, layout, accumulate, bind)
    return product


def products_of_matrices(
    lefts: Sequence[jax.Array],
    b: jax.Array,
    layout: Layout,
    accumulate,
    bind: Callable | None = None,
    least_rows: int = 1,
) -> list[jax.Array]:
    """The products of several left operands with b, which is read once: their rows are joined.

    Args:
      lefts: with as many rows as they like, and the axes of `layout`.
      b, layout, accumulate, bind: as in `product_of_matrices`.
      least_rows: of the joined matrix, which rows of zeros fill up.
    """
    free = _free_axes(layout, 1, b.ndim)
    batch, terms = list(layout.batch[1]), list(layout.contracting[1])
    lies_last = [*batch, *free, *terms] == list(range(b.ndim))  # where b's terms are
    rhs = _as_matrix(b, (batch, free, terms) if lies_last else (batch, terms, free))
    flat = [_as_matrix(a, _groups(layout, a.ndim)) for a in lefts]
    lhs = jnp.concatenate(flat, -2) if len(flat) > 1 else flat[0]
    missing = least_rows - lhs.shape[-2]
    if certainly(lambda: missing > 0):
        lhs = jnp.pad(lhs, [(0, 0)] * (lhs.ndim - 2) + [(0, missing), (0, 0)])
    ahead = lhs.ndim - 2
    batched = tuple(range(ahead))
    numbers = (((ahead + 1,), (ahead + lies_last,)), (batched, batched))
    if bind is None:
        product = jax.lax.dot_general(lhs, rhs, numbers, preferred_element_type=accumulate)
    else:
        product = bind(lhs, rhs, accumulate, numbers)
    found, start = [], 0
    for a, part in zip(lefts, flat):
        rows = part.shape[-2]
        own = product
        if not certainly(lambda own=own, rows=rows: own.shape[-2] == rows):
            own = jax.lax.slice_in_dim(product, start, start + rows, axis=ahead)
        found.append(_as_result(own, a, b, layout))
        start += rows
    return found


def _free_axes(layout: Layout, side: int, ndim: int) -> list[int]:
    taken = (*layout.contracting[side], *layout.batch[side])
    return [axis for axis in range(ndim) if axis not in taken]


def _groups(layout: Layout, ndim: int) -> tuple[list[int], ...]:
    return list(layout.batch[0]), _free_axes(layout, 0, ndim), list(layout.contracting[0])


def _as_matrix(x: jax.Array, groups: Sequence[Sequence[int]]) -> jax.Array:
    """[*batch, first, second]: one axis for each of three groups; none for a batch of no axes."""
    flat = x.transpose([axis for group in groups for axis in group])
    sizes = [math.prod(x.shape[axis] for axis in group) for group in groups]
    return flat.reshape(sizes if groups[0] else sizes[1:])


def _as_result(product: jax.Array, a: jax.Array, b: jax.Array, layout: Layout) -> jax.Array:
    """A product of matrices with the axes of the dot's result."""
    axes = [(a, 0, axis) for axis in (*layout.batch[0], *_free_axes(layout, 0, a.ndim))]
    axes += [(b, 1, axis) for axis in _free_axes(layout, 1, b.ndim)]
    product = product.reshape([x.shape[axis] for x, _, axis in axes])
    order = [layout.out_axes[side][axis] for _, side, axis in axes]
    return product.transpose(np.argsort(np.array(order)))
