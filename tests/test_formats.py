"""`round_to_format` against ml_dtypes and against a search for the nearest grid value in float64.

The references know nothing of the five numbers: they decode a format's codes or ask ml_dtypes.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.formats import code_values

ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m4": ml_dtypes.float8_e3m4,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)]
SMALL_FLOATS = [f"e{e}m{m}" for e in range(2, 8) for m in range(7 - e + 1)]
ALL_NAMES = [*INTEGERS, *SMALL_FLOATS, "bf16", "fp16", "fp32"]
SMALLEST_NORMAL = np.float32(2.0**-126)
PADDED = 1 << 12

round_jitted = jax.jit(aqs.round_to_format)


def integer_grid(name):
    """The values of an integer format, float64, in rising order."""
    magnitude_bits = int(name[-1]) - (name[0] == "i")
    largest = 2**magnitude_bits - 1
    return np.arange(-largest if name[0] == "i" else 0, largest + 1, dtype=np.float64)


def float_grid(name):
    """The values of an eXmY format, float64, in rising order, decoded code by code (IEEE 754).

    From 8 bits on the top exponent is no number, but for e4m3 only its last code is none (OCP).
    """
    exponent_bits, mantissa_bits = (int(digits) for digits in name[1:].split("m"))
    bias = 2 ** (exponent_bits - 1) - 1
    magnitudes = []
    for field in range(2**exponent_bits):
        for fraction in range(2**mantissa_bits):
            at_top = field == 2**exponent_bits - 1
            last = at_top and fraction == 2**mantissa_bits - 1
            if last if name == "e4m3" else at_top and 1 + exponent_bits + mantissa_bits >= 8:
                continue
            leading, exponent = (1, field - bias) if field else (0, 1 - bias)
            magnitudes.append((leading + fraction / 2**mantissa_bits) * 2.0**exponent)
    return np.array([-m for m in reversed(magnitudes[1:])] + magnitudes)


def grid_of(name):
    return integer_grid(name) if "int" in name else float_grid(name)


def nearest_on_grid(x, grid):
    """The nearest value of a grid, beyond it the last; ties go to the even multiple of the step."""
    x = np.clip(np.asarray(x, np.float64), grid[0], grid[-1])
    upper = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    below, above = grid[upper - 1], grid[upper]
    even_is_below = np.fmod(below / (above - below), 2) == 0
    to_below = (x - below < above - x) | ((x - below == above - x) & even_is_below)
    return np.where(to_below, below, above)


def all_codes(dtype):
    bits = 8 * np.dtype(dtype).itemsize
    return np.arange(2**bits, dtype=f"uint{bits}").view(dtype)


def hard_inputs(grid, dtype=np.float32):
    """Every grid value and tie, the next number on either side of both, and values beyond."""
    grid = np.asarray(grid, np.float64)
    ties = (grid[1:] + grid[:-1]) / 2
    largest = np.abs(grid).max()
    beyond = largest * np.array([1 + 2.0**-20, 1.0625, 1.25, 1.5, 2, 3, 1024, 2.0**60])
    points = np.concatenate([grid, ties, beyond, [1e-30, SMALLEST_NORMAL]])
    points = points[np.abs(points) <= np.finfo(np.float32).max].astype(dtype)
    away = np.nextafter(points, dtype(np.inf))
    toward = np.nextafter(points, dtype(-np.inf))
    points = np.concatenate([points, away, toward, [dtype(np.inf)]]).astype(dtype)
    points = points[(points == 0) | (np.abs(points) >= SMALLEST_NORMAL)]
    return np.concatenate([points, -points])


def rounded(x, name):
    """`round_to_format` of a numpy array, compiled for one length and any format."""
    padded = np.zeros(-(-x.size // PADDED) * PADDED, x.dtype)
    padded[: x.size] = x
    return np.asarray(round_jitted(padded, aqs.numeric_format(name)))[: x.size]


def assert_same_bits(actual, expected):
    unsigned = f"uint{8 * actual.dtype.itemsize}"
    assert actual.dtype == expected.dtype
    different = actual.view(unsigned) != expected.view(unsigned)
    assert not different.any(), (actual[different][:5], expected[different][:5])


# --- Exhaustive -----------------------------------------------------------------------------------

# Values compared bit for bit with ml_dtypes, at least: all codes, ties, neighbours, both signs.
EXACT_COUNTS = {
    "e4m3": 3000, "e5m2": 2900, "e3m4": 2700, "e2m1": 200, "e2m3": 750, "e3m2": 750,
    "bf16": 700_000, "fp16": 700_000,
}  # fmt: skip


def clipped_through(dtype, x):
    """x as ml_dtypes rounds it; clipped first, as ml_dtypes overflows to infinity or NaN."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -largest, largest).astype(dtype).astype(np.float32)


