"""Products with stored weights in floating point: their values are computed tile by tile.

XLA:CPU writes down the values of all weights before it multiplies them: 64 MB of float32 for 16 MB
of int8, read again by the product. A tile of them stays in the cache: [1, 4096] x [4096, 4096] in
int8 takes 2.5 ms instead of 19, and the float product 4.3 (two cores, jax 0.12).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.qtensor import STORAGE_DTYPES, QTensor
from aqt_search.numerics.symbolic import certainly
from aqt_search.products.layout import Layout
from aqt_search.products.matrices import product_of_matrices
from aqt_search.products.operands import OperandValue

TILE = 2**20  # elements: 4 MB of float32; half and double take as long
_LEAST = 2 * TILE


def takes_tiles(layout: Layout, operands: tuple[OperandValue, OperandValue]) -> bool:
    """Whether the right operand is stored, [n, ..., k], and worth tiles along n, on CPU."""
    lhs, rhs = operands
    if jax.default_backend() != "cpu" or layout.kind != "dot_general" or layout.batch != ((), ()):
        return False
    if isinstance(lhs, QTensor) or not isinstance(rhs, QTensor) or rhs.order or rhs.ndim < 2:
        return False
    if 0 in layout.contracting[1] or rhs.granularity.block_axis == 0:
        return False
    n, row = rhs.shape[0], math.prod(rhs.shape[1:])
    if rhs.fmt not in STORAGE_DTYPES and row * int(rhs.fmt.bits) % 8:  # it ends within a byte
        return False
    return certainly(lambda: n * row >= _LEAST and row <= TILE)


def product_in_tiles(
    x: jax.Array, weights: QTensor, layout: Layout, dtype: np.dtype, accumulate: Any
) -> jax.Array:
    """x times the values in `dtype` of weights that `takes_tiles`."""
    n, place = weights.shape[0], layout.out_axes[1][0]
    assert place is not None  # nothing sums over the first axis
    rows = TILE // math.prod(weights.shape[1:])
    lying = weights
    if weights.fmt not in STORAGE_DTYPES:  # a row of bytes for each of the weights'
        lying = dataclasses.replace(weights, data=weights.data.reshape(n, -1), row_axes=1)

    def product(start: jax.typing.ArrayLike, size: int) -> jax.Array:
        tile = lying.of_rows(lambda part: jax.lax.dynamic_slice_in_dim(part, start, size), size)
        values = tile.dequantize(dtype)
        return product_of_matrices(x, values, layout, accumulate)

    tiles = jax.lax.map(lambda start: product(start, rows), rows * jnp.arange(n // rows))
    found = jnp.moveaxis(tiles, 0, place)
    shape = (*found.shape[:place], n - n % rows, *found.shape[place + 2 :])
    found = found.reshape(shape)
    if n % rows:
        found = jnp.concatenate([found, product(n - n % rows, n % rows)], place)
    return found
