"""A convolution over rows against lax's own, in integers: equal to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_search.products.row_convolution import applies, row_convolution

NHWC = ("NHWC", "HWIO", "NHWC")
# Shapes, dimension numbers, further arguments of lax.
CASES = {
    "plain": ((2, 8, 8, 3), (3, 3, 3, 5), NHWC, {}),
    "strided, same": ((2, 8, 9, 3), (3, 2, 3, 5), NHWC, {"window_strides": (2, 3)}),
    "explicit padding": ((2, 8, 8, 3), (3, 3, 3, 5), NHWC, {"padding": [(0, 2), (3, 1)]}),
    "valid": ((2, 8, 8, 3), (5, 1, 3, 5), NHWC, {"padding": "VALID"}),
    "one tap": ((2, 8, 8, 3), (1, 1, 3, 5), NHWC, {"window_strides": (2, 2)}),
    "dilated kernel": ((2, 9, 9, 3), (3, 3, 3, 5), NHWC, {"rhs_dilation": (2, 3)}),
    "transposed": (
        (2, 5, 5, 3), (3, 3, 3, 5), NHWC, {"lhs_dilation": (2, 3), "padding": [(1, 2), (0, 1)]},
    ),
    "one dimension": ((2, 12, 3), (4, 3, 5), ("NWC", "WIO", "NWC"), {}),
    "three dimensions": ((1, 4, 5, 6, 2), (2, 3, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), {}),
    "kernel output first": ((2, 8, 8, 3), (5, 3, 3, 2), ("NHWC", "OIHW", "NHWC"), {}),
    "no images": ((0, 8, 8, 3), (3, 3, 3, 5), NHWC, {}),
}  # fmt: skip
NOT = {
    "channels first": ((2, 3, 8, 8), (5, 3, 3, 3), ("NCHW", "OIHW", "NCHW"), {}),
    "groups": ((2, 8, 8, 6), (3, 3, 2, 9), NHWC, {"feature_group_count": 3}),
    "batch groups": ((4, 8, 8, 3), (3, 3, 3, 6), NHWC, {"batch_group_count": 2}),
    "many taps": ((2, 8, 8, 3), (7, 8, 3, 5), NHWC, {}),
    "smaller than the kernel": (
        (1, 2, 2, 1),
        (3, 3, 1, 1),
        NHWC,
        {"padding": "VALID", "window_strides": (2, 2)},
    ),
    "cut off": ((2, 8, 8, 3), (3, 3, 3, 5), NHWC, {"padding": [(-1, 2), (1, 1)]}),
}


def integers(shape, seed):
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


def traced(case):
    lhs_shape, rhs_shape, numbers, further = case
    arguments = {
        "window_strides": (1,) * (len(lhs_shape) - 2), "padding": "SAME",
        "dimension_numbers": numbers, "preferred_element_type": np.int32, **further,
    }  # fmt: skip
    lhs, rhs = integers(lhs_shape, 0), integers(rhs_shape, 1)

    def convolve(a, b):
        return jax.lax.conv_general_dilated(a, b, **arguments)

    return lhs, rhs, convolve, jax.make_jaxpr(convolve)(lhs, rhs).eqns[0].params


@pytest.mark.parametrize("case", CASES)
def test_equals_that_of_lax(case):
    lhs, rhs, convolve, params = traced(CASES[case])
    assert applies(params, lhs.shape, rhs.shape)
    actual = row_convolution(jnp.asarray(lhs), jnp.asarray(rhs), params, np.int32)
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, convolve(lhs, rhs))


@pytest.mark.parametrize("case", NOT)
def test_leaves_the_others_to_lax(case):
    lhs, rhs, _, params = traced(NOT[case])
    assert not applies(params, lhs.shape, rhs.shape)
