"""A depthwise convolution as shifted products against float64 numpy and lax's own."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.products import depthwise
from aqt_search.products.depthwise import applies, shifted_products

NHWC = ("NHWC", "HWIO", "NHWC")
# Shapes, dimension numbers, further arguments of lax.
CASES = {
    "plain": ((2, 6, 6, 3), (3, 3, 1, 3), NHWC, {}),
    "strided, same": ((2, 8, 9, 3), (3, 2, 1, 3), NHWC, {"window_strides": (2, 3)}),
    "stride beyond the kernel": ((2, 9, 9, 3), (2, 1, 1, 3), NHWC, {"window_strides": (3, 4)}),
    "asymmetric padding": ((2, 6, 6, 3), (3, 3, 1, 3), NHWC, {"padding": [(0, 2), (3, 1)]}),
    "cut off": ((2, 6, 6, 3), (3, 3, 1, 3), NHWC, {"padding": [(-1, 2), (1, -1)]}),
    "valid": ((2, 6, 6, 3), (5, 1, 1, 3), NHWC, {"padding": "VALID"}),
    "one tap": ((2, 6, 6, 3), (1, 1, 1, 3), NHWC, {"window_strides": (2, 2)}),
    "dilated kernel": ((2, 9, 9, 3), (3, 3, 1, 3), NHWC, {"rhs_dilation": (2, 3)}),
    "dilated, strided": (
        (2, 9, 9, 3), (3, 2, 1, 3), NHWC, {"rhs_dilation": (2, 3), "window_strides": (2, 1)},
    ),
    "two outputs each": ((2, 6, 6, 3), (3, 3, 1, 6), NHWC, {"window_strides": (2, 1)}),
    "channels first": ((2, 3, 6, 5), (6, 1, 3, 3), ("NCHW", "OIHW", "NCHW"), {}),
    "mixed axes": ((5, 3, 2, 6), (3, 1, 2, 3), ("HCNW", "HIWO", "WNCH"), {}),
    "one dimension": ((2, 9, 3), (4, 1, 3), ("NWC", "WIO", "NWC"), {}),
    "three dimensions": ((1, 4, 5, 6, 2), (2, 3, 2, 1, 2), ("NDHWC", "DHWIO", "NDHWC"), {}),
    "no images": ((0, 6, 6, 3), (3, 3, 1, 3), NHWC, {}),
}  # fmt: skip
NOT = {
    "one channel": ((2, 6, 6, 1), (3, 3, 1, 3), NHWC, {}),
    "groups": ((2, 6, 6, 6), (3, 3, 2, 9), NHWC, {"feature_group_count": 3}),
    "batch groups": (
        (4, 6, 6, 3), (3, 3, 3, 6), NHWC, {"feature_group_count": 1, "batch_group_count": 2},
    ),
    "transposed": (
        (2, 5, 5, 3), (3, 3, 1, 3), NHWC, {"lhs_dilation": (2, 1), "padding": [(1, 1), (1, 1)]},
    ),
    "no place": ((2, 2, 6, 3), (3, 3, 1, 3), NHWC, {"padding": "VALID"}),
    "many taps": ((2, 6, 6, 3), (8, 7, 1, 3), NHWC, {}),
}  # fmt: skip


def traced(case, dtype=np.float32, preferred=None):
    """Operands, lax's convolution and the parameters of its primitive."""
    lhs_shape, rhs_shape, numbers, further = case
    rng = np.random.default_rng(0)
    lhs, rhs = (jnp.asarray(rng.normal(size=s), dtype) for s in (lhs_shape, rhs_shape))
    arguments = {
        "window_strides": (1,) * (len(lhs_shape) - 2), "padding": "SAME",
        "dimension_numbers": numbers, "preferred_element_type": preferred,
        "feature_group_count": lhs_shape[numbers[0].index("C")], **further,
    }  # fmt: skip

    def convolve(a, b):
        return jax.lax.conv_general_dilated(a, b, **arguments)

    return lhs, rhs, convolve, jax.make_jaxpr(convolve)(lhs, rhs).eqns[0].params


