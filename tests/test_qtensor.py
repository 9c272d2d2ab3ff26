"""`quantize_tensor` stores what `fake_quant` computes, in the bytes it should take."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.formats import code_values

SMALL = [
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)),
    *(f"e{e}m{m}" for e in range(2, 8) for m in range(7 - e + 1)),
]
NATIVE = {
    "int8": np.int8, "uint8": np.uint8, "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2, "e3m4": ml_dtypes.float8_e3m4,
    "bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32,
}  # fmt: skip
# Sizes that fill no whole byte at most widths.
GRANULARITIES = [((), ()), ((1,), ()), ((3, 11), (-1,)), ((3, 11), ()), ((0, 4), (-1,))]
CASES = [
    *((name, (5, 3, 7), (0, 2)) for name in [*SMALL, "bf16", "fp16", "fp32"]),
    *((name, *case) for name in ("int3", "int8", "e2m1", "e4m3", "bf16") for case in GRANULARITIES),
]


def sample(shape, dtype=np.float32):
    return np.random.default_rng(2).standard_normal(shape).astype(dtype) * 3


def assert_stores_fake_quant(x, name, channel_axes):
    q = aqs.quantize_tensor(x, name, channel_axes)
    expected = np.asarray(aqs.fake_quant(x, name, channel_axes))
    actual = np.asarray(q.dequantize())
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(actual, expected)
    if name not in ("int8", "uint8"):  # two's complement has no negative zero
        np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))
    return q


@pytest.mark.parametrize("name, shape, channel_axes", CASES)
def test_dequantize_equals_fake_quant_and_bytes_are_counted(name, shape, channel_axes):
    q = assert_stores_fake_quant(sample(shape), name, channel_axes)
    fmt = aqs.numeric_format(name)
    scales = 0 if fmt.bits >= 16 else math.prod(shape[axis] for axis in channel_axes)
    assert q.nbytes == math.ceil(math.prod(shape) * fmt.bits / 8) + 4 * scales
    assert q.data.dtype == NATIVE.get(name, np.uint8)
    assert (q.scale is None) == (fmt.bits >= 16)


@pytest.mark.parametrize("name", ["int4", "int8", "e4m3", "e2m3", "bf16"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_narrow_tensors_come_back_in_their_dtype(name, dtype):
    assert_stores_fake_quant(jnp.asarray(sample((3, 11)), dtype), name, (-1,))


@pytest.mark.parametrize("name", ["int4", "int8", "e4m3", "e2m3", "bf16"])
def test_float64_tensors(name):
    with jax.enable_x64(True):
        assert_stores_fake_quant(sample((3, 11), np.float64), name, (-1,))


@pytest.mark.parametrize("name", SMALL)
def test_every_code_survives_storage(name):
    values = code_values(name)
    values = np.resize(values[~np.isnan(values)], 257)  # an odd number, the same for all formats
    q = assert_stores_fake_quant(values, name, ())
    # The largest value is in the tensor, so its scale is 1 and every value is its own code.
    np.testing.assert_array_equal(q.dequantize(), values)


@pytest.mark.parametrize("name", ["int4", "int8", "e2m3", "e4m3", "bf16"])
def test_jit_and_tree_map(name):
    x = sample((5, 7))
    eager = aqs.quantize_tensor(x, name, (-1,))
    jitted = jax.jit(lambda x: aqs.quantize_tensor(x, name, (-1,)))(x)
    copied = jax.tree.map(jnp.copy, jitted)
    assert jax.tree.structure(copied) == jax.tree.structure(eager)
    assert (copied.shape, copied.dtype, copied.nbytes) == (x.shape, x.dtype, eager.nbytes)
    expected = aqs.fake_quant(x, name, (-1,))
    for q in (eager, jitted, copied):
        np.testing.assert_array_equal(q.dequantize(), expected)
        np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(q), expected)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_is_not_hidden(name, bad):
    x = sample((5, 3))
    x[2, 1] = bad
    y = np.asarray(aqs.quantize_tensor(x, name, (-1,)).dequantize())
    np.testing.assert_array_equal(np.isnan(y), [[False, True, False]] * 5)


def test_wrong_arguments():
    x = jnp.ones((2, 3))
    with pytest.raises(aqs.FormatError, match="12 bits and no storage dtype"):
        aqs.quantize_tensor(x, "e5m6")
    with pytest.raises(aqs.FormatError, match="needs a concrete format"):
        jax.jit(aqs.quantize_tensor)(x, aqs.numeric_format("int4"))
    with pytest.raises(aqs.FormatError, match="Unknown format 'int0'"):
        aqs.quantize_tensor(x, "int0")
    with pytest.raises(TypeError, match="quantize_tensor expects a floating-point"):
        aqs.quantize_tensor(jnp.arange(3), "int4")
    with pytest.raises(ValueError, match="Channel axis 5 is out of range"):
        aqs.quantize_tensor(x, "int4", (5,))
