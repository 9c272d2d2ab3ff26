"""Quantizers: scales and codes against references written from the specifications."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.quantizer import (
    NAMED_QUANTIZERS,
    SCALE_FORMATS,
    operand_spec,
    spec_name,
    stack_quantizers,
)

# What XLA makes of the programs is not the question here: what compiles fastest will do.
jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0},
)
fake_quant = jit(aqs.fake_quant)  # under traced formats; a name is no argument of jit


def store(x, q):
    """`quantize_tensor`, whose format is static."""
    return jit(lambda x: aqs.quantize_tensor(x, q))(x)


def sample(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- Known answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, codes, scale",
    [
        ("int8", [-127, -64, -13, 0, 13, 64, 127], 1 / 127.5),
        ("int4", [-7, -4, -1, 0, 1, 4, 7], 2 / 15),
        ("int2", [-1, -1, 0, 0, 0, 1, 1], 2 / 3),
    ],
)
def test_the_grid_of_aqt_v2(name, codes, scale):
    x = np.array([-1, -0.5, -0.1, 0, 0.1, 0.5, 1], np.float32)
    q = store(x, aqs.Quantizer(name, edge="half_step"))
    np.testing.assert_array_equal(q.codes(np.float32), codes)
    np.testing.assert_allclose(q.scale, [scale], rtol=2.0**-22)
    legacy = store(x, aqs.Quantizer(name))
    np.testing.assert_allclose(legacy.scale, [1 / max(codes)], rtol=2.0**-22)


def test_rounding_of_e2m1_and_e4m3():
    fixed = aqs.Quantizer("e2m1", calibration=aqs.fixed(6.0))  # a scale of 1
    np.testing.assert_array_equal(
        fake_quant(np.array([1.25, 2.5, 5, -1.25, -2.5, -5, 9], np.float32), fixed),
        [1, 2, 4, -1, -2, -4, 6],
    )
    fixed = aqs.Quantizer("e4m3", calibration=aqs.fixed(448.0))
    np.testing.assert_array_equal(
        fake_quant(np.array([100, 0.01, 500], np.float32), fixed),
        np.array([96, 10 / 1024, 448], np.float32),
    )


# Signal to quantization noise of (256, 1024) x (1024, 1024) products of N(0, 1), in decibels.
SQNR = [
    ("int8", "max_value", 39.0),
    ("int8", "half_step", 39.1),
    ("int4", "half_step", 14.4),
    ("e4m3", "max_value", 28.5),
    ("nvfp4", None, 17.4),
    ("mxfp4", None, 15.75),
    ("mxfp6", None, 27.5),
    ("mxfp8", None, 27.5),
    ("mxint8", None, 38.5),
]


def test_signal_to_noise():
    lhs, rhs = sample(256, 1024), sample(1024, 1024, seed=1)
    exact = lhs.astype(np.float64) @ rhs.astype(np.float64)

    def values(q):
        if q.granularity.block_size is None:
            sides = aqs.per_channel(0), aqs.per_channel(1)
        else:
            size = q.granularity.block_size
            sides = aqs.per_block(size, 1), aqs.per_block(size, 0)
        operands = zip((lhs, rhs), sides)
        return [fake_quant(x, dataclasses.replace(q, granularity=g)) for x, g in operands]

    for name, edge, least in SQNR:
        q = aqs.quantizer(name)
        if edge is not None:
            q = aqs.Quantizer(name, aqs.PER_CHANNEL, edge=edge)
        noise = np.asarray(np.matmul(*map(np.asarray, values(q))), np.float64) - exact
        found = 10 * np.log10(np.square(exact).sum() / np.square(noise).sum())
        assert least <= found < least + 0.6, (name, edge, found)


# --- OCP Microscaling v1.0 and NVFP4, bit for bit -------------------------------------------------

# Element format, its exponent bits, mantissa bits, largest value and the dtype of ml_dtypes.
ELEMENTS = {
    "mxfp8": (4, 3, 448.0, ml_dtypes.float8_e4m3fn),
    "mxfp8_e4m3": (4, 3, 448.0, ml_dtypes.float8_e4m3fn),
    "mxfp8_e5m2": (5, 2, 57344.0, ml_dtypes.float8_e5m2),
    "mxfp6": (2, 3, 7.5, ml_dtypes.float6_e2m3fn),
    "mxfp6_e2m3": (2, 3, 7.5, ml_dtypes.float6_e2m3fn),
    "mxfp6_e3m2": (3, 2, 28.0, ml_dtypes.float6_e3m2fn),
    "mxfp4": (2, 1, 6.0, ml_dtypes.float4_e2m1fn),
    "mxint8": (None, None, 127.0, None),
    "nvfp4": (2, 1, 6.0, ml_dtypes.float4_e2m1fn),
}


def round_element(v, name):
    """Half to even on the element's grid, saturated; in float64."""
    exponent_bits, mantissa_bits, largest, _ = ELEMENTS[name]
    if exponent_bits is None:  # mxint8: the project counts in units of the last bit, 2^-6
        return np.clip(np.rint(v), -largest, largest)
    smallest = 2 - 2 ** (exponent_bits - 1)  # exponent of the smallest normal number
    exponent = np.floor(np.log2(np.maximum(np.abs(v), 2.0**-200)))
    ulp = 2.0 ** (np.maximum(exponent, smallest) - mantissa_bits)
    return np.clip(np.rint(v / ulp) * ulp, -largest, largest)


