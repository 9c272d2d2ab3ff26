"""`jax.export` with symbolic shapes: one program for every size, in every execution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import aqt_search as aqs
from aqt_search.products.carriers import EXECUTIONS

NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def sample(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolve(window_strides, **more):
    return lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], window_strides, "SAME", **NHWC, **more
    )


def attend(p, x):
    x = x @ p["w"]
    scores = jnp.einsum("bqd,bkd->bqk", x, x)
    return jnp.einsum("bqk,bkd->bqd", scores, x)


# The function, its weight, the shape of its data ("b" is symbolic), and their dtype. As large as
# `auto` asks for where it takes a native product.
FUNCTIONS = {
    "dot": (lambda p, x: x @ p["w"], (64, 64), ("b", 64)),
    "rows of images": (lambda p, x: x @ p["w"], (64, 64), ("b", 5, "b", 64)),
    "convolution": (convolve((1, 1)), (3, 3, 32, 32), ("b", 4, 4, 32)),
    "images of any size": (convolve((2, 2)), (3, 3, 32, 32), (1, "b", "b", 32)),
    "depthwise": (convolve((2, 2), feature_group_count=8), (3, 3, 1, 8), ("b", 5, "b", 8)),
    "attention": (attend, (64, 64), (2, "b", 64)),  # sums over the symbolic axis
    "lookup": (lambda p, i: p["w"][i], (9, 8), ("b", 3)),
}


def data(shape, size):
    shape = tuple(size if n == "b" else n for n in shape)
    return sample(*shape, seed=1) if len(shape) > 2 or shape[1] > 3 else np.ones(shape, np.int32)


def exported(fun, shape, dtype):
    (b,) = export.symbolic_shape("b")
    symbolic = tuple(b if n == "b" else n for n in shape)
    return export.export(jax.jit(fun))(jax.ShapeDtypeStruct(symbolic, dtype)).call


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_program_serves_every_size(name, execution):
    fun, weight, shape = FUNCTIONS[name]
    params, x = {"w": sample(*weight)}, data(shape, 7)
    sites = aqs.find_sites(fun, params, x)
    spec = "e4m3" if execution == "fp8" else "int8"
    assignment = aqs.assign(sites, [(".*", spec)])
    frozen = aqs.freeze(fun, assignment, params, x)
    served = exported(
        functools.partial(aqs.serve(fun, execution=execution), frozen), shape, x.dtype
    )
    expected = aqs.quantize(fun)(assignment, params, x)
    # Sums of at most 288 terms in another order; a rounding may turn on them in attention.
    bound = (1e-2 if name == "attention" else 1e-5) * np.abs(expected).max()
    np.testing.assert_allclose(served(x), expected, rtol=0, atol=bound)


def exported_dot(terms, **how):
    """A dot over a symbolic axis: [3, t] x [t, 5]."""
    (t,) = export.symbolic_shape("t", constraints=[terms] if terms else ())
    product = functools.partial(aqs.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), **how)
    shapes = jax.ShapeDtypeStruct((3, t), np.float32), jax.ShapeDtypeStruct((t, 5), np.float32)
    return export.export(jax.jit(product))(*shapes).call


@pytest.mark.parametrize("constraint", [None, "t <= 1000"])
@pytest.mark.parametrize("execution", ["int8", "native"])
@pytest.mark.parametrize("formats", [("int8", "int8"), ("uint8", "uint8")])
def test_sums_over_a_symbolic_axis(formats, execution, constraint):
    how = {"lhs_format": formats[0], "rhs_format": formats[1], "execution": execution}
    product = exported_dot(constraint, **how)
    for terms in (7, 1000) if constraint else (7, 200_000):
        lhs, rhs = np.abs(sample(3, terms)), np.abs(sample(terms, 5, seed=1))
        values = aqs.fake_quant(lhs, formats[0]), aqs.fake_quant(rhs, formats[1], (1,))
        expected = np.asarray(values[0], np.float64) @ np.asarray(values[1], np.float64)
        np.testing.assert_allclose(product(lhs, rhs), expected, rtol=1e-5)


def test_blocks_along_a_symbolic_axis():
    blocks = aqs.Quantizer("uint8", aqs.per_block(4))
    for execution in ("emulated", "int8", "bf16", "auto"):
        product = exported_dot(None, lhs_format=blocks, rhs_format=blocks, execution=execution)
        for terms in (8, 9):
            lhs, rhs = np.abs(sample(3, terms)), np.abs(sample(terms, 5, seed=1))
            q = [aqs.Quantizer("uint8", aqs.per_block(4, axis)) for axis in (1, 0)]
            values = [np.asarray(aqs.fake_quant(x, f)) for x, f in zip((lhs, rhs), q)]
            np.testing.assert_allclose(product(lhs, rhs), values[0] @ values[1], rtol=1e-5)


def test_a_sum_of_unknown_length_that_has_no_blocks_is_refused():
    (t,) = export.symbolic_shape("t")
    einsum = functools.partial(
        aqs.einsum, "bi,io->ob", lhs_format="int8", rhs_format="int8", execution="int8"
    )
    shapes = jax.ShapeDtypeStruct((3, t), np.float32), jax.ShapeDtypeStruct((t, 5), np.float32)
    with pytest.raises(ValueError, match=r"not known to be at most 131,071 .* constraints=\['t <="):
        export.export(jax.jit(einsum))(*shapes)
