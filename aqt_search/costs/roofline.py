"""Latency of an assignment on a chip by the roofline model, as a cost.

    latency = sum over sites of max(operations / rate, bytes / bandwidth)

(Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009.) A site takes as long as
the slower of its arithmetic and its memory traffic. docs/roofline.md says what this leaves out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.costs import cost
from aqt_search.numerics.formats import NumericFormat, is_integer, is_traced, numeric_format
from aqt_search.numerics.quantizer import quantizer
from aqt_search.tracing.layers import apart
from aqt_search.tracing.sites import Operand, Site, SiteError, SiteFormats


class Rates(NamedTuple):
    """Peak operations per second (a multiply-accumulate is two), dense, by type of the operands.

    None where a chip has no such unit, or none that is faster than the next wider one.
    """

    fp32: float
    fp16: float | None = None
    bf16: float | None = None
    fp8: float | None = None  # e4m3 and e5m2, in any combination
    fp4: float | None = None  # e2m1
    int8: float | None = None
    int4: float | None = None


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at best."""

    name: str
    bandwidth: float  # bytes per second from and to main memory
    rates: Rates

    def __post_init__(self):
        for what, value in {"bandwidth": self.bandwidth, **self.rates._asdict()}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"Chip {self.name!r} has {what}={value!r}: expected a positive number per"
                    " second, or None for a unit that it does not have."
                )


# NVIDIA H100 Tensor Core GPU data sheet and architecture white paper, SXM5, figures without
# sparsity. float32 runs outside of the tensor cores: TF32 (494.7e12) does not hold it exactly.
_HOPPER = Rates(fp32=66.9e12, fp16=989.4e12, bf16=989.4e12, fp8=1978.9e12, int8=1978.9e12)
# Google Cloud TPU documentation, pages "TPU v5e" and "TPU v5p"; int8 of v5p from its announcement
# (December 2023). float32 takes six bf16 passes (XLA's BF16_BF16_F32_X6). v5p runs fp8 at the rate
# of bf16, v5e has no fp8.
_TPU_V5E = Rates(fp32=197e12 / 6, bf16=197e12, int8=393e12)
_TPU_V5P = Rates(fp32=459e12 / 6, bf16=459e12, int8=918e12)
# Assumed, no product: int8 as in Coral's Edge TPU (data sheet: 4 TOPS), everything else on four
# small CPU cores (1.5 GHz x 8 float32 operations a cycle), 32 bits of LPDDR4-3200.
_EDGE_INT8 = Rates(fp32=48e9, int8=4e12)

CHIPS: Mapping[str, Chip] = {
    "h100": Chip("h100", 3.35e12, _HOPPER),  # SXM5, HBM3
    "h200": Chip("h200", 4.8e12, _HOPPER),  # H200 data sheet, SXM: H100's compute, HBM3e
    "tpu_v5e": Chip("tpu_v5e", 819e9, _TPU_V5E),
    "tpu_v5p": Chip("tpu_v5p", 2765e9, _TPU_V5P),
    "edge_int8": Chip("edge_int8", 12.8e9, _EDGE_INT8),
}

_INTEGER_BITS = {"int4": 4, "int8": 8}
_FLOAT_GRIDS = {"fp4": ["e2m1"], "fp8": ["e4m3", "e5m2"], "bf16": ["bf16"], "fp16": ["fp16"]}


def _format(site: Site, operand: Operand, spec) -> NumericFormat:
    """The format of an operand, or that of the dtype it has in the unquantized model."""
    if spec is not None:
        return quantizer(spec).fmt
    if not jnp.issubdtype(operand.dtype, jnp.floating):  # indices, which nothing is multiplied by
        return numeric_format("fp32")._replace(bits=8 * operand.dtype.itemsize)
    info = jnp.finfo(operand.dtype)
    if info.bits > 32:
        raise SiteError(
            f"Site {site.name!r} has an operand of {operand.dtype}, which no chip has a rate for."
            " Trace the function in float32 or narrower, or give the operand a format."
        )
    return NumericFormat(info.nmant, info.minexp, float(info.min), float(info.max), info.bits)


def _columns(formats: Sequence[NumericFormat], xp: ModuleType) -> NumericFormat:
    """n formats as one, whose fields have shape [n]."""
    fields = NumericFormat._fields
    return NumericFormat(*(xp.array([getattr(f, field) for f in formats]) for field in fields))


