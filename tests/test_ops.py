"""The quantized products against lax and numpy on operands that are fake-quantized by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs

FORMATS = [("int8", "int4"), ("e4m3", "e2m1"), (None, "int3"), ("uint8", None), ("bf16", "fp16")]


def sample(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized(x, name, channel_axes=()):
    return x if name is None else np.asarray(aqs.fake_quant(x, name, channel_axes))


def quantizer(name, per_channel):
    granularity = aqs.PER_CHANNEL if per_channel else aqs.PER_TENSOR
    return None if name is None else aqs.Quantizer(name, granularity)


def assert_close_to_float64(actual, expected):
    """Sums of at most a few hundred float32 terms of order one: 1e-5 is many times their error."""
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# --- dot_general ----------------------------------------------------------------------------------

# Shapes, dimension numbers, the same product in numpy, channel axes of lhs and rhs.
DOTS = {
    "matmul": ((4, 7), (7, 5), (((1,), (0,)), ((), ())), "ab,bc->ac", (0,), (1,)),
    "transposed weight": ((4, 7), (5, 7), (((1,), (1,)), ((), ())), "ab,cb->ac", (0,), (0,)),
    "weight first": ((5, 7), (7, 4), (((1,), (0,)), ((), ())), "ab,bc->ac", (0,), (1,)),
    "batched": ((3, 4, 7), (3, 7, 5), (((2,), (1,)), ((0,), (0,))), "gab,gbc->gac", (0, 1), (0, 2)),
    "two contracted": (
        (4, 2, 7), (2, 7, 5, 3), (((1, 2), (0, 1)), ((), ())), "aij,ijbc->abc", (0,), (2, 3),
    ),
    "outer": ((4,), (5,), (((), ()), ((), ())), "a,b->ab", (0,), (0,)),
    "inner": ((7,), (7,), (((0,), (0,)), ((), ())), "a,a->", (), ()),
}  # fmt: skip


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("per_channel", [(False, True), (True, False)])
@pytest.mark.parametrize("case", DOTS)
def test_dot_general(case, per_channel, formats):
    lhs_shape, rhs_shape, dimensions, subscripts, lhs_axes, rhs_axes = DOTS[case]
    lhs, rhs = sample(*lhs_shape), sample(*rhs_shape, seed=1)
    actual = aqs.dot_general(
        lhs, rhs, dimensions,
        lhs_format=quantizer(formats[0], per_channel[0]),
        rhs_format=quantizer(formats[1], per_channel[1]),
    )  # fmt: skip
    lhs = quantized(lhs, formats[0], lhs_axes if per_channel[0] else ())
    rhs = quantized(rhs, formats[1], rhs_axes if per_channel[1] else ())
    np.testing.assert_array_equal(actual, jax.lax.dot_general(lhs, rhs, dimensions))
    expected = np.einsum(subscripts, lhs.astype(np.float64), rhs.astype(np.float64))
    assert_close_to_float64(actual, expected)


def test_dot_general_without_formats_is_that_of_lax():
    lhs, rhs = jnp.asarray(sample(4, 7), jnp.bfloat16), jnp.asarray(sample(7, 5), jnp.bfloat16)
    dimensions = (((1,), (0,)), ((), ()))
    ours = aqs.dot_general(lhs, rhs, dimensions, None, jnp.float32)
    np.testing.assert_array_equal(
        ours, jax.lax.dot_general(lhs, rhs, dimensions, preferred_element_type=jnp.float32)
    )
    assert ours.dtype == jnp.float32


# --- conv_general_dilated -------------------------------------------------------------------------

NHWC = ("NHWC", "HWIO", "NHWC")
# Shapes, dimension numbers, the kernel's output axis, further arguments of lax.
CONVS = {
    "plain": ((2, 8, 8, 3), (3, 3, 3, 5), NHWC, 3, {}),
    "no dimension numbers": ((2, 3, 8, 8), (5, 3, 3, 3), None, 0, {}),
    "strided, same": ((2, 8, 9, 3), (3, 2, 3, 5), NHWC, 3, {"window_strides": (2, 3)}),
    "explicit padding": ((2, 8, 8, 3), (3, 3, 3, 5), NHWC, 3, {"padding": [(0, 2), (3, 1)]}),
    "grouped": ((2, 8, 8, 6), (3, 3, 2, 9), NHWC, 3, {"feature_group_count": 3}),
    "depthwise": ((2, 8, 8, 6), (3, 3, 1, 6), NHWC, 3, {"feature_group_count": 6}),
    "batch groups": ((4, 8, 8, 3), (3, 3, 3, 6), NHWC, 3, {"batch_group_count": 2}),
    "dilated kernel": ((2, 9, 9, 3), (3, 3, 3, 5), NHWC, 3, {"rhs_dilation": (2, 3)}),
    "transposed": ((2, 5, 5, 3), (3, 3, 3, 5), NHWC, 3, {"lhs_dilation": (2, 2)}),
    "one dimension": ((2, 12, 3), (4, 3, 5), ("NWC", "WIO", "NWC"), 2, {}),
    "three dimensions": ((1, 4, 5, 6, 2), (2, 3, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), 4, {}),
    "output first": ((2, 3, 8, 8), (5, 3, 3, 3), ("NCHW", "OIHW", "NHWC"), 0, {}),
}


def float64_convolution(lhs, rhs, **arguments):
    with jax.enable_x64(True):
        return np.asarray(
            jax.lax.conv_general_dilated(
                lhs.astype(np.float64), rhs.astype(np.float64), **arguments
            )
        )


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("case", CONVS)
def test_conv_general_dilated(case, formats):
    lhs_shape, rhs_shape, dimensions, out_axis, further = CONVS[case]
    lhs, rhs = sample(*lhs_shape), sample(*rhs_shape, seed=1)
    arguments = {
        "window_strides": (1,) * (lhs.ndim - 2),
        "padding": [(1, 2)] * (lhs.ndim - 2) if "lhs_dilation" in further else "SAME",
        "dimension_numbers": dimensions,
        **further,
    }
    convolve = functools.partial(
        aqs.conv_general_dilated, lhs_format=formats[0], rhs_format=formats[1], **arguments
    )
    actual = convolve(lhs, rhs)
    per_tensor = convolve(lhs, rhs, rhs_format=quantizer(formats[1], False))
    lhs = quantized(lhs, formats[0])
    one_scale, rhs = quantized(rhs, formats[1]), quantized(rhs, formats[1], (out_axis,))
    if case != "depthwise":  # which is added up in another order on CPU
        np.testing.assert_array_equal(actual, jax.lax.conv_general_dilated(lhs, rhs, **arguments))
    assert_close_to_float64(actual, float64_convolution(lhs, rhs, **arguments))
    assert_close_to_float64(per_tensor, float64_convolution(lhs, one_scale, **arguments))


def test_convolution_against_a_sum_written_out():
    lhs, rhs = sample(2, 6, 6, 3), sample(3, 3, 3, 4, seed=1)
    actual = aqs.conv_general_dilated(
        lhs, rhs, (1, 1), "VALID", dimension_numbers=NHWC, lhs_format="int8", rhs_format="int4"
    )
    lhs = quantized(lhs, "int8").astype(np.float64)
    rhs = quantized(rhs, "int4", (3,)).astype(np.float64)
    expected = sum(
        np.einsum("bhwi,io->bhwo", lhs[:, i : i + 4, j : j + 4], rhs[i, j])
        for i in range(3)
        for j in range(3)
    )
    assert_close_to_float64(actual, expected)


# --- einsum ---------------------------------------------------------------------------------------

# Subscripts, shapes, channel axes of lhs and rhs.
EINSUMS = [
    ("bi,io->bo", (4, 7), (7, 5), (0,), (1,)),
    ("bi,io", (4, 7), (7, 5), (0,), (1,)),  # implicit output: b and o
    ("...i,io->...o", (2, 3, 7), (7, 5), (0, 1), (1,)),
    ("...i,io", (2, 3, 7), (7, 5), (0, 1), (1,)),
    ("bqhd,bkhd->bhqk", (2, 3, 2, 5), (2, 4, 2, 5), (0, 1, 2), (0, 1, 2)),
    ("...qd,...kd->...qk", (2, 3, 5), (2, 4, 5), (0, 1), (0, 1)),
    ("abc,cd->bd", (2, 3, 7), (7, 5), (1,), (1,)),  # a is summed over in lhs alone
    (" b i , i o -> o b ", (4, 7), (7, 5), (0,), (1,)),
    ("ij,ij->", (3, 4), (3, 4), (), ()),
    ("bij,bjk->bik", (1, 3, 8), (2, 8, 5), (0, 1), (0, 2)),  # an axis of 1 goes with any other
    ("bij,bjk->bik", (2, 3, 8), (1, 8, 5), (0, 1), (0, 2)),
    ("bij,bjk->bik", (2, 3, 1), (1, 8, 5), (0, 1), (0, 2)),
    ("...ij,...jk->...ik", (2, 1, 3, 1), (6, 8, 5), (0, 1, 2), (0, 2)),
]


@pytest.mark.parametrize("formats", [("int8", "int4"), ("e4m3", None)])
@pytest.mark.parametrize("subscripts, lhs_shape, rhs_shape, lhs_axes, rhs_axes", EINSUMS)
def test_einsum(subscripts, lhs_shape, rhs_shape, lhs_axes, rhs_axes, formats):
    lhs, rhs = sample(*lhs_shape), sample(*rhs_shape, seed=1)
    product = functools.partial(
        aqs.einsum, subscripts, lhs, rhs, lhs_format=formats[0], rhs_format=formats[1]
    )
    cases = [
        (product(), (), rhs_axes),
        (
            product(
                lhs_format=quantizer(formats[0], True), rhs_format=quantizer(formats[1], False)
            ),
            lhs_axes,
            (),
        ),
    ]
    for actual, left, right in cases:
        operands = quantized(lhs, formats[0], left), quantized(rhs, formats[1], right)
        np.testing.assert_array_equal(actual, jnp.einsum(subscripts, *operands))
        in_float64 = np.einsum(subscripts, *(x.astype(np.float64) for x in operands))
        assert_close_to_float64(actual, in_float64)


@pytest.mark.parametrize("execution", ["native", "auto", "int8", "fp8", "bf16"])
@pytest.mark.parametrize("subscripts, lhs_shape, rhs_shape, lhs_axes, rhs_axes", EINSUMS)
def test_einsum_on_codes(subscripts, lhs_shape, rhs_shape, lhs_axes, rhs_axes, execution):
    if subscripts == "abc,cd->bd" and execution != "auto":
        pytest.skip("refused: a label is summed over in one operand alone")
    lhs, rhs = sample(*lhs_shape), np.abs(sample(*rhs_shape, seed=1))
    formats = ("e4m3", "e2m1") if execution == "fp8" else ("int8", "uint8")
    actual = aqs.einsum(
        subscripts, lhs, rhs, lhs_format=formats[0], rhs_format=formats[1], execution=execution
    )
    operands = quantized(lhs, formats[0]), quantized(rhs, formats[1], rhs_axes)
    in_float64 = np.einsum(subscripts, *(x.astype(np.float64) for x in operands))
    assert_close_to_float64(actual, in_float64)


@pytest.mark.parametrize("subscripts", ["ij->ji", "ij,jk,kl->il", ""])
def test_einsum_takes_two_operands(subscripts):
    with pytest.raises(ValueError, match="einsum takes subscripts for two operands"):
        aqs.einsum(subscripts, sample(2, 2), sample(2, 2))


def test_unknown_formats():
    x = sample(4, 4)
    dimensions = (((1,), (0,)), ((), ()))
    with pytest.raises(aqs.FormatError, match="Unknown format 'int0'"):
        aqs.dot_general(x, x, dimensions, lhs_format="int0")
    with pytest.raises(aqs.FormatError, match="Unknown format 'int0'"):
        aqs.einsum("ij,jk", x, x, rhs_format="int0")


# --- Gradients ------------------------------------------------------------------------------------


def finite_difference(fun, x, direction):
    """Central difference in float64; exact for a quadratic function, up to rounding."""
    step = 1e-3
    return (fun(x + step * direction) - fun(x - step * direction)) / (2 * step)


def check_gradients(product, plain, lhs, rhs, axes):
    """`product` quantizes, `plain` does not; the loss is quadratic in either operand.

    The straight-through gradient is the true gradient of the model x + stop_gradient(q(x) - x): the
    offset q(x) - x is held while x moves.
    """
    weights = sample(*np.shape(product(lhs, rhs)), seed=2)
    gradients = jax.grad(lambda *o: jnp.sum(weights * product(*o) ** 2), (0, 1))(lhs, rhs)
    with jax.enable_x64(True):
        operands = [lhs.astype(np.float64), rhs.astype(np.float64)]
        offsets = [quantized(x, "int8", a).astype(np.float64) - x for x, a in zip((lhs, rhs), axes)]
        for side, gradient in enumerate(gradients):
            assert np.abs(gradient).max() > 0.1  # AQT's convolution returns zeros here
            direction = sample(*operands[side].shape, seed=3).astype(np.float64)

            def loss(x, side=side):
                moved = [o + d for o, d in zip(operands, offsets)]
                moved[side] = x + offsets[side]
                return float(jnp.sum(weights * plain(*moved) ** 2))

            slope = finite_difference(loss, operands[side], direction)
            # float32 sums of some hundred terms; the model is quadratic, so the slope is exact.
            scale = np.abs(np.asarray(gradient) * direction).sum()
            assert abs(np.sum(np.asarray(gradient, np.float64) * direction) - slope) < 1e-5 * scale


def test_dot_gradients_are_those_of_the_straight_through_model():
    dimensions = (((1,), (0,)), ((), ()))
    quantize = functools.partial(aqs.dot_general, lhs_format="int8", rhs_format="int8")
    check_gradients(
        lambda a, b: quantize(a, b, dimensions),
        lambda a, b: jax.lax.dot_general(a, b, dimensions),
        sample(4, 7), sample(7, 5, seed=1), ((), (1,)),
    )  # fmt: skip


def test_the_gradient_of_a_scalar_is_quantized():
    """One number is the largest of its tensor, so quantizing changes its rounding alone."""
    lhs, rhs = sample(6), sample(6, seed=1)

    def loss(lhs, rhs):
        dimensions = (((0,), (0,)), ((), ()))
        return 3 * aqs.dot_general(lhs, rhs, dimensions, lhs_gradient="int8", rhs_gradient="e4m3")

    for gradient, other in zip(jax.grad(loss, (0, 1))(lhs, rhs), (rhs, lhs)):
        np.testing.assert_allclose(gradient, 3 * other, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 3])
def test_convolution_gradients_are_those_of_the_straight_through_model(groups):
    arguments = {
        "window_strides": (2, 1), "padding": "SAME", "dimension_numbers": NHWC,
        "feature_group_count": groups,
    }  # fmt: skip
    check_gradients(
        functools.partial(
            aqs.conv_general_dilated, lhs_format="int8", rhs_format="int8", **arguments
        ),
        functools.partial(jax.lax.conv_general_dilated, **arguments),
        sample(2, 6, 6, 3), sample(3, 3, 3 // groups, 6, seed=1), ((), (3,)),
    )  # fmt: skip


# --- In Flax modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [("int8", "int4"), ("e4m3", "e4m3")])
def test_in_the_fields_of_flax_modules(formats):
    lhs_format, rhs_format = formats
    chosen = {"lhs_format": lhs_format, "rhs_format": rhs_format}
    x = jnp.asarray(sample(2, 8, 8, 3))
    conv = nn.Conv(
        4, (3, 3), conv_general_dilated=functools.partial(aqs.conv_general_dilated, **chosen)
    )
    variables = conv.init(jax.random.key(0), x)
    kernel = jnp.asarray(quantized(np.asarray(variables["params"]["kernel"]), rhs_format, (3,)))
    by_hand = {"params": {"kernel": kernel, "bias": variables["params"]["bias"]}}
    expected = nn.Conv(4, (3, 3)).apply(by_hand, jnp.asarray(quantized(x, lhs_format)))
    np.testing.assert_array_equal(conv.apply(variables, x), expected)

    dense = nn.Dense(5, dot_general=functools.partial(aqs.dot_general, **chosen))
    variables = dense.init(jax.random.key(0), x)
    kernel = jnp.asarray(quantized(np.asarray(variables["params"]["kernel"]), rhs_format, (1,)))
    by_hand = {"params": {"kernel": kernel, "bias": variables["params"]["bias"]}}
    expected = nn.Dense(5).apply(by_hand, jnp.asarray(quantized(x, lhs_format)))
    np.testing.assert_array_equal(dense.apply(variables, x), expected)


def test_traced_formats_compile_once_and_vmap_equals_the_loop():
    lhs, rhs = sample(4, 7), sample(7, 5, seed=1)
    names = ["int2", "int8", "e2m1", "e4m3", "bf16"]
    traces = []

    @jax.jit
    def product(lhs_format, rhs_format):
        traces.append(None)
        return aqs.einsum("bi,io->bo", lhs, rhs, lhs_format=lhs_format, rhs_format=rhs_format)

    pairs = [(f, g) for f in map(aqs.numeric_format, names) for g in map(aqs.numeric_format, names)]
    loop = np.stack([product(*pair) for pair in pairs])
    assert len(traces) == 1
    lhs_table, rhs_table = (aqs.stack_formats(column) for column in zip(*pairs))
    assert_close_to_float64(jax.vmap(product)(lhs_table, rhs_table), loop)