@pytest.mark.parametrize("name", EXACT_COUNTS)
def test_every_code_and_tie_is_bit_exact_against_ml_dtypes(name):
    dtype = ML_DTYPES[name]
    if name in ("bf16", "fp16"):
        codes = all_codes(dtype).astype(np.float32)
        grid = np.unique(codes[np.isfinite(codes)])
    else:
        grid = float_grid(name)
    x = hard_inputs(grid)
    assert x.size >= EXACT_COUNTS[name]
    assert_same_bits(rounded(x, name), clipped_through(dtype, x))


# At least 10 inputs for each of the 2^bits codes.
@pytest.mark.parametrize("name", INTEGERS)
def test_every_code_and_tie_equals_round_and_clip_for_integers(name):
    grid = integer_grid(name)
    x = hard_inputs(grid)
    assert x.size >= 10 * grid.size
    expected = np.clip(np.rint(x.astype(np.float64)), grid[0], grid[-1])
    np.testing.assert_array_equal(rounded(x, name), expected)


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_every_float_format_of_8_bits_or_fewer_finds_the_nearest_value(name):
    grid = float_grid(name)
    x = hard_inputs(grid)
    assert x.size >= 10 * grid.size
    expected = nearest_on_grid(x, grid).astype(np.float32)
    assert_same_bits(rounded(x, name), np.copysign(expected, x))


@pytest.mark.parametrize("name", [*ML_DTYPES, "int4", "uint8", "e6m1", "e2m0"])
def test_random_bit_patterns(name):
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) >= SMALLEST_NORMAL)]
    if name in ML_DTYPES:
        assert_same_bits(rounded(x, name), clipped_through(ML_DTYPES[name], x))
    else:
        np.testing.assert_array_equal(rounded(x, name), nearest_on_grid(x, grid_of(name)))


@pytest.mark.parametrize("name", [*INTEGERS, *SMALL_FLOATS])
def test_codes_list_the_grid(name):
    values = code_values(name)
    assert values.shape == (2 ** aqs.numeric_format(name).bits,)
    np.testing.assert_array_equal(np.unique(values[~np.isnan(values)]), grid_of(name))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m4", "e2m1", "e2m3", "e3m2"])
def test_codes_are_the_bits_of_ml_dtypes(name):
    values = code_values(name)
    codes = np.arange(values.size, dtype=np.uint8).view(ML_DTYPES[name]).astype(np.float32)
    finite = np.isfinite(codes)
    assert_same_bits(values[finite], codes[finite])
    assert np.isnan(values[~finite]).all()


@pytest.mark.parametrize("name", ALL_NAMES)
def test_infinity_saturates_and_nan_stays(name):
    fmt = aqs.numeric_format(name)
    y = rounded(np.array([np.inf, -np.inf, np.nan, 0.0], np.float32), name)
    np.testing.assert_array_equal(y, [fmt.max_value, fmt.min_value, np.nan, 0.0])


# --- Other input types ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*INTEGERS, *SMALL_FLOATS])
def test_float64_is_rounded_in_float64(name):
    grid = grid_of(name)
    x = hard_inputs(grid, np.float64)
    with jax.enable_x64(True):
        y = rounded(x, name)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, nearest_on_grid(x, grid))


def test_float64_ignores_what_float32_cannot_see():
    with jax.enable_x64(True):
        y = aqs.round_to_format(np.array([2.5 + 2.0**-40, 2.5, 1e-310, -1e300]), "int8")
    np.testing.assert_array_equal(y, [3, 2, 0, -127])


