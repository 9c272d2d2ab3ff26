"""Numeric formats as data: every integer and float format is a grid fixed by five numbers.

A float grid with `m` mantissa bits has the spacing `ulp = 2^(e - m)` for `2^e <= |x| < 2^(e+1)`,
and keeps the spacing of its smallest exponent below that (the subnormals). An integer grid is the
float grid whose exponent never moves: `min_exponent = mantissa_bits`, so `ulp = 1` everywhere. One
rounding rule therefore serves all formats, and a format can be traced, stacked, vmapped and
checkpointed like any array.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

# Half to even; up with the probability of the remainder, so right in the mean; towards -infinity.
ROUNDINGS = ("nearest_even", "stochastic", "floor")
# A scale adds nothing to a grid whose exponents already span this many powers of two.
_WIDE_MAX_VALUE = 2.0**64


class FormatError(ValueError):
    """A format name or specification that cannot be understood."""


class NumericFormat(NamedTuple):
    """The grid of a numeric format; each field is a number or an array (a stack of formats).

    The grid holds `k * 2^(e - mantissa_bits)` for integers `|k| < 2^(mantissa_bits + 1)` and
    exponents `e >= min_exponent`, cut to `[min_value, max_value]`.
    """

    mantissa_bits: int | np.ndarray | jax.Array  # [...], int32: explicit, after the leading one
    min_exponent: int | np.ndarray | jax.Array  # [...], int32: of the smallest normal number
    min_value: float | np.ndarray | jax.Array  # [...], float32
    max_value: float | np.ndarray | jax.Array  # [...], float32
    bits: int | np.ndarray | jax.Array  # [...], int32: storage width in bits


def _integer_format(bits: int, signed: bool) -> NumericFormat:
    magnitude_bits = bits - 1 if signed else bits
    largest = float(2**magnitude_bits - 1)
    exponent = magnitude_bits - 1
    return NumericFormat(exponent, exponent, -largest if signed else 0.0, largest, bits)


def _float_format(exponent_bits: int, mantissa_bits: int) -> NumericFormat:
    """Returns the grid of sign, exponent and mantissa bits, with the usual rules for top codes.

    Below 8 bits every code is a number (OCP Microscaling). From 8 bits on the top exponent is kept
    for infinity and NaN (IEEE 754), except e4m3, which gives up only its very last code (OCP FP8).
    """
    bits = 1 + exponent_bits + mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    top_exponent = 2**exponent_bits - 1 - bias
    top_mantissa = 2.0 - 2.0**-mantissa_bits
    if (exponent_bits, mantissa_bits) == (4, 3):
        top_mantissa -= 2.0**-mantissa_bits
    elif bits >= 8:
        top_exponent -= 1
    largest = top_mantissa * 2.0**top_exponent
    return NumericFormat(mantissa_bits, 1 - bias, -largest, largest, bits)


_NAMED_FLOATS = {"bf16": (8, 7), "fp16": (5, 10), "fp32": (8, 23)}
_INTEGER_NAME = re.compile(r"(u?)int([2-8])|(u)int1")
_FLOAT_NAME = re.compile(r"e(\d+)m(\d+)")
_EXAMPLE_NAMES = tuple(
    [f"{u}int{b}" for u in ("", "u") for b in range(2, 9)]
    + ["uint1", "e2m1", "e2m3", "e3m2", "e4m3", "e5m2", *_NAMED_FLOATS]
)


def numeric_format(name: str | NumericFormat) -> NumericFormat:
    """Returns the format called `name`.

    Names: `int2` .. `int8` (symmetric: int4 spans -7 .. 7), `uint1` .. `uint8`, `eXmY` with X in
    2 .. 8 exponent bits and Y in 0 .. 23 mantissa bits beside a sign bit, `bf16` (e8m7), `fp16`
    (e5m10) and `fp32` (e8m23). `e4m3` is OCP's e4m3fn (largest value 448), `e2m1`, `e2m3` and
    `e3m2` are OCP Microscaling's; other eXmY of 8 bits or more follow IEEE 754, narrower ones use
    every code as a number. A `NumericFormat` is returned as it is.

    Raises:
      FormatError: the name is not one of these; the message shows the nearest names.
    """
    if isinstance(name, NumericFormat):
        return name
    if not isinstance(name, str):
        raise FormatError(
            f"A format is a name such as 'int4' or 'e4m3', or a NumericFormat; got {name!r}."
        )
    if match := _INTEGER_NAME.fullmatch(name):
        return _integer_format(int(match[2] or 1), signed=not (match[1] or match[3]))
    if name in _NAMED_FLOATS:
        return _float_format(*_NAMED_FLOATS[name])
    if match := _FLOAT_NAME.fullmatch(name):
        exponent_bits, mantissa_bits = int(match[1]), int(match[2])
        in_range = 2 <= exponent_bits <= 8 and mantissa_bits <= 23
        if in_range and (exponent_bits, mantissa_bits) != (8, 0):
            return _float_format(exponent_bits, mantissa_bits)
        raise FormatError(
            f"Format {name!r} is out of range: eXmY takes 2 to 8 exponent bits and 0 to 23 mantissa"
            " bits, as its values are emulated in float32 (e8m0 is a type of scales, not a format)."
        )
    near = difflib.get_close_matches(name, _EXAMPLE_NAMES, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise FormatError(
        f"Unknown format {name!r}: expected int2..int8, uint1..uint8, eXmY (such as e4m3 or e2m1),"
        f" bf16, fp16 or fp32.{hint}"
    )


@overload
def format_name(fmt: NumericFormat) -> str: ...


@overload
def format_name(fmt: None) -> None: ...


def format_name(fmt: NumericFormat | None) -> str | None:
    """The name `numeric_format` knows a concrete format by; None stays None.

    Raises:
      FormatError: the format is none of the named ones.
    """
    if fmt is None:
        return None
    bits, mantissa_bits = int(fmt.bits), int(fmt.mantissa_bits)
    candidates = [f"int{bits}", f"uint{bits}"] if bits <= 8 else []
    candidates += [*_NAMED_FLOATS, f"e{bits - 1 - mantissa_bits}m{mantissa_bits}"]
    for name in candidates:
        with contextlib.suppress(FormatError):
            if all(a == b for a, b in zip(numeric_format(name), fmt)):
                return name
    raise FormatError(f"{fmt} is none of the named formats.")


def stack_formats(formats: Sequence[str | NumericFormat]) -> NumericFormat:
    """Stacks n formats into a table: one `NumericFormat` whose fields have shape [n].

    `jax.tree.map(lambda column: jnp.asarray(column)[i], table)` is format i again; `i` may be
    traced.
    """
    if not formats:
        raise FormatError("stack_formats needs at least one format; got an empty sequence.")
    rows = [numeric_format(f) for f in formats]
    columns = [np.stack([np.asarray(v) for v in column]) for column in zip(*rows)]
    dtypes = (np.int32, np.int32, np.float32, np.float32, np.int32)
    return NumericFormat(*(c.astype(d) for c, d in zip(columns, dtypes)))


def is_unscaled(fmt: NumericFormat) -> bool | np.ndarray | jax.Array:
    """Whether `fmt` is used with scale 1: formats of 16 bits or more, or with e8mY's range."""
    return (fmt.bits >= 16) | (fmt.max_value >= _WIDE_MAX_VALUE)


