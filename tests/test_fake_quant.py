"""`fake_quant` against its equation in numpy, its straight-through gradient, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs

NAMES = [
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)),
    "e2m0", "e2m1", "e2m3", "e3m2", "e3m4", "e4m3", "e5m2", "e6m1", "e7m2", "fp16", "bf16", "fp32",
]  # fmt: skip
UNSCALED = ("fp16", "bf16", "fp32", "e8m2")
SCALED = [name for name in NAMES if name not in UNSCALED]
# Shape and channel axes.
GRANULARITIES = [
    ((40,), ()),
    ((40,), (0,)),
    ((6, 30), (-1,)),
    ((6, 30), (0,)),
    ((3, 3, 5, 8), (-1,)),
    ((2, 6, 30), (0, 2)),
    ((), ()),
]


def sample(shape, dtype=np.float32):
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(dtype)


def scale_of(x, fmt, channel_axes):
    """max|x| / max_value, as a product with 1 / max_value, in x's precision."""
    axes = tuple(a for a in range(x.ndim) if a not in [c % x.ndim for c in channel_axes])
    scale = np.max(np.abs(x), axis=axes, keepdims=True) * (1 / x.dtype.type(fmt.max_value))
    return np.ones_like(scale) if fmt.bits >= 16 else scale


def reference(x, name, channel_axes=()):
    """The equation step by step in numpy; the rounding itself is held by test_formats."""
    fmt = aqs.numeric_format(name)
    scale = scale_of(x, fmt, channel_axes)
    return np.asarray(aqs.round_to_format(x * (1 / scale), fmt)) * scale


@pytest.mark.parametrize("shape, channel_axes", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_equation_is_met_bit_for_bit(name, shape, channel_axes):
    x = sample(shape)
    y = aqs.fake_quant(x, name, channel_axes)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(y, reference(x, name, channel_axes))


@pytest.mark.parametrize("name", ["int4", "e4m3", "bf16", "uint8"])
def test_equation_in_float64(name):
    x = sample((6, 30), np.float64)
    with jax.enable_x64(True):
        y = aqs.fake_quant(x, name, (-1,))
        assert y.dtype == np.float64
        np.testing.assert_array_equal(y, reference(x, name, (-1,)))


# Half a step at the top of the range, in units of max|x|, plus a few float32 roundings.
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_step(bits):
    x = sample((6, 300))
    error = np.abs(np.asarray(aqs.fake_quant(x, f"int{bits}", (0,)), np.float64) - x)
    half_step = np.abs(x).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1) / 2
    assert np.all(error <= half_step * (1 + 1e-5))