@pytest.mark.parametrize("name", [*ML_DTYPES, "int8", "uint8"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_16_bit_input(name, dtype):
    x = all_codes(dtype)
    wide = x.astype(np.float32)
    keep = ~np.isnan(wide) & ((wide == 0) | (np.abs(wide) >= SMALLEST_NORMAL))
    x, wide = x[keep], wide[keep]
    y = rounded(x, name)
    assert y.dtype == dtype
    if name in ML_DTYPES:
        expected = clipped_through(ML_DTYPES[name], wide)
    else:
        expected = nearest_on_grid(wide, integer_grid(name))
    with np.errstate(over="ignore"):  # bf16's largest value is infinite in float16
        np.testing.assert_array_equal(y, expected.astype(dtype))


@pytest.mark.parametrize("name", ["bf16", "fp32", "e8m1", "e8m10", "fp16", "int8", "e4m3"])
def test_tiny_values_are_kept_or_flushed_never_nan(name):
    x = np.arange(1, 2**23, 2**23 // 4000, dtype=np.uint32).view(np.float32)  # subnormals
    x = np.concatenate([x, -x])
    y = rounded(x, name)
    step = {"bf16": 2.0**-133, "fp32": 2.0**-149, "e8m1": 2.0**-127, "e8m10": 2.0**-136}.get(name)
    # numpy computes on subnormals; a backend may flush them, and then the result is zero.
    exact = np.float64(0) if step is None else np.rint(x.astype(np.float64) / step) * step
    assert np.all((y == 0) | (y == exact))


@pytest.mark.parametrize("name", ["bf16", "fp32", "e8m1"])
def test_smallest_normal_numbers_of_wide_formats(name):
    x = SMALLEST_NORMAL * np.array([1, 1.25, 1.5, 1.75, 2, 2.5, 3], np.float32)
    step = 2.0 ** -(126 + aqs.numeric_format(name).mantissa_bits)
    double = np.where(x < 2 * SMALLEST_NORMAL, step, 2 * step)
    np.testing.assert_array_equal(rounded(x, name), np.rint(x / double) * double)


def test_fp32_is_the_identity():
    bits = np.random.default_rng(1).integers(0, 2**32, 1 << 14, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) >= SMALLEST_NORMAL)]
    assert_same_bits(rounded(x, "fp32"), x)


# --- Gradient -------------------------------------------------------------------------------------


def test_gradient_is_one_inside_the_range_and_zero_outside():
    x = jnp.array([-8.0, -7.0, -0.3, 0.0, 6.9, 7.0, 7.01, 100.0])
    gradient = jax.grad(lambda x: aqs.round_to_format(x, "int4").sum())(x)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 1, 1, 0, 0])
    _, tangent = jax.jvp(lambda x: aqs.round_to_format(x, "int4"), (x,), (jnp.full(8, 3.0),))
    np.testing.assert_array_equal(tangent, 3 * gradient)


# --- Formats as data ------------------------------------------------------------------------------


def test_one_compilation_serves_all_formats():
    traces = []

    @jax.jit
    def round_counted(x, fmt):
        traces.append(None)
        return aqs.round_to_format(x, fmt)

    x = np.linspace(-10, 10, 101, dtype=np.float32)
    for name in ALL_NAMES:
        y = round_counted(x, aqs.numeric_format(name))
        np.testing.assert_array_equal(y, aqs.round_to_format(x, name))
    assert len(traces) == round_counted._cache_size() == 1


def test_vmap_and_scan_over_a_table_equal_the_loop():
    x = jnp.linspace(-10, 10, 101)
    loop = np.stack([aqs.round_to_format(x, name) for name in ALL_NAMES])
    table = aqs.stack_formats(ALL_NAMES)
    np.testing.assert_array_equal(jax.vmap(aqs.round_to_format, (None, 0))(x, table), loop)
    _, scanned = jax.lax.scan(lambda c, fmt: (c, aqs.round_to_format(x, fmt)), None, table)
    np.testing.assert_array_equal(scanned, loop)

    @jax.jit
    def pick(table, index):
        return aqs.round_to_format(x, jax.tree.map(lambda column: column[index], table))

    np.testing.assert_array_equal(np.stack([pick(table, i) for i in range(len(loop))]), loop)