def blocks_of(x, size):
    """[rows, n] as [rows, blocks, size], zeros in the last."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, -x.shape[1] % size)])
    return x.reshape(x.shape[0], -1, size)


def microscaling(x, name):
    """Scales and elements by OCP Microscaling v1.0, section 6.3."""
    blocks = blocks_of(x, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    # The exponent of the largest normal element; in mxint8's units of 2^-6 that is 6.
    largest_exponent = np.floor(np.log2(ELEMENTS[name][2]))
    shared = np.floor(np.log2(np.where(largest > 0, largest, 1)))
    scale = np.where(largest > 0, 2.0 ** (shared - largest_exponent), 1)
    return scale[..., 0], round_element(blocks / scale, name)


def spread(rows, columns):
    """Normal numbers, their columns over many powers of two; a row of zeros and one of ties."""
    x = sample(rows, columns) * np.exp2(np.arange(columns) // 7 % 9 - 4).astype(np.float32)
    x[1] = 0
    x[2] = np.arange(columns) % 33 / 4 - 3
    x[3, :40] = 2.0 ** np.arange(-20, 20)
    return x.astype(np.float32)


@pytest.mark.parametrize("columns", [64, 75])  # 75: the last block holds 11
@pytest.mark.parametrize("name", [name for name in ELEMENTS if name != "nvfp4"])
def test_microscaling_is_that_of_the_specification(name, columns):
    x = spread(6, columns)
    q = store(x, name)
    scale, elements = microscaling(x, name)
    assert q.scale.dtype == ml_dtypes.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(q.scale, np.float64), scale)
    codes = np.asarray(q.codes(np.float32), np.float64)
    elements = elements.reshape(6, -1)[:, :columns]
    np.testing.assert_array_equal(codes, elements)
    values = elements * np.repeat(scale, 32, -1)[:, :columns]
    np.testing.assert_array_equal(np.asarray(q.dequantize(), np.float64), values)


def test_elements_round_as_in_ml_dtypes():
    x = np.concatenate([sample(2000) * 4, np.arange(-64, 64) / 8]).astype(np.float32)
    for name, (_, _, largest, dtype) in ELEMENTS.items():
        if dtype is not None:
            inside = np.clip(x, -largest, largest)
            expected = inside.astype(dtype).astype(np.float64)
            np.testing.assert_array_equal(round_element(x.astype(np.float64), name), expected)


@pytest.mark.parametrize("columns", [64, 75])
def test_nvfp4_has_two_levels_of_scales(columns):
    x = spread(6, columns)
    q = store(x, "nvfp4")
    blocks = blocks_of(x, 16)
    largest = np.abs(blocks).max(-1)
    # In float32 as it is stored; block scales that lie on a tie could go either way, none does.
    tensor = np.abs(x).max() / (6 * 448)
    np.testing.assert_allclose(np.asarray(q.tensor_scale).item(), tensor, rtol=2.0**-22)
    assert (q.tensor_scale.dtype, q.scale.dtype) == (np.float32, ml_dtypes.float8_e4m3fn)
    scale = np.maximum(round_element(largest / 6 / tensor, "mxfp8"), 2.0**-9)
    scale[largest == 0] = 1
    np.testing.assert_array_equal(np.asarray(q.scale, np.float64), scale)
    steps = blocks / (scale * tensor)[..., None]
    codes = np.asarray(q.codes(np.float32)).reshape(6, columns)
    expected = round_element(steps, "nvfp4").reshape(6, -1)[:, :columns]
    # float32 may decide a tie otherwise: there the element lies half a step away.
    steps = steps.reshape(6, -1)[:, :columns]
    ulp = np.exp2(np.maximum(np.floor(np.log2(np.abs(steps) + 1e-30)), 0) - 1)
    near_tie = np.abs(np.abs(steps / ulp - np.floor(steps / ulp)) - 0.5) < 1e-5
    assert near_tie.mean() < 0.05
    np.testing.assert_array_equal(codes[~near_tie], expected[~near_tie])


# --- Variants of the scale ------------------------------------------------------------------------


@pytest.mark.parametrize("edge", ["max_value", "half_step"])
@pytest.mark.parametrize(
    "calibration, scale_format",
    [  # without ("min_max", "e4m3"): scales in two levels go with no zero point
        *((name, scale) for name in ("absmax", "percentile") for scale in SCALE_FORMATS),
        ("min_max", "float32"),
        ("min_max", "e8m0"),
    ],
)
def test_storage_holds_what_fake_quant_computes(calibration, scale_format, edge):
    chosen = {"absmax": aqs.absmax(), "min_max": aqs.min_max(), "percentile": aqs.percentile(90.0)}
    x = sample(6, 20)

    def both(x):
        found = {}
        for name in ("int4", "uint8", "e2m1"):
            q = aqs.Quantizer(name, aqs.per_block(5, 1), chosen[calibration], scale_format, edge)
            found[name] = aqs.quantize_tensor(x, q).dequantize(), aqs.fake_quant(x, q)
        return found

    for name, (stored, emulated) in jit(both)(x).items():
        # An interpolated bound may differ in its last bit from one program to another.
        rtol = 4 * 2.0**-24 if calibration == "percentile" else 0
        np.testing.assert_allclose(stored, emulated, rtol=rtol, err_msg=name)


def test_zero_points_hold_both_bounds():
    """Codes span the format, zero is exact, and no error is above half a step."""
    x = (sample(4, 50) + np.array([[0], [3], [-3], [0.5]])).astype(np.float32)
    for name, steps in (("int4", 14), ("uint4", 15), ("int8", 254), ("uint8", 255)):
        q = aqs.Quantizer(name, aqs.per_channel(0), aqs.min_max())
        low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
        step = (high - low)[:, None] / steps
        error = np.abs(np.asarray(fake_quant(x, q), np.float64) - x)
        # Rounding the zero point moves the grid by half a step, which saturates at the ends.
        assert np.all(error <= step * (1 + 1e-5))
        stored = store(x, q)
        zero = np.asarray(stored.zero_point)
        np.testing.assert_array_equal(zero, np.rint(zero))
        np.testing.assert_allclose(stored.scale, step, rtol=1e-6)
        np.testing.assert_array_equal(fake_quant(np.pad(x, [(0, 0), (0, 1)]), q)[:, -1], 0)


@pytest.mark.parametrize("name", ["int4", "e4m3", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_are_never_hidden(name, bad):
    x = sample(4, 8)
    x[1, 2] = bad
    calibrations = (
        aqs.absmax(), aqs.min_max(), aqs.percentile(50.0), aqs.mean_deviation(), aqs.mse(3),
        aqs.fixed(1.0), aqs.fixed(1.0, -1.0),
    )  # fmt: skip

    def quantize(x):
        return [aqs.fake_quant(x, aqs.Quantizer(name, aqs.per_channel(0), c)) for c in calibrations]

    for calibration, y in zip(calibrations, jit(quantize)(x)):
        assert np.isnan(y[1, 2]), calibration
        assert np.isfinite(np.delete(y, 1, 0)).all()


# --- Rounding -------------------------------------------------------------------------------------


def rounded(rounding, key=None, name="int4"):
    return aqs.Quantizer(name, None, aqs.fixed(7.0), rounding=rounding, key=key)


def test_floor_rounds_down():
    x = np.array([-7, -6.5, -0.1, 0, 0.9, 3, 6.99], np.float32)
    np.testing.assert_array_equal(fake_quant(x, rounded("floor")), np.floor(x))


@pytest.mark.parametrize("name", ["int4", "e2m1"])
def test_stochastic_rounding_is_unbiased(name):
    largest = aqs.numeric_format(name).max_value
    q = aqs.Quantizer(name, None, aqs.fixed(largest), rounding="stochastic")
    x = np.linspace(-largest, largest, 37).astype(np.float32)
    draws = 4000

    def mean(key):
        tiled = jnp.tile(x[None], (draws, 1))
        return aqs.fake_quant(tiled, dataclasses.replace(q, key=key))

    found = np.asarray(jit(mean)(jax.random.key(0)), np.float64)
    low, high = found.min(0), found.max(0)
    ulp = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1))), 0) - 1)
    step = 1.0 if name == "int4" else ulp
    assert np.all(high - low <= step)  # only the two neighbours on the grid
    share = (x - low) / np.where(high > low, high - low, 1)
    error = (high - low) * np.sqrt(share * (1 - share) / draws)  # standard error of the mean
    # 37 means, each within 5 standard errors: false alarms below 1 in 40,000.
    assert np.all(np.abs(found.mean(0) - x) <= 5 * error + 1e-6)
    on_grid = np.asarray(fake_quant(x, dataclasses.replace(q, rounding="nearest_even"))) == x
    np.testing.assert_array_equal(low[on_grid], x[on_grid])
    np.testing.assert_array_equal(high[on_grid], x[on_grid])
    assert (high > low).sum() > 10


def test_rows_draw_the_same_bits_however_a_batch_is_sharded():
    x = sample(8, 5)
    q = rounded("stochastic", jax.random.key(3))
    whole = np.asarray(fake_quant(x, q))
    other = fake_quant(x, dataclasses.replace(q, key=jax.random.key(4)))
    assert np.any(whole != np.asarray(other))
    for shards in (2, 4):
        mapped = jit(jax.vmap(lambda x: aqs.fake_quant(x, q, axis_name="batch"), axis_name="batch"))
        found = mapped(x.reshape(shards, -1, 5))
        np.testing.assert_array_equal(found.reshape(8, 5), whole)
    assert np.any(whole[0] != np.asarray(fake_quant(np.tile(x[:1], (2, 1)), q))[1])


# --- Names, tables, errors ------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(NAMED_QUANTIZERS) - {"binary"}))
def test_block_formats_by_name(name):
    q = aqs.quantizer(name)
    assert q.granularity == aqs.per_block(16 if name == "nvfp4" else 32)
    assert q.scale_format == ("e4m3" if name == "nvfp4" else "e8m0")
    assert q.bits == int(name.split("_")[0][-1])
    assert operand_spec(name) == q
    assert aqs.quantizer(spec_name(q)) == q


def test_names_of_formats_and_tables():
    assert operand_spec("int4") == aqs.numeric_format("int4")
    assert spec_name(aqs.numeric_format("e4m3")) == "e4m3"
    assert spec_name(aqs.Quantizer("int4")) == "int4"
    assert spec_name(aqs.quantizer("binary")) == "binary"
    table = stack_quantizers([aqs.Quantizer("int4"), aqs.Quantizer("e2m1")])
    np.testing.assert_array_equal(table.bits, [4, 4])
    np.testing.assert_array_equal(table.fmt.max_value, [7, 6])


def test_wrong_arguments():
    bad = [
        ({"scale_format": "e5m2"}, "Unknown scale_format 'e5m2': expected one of float32, e8m0"),
        ({"edge": "top"}, "Unknown edge 'top': expected one of max_value, half_step"),
        ({"rounding": "up"}, "Unknown rounding 'up': expected one of nearest_even, stochastic"),
        ({"granularity": "rows"}, "A granularity is PER_TENSOR, .* got 'rows'"),
        *(
            ({"granularity": aqs.PER_TOKEN, "calibration": kept}, "PER_TOKEN .* such as absmax, or")
            for kept in (
                aqs.moving_average(aqs.absmax()), aqs.frozen_after(aqs.absmax(), 1), aqs.lsq(),
                aqs.pact(1.0), aqs.batch_quant(), aqs.delayed(aqs.absmax()),
            )
        ),
    ]  # fmt: skip
    for arguments, message in bad:
        with pytest.raises(aqs.FormatError, match=message):
            aqs.Quantizer("int8", **arguments)
    for make in (aqs.Quantizer, aqs.quantizer, operand_spec):
        with pytest.raises(aqs.FormatError, match="Unknown format 'mxfp5'"):
            make("mxfp5")
    with pytest.raises(aqs.FormatError, match="zero point"):
        aqs.Quantizer("int8", aqs.per_block(16), aqs.min_max(), "e4m3")
    with pytest.raises(aqs.FormatError, match="may differ in their format alone"):
        stack_quantizers([aqs.Quantizer("int4"), aqs.Quantizer("int4", edge="half_step")])
    with pytest.raises(aqs.FormatError, match="has no name: it differs from the default of int4"):
        spec_name(aqs.Quantizer("int4", edge="half_step"))
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="Stochastic rounding needs a random key"):
        aqs.fake_quant(x, aqs.Quantizer("int4", rounding="stochastic"))
    with pytest.raises(ValueError, match="This calibration has state: use fake_quant_with_state"):
        aqs.fake_quant(x, aqs.Quantizer("int4", calibration=aqs.delayed(aqs.absmax())))
    with pytest.raises(ValueError, match=r"got channel_axes \(0,\) and a quantizer with"):
        aqs.fake_quant(x, "mxfp4", (0,))


CALIBRATIONS = {
    "absmax": aqs.absmax(), "min_max": aqs.min_max(), "percentile": aqs.percentile(95.0),
    "mse": aqs.mse(), "fixed": aqs.fixed(1.5), "centred": aqs.centred(aqs.absmax()),
    "moving average": aqs.moving_average(aqs.absmax()), "lsq": aqs.lsq(), "pact": aqs.pact(),
    "batch_quant": aqs.batch_quant(), "mean deviation": aqs.mean_deviation(3.0),
    "average": aqs.moving_average(aqs.mean_deviation(3.0), 0.7),
}  # fmt: skip


@pytest.mark.parametrize("name", ["int2", "int4", "uint4", "int8", "e2m1", "e4m3", "e5m2", "bf16"])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_format_known_in_a_program_gives_the_bits_of_one_that_is_data(calibration, name):
    x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    fmt, how = aqs.numeric_format(name), CALIBRATIONS[calibration]
    state = aqs.init_state(aqs.Quantizer(fmt, calibration=how), x.shape)

    def run(fmt, x, state):
        q = aqs.Quantizer(fmt, calibration=how)
        values, state = aqs.fake_quant_with_state(x, q, state)
        return values, aqs.fake_quant_with_state(1.3 * x, q, state, update=False)

    known = jax.jit(lambda x, state: run(fmt, x, state))(x, state)
    data = jax.jit(run)(jax.tree.map(jnp.asarray, fmt), x, state)
    assert jax.tree.structure(known) == jax.tree.structure(data)
    for one, other in zip(jax.tree.leaves(known), jax.tree.leaves(data)):
        np.testing.assert_array_equal(one, other)
