"""Dots as products of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np

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
    free = [
        [axis for axis in range(x.ndim) if axis not in (*contracting, *batch)]
        for x, contracting, batch in zip((a, b), layout.contracting, layout.batch)
    ]
    groups = [
        [list(layout.batch[side]), free[side], list(layout.contracting[side])] for side in (0, 1)
    ]
    if [axis for part in groups[1] for axis in part] != list(range(b.ndim)):
        groups[1] = [groups[1][0], groups[1][2], groups[1][1]]
    last = 1 if groups[1][2] == free[1] else 2  # where b's terms are
    sides = []
    for x, parts in zip((a, b), groups):
        flat = x.transpose([axis for part in parts for axis in part])
        sides.append(flat.reshape([math.prod(x.shape[axis] for axis in part) for part in parts]))
    lhs, rhs = sides if layout.batch[0] else [x[0] for x in sides]
    ahead = lhs.ndim - 2
    batched = tuple(range(ahead))
    numbers = (((ahead + 1,), (ahead - 1 + last,)), (batched, batched))
    if bind is None:
        product = jax.lax.dot_general(lhs, rhs, numbers, preferred_element_type=accumulate)
    else:
        product = bind(lhs, rhs, accumulate, numbers)
    axes = [(a, 0, axis) for axis in (*layout.batch[0], *free[0])]
    axes += [(b, 1, axis) for axis in free[1]]
    product = product.reshape([x.shape[axis] for x, _, axis in axes])
    order = [layout.out_axes[side][axis] for _, side, axis in axes]
    return product.transpose(np.argsort(np.array(order)))
