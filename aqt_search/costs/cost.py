"""What an assignment costs: multiply-accumulates weighted by bit widths, and bytes of weights.

Every function sums over sites with the assignment's bit widths, which may be traced: costs can be
jitted and vmapped in the assignment. With concrete formats the sums are exact integers.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Hashable, Mapping, Sequence

import jax
import numpy as np

from aqt_search.numerics.calibration import is_asymmetric
from aqt_search.numerics.formats import is_unscaled
from aqt_search.numerics.granularity import per_channel, resolve, scale_shape
from aqt_search.numerics.quantizer import SCALE_FORMATS, Quantizer, quantizer
from aqt_search.tracing.layers import apart
from aqt_search.tracing.sites import SIDES, Operand, Site, SiteError, SiteFormats


def _bits(operand: Operand, fmt) -> int | jax.Array:
    """Bits of an operand: its format's, or those of the dtype it has in the unquantized model."""
    return 8 * operand.dtype.itemsize if fmt is None else fmt.bits


def _scale_bits(operand: Operand, q: Quantizer) -> float | np.ndarray | jax.Array:
    """Bits of an operand's stored scales and zero points; none in formats used unscaled."""
    granularity = q.granularity or per_channel(*operand.channel_axes)
    shape, shared = operand.stored_shape, (*operand.uniform, *operand.contracting)
    granularity = resolve(granularity, len(shape), shared)
    count = operand.copies * math.prod(scale_shape(shape, granularity))
    bits = count * SCALE_FORMATS[q.scale_format]
    if q.scale_format == "e4m3":
        bits += 32 * operand.copies  # one for the tensor
    if is_asymmetric(q.calibration):  # a centred grid's is known
        bits += 32 * count
    return (1.0 - is_unscaled(q.fmt)) * bits


def total_macs(sites: Mapping[str, Site]) -> int:
    """Multiply-accumulates of one call, at the batch size the sites were traced with.

    Raises:
      SiteError: a site stands in a while loop, whose number of iterations is not known.
    """
    return sum(_site_macs(site) for site in sites.values())


def _site_macs(site: Site) -> int:
    if site.repeats is None:
        raise SiteError(
            f"Site {site.name!r} is inside a while loop, so how often it runs is not known and it"
            " has no cost. Use lax.scan or fori_loop with fixed bounds, or set its `repeats` with"
            " dataclasses.replace."
        )
    return site.macs * site.repeats


def gbops(
    sites: Mapping[str, Site], assignment: Mapping[str, SiteFormats]
) -> float | np.ndarray | jax.Array:
    """Billions of bit operations of one call.

        GBOPs = sum over sites of MACs * lhs bits * rhs bits / 1e9   (FLIQS, arXiv 2308.03290)

    An operand without a format counts with the bits of its dtype (float32: 32). ResNet-50 at
    224 x 224 and batch 1 in bf16 x bf16 costs 1046.831169536.

    Args:
      sites: as `find_sites` returns them; trace with a batch of one for the cost of an example.
      assignment: formats by site; missing sites are not quantized. May be traced.

    Returns:
      A float, or a float32 scalar if the formats are traced.

    Raises:
      SiteError: a site's number of executions is not known.
    """
    total = 0.0
    sites, assignment = apart(sites, assignment)
    for name, site in sites.items():
        formats = assignment.get(name, SiteFormats())
        bits = 1.0 * _bits(site.lhs, formats.lhs) * _bits(site.rhs, formats.rhs)
        total = total + bits * float(_site_macs(site))
    return total / 1e9


def _bits_of_stacks(
    sites: Mapping[str, Site], assignment: Mapping[str, SiteFormats]
) -> dict[tuple[str, str], list]:
    """The bits of every operand, those of all layers of a stack that is taken apart."""
    found: dict[tuple[str, str], list] = {}
    for name, site in sites.items():
        formats = assignment.get(name, SiteFormats())
        for side in SIDES:
            bits = _bits(getattr(site, side), getattr(formats, side))
            found.setdefault((site.stack, side), []).append(bits)
    return found


def _differ(bits: Sequence, others: Sequence) -> bool | jax.Array:
    """Whether two weights of one array are stored apart: stacks are, unless all layers agree."""
    if len(bits) != len(others):
        return True
    return functools.reduce(operator.or_, (one != other for one, other in zip(bits, others)))


def weight_bytes(
    sites: Mapping[str, Site], assignment: Mapping[str, SiteFormats], *, scales: bool = True
) -> float | np.ndarray | jax.Array:
    """Bytes of the weights as they are stored: packed codes and, unless left out, their scales.

        bytes = sum over weights of (elements * bits + bits of scales and zero points) / 8

    A weight that several sites use is stored once per distinct format width, as `freeze` does; a
    stack of layers that two scans go through is if its layers have the same widths in both.

    Args:
      sites: as `find_sites` returns them.
      assignment: formats by site; missing sites are not quantized. May be traced.
      scales: whether to count scales and zero points; by default a float32 scale per output
        channel of scaled formats. An nvfp4 weight takes 4.5 bits an element.

    Returns:
      A float, or a float32 scalar if the formats are traced.
    """
    total = 0.0
    sites, assignment = apart(sites, assignment)
    stacks = _bits_of_stacks(sites, assignment)
    stored: dict[Hashable, list] = {}
    for name, site in sites.items():
        formats = assignment.get(name, SiteFormats())
        for side, fmt in zip(SIDES, formats):
            operand = getattr(site, side)
            if operand.role == "weight":
                bits, stack = _bits(operand, fmt), stacks[site.stack, side]
                size = 1.0 * bits * operand.size
                if scales and fmt is not None:
                    size = size + _scale_bits(operand, quantizer(fmt))
                array = operand.parameter if operand.array is None else operand.array
                earlier = stored.setdefault(array, [])
                for other, of_stack in earlier:
                    size = size * _differ([bits, *stack], [other, *of_stack])
                earlier.append((bits, stack))
                total = total + size
    return total / 8
