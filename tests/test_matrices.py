"""Dots as products of matrices, and several left operands against one right operand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.products.layout import dot_layout, einsum_layout
from aqt_search.products.matrices import product_of_matrices, products_of_matrices

# Shapes of both operands, and dimension numbers of their dot.
DOTS = [
    ((5, 7), (7, 3), (((1,), (0,)), ((), ()))),
    ((5, 7), (3, 7), (((1,), (1,)), ((), ()))),
    ((7, 5), (3, 7), (((0,), (1,)), ((), ()))),
    ((2, 5, 7), (2, 7, 3), (((2,), (1,)), ((0,), (0,)))),
    ((2, 5, 7), (2, 3, 7), (((2,), (2,)), ((0,), (0,)))),
    ((5, 2, 7), (3, 7, 2), (((2,), (1,)), ((1,), (2,)))),
    ((4, 5, 7, 2), (7, 2, 3, 6), (((2, 3), (0, 1)), ((), ()))),
    ((4, 5, 7, 2), (3, 6, 7, 2), (((2, 3), (2, 3)), ((), ()))),
    ((7,), (7, 3), (((0,), (0,)), ((), ()))),
    ((5, 7), (7,), (((1,), (0,)), ((), ()))),
]


def integers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.int32)


@pytest.mark.parametrize("least_rows", [1, 8])
@pytest.mark.parametrize("lhs, rhs, numbers", DOTS)
def test_they_are_the_dots_of_lax(lhs, rhs, numbers, least_rows):
    """Also two at once, of different numbers of rows."""
    layout = dot_layout(len(lhs), len(rhs), numbers)
    free = [axis for axis in range(len(lhs)) if axis not in (*numbers[0][0], *numbers[1][0])]
    single = [1 if axis in free else n for axis, n in enumerate(lhs)]
    lefts = [integers(*lhs), integers(*single, seed=1), integers(*lhs, seed=2)]
    b = integers(*rhs, seed=3)
    found = products_of_matrices(
        list(map(jnp.asarray, lefts)), jnp.asarray(b), layout, None, least_rows=least_rows
    )
    for left, product in zip(lefts, found):
        np.testing.assert_array_equal(product, jax.lax.dot_general(left, b, numbers))


def test_an_einsum_with_its_result_in_another_order():
    a, b = integers(2, 5, 7), integers(7, 3, 2, seed=1)
    layout = einsum_layout("bik", "kjb", "jbi")
    found = product_of_matrices(jnp.asarray(a), jnp.asarray(b), layout, None)
    np.testing.assert_array_equal(found, np.einsum("bik,kjb->jbi", a, b))


@pytest.mark.parametrize("rows", [1, 3, 8, 63, 64, 70])
@pytest.mark.parametrize("formats", [("int8", "int8"), ("uint8", "int4"), ("int4", "uint8")])
def test_products_of_few_rows(rows, formats):
    """Codes of one, both or no side with a zero point: sums are exact, whatever is joined."""
    rng = np.random.default_rng(rows)
    x, w = rng.uniform(0, 1, (rows, 96)), rng.uniform(0, 1, (96, 80))
    x, w = x.astype(np.float32), w.astype(np.float32)
    numbers = (((1,), (0,)), ((), ()))
    lhs, rhs = (aqs.Quantizer(name, scale_format="e8m0") for name in formats)
    rhs = aqs.quantize_tensor(w, rhs, order=(1, 0))
    found = [
        aqs.dot_general(x, rhs, numbers, lhs_format=lhs, execution=execution)
        for execution in ("emulated", "int8")
    ]
    np.testing.assert_array_equal(*found)