def test_fields_broadcast_against_the_array():
    table = aqs.stack_formats(["int4", "e4m3"])
    by_row = jax.tree.map(lambda column: column[:, None], table)
    x = jnp.stack([jnp.linspace(-10, 10, 33)] * 2)
    y = aqs.round_to_format(x, by_row)
    for row, name in enumerate(["int4", "e4m3"]):
        np.testing.assert_array_equal(y[row], aqs.round_to_format(x[row], name))


def test_a_format_is_a_pytree_of_five_scalars():
    fmt = aqs.numeric_format("int4")
    assert jax.tree.leaves(fmt) == [2, 2, -7.0, 7.0, 4]
    table = aqs.stack_formats(["int4", fmt, "bf16"])
    assert [leaf.shape for leaf in table] == [(3,)] * 5
    assert [leaf.dtype for leaf in table] == [np.int32, np.int32, np.float32, np.float32, np.int32]


# --- Names ----------------------------------------------------------------------------------------


# The table of the design page.
@pytest.mark.parametrize(
    "name, fields",
    [
        ("int4", (2, 2, -7, 7, 4)),
        ("uint4", (3, 3, 0, 15, 4)),
        ("e4m3", (3, -6, -448, 448, 8)),
        ("e2m1", (1, 0, -6, 6, 4)),
        ("bf16", (7, -126, -3.3895313892515355e38, 3.3895313892515355e38, 16)),
        ("fp16", (10, -14, -65504, 65504, 16)),
        ("fp32", (23, -126, -3.4028234663852886e38, 3.4028234663852886e38, 32)),
    ],
)
def test_named_formats(name, fields):
    assert aqs.numeric_format(name) == fields
    assert aqs.numeric_format(aqs.numeric_format(name)) == fields


@pytest.mark.parametrize("alias, name", [("e8m7", "bf16"), ("e5m10", "fp16"), ("e8m23", "fp32")])
def test_named_floats_are_exmy(alias, name):
    assert aqs.numeric_format(alias) == aqs.numeric_format(name)


@pytest.mark.parametrize("name, largest", [("e3m4", 15.5), ("e5m2", 57344), ("e3m2", 28)])
def test_largest_values(name, largest):
    assert (
        aqs.numeric_format(name).max_value == largest == float(ml_dtypes.finfo(ML_DTYPES[name]).max)
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("int9", r"Unknown format 'int9'.*Did you mean .*int"),
        ("int1", "Unknown format 'int1'"),
        ("uint16", "Unknown format 'uint16'"),
        ("e4m3fn", r"Unknown format 'e4m3fn'.*Did you mean e4m3"),
        ("bfloat16", r"Unknown format 'bfloat16'.*bf16"),
        ("INT8", "Unknown format 'INT8'"),
        ("", r"Unknown format ''.*expected int2\.\.int8, uint1\.\.uint8, eXmY"),
        ("e1m2", "'e1m2' is out of range: eXmY takes 2 to 8 exponent bits"),
        ("e9m2", "'e9m2' is out of range"),
        ("e5m24", "'e5m24' is out of range.*0 to 23 mantissa"),
        ("e8m0", "'e8m0' is out of range.*e8m0 is a type of scales"),
        (8, "A format is a name such as 'int4' or 'e4m3', or a NumericFormat; got 8"),
        (None, "got None"),
    ],
)
def test_wrong_names_say_what_was_expected(name, message):
    with pytest.raises(aqs.FormatError, match=message):
        aqs.numeric_format(name)


def test_wrong_arguments():
    with pytest.raises(aqs.FormatError, match="at least one format"):
        aqs.stack_formats([])
    with pytest.raises(aqs.FormatError, match="'int0'"):
        aqs.stack_formats(["int8", "int0"])
    with pytest.raises(TypeError, match=r"round_to_format expects a floating-point.*int32"):
        aqs.round_to_format(jnp.arange(3), "int4")
    with pytest.raises(aqs.FormatError, match="at most 8 bits; this one has 16"):
        code_values("bf16")


@pytest.mark.parametrize("transform", [jax.jit, functools.partial(jax.vmap, in_axes=0)])
def test_a_format_may_be_closed_over_or_named(transform):
    x = jnp.linspace(-3, 3, 7)
    expected = aqs.round_to_format(x, "e2m1")
    np.testing.assert_array_equal(transform(lambda x: aqs.round_to_format(x, "e2m1"))(x), expected)