def summed_in_numpy(lhs, rhs, params):
    """The definition, an output position at a time, in float64; and the same of magnitudes."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    images = np.transpose(np.asarray(lhs, np.float64), lhs_spec)
    kernel = np.transpose(np.asarray(rhs, np.float64), rhs_spec)[:, 0]
    sizes, taps = images.shape[2:], kernel.shape[1:]
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    lows = [low for low, _ in params["padding"]]
    counts = [
        (n + sum(pad) - (k - 1) * d - 1) // s + 1
        for n, pad, k, d, s in zip(sizes, params["padding"], taps, dilation, strides)
    ]
    out = np.zeros((2, images.shape[0], kernel.shape[0], *counts))
    multiplier = kernel.shape[0] // images.shape[1]
    for place in itertools.product(*map(range, counts)):
        for tap in itertools.product(*map(range, taps)):
            at = tuple(
                p * s + t * d - low for p, s, t, d, low in zip(place, strides, tap, dilation, lows)
            )
            # lax cuts off what a negative padding leaves out, also at the far end.
            ends = [n + min(high, 0) for n, (_, high) in zip(sizes, params["padding"])]
            if all(max(0, -low) <= a < end for a, end, low in zip(at, ends, lows)):
                pixel = np.repeat(images[(slice(None), slice(None), *at)], multiplier, axis=1)
                term = pixel * kernel[(slice(None), *tap)][None]
                out[(slice(None), slice(None), slice(None), *place)] += [term, np.abs(term)]
    return [np.transpose(part, np.argsort(out_spec)) for part in out]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES]
    + [("asymmetric padding", "bfloat16"), ("two outputs each", "float16")],
)
def test_equals_the_definition(case, dtype):
    lhs, rhs, convolve, params = traced(CASES[case], dtype)
    assert applies(params, lhs.shape, rhs.shape)
    actual = shifted_products(lhs, rhs, params)
    expected, magnitudes = summed_in_numpy(lhs, rhs, params)
    assert actual.dtype == dtype
    assert actual.shape == convolve(lhs, rhs).shape == expected.shape
    # n products and sums in float32, each within half an ulp; then one rounding to the dtype.
    terms = CASES[case][1][0] * rhs.size
    bound = terms * 2.0**-24 * magnitudes
    bound = bound + float(jnp.finfo(dtype).eps) / 2 * (np.abs(expected) + bound) + 2.0**-24
    assert np.all(np.abs(np.asarray(actual, np.float64) - expected) <= bound)


@pytest.mark.parametrize("case", NOT)
def test_leaves_the_others_to_lax(case):
    lhs, rhs, _, params = traced(NOT[case])
    assert not applies(params, lhs.shape, rhs.shape)


def test_sums_in_the_preferred_type():
    lhs, rhs, convolve, params = traced(CASES["plain"], jnp.bfloat16, np.float32)
    actual = shifted_products(lhs, rhs, params)
    assert actual.dtype == convolve(lhs, rhs).dtype == np.float32
    # Products of bfloat16 are exact in float32: nine sums are rounded.
    expected, magnitudes = summed_in_numpy(lhs, rhs, params)
    assert np.all(np.abs(actual - expected) <= 9 * 2.0**-24 * magnitudes)


def assert_close(actual, expected):
    """Equal up to float32 rounding of sums of at most 200 terms of order 1 to 30."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4),
                 actual, expected)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c != "no images"])
def test_derivatives_equal_those_of_lax(case):
    lhs, rhs, convolve, params = traced(CASES[case])
    rng = np.random.default_rng(1)
    tangents = tuple(jnp.asarray(rng.normal(size=x.shape), np.float32) for x in (lhs, rhs))

    def derivatives(fun):
        def loss(lhs, rhs):
            return jnp.sum(jnp.sin(fun(lhs, rhs)))

        gradient = jax.grad(loss, (0, 1))
        return (
            gradient(lhs, rhs),
            jax.jvp(fun, (lhs, rhs), tangents),
            jax.jvp(gradient, (lhs, rhs), tangents),
        )

    assert_close(jax.jit(derivatives, static_argnums=0)(shifted(params)),
                 jax.jit(derivatives, static_argnums=0)(convolve))  # fmt: skip


def shifted(params):
    return functools.partial(shifted_products, params=params)


@pytest.mark.parametrize("case", ["strided, same", "two outputs each", "mixed axes"])
def test_vmap_is_a_loop_and_jit_is_eager(case):
    lhs, rhs, _, params = traced(CASES[case])
    fun = shifted(params)
    many, kernels = jnp.stack([lhs, 2 * lhs]), jnp.stack([rhs, rhs - 1])
    loop = jnp.stack([fun(a, b) for a, b in zip(many, kernels)])
    assert_close(jax.vmap(fun)(many, kernels), loop)
    assert_close(jax.vmap(fun, (None, 0))(lhs, kernels)[1], fun(lhs, kernels[1]))
    np.testing.assert_array_equal(jax.jit(fun)(lhs, rhs), fun(lhs, rhs))


def test_keeps_the_operands_alone_for_the_gradient():
    lhs, rhs, _, params = traced(CASES["plain"])
    _, transpose = jax.vjp(shifted(params), lhs, rhs)
    kept = sum(leaf.size for leaf in jax.tree.leaves(transpose))
    assert kept <= lhs.size + rhs.size


