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
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
from aqt_search.numerics.outline import outline, where
from aqt_search.products.measured_facts import Work, facts_about

Execution = str | Mapping[str, str]  # of all sites, or by site
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
    smallest: float


_LARGEST_BF16 = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
_LIMITS = {
    _INT8: _Limits(8, 0, 127.0, -127.0),
    _SHIFTED: _Limits(8, 0, 255.0, 0.0),
    _E4M3: _Limits(4, -9, 448.0, -448.0),
    _E5M2: _Limits(3, -16, 57344.0, -57344.0),
    _BF16: _Limits(8, -133, _LARGEST_BF16, -_LARGEST_BF16),
}


def accumulator(carrier: Carrier) -> np.dtype:
    """The dtype products of a carrier are summed in."""
    return np.dtype(np.int32 if carrier.dtype == np.int8 else np.float32)


def _holds(carrier: Carrier, fmt: NumericFormat) -> bool:
    limits = _LIMITS[carrier]
    scaled = not bool(is_unscaled(fmt)) or carrier == _BF16
    return (
        scaled
        and int(fmt.mantissa_bits) < limits.significant_bits
        and int(fmt.min_exponent) - int(fmt.mantissa_bits) >= limits.smallest_exponent
        and limits.smallest <= float(fmt.min_value)
        and float(fmt.max_value) <= limits.largest
    )


def does_not_fit(carrier: Carrier, grid: Grid) -> jax.Array:
    """Whether the carrier cannot hold every code of a (traced) format."""
    limits = _LIMITS[carrier]
    dtype = grid.step.dtype.type
    return (
        (grid.steps > dtype(2.0 ** (limits.significant_bits - 1)))
        | (grid.min_power * grid.step < dtype(2.0**limits.smallest_exponent))
        | (grid.max_value > dtype(limits.largest))
        | (grid.min_value < dtype(limits.smallest))
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


def holding(formats: Sequence[NumericFormat]) -> Carrier | None:
    """The narrowest carrier of the codes of all these formats; None if there is none."""
    known = [] if any(map(is_traced, formats)) else formats
    fitting = (c for c in _LIMITS if known and all(_holds(c, fmt) for fmt in known))
    return next(fitting, None)


def fastest(work: Work, formats: Sequence[NumericFormat]) -> str:
    """The execution that `auto` takes: what is known to be fastest, "emulated" where unknown."""
    if any(is_traced(fmt) for fmt in formats):
        return "emulated"
    known = (fact.execution for fact in facts_about(work) if fact.ratio < 1)
    return next((name for name in known if _family(name, formats)), "emulated")


def check_execution(execution: Execution) -> None:
    """Raises ValueError for an unknown execution, of all sites or of one."""
    by_site = execution if isinstance(execution, Mapping) else {"": execution}
    if "executions" in by_site and "milliseconds" in by_site:
        raise ValueError(
            'execution is a whole record of measure_executions: expected its record["executions"].'
        )
    for name, own in by_site.items():
        if own not in EXECUTIONS:
            of = f" of site {name!r}" if name else ""
            raise ValueError(
                f"Unknown execution {own!r}{of}: expected one of {', '.join(EXECUTIONS)}, or a"
                " mapping of sites to these."
            )


NOT_A_NUMBER = -128  # the one number of int8 that no symmetric format has


def encode_carrier(codes: jax.Array, carrier: Carrier) -> jax.Array:
    """Codes as the carrier's numbers; what becomes of NaN in int8 `bad_sums` tells."""
    if carrier.shift:
        codes = codes - codes.dtype.type(carrier.shift)
    elif carrier.dtype == np.int8:
        codes = where(jnp.isnan(codes), NOT_A_NUMBER, codes)
    return codes.astype(carrier.dtype)


def bad_sums(
    encoded: jax.Array, codes: jax.Array, carrier: Carrier, axes: Sequence[int]
) -> jax.Array:
    """Which sums over `axes` have a NaN among them, of codes that int8 carries; axes are kept.

    The carrier's numbers are read where one of them is free to say so: a fourth of the bytes.
    """
    if carrier.shift:
        return jnp.isnan(jnp.max(codes, axes, keepdims=True, initial=0))
    return _least(encoded, tuple(axes)) == NOT_A_NUMBER


@functools.partial(outline, static_argnums=(1,))
def _least(encoded: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Outlined, so that it reads the codes and does not round anew."""
    return jnp.min(encoded, axes, keepdims=True, initial=0)
