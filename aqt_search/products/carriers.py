"""Carriers: the dtypes that hold codes in native products, and which one a product should use.

    carrier   codes of                                     accumulates in
    int8      integer formats of 8 bits or fewer           int32
    fp8       e4m3 (or e5m2): floats and integers within   float32
    bf16      every format of 8 bits or fewer, bf16        float32

A bfloat16 number has 8 significant bits, so it holds any code of 8 bits or fewer exactly, integer
or float, and a product of two of them is exact in float32. One carrier therefore serves formats
that are traced.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from aqt_search.numerics.formats import (
    FormatError,
    Grid,
    NumericFormat,
    format_name,
    is_traced,
    is_unscaled,
)
from aqt_search.numerics.symbolic import certainly

EXECUTIONS = ("emulated", "native", "auto", "int8", "fp8", "bf16")


class Carrier(NamedTuple):
    """How the codes of one operand are held: as `dtype` numbers of `code - shift`."""

    dtype: np.dtype
    shift: int = 0


_INT8 = Carrier(np.dtype(np.int8))
_SHIFTED = Carrier(np.dtype(np.int8), 128)  # uint8
_E4M3 = Carrier(np.dtype(ml_dtypes.float8_e4m3fn))
_E5M2 = Carrier(np.dtype(ml_dtypes.float8_e5m2))
_BF16 = Carrier(np.dtype(ml_dtypes.bfloat16))
_FAMILIES = {"int8": (_INT8, _SHIFTED), "fp8": (_E4M3, _E5M2), "bf16": (_BF16,)}


class _Limits(NamedTuple):
    significant_bits: int
    smallest_exponent: int  # of the last bit
    largest: float


_LIMITS = {
    _INT8: _Limits(8, 0, 127.0),
    _SHIFTED: _Limits(8, 0, 255.0),
    _E4M3: _Limits(4, -9, 448.0),
    _E5M2: _Limits(3, -16, 57344.0),
    _BF16: _Limits(8, -133, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
}


def accumulator(carrier: Carrier) -> np.dtype:
    """The dtype products of a carrier are summed in."""
    return np.dtype(np.int32 if carrier.dtype == np.int8 else np.float32)


def _holds(carrier: Carrier, fmt: NumericFormat) -> bool:
    limits = _LIMITS[carrier]
    scaled = not bool(is_unscaled(fmt)) or carrier == _BF16
    unsigned = int(fmt.min_value) == 0
    return (
        scaled
        and int(fmt.mantissa_bits) < limits.significant_bits
        and int(fmt.min_exponent) - int(fmt.mantissa_bits) >= limits.smallest_exponent
        and float(fmt.max_value) <= limits.largest
        and (carrier != _SHIFTED or unsigned)
    )


def does_not_fit(carrier: Carrier, grid: Grid) -> jax.Array:
    """Whether the carrier cannot hold every code of a (traced) format."""
    limits = _LIMITS[carrier]
    dtype = grid.step.dtype.type
    return (
        (grid.steps > dtype(2.0 ** (limits.significant_bits - 1)))
        | (grid.min_power * grid.step < dtype(2.0**limits.smallest_exponent))
        | (grid.max_value > dtype(limits.largest))
        | ((grid.min_value < 0) if carrier.shift else False)
    )


def _family(
    name: str, formats: Sequence[NumericFormat], alike: bool = False
) -> tuple[Carrier, ...] | None:
    """A carrier for each format out of one family; the family's first for a traced format."""
    found = []
    if alike and name == "fp8":
        traced = any(map(is_traced, formats))
        for carrier in _FAMILIES[name][: 1 if traced else None]:
            if all(is_traced(fmt) or _holds(carrier, fmt) for fmt in formats):
                return (carrier,) * len(formats)
        return None
    for fmt in formats:
        carriers = _FAMILIES[name]
        if is_traced(fmt):
            unsigned = not isinstance(fmt.min_value, jax.core.Tracer) and fmt.min_value == 0
            fitting = carriers[-1:] if unsigned and name == "int8" else carriers[:1]
        else:
            fitting = [c for c in carriers if _holds(c, fmt)]
        if not fitting:
            return None
        found.append(fitting[0])
    return tuple(found)


def carriers_of(
    execution: str, formats: Sequence[NumericFormat], alike: bool = False
) -> tuple[Carrier, ...]:
    """The carriers of a native product's operands.

    "native" takes the first of int8, fp8 and bf16 that holds both formats, and bf16 for traced
    ones.

    Raises:
      FormatError: no carrier, or not the one asked for, holds the formats.
    """
    if execution == "native":
        traced = any(is_traced(fmt) for fmt in formats)
        names = ("bf16",) if traced else ("int8", "fp8", "bf16")
    else:
        names = (execution,)
    for name in names:
        if found := _family(name, formats, alike):
            return found
    shown = " and ".join("a traced one" if is_traced(f) else format_name(f) for f in formats)
    raise FormatError(
        f"Execution {execution!r} cannot hold the formats {shown}: int8 takes integers of"
        " up to 8 bits, fp8 takes what e4m3 or e5m2 contain, bf16 takes formats of up to 8 bits and"
        " bf16. Use execution='emulated' here."
    )


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16 products (Linux; else unknown)."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Work(NamedTuple):
    """What the choice of an execution depends on; sizes may be symbolic."""

    kind: str  # of the layout
    rows: int  # output positions: batch and free axes of the left operand
    terms: int  # products summed per output
    columns: int  # output channels
    groups: int  # of a convolution; more than 1 for a dot with batch axes, too
    inputs: int  # input channels of a convolution per group


def fastest(work: Work, formats: Sequence[NumericFormat]) -> str:
    """The execution that `auto` takes: what was measured to be fastest, "emulated" where unknown.

    On CPU (two Zen 4 cores, jax 0.10.2, python -m benchmarks.quantized_ops): a dot with its
    quantization takes 0.63 times the float32 time in bf16, where the CPU multiplies bfloat16, and
    0.90 times in int8; an int8 convolution of 64 channels 0.51 times (without quantization, of 32
    channels 0.49 and of 16 channels 2.0 times). Other backends were not measured.
    """
    if jax.default_backend() != "cpu" or any(is_traced(fmt) for fmt in formats):
        return "emulated"
    if work.kind != "conv_general_dilated":
        sizes = work.rows, work.terms, work.columns
        if work.groups > 1 or not certainly(lambda: all(n >= 64 for n in sizes)):
            return "emulated"
        if _cpu_multiplies_bfloat16() and _family("bf16", formats):
            return "bf16"
        return "int8" if _family("int8", formats) else "emulated"
    wide = work.groups == 1 and certainly(lambda: work.inputs >= 32 and work.columns >= 32)
    return "int8" if wide and _family("int8", formats) else "emulated"


def check_execution(execution: str) -> None:
    """Raises ValueError for an unknown execution."""
    if execution not in EXECUTIONS:
        raise ValueError(
            f"Unknown execution {execution!r}: expected one of {', '.join(EXECUTIONS)}."
        )


def encode_carrier(codes: jax.Array, carrier: Carrier) -> jax.Array:
    """Codes as the carrier's numbers; what becomes of NaN in int8 is for their scale to say."""
    if carrier.shift:
        codes = codes - codes.dtype.type(carrier.shift)
    return codes.astype(carrier.dtype)
