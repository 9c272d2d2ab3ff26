"""Measured facts: which form of a product on codes was faster than floating point, and where.

`auto` reads this table. A row holds for a kind of product, on a chip, from one jaxlib on. What is
not in it runs emulated; `aqt_search.measure_executions` measures a function on the machine at hand.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jaxlib
import numpy as np

from aqt_search.numerics.symbolic import certainly
from aqt_search.products.layout import Layout


class Work(NamedTuple):
    """What the choice of a form depends on; sizes may be symbolic."""

    kind: str  # of the layout
    rows: int  # output positions: batch and free axes of the left operand
    terms: int  # products summed per output
    columns: int  # output channels
    groups: int  # of a convolution; more than 1 for a dot with batch axes, too
    inputs: int  # input channels of a convolution per group


def work_of(layout: Layout, lhs: Sequence[int], rhs: Sequence[int]) -> Work:
    """What is to be done for operands of these shapes."""
    terms = math.prod(rhs[axis] for axis in layout.contracting[1])
    rows = math.prod(n for axis, n in enumerate(lhs) if axis not in layout.contracting[0])
    columns = math.prod(n for axis, n in enumerate(rhs) if axis not in layout.contracting[1])
    groups = layout.groups + len(layout.batch[0])
    inputs = rhs[layout.contracting[1][-1]] if layout.contracting[1] else 1
    return Work(layout.kind, rows, terms, columns, groups, inputs)


class Fact(NamedTuple):
    """A form of a product, and its time beside that of the emulated one."""

    backend: str
    chip: str  # part of what `chip` says
    jaxlib: str  # that it was measured with
    kind: str
    execution: str  # the family of carriers
    form: str  # "lax"; "rows" (row_convolution)
    ratio: float  # forward, activations quantized on the way, to float32 (on GPU and TPU to bf16)
    rows: int = 64  # these at least
    columns: int = 64
    inputs: int = 64  # of a dot: terms
    kernel: int = 1  # inputs times columns
    taps: tuple[int, int] = (1, 49)  # of a convolution: from, to
    most_rows: int | None = None
    measured: bool = True  # else by the vendor's published rates


# CPU: two Zen 4 cores; dots by `python -m benchmarks.quantized_ops --only serving-static`, the int8
# convolutions alone, beside float32 ones. H100: 80 GB, [n, k] weights, a scale per row.
FACTS = (
    Fact("cpu", "avx512_bf16", "0.10.2", "dot_general", "bf16", "lax", 0.58),
    Fact("cpu", "amx_bf16", "0.10.2", "dot_general", "bf16", "lax", 0.58),
    Fact("cpu", "", "0.10.2", "dot_general", "int8", "lax", 0.84),
    Fact("cpu", "", "0.10.2", "dot_general", "int8", "lax", 0.53, rows=1, most_rows=255),
    Fact("cpu", "", "0.10.2", "conv_general_dilated", "int8", "rows", 0.51, 1, 32, 32),
    Fact("cpu", "", "0.12.0", "dot_general", "int8", "lax", 0.38, rows=1),
    Fact("cpu", "avx512_bf16", "0.12.0", "dot_general", "bf16", "lax", 0.59),
    # XLA multiplies codes fast from 512 pairs of an input and an output on, 16 x 32 or 24 x 24.
    Fact("cpu", "", "0.12.0", "conv_general_dilated", "int8", "lax", 0.48, 1, 1, 1, 512, (2, 49)),
    Fact("cpu", "", "0.12.0", "conv_general_dilated", "int8", "rows", 0.70, 1, 32, 32, 1, (1, 1)),
    Fact("gpu", "H100", "0.11.2", "dot_general", "int8", "lax", 1.21, 4096, 4096, 4096),
    Fact("tpu", "v5", "0.11.2", "dot_general", "int8", "lax", 0.5, 512, 512, 512, measured=False),
    Fact("tpu", "v6", "0.11.2", "dot_general", "int8", "lax", 0.5, 512, 512, 512, measured=False),
)  # fmt: skip


@functools.cache
def chip() -> str:
    """What the default backend runs on: a device's name, of a CPU its flags (Linux; else "")."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    try:
        return pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".")[:3] if part.isdecimal())


def known_at(jaxlib_version: str, facts: Sequence[Fact]) -> list[Fact]:
    """Those measured with the newest jaxlib that is not newer than this one, or else the oldest."""
    known = sorted({_version(fact.jaxlib) for fact in facts})
    fitting = [v for v in known if v <= _version(jaxlib_version)] or known[:1]
    return [fact for fact in facts if _version(fact.jaxlib) in fitting[-1:]]


def facts_at_hand() -> list[Fact]:
    """What is known of this backend and chip."""
    here = [f for f in FACTS if f.backend == jax.default_backend() and f.chip in chip()]
    return known_at(jaxlib.__version__, here)


def _applies(fact: Fact, work: Work) -> bool:
    kind = "conv_general_dilated" if work.kind == "conv_general_dilated" else "dot_general"
    if fact.kind != kind or work.groups > 1:
        return False
    if fact.most_rows is not None and not certainly(lambda: work.rows <= fact.most_rows):
        return False
    if kind == "dot_general":
        sizes = ((work.rows, fact.rows), (work.columns, fact.columns), (work.terms, fact.inputs))
        return certainly(lambda: all(size >= least for size, least in sizes))
    least, most = fact.taps
    return certainly(
        lambda: (
            work.rows >= fact.rows
            and work.columns >= fact.columns
            and work.inputs >= fact.inputs
            and work.inputs * work.columns >= fact.kernel
            and least * work.inputs <= work.terms <= most * work.inputs
        )
    )


def facts_about(work: Work) -> list[Fact]:
    """What is known of this product here, the fastest form first."""
    found = [fact for fact in facts_at_hand() if _applies(fact, work)]
    return sorted(found, key=lambda fact: fact.ratio)


# XLA:CPU computes an int8 product of one row without its fast kernel, fused with what is before it:
# in 29 ms for [1, 4096] x [4096, 4096] codes (float32: 3.7 ms), where eight rows take 3.5 ms.
LEAST_ROWS = 8
_FEW_ROWS = 64


def has_few_rows(layout: Layout, lhs: Sequence[int], accumulate: np.dtype) -> bool:
    """Whether reading the right operand is what a product of int8 codes takes, on CPU."""
    if layout.kind != "dot_general" or accumulate != np.int32 or jax.default_backend() != "cpu":
        return False
    summed = layout.contracting[0]
    free = [n for axis, n in enumerate(lhs) if axis not in (*summed, *layout.batch[0])]
    return certainly(lambda: math.prod(free) < _FEW_ROWS)


def convolves_over_rows(work: Work) -> bool:
    """Whether a convolution of int8 codes runs over rows: on CPU also where nothing is known.

    XLA's own takes 8 times the float32 time there for channels too few for its fast kernel.
    """
    known = [fact for fact in facts_about(work) if fact.execution == "int8"]
    return known[0].form == "rows" if known else jax.default_backend() == "cpu"