def _holds(unit: str, fmt: NumericFormat, xp: ModuleType) -> np.ndarray | jax.Array | bool:
    """Whether a unit takes formats [n] exactly; bool [n].

    A scale takes in what a float format has more on top (e5m1 is e5m2's numbers, doubled).
    """
    if unit in _INTEGER_BITS:
        return is_integer(fmt) & (fmt.bits <= _INTEGER_BITS[unit])
    grids = [numeric_format(name) for name in _FLOAT_GRIDS[unit]]
    fits = functools.reduce(
        operator.or_,
        (
            (fmt.mantissa_bits <= grid.mantissa_bits) & (fmt.min_exponent >= grid.min_exponent)
            for grid in grids
        ),
    )
    # Integers next to floats go to bf16.
    return fits & xp.logical_not(is_integer(fmt)) if unit in ("fp4", "fp8") else fits


def _rate(
    lhs: NumericFormat, rhs: NumericFormat, rates: Rates, xp: ModuleType
) -> float | np.ndarray | jax.Array:
    """Operations per second of products of formats [n]; float [n], or one for all."""
    fastest = rates.fp32  # holds every format
    for unit in (*_INTEGER_BITS, *_FLOAT_GRIDS):
        rate = getattr(rates, unit)
        if rate is not None:
            held = _holds(unit, lhs, xp) & _holds(unit, rhs, xp)
            fastest = xp.maximum(fastest, rate * held)
    return fastest


class _Work(NamedTuple):
    """What all executions of a site do in one call, whatever its formats are."""

    operations: int
    lhs: int  # elements read
    rhs: int
    result_bits: int  # written


def _work(site: Site) -> _Work:
    operations = 2 * cost.total_macs({site.name: site})  # raises if `repeats` is not known
    lhs, rhs = math.prod(site.lhs.shape), math.prod(site.rhs.shape)
    result = math.prod(site.out_shape)
    bits = 8 * max(2, site.lhs.dtype.itemsize, site.rhs.dtype.itemsize)
    if site.kind == "gather":  # reads the rows it looks up, and no others
        rhs = result
        bits = 8 * site.rhs.dtype.itemsize
    assert site.repeats is not None  # the first line has raised otherwise
    return _Work(operations, *(site.repeats * n for n in (lhs, rhs, bits * result)))


def _chip(name: str) -> Chip:
    if name not in CHIPS:
        raise ValueError(
            f"Unknown chip {name!r}: expected one of {', '.join(CHIPS)}, or a Chip of your own."
        )
    return CHIPS[name]


def latency_ms(
    sites: Mapping[str, Site], assignment: Mapping[str, SiteFormats], chip: Chip | str
) -> float | jax.Array:
    """Milliseconds that the sites of one call take at least, one after the other.

        latency = 1e3 * sum over sites of max(2 * MACs / rate, bytes / bandwidth)

    A site runs at the rate of the fastest unit of the chip that holds both operands exactly:
    integers of 8 bits or fewer in int8, floats within e4m3 or e5m2 in fp8, mixtures of the two and
    what is wider in bf16 or fp16, the rest in fp32. Weights alone in int4 therefore compute in
    bf16 next to bf16 activations, but move a quarter of the bytes. Bytes are those of the operands,
    packed and without scales, and of the result in the wider of the operands' dtypes in the
    unquantized model, 16 bits at least; each is moved once an execution. A lookup moves the rows it
    looks up.

    Args:
      sites: as `find_sites` returns them; the batch size and the dtypes are those of its trace.
      assignment: formats by site; a missing site or operand counts as its dtype. May be traced.
      chip: a `Chip`, or the name of one of `CHIPS`.

    Returns:
      A float, or a float32 scalar if the formats are traced.

    Raises:
      SiteError: a site's number of executions is not known, or it multiplies float64.
      ValueError: unknown name of a chip.
    """
    chip = _chip(chip) if isinstance(chip, str) else chip
    sites, assignment = apart(sites, assignment)
    work = np.array([_work(site) for site in sites.values()], np.float64).reshape(-1, 4)
    operations, lhs_size, rhs_size, result_bits = work.T
    formats = []
    for name, site in sites.items():
        found = assignment.get(name, SiteFormats())
        formats.append((_format(site, site.lhs, found.lhs), _format(site, site.rhs, found.rhs)))
    traced = any(is_traced(fmt) for pair in formats for fmt in pair)
    xp = jnp if traced else np
    lhs, rhs = (_columns([pair[side] for pair in formats], xp) for side in (0, 1))
    compute = operations / _rate(lhs, rhs, chip.rates, xp)
    bits = lhs_size * lhs.bits + rhs_size * rhs.bits + result_bits
    total = 1e3 * xp.sum(xp.maximum(compute, bits / 8 / chip.bandwidth))
    return total if traced else float(total)