def is_traced(fmt: NumericFormat) -> bool:
    """Whether a field of the format is known only when the program runs."""
    return any(isinstance(field, jax.core.Tracer) for field in fmt)


def is_integer(fmt: NumericFormat) -> bool | np.ndarray | jax.Array:
    """Whether the format's grid has one spacing everywhere: its exponent never moves."""
    # e2m0, the powers of two up to 4, is the one float grid whose two numbers agree as well.
    return (fmt.mantissa_bits == fmt.min_exponent) & ((fmt.mantissa_bits > 0) | (fmt.max_value < 2))


def is_known_integer(fmt: NumericFormat) -> bool:
    """Whether the format is an integer one, and that is known before the program runs."""
    # In numpy: numbers on a device would make this one more step of a program being traced.
    return not is_traced(fmt) and bool(np.all(is_integer(NumericFormat(*map(np.asarray, fmt)))))


def unsigned_twin(fmt: NumericFormat) -> NumericFormat:
    """The format of as many bits without a sign: int4 to uint4; formats other than intN stay.

    Chosen by data, so it serves traced formats.
    """
    twin = is_integer(fmt) & (fmt.min_value < 0)
    more = twin * 1
    return NumericFormat(
        fmt.mantissa_bits + more,
        fmt.min_exponent + more,
        fmt.min_value * (1 - more),
        fmt.max_value * (1 + more) + more,
        fmt.bits,
    )