class Separable(nn.Module):
    """Depthwise convolutions, strided and dilated, then a head."""

    @nn.compact
    def __call__(self, x):
        """Maps [n, h, w, 4] to [n, 3]."""
        groups = {"feature_group_count": 4, "use_bias": False}
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="strided", **groups)(x))
        x = nn.relu(nn.Conv(8, (3, 3), kernel_dilation=2, name="doubled", **groups)(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def network():
    x = jax.random.normal(jax.random.key(0), (2, 10, 10, 4))
    model = Separable()
    variables = model.init(jax.random.key(1), x)
    return model.apply, aqs.find_sites(model.apply, variables, x), variables, x


def value_and_gradient(assignment, apply, variables, x):
    """The loss, its gradient, and the number of lax's convolutions in the program."""

    def loss(variables):
        return jnp.sum(aqs.quantize(apply)(assignment, variables, x) ** 2)

    traced = jax.jit(jax.value_and_grad(loss)).trace(variables)
    count = str(traced.jaxpr).count("conv_general_dilated")
    return traced.lower().compile()(variables), count


def with_lax(monkeypatch):
    monkeypatch.setattr(depthwise, "applies", lambda *_: False)


@pytest.mark.parametrize("gradient", [None, "int8"])
def test_a_quantized_network_equals_that_with_lax(monkeypatch, gradient):
    apply, sites, variables, x = network()
    spec = {"weight": "int8", "activation": "e4m3"}
    spec |= {"lhs_gradient": gradient, "rhs_gradient": gradient}
    assignment = aqs.assign(sites, [(".*", spec)])
    actual, count = value_and_gradient(assignment, apply, variables, x)
    assert count == 0
    with_lax(monkeypatch)
    expected, count = value_and_gradient(assignment, apply, variables, x)
    assert count > 0
    assert_close(actual, expected)


def test_many_assignments_at_once_equal_those_with_lax(monkeypatch):
    apply, sites, variables, x = network()
    table = jax.tree.map(jnp.asarray, aqs.stack_formats(["int4", "e4m3", "int8"]))

    def of_all(variables):
        def loss(index):
            fmt = jax.tree.map(lambda field: field[index], table)
            assignment = aqs.assign(sites, [(".*", fmt)])
            return jnp.sum(aqs.quantize(apply)(assignment, variables, x) ** 2)

        return jax.vmap(loss)(jnp.arange(3))

    def derivatives():
        return jax.jit(lambda v: (of_all(v), jax.jacfwd(of_all)(v)["params"]["strided"]))(variables)

    actual = derivatives()
    with_lax(monkeypatch)
    assert_close(actual, derivatives())


def test_without_a_format_the_convolution_is_that_of_lax():
    apply, sites, variables, x = network()
    nothing = aqs.assign(sites, [(".*", None)])
    run = functools.partial(aqs.quantize(apply), nothing)
    assert str(jax.make_jaxpr(run)(variables, x)).count("conv_general_dilated") == 2
    np.testing.assert_array_equal(run(variables, x), apply(variables, x))


def test_fp32_rounds_nothing_and_takes_this_form():
    apply, sites, variables, x = network()
    run = functools.partial(aqs.quantize(apply), aqs.assign(sites, [(".*", "fp32")]))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(run)(variables, x))
    assert_close(run(variables, x), apply(variables, x))


@pytest.mark.parametrize("execution", ["emulated", "int8", "bf16"])
def test_the_operation_equals_that_with_lax(monkeypatch, execution):
    lhs, rhs, _, params = traced(CASES["strided, same"])

    def run(lhs, rhs):
        return aqs.conv_general_dilated(
            lhs, rhs, params["window_strides"], params["padding"], dimension_numbers=NHWC,
            feature_group_count=3, lhs_format="int8", rhs_format="int8", execution=execution,
        )  # fmt: skip

    actual = jax.vjp(run, lhs, rhs)
    native = str(jax.make_jaxpr(run)(lhs, rhs)).count("conv_general_dilated")
    assert native == (execution != "emulated")
    with_lax(monkeypatch)
    expected = jax.vjp(run, lhs, rhs)
    assert_close((actual[0], actual[1](actual[0])), (expected[0], expected[1](actual[0])))


def test_elsewhere_than_on_cpu_it_is_lax(monkeypatch):
    lhs, rhs, _, _ = traced(CASES["plain"])

    def convolutions():
        run = functools.partial(
            aqs.conv_general_dilated, window_strides=(1, 1), padding="SAME", rhs_format="int8",
            dimension_numbers=NHWC, feature_group_count=3,
        )  # fmt: skip
        return str(jax.make_jaxpr(lambda a, b: run(a, b))(lhs, rhs)).count("conv_general_dilated")

    assert convolutions() == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolutions() == 1