@pytest.mark.parametrize("name", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_computed_in_float32(name, dtype):
    x = jnp.asarray(sample((6, 30)), dtype)
    y = aqs.fake_quant(x, name, (-1,))
    assert y.dtype == dtype
    expected = aqs.fake_quant(x.astype(jnp.float32), name, (-1,)).astype(dtype)
    np.testing.assert_array_equal(y, expected)


def test_jit_and_vmap_over_a_table_equal_the_eager_loop():
    x = sample((6, 300))
    traces = []

    @jax.jit
    def counted(x, fmt):
        traces.append(None)
        return aqs.fake_quant(x, fmt, (-1,))

    loop = np.stack([aqs.fake_quant(x, name, (-1,)) for name in NAMES])
    jitted = np.stack([counted(x, aqs.numeric_format(name)) for name in NAMES])
    table = aqs.stack_formats(NAMES)
    batched = jax.vmap(lambda fmt: aqs.fake_quant(x, fmt, (-1,)))(table)
    np.testing.assert_array_equal(jitted, loop)
    np.testing.assert_array_equal(batched, loop)
    assert len(traces) == 1


# --- Gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_axes", [(), (-1,)])
@pytest.mark.parametrize("name", ["int2", "int4", "uint4", "e4m3", "bf16"])
def test_gradient_is_exactly_the_identity_and_saves_nothing(name, channel_axes):
    x, cotangent = sample((6, 30)), sample((6, 30))[::-1]
    fmt = jax.tree.map(jnp.asarray, aqs.numeric_format(name))

    def quantized(x):
        return aqs.fake_quant(x, fmt, channel_axes)

    _, pullback = jax.vjp(quantized, x)
    np.testing.assert_array_equal(pullback(cotangent)[0], cotangent)
    assert jax.tree.leaves(pullback) == []
    assert jax.make_jaxpr(pullback)(cotangent).eqns == []
    _, tangent = jax.jvp(quantized, (x,), (cotangent,))
    np.testing.assert_array_equal(tangent, cotangent)
    _, tangent = jax.jit(lambda x, t: jax.jvp(quantized, (x,), (t,)))(x, cotangent)
    np.testing.assert_array_equal(tangent, cotangent)


def test_second_derivative_is_zero():
    hessian = jax.hessian(lambda x: aqs.fake_quant(x, "int4").sum())(jnp.ones(3))
    np.testing.assert_array_equal(hessian, np.zeros((3, 3)))


# --- Edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_empty_arrays_stay(name):
    np.testing.assert_array_equal(aqs.fake_quant(jnp.zeros((2, 3)), name, (-1,)), np.zeros((2, 3)))
    for shape in ((0,), (0, 3), (3, 0)):
        assert aqs.fake_quant(jnp.zeros(shape), name, (-1,)).shape == shape
        assert aqs.fake_quant(jnp.zeros(shape), name).shape == shape


# A constant is the largest magnitude, so it is on the grid, up to rounding of scale and product.
@pytest.mark.parametrize("value", [1.0, -3.7, 1e-15, 1e30])
@pytest.mark.parametrize("name", [name for name in SCALED if name[0] != "u"])
def test_constants_are_kept(name, value):
    y = aqs.fake_quant(jnp.full((4,), value), name)
    np.testing.assert_allclose(y, np.full(4, value, np.float32), rtol=4 * 2.0**-24)


@pytest.mark.parametrize("name", NAMES)
def test_huge_values_stay_finite(name):
    largest = np.finfo(np.float32).max
    y = np.asarray(aqs.fake_quant(np.array([largest, 1e38, -1e38, -largest], np.float32), name))
    assert np.isfinite(y).all()
    if name in SCALED:  # they saturate at a quarter of the largest float
        low = 0 if name[0] == "u" else -largest / 4
        np.testing.assert_allclose(y, [largest / 4, largest / 4, low, low], rtol=1e-6)


@pytest.mark.parametrize("name", SCALED)
def test_tiny_values_are_rounded_in_steps_of_the_smallest_normal_number(name):
    tiny = np.float32(2.0**-126)
    x = np.array([1, -1, 1.25, 0], np.float32) * tiny
    # max|x| / max_value lies below 2^-126 but for max_value 1, so the scale is held there.
    scale = max(tiny, np.float32(1.25 / aqs.numeric_format(name).max_value) * tiny)
    expected = np.asarray(aqs.round_to_format(x * (1 / scale), name)) * scale
    np.testing.assert_array_equal(aqs.fake_quant(x, name), expected)
    np.testing.assert_array_equal(aqs.fake_quant(np.full(3, 1e-40, np.float32), name), np.zeros(3))


@pytest.mark.parametrize("name", ["int4", "e4m3"])
def test_small_values_above_it_keep_their_shape(name):
    x = sample((30,))
    small = np.float32(2.0**-100)
    np.testing.assert_array_equal(
        aqs.fake_quant(x * small, name), np.asarray(aqs.fake_quant(x, name)) * small
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SCALED)
def test_a_bad_value_makes_its_channel_nan_and_no_other(name, bad):
    x = sample((6, 4))
    x[2, 1] = bad
    y = np.asarray(aqs.fake_quant(x, name, (-1,)))
    assert np.isnan(y[:, 1]).all()
    others = [0, 2, 3]
    np.testing.assert_array_equal(y[:, others], aqs.fake_quant(x[:, others], name, (-1,)))
    assert np.isnan(aqs.fake_quant(x, name)).all()


@pytest.mark.parametrize("name", UNSCALED)
def test_wide_formats_are_not_scaled(name):
    x = sample((6, 30)) * 1000
    np.testing.assert_array_equal(aqs.fake_quant(x, name, (-1,)), aqs.round_to_format(x, name))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unsigned_formats_cut_negative_values(bits):
    x = sample((6, 30))
    y = np.asarray(aqs.fake_quant(np.abs(x), f"uint{bits}"))
    signed = np.asarray(aqs.fake_quant(x, f"uint{bits}"))
    np.testing.assert_array_equal(signed, np.where(x < 0, 0, y))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"Channel axis 2 is out of range.*2 dimensions"):
        aqs.fake_quant(jnp.ones((2, 3)), "int4", (2,))
    with pytest.raises(TypeError, match="fake_quant expects a floating-point array; got dtype int"):
        aqs.fake_quant(jnp.arange(3), "int4")
    with pytest.raises(aqs.FormatError, match="Unknown format 'int0'"):
        aqs.fake_quant(jnp.ones(3), "int0")


# --- Sharded batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_axes", [(), (-1,)])
@pytest.mark.parametrize("mapped", [jax.vmap, jax.pmap])
def test_a_scale_shared_over_a_mapped_axis_is_that_of_the_whole(mapped, channel_axes):
    x = sample((8, 5))
    x[6, 3] = 50.0  # one shard holds the maximum
    shards = x.reshape(2, 4, 5)
    apart = mapped(lambda s: aqs.fake_quant(s, "int4", channel_axes), axis_name="batch")
    shared = mapped(lambda s: aqs.fake_quant(s, "int4", channel_axes, "batch"), axis_name="batch")
    whole = np.asarray(aqs.fake_quant(x, "int4", channel_axes))
    np.testing.assert_array_equal(np.asarray(shared(shards)).reshape(8, 5), whole)
    assert np.any(np.asarray(apart(shards)).reshape(8, 5) != whole)