def _exponent_mask(dtype: np.dtype) -> np.integer:
    """The bits of the exponent field of a float32 or float64."""
    info = np.finfo(dtype)
    return np.dtype(f"int{info.bits}").type((info.maxexp * 2 - 1) << info.nmant)


def leading_power(x: jax.Array) -> jax.Array:
    """2^floor(log2|x|) for normal numbers, 0 below them: the exponent bits alone, exact."""
    mask = _exponent_mask(x.dtype)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, mask.dtype) & mask, x.dtype)


def _twice_inverse(power: jax.Array) -> jax.Array:
    """2 / power for powers of two: exact, a normal number for every normal one, and no division."""
    info, integer = np.finfo(power.dtype), _exponent_mask(power.dtype).dtype
    field = integer.type((2 * info.maxexp - 1) << info.nmant)
    return jax.lax.bitcast_convert_type(
        field - jax.lax.bitcast_convert_type(power, integer), power.dtype
    )


def _power_of_two(exponent: jax.typing.ArrayLike, dtype: np.dtype) -> jax.Array:
    """2^exponent for exponents of normal numbers, written straight into the exponent field."""
    info, integer = np.finfo(dtype), _exponent_mask(dtype).dtype
    field = (jnp.asarray(exponent, integer) + integer.type(info.maxexp - 1)) << integer.type(
        info.nmant
    )
    return jax.lax.bitcast_convert_type(field, dtype)


class Grid(NamedTuple):
    """A format as its arithmetic needs it: floats of the carrier's dtype, each exact.

    The fields are scalars, or broadcast against what is rounded. `as_grid` makes one.
    """

    min_value: jax.Array
    max_value: jax.Array
    min_power: jax.Array  # 2^min_exponent
    steps: jax.Array  # 2^mantissa_bits: steps of the grid from one power of two to the next
    step: jax.Array  # 2^-mantissa_bits
    inverse_max: jax.Array  # 1 / max_value
    unscaled: jax.Array  # 1 if the format is used with scale 1, else 0


def as_grid(fmt: NumericFormat, dtype: np.dtype) -> Grid:
    """The grid of a format for carriers of `dtype`, float32 or float64."""
    low, high = (jnp.asarray(v, dtype) for v in (fmt.min_value, fmt.max_value))
    mantissa_bits = jnp.asarray(fmt.mantissa_bits)
    return Grid(
        low, high, _power_of_two(fmt.min_exponent, dtype), _power_of_two(mantissa_bits, dtype),
        _power_of_two(-mantissa_bits, dtype), 1 / high, jnp.asarray(is_unscaled(fmt), dtype),
    )  # fmt: skip


def known_format(formats: Sequence[NumericFormat]) -> NumericFormat | None:
    """The one that all of these are, in numbers of Python; None if they differ or are traced."""
    if any(isinstance(n, jax.core.Tracer) or np.ndim(n) for fmt in formats for n in fmt):
        return None
    found = {NumericFormat(*(np.asarray(field).item() for field in fmt)) for fmt in formats}
    return found.pop() if len(found) == 1 else None


@functools.cache
def known_grid(fmt: NumericFormat, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """The numbers of `as_grid` for a `known_format`, which a program may be built with."""
    with jax.ensure_compile_time_eval():
        return tuple(map(np.asarray, as_grid(fmt, dtype)))


def _round_steps(steps: jax.Array, rounding: str, random: jax.Array | None) -> jax.Array:
    if rounding == "nearest_even":
        return jax.lax.round(steps, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    floor = jax.lax.floor(steps)
    if rounding == "floor":
        return floor
    assert random is not None  # "stochastic" takes it
    # The remainder is exact, so a value on the grid stays there for any random number below 1.
    return floor + (random < steps - floor).astype(steps.dtype)


def round_to_grid(
    x: jax.Array,
    grid: Grid,
    rounding: str = "nearest_even",
    random: jax.Array | None = None,
    *,
    integer: bool = False,
) -> jax.Array:
    """The rule of `round_to_format` on a float32 or float64 array, with no gradient rule.

    Args:
      x, grid: what is rounded, and to what.
      rounding: one of `ROUNDINGS`.
      random: uniform in [0, 1), of x's shape; "stochastic" takes it.
      integer: whether the grid is known to be `is_integer`. Its steps are 1, so that the same
        numbers come of rounding alone.
    """
    # The limits lie on the grid, so clipping first changes nothing and takes care of infinity.
    clipped = jnp.minimum(jnp.maximum(x, grid.min_value), grid.max_value)
    if integer:
        return _round_steps(clipped, rounding, random)
    power = jnp.maximum(leading_power(clipped), grid.min_power)
    # ulp = power * step may lie below the smallest normal number, which backends flush to zero;
    # the power and the step, applied one after the other, never do.
    steps = clipped * _twice_inverse(power) * (0.5 * grid.steps)
    steps = _round_steps(steps, rounding, random)
    return steps * grid.step * power


@jax.custom_jvp
def _round_straight_through(x: jax.Array, fmt: NumericFormat) -> jax.Array:
    return round_to_grid(x, as_grid(fmt, x.dtype))


@_round_straight_through.defjvp
def _round_straight_through_jvp(primals, tangents):
    x, fmt = primals
    inside = (x >= fmt.min_value) & (x <= fmt.max_value)
    return _round_straight_through(x, fmt), jnp.where(inside, tangents[0], 0)


def round_to_format(x: jax.typing.ArrayLike, fmt: str | NumericFormat) -> jax.Array:
    """Rounds `x` to the nearest value of the format's grid, without any scale.

        e = max(floor(log2|x|), min_exponent);  ulp = 2^(e - mantissa_bits)
        y = clip(round_half_even(x / ulp) * ulp, min_value, max_value)

    Values beyond the range saturate, infinities too; NaN stays NaN. The gradient is that of x
    inside `[min_value, max_value]` and zero outside. float32 and float64 are rounded as they are,
    bfloat16 and float16 through float32. A float32 subnormal rounds to zero where the backend
    flushes subnormals (XLA on CPU does).

    Args:
      x: any shape, floating point.
      fmt: a name or a `NumericFormat`, whose fields broadcast against `x`; may be traced.

    Returns:
      An array of x's shape and dtype.

    Raises:
      FormatError: unknown format name.
      TypeError: x is not floating point.
    """
    x = floating_array(x, "round_to_format")
    fmt = numeric_format(fmt)
    carrier = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    return _round_straight_through(carrier, fmt).astype(x.dtype)


def floating_array(x: jax.typing.ArrayLike, caller: str) -> jax.Array:
    """Returns `x` as an array, or raises a TypeError that names the caller."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{caller} expects a floating-point array; got dtype {x.dtype}. Convert it first."
        )
    return x


def code_values(fmt: str | NumericFormat) -> np.ndarray:
    """Every value of a format of 8 bits or fewer in the order of its codes, float32 of shape [n].

    A code is sign and magnitude: code c < 2^(bits-1) (2^bits if unsigned) has exponent field
    `c >> m` and fraction `c & (2^m - 1)` as in IEEE 754; the sign bit on top negates it. Codes that
    a format keeps for infinity or NaN are NaN here. Sign and magnitude serve integers, too.
    """
    fmt = numeric_format(fmt)
    if fmt.bits > 8:
        raise FormatError(f"code_values lists formats of at most 8 bits; this one has {fmt.bits}.")
    mantissa_bits, min_exponent, bits = map(int, (fmt.mantissa_bits, fmt.min_exponent, fmt.bits))
    min_value, max_value = float(fmt.min_value), float(fmt.max_value)
    codes = np.arange(2 ** (bits if min_value == 0 else bits - 1))
    field, fraction = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
    significand = fraction + np.where(field > 0, 2**mantissa_bits, 0)
    exponent = np.maximum(field - 1, 0) + min_exponent - mantissa_bits
    magnitude = np.ldexp(significand.astype(np.float64), exponent)
    magnitude[magnitude > max_value] = np.nan
    signed = magnitude if min_value == 0 else np.concatenate([magnitude, -magnitude])
    return signed.astype(np.float32)


def codes_of(x: jax.Array, fmt: NumericFormat) -> jax.Array:
    """The code (uint8, see `code_values`) of every element of `x`, which must lie on the grid."""
    m, min_exponent = int(fmt.mantissa_bits), int(fmt.min_exponent)
    power = jnp.maximum(leading_power(x), _power_of_two(min_exponent, x.dtype))
    steps = (jnp.abs(x) / power * 2.0**m).astype(np.int32)
    # frexp's fraction lies in [1/2, 1), hence the 1 between its exponent and log2(power).
    magnitude = ((jnp.frexp(power)[1] - 1 - min_exponent) << m) + steps
    sign = jnp.signbit(x) & (fmt.min_value < 0)
    return (magnitude + (sign.astype(np.int32) << (fmt.bits - 1))).astype(jnp.uint8)
