"""Quantizers: a format with all that decides how a tensor is put into it.

    Quantizer("int8", per_channel(-1), percentile(99.9))
    quantizer("mxfp4")                       # OCP Microscaling: blocks of 32, power-of-two scales

The format is data and may be traced; everything else is static, so that changing it compiles anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from aqt_search.numerics import calibration as calibrations
from aqt_search.numerics.calibration import Calibration, Over
from aqt_search.numerics.formats import (
    ROUNDINGS,
    FormatError,
    NumericFormat,
    format_name,
    numeric_format,
    stack_formats,
    unsigned_twin,
)
from aqt_search.numerics.gradient_rules import PASS_THROUGH, STRAIGHT_THROUGH, GradientRule
from aqt_search.numerics.granularity import Granularity, per_block, shared_axes

SCALE_FORMATS = {"float32": 32, "e8m0": 8, "e4m3": 8}  # bits of a stored scale
EDGES = ("max_value", "half_step")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How a tensor is quantized: values = (codes - zero_point) * scale.

    scale = bound / edge;  codes = round_to_format(x / scale + zero_point)
    """

    fmt: NumericFormat  # a name or a NumericFormat; data
    # Which elements share a scale; None: per channel for weights, per tensor for activations.
    granularity: Granularity | None = dataclasses.field(default=None, metadata={"static": True})
    calibration: Calibration = dataclasses.field(
        default=calibrations.absmax(), metadata={"static": True}
    )
    # "float32"; "e8m0", a power of two (OCP Microscaling); "e4m3" times a float32 scale of the
    # whole tensor (NVFP4).
    scale_format: str = dataclasses.field(default="float32", metadata={"static": True})
    # What the bound meets: the format's "max_value" (2^(b-1) - 1 for integers), or the end of its
    # last step, "half_step" beyond (2^(b-1) - 0.5). AQT's legacy and AQT v2's convention. Scales in
    # e8m0 and those with a zero point have rules of their own, without an edge.
    edge: str = dataclasses.field(default="max_value", metadata={"static": True})
    rounding: str = dataclasses.field(default="nearest_even", metadata={"static": True})
    # Whether an operand that is never negative takes the unsigned twin of an integer format.
    unsigned: bool = dataclasses.field(default=True, metadata={"static": True})
    # What stands for the derivative of rounding.
    gradient: GradientRule = dataclasses.field(default=STRAIGHT_THROUGH, metadata={"static": True})
    key: jax.Array | None = None  # random key of stochastic rounding; data
    # Which elements of the tensor a subnet has, where calibrations count them (percentile,
    # mean_deviation, lsq, batch_quant): bool, of its rank, broadcasts to it; data. None: all.
    active: jax.Array | None = None

    def __post_init__(self):
        if isinstance(self.fmt, str):
            object.__setattr__(self, "fmt", numeric_format(self.fmt))
        for value, known, what in (
            (self.scale_format, SCALE_FORMATS, "scale_format"),
            (self.edge, EDGES, "edge"),
            (self.rounding, ROUNDINGS, "rounding"),
        ):
            if value not in known:
                raise FormatError(f"Unknown {what} {value!r}: expected one of {', '.join(known)}.")
        if self.scale_format == "e4m3" and has_zero_point(self.calibration):
            raise FormatError("Scales in e4m3 have no zero point: use bounds that are symmetric.")
        if self.calibration.derivative is not None and not self.gradient.clips:
            raise FormatError(
                "Learned bounds move what they clip, so a gradient that passes there is none of"
                " theirs: use STRAIGHT_THROUGH, or ewgs(delta)."
            )
        if isinstance(self.granularity, str):
            raise FormatError(
                f"A granularity is PER_TENSOR, PER_CHANNEL, PER_TOKEN, per_channel(axes) or"
                f" per_block(size); got {self.granularity!r}."
            )
        of_rows = self.granularity is not None and self.granularity.rows
        if of_rows and self.calibration.read is not None:
            raise FormatError(
                "PER_TOKEN gives every row of the data at hand a scale of its own: a calibration"
                " with state (static, moving or learned bounds) knows nothing of rows that are yet"
                " to come. Use one without, such as absmax, or PER_TENSOR (in configurations a"
                " granularity of 'tensor')."
            )

    @property
    def bits(self) -> int | np.ndarray | jax.Array:
        """Bits of an element, without scales."""
        return self.fmt.bits


# OCP Microscaling Formats v1.0: blocks of 32 with an e8m0 scale; mxfp8 and mxfp6 have two variants.
_MX_ELEMENTS = {
    "mxfp8": "e4m3", "mxfp8_e4m3": "e4m3", "mxfp8_e5m2": "e5m2",
    "mxfp6": "e2m3", "mxfp6_e2m3": "e2m3", "mxfp6_e3m2": "e3m2",
    "mxfp4": "e2m1", "mxint8": "int8",
}  # fmt: skip


# Names of quantizers that are more than a format.
NAMED_QUANTIZERS = (*_MX_ELEMENTS, "nvfp4", "binary")


def quantizer(spec: str | NumericFormat | Quantizer) -> Quantizer:
    """The quantizer called `spec`: a format's name, or a block format's.

    Block formats: `mxfp8` (e4m3; `mxfp8_e5m2`), `mxfp6` (e2m3; `mxfp6_e3m2`), `mxfp4`, `mxint8`
    (OCP Microscaling v1.0: 32 elements along the contraction share a power of two, the largest not
    above max|x| over the largest power of two of the format) and `nvfp4` (16 share an e4m3 scale,
    the tensor a float32 one).

    `binary`: E|x| where x is positive, else -E|x|, in one bit; the gradient passes everywhere
    (XNOR-Net: Rastegari et al. 2016, arXiv 1603.05279, equation 6; DoReFa-Net: Zhou et al. 2016,
    arXiv 1606.06160, equation 8).

    Raises:
      FormatError: unknown name.
    """
    if isinstance(spec, Quantizer):
        return spec
    if spec == "nvfp4":
        return Quantizer(numeric_format("e2m1"), per_block(16), scale_format="e4m3", unsigned=False)
    if spec == "binary":
        mean = calibrations.centred(calibrations.mean_deviation(1.0, 0.0))
        return Quantizer(numeric_format("uint1"), calibration=mean, gradient=PASS_THROUGH)
    if isinstance(spec, str) and spec in _MX_ELEMENTS:
        element = numeric_format(_MX_ELEMENTS[spec])
        return Quantizer(element, per_block(32), scale_format="e8m0", unsigned=False)
    return Quantizer(_format_of(spec))


def operand_spec(spec: str | NumericFormat | Quantizer) -> NumericFormat | Quantizer:
    """What `spec` names: a format where that says all, else a quantizer.

    Raises:
      FormatError: unknown name.
    """
    if isinstance(spec, Quantizer) or (isinstance(spec, str) and spec in NAMED_QUANTIZERS):
        return quantizer(spec)
    return _format_of(spec)


def _format_of(spec: str | NumericFormat) -> NumericFormat:
    try:
        return numeric_format(spec)
    except FormatError as error:
        raise FormatError(f"{error} Quantizers: {', '.join(NAMED_QUANTIZERS)}.") from error


def stack_quantizers(specs: Sequence[Quantizer | NumericFormat]) -> Quantizer:
    """One quantizer whose format is the table of all formats, as `stack_formats` makes it.

    Raises:
      FormatError: the quantizers differ in more than their format.
    """
    quantizers = [quantizer(spec) for spec in specs]
    first = quantizers[0]
    whole = dataclasses.replace(first, active=None)  # masks cannot be compared
    for other in quantizers[1:]:
        alike = dataclasses.replace(other, fmt=first.fmt, active=None) == whole
        if not alike or other.active is not first.active:
            raise FormatError(
                f"Quantizers to choose from may differ in their format alone: {other} is not as"
                f" {first}."
            )
    return dataclasses.replace(first, fmt=stack_formats([q.fmt for q in quantizers]))


def spec_name(spec: NumericFormat | Quantizer) -> str:
    """The name that `operand_spec` gives `spec` for.

    Raises:
      FormatError: a quantizer that no name says all of.
    """
    if not isinstance(spec, Quantizer):
        return format_name(spec)
    for name in NAMED_QUANTIZERS:
        if spec.active is None and quantizer(name) == spec:
            return name
    plain = Quantizer(spec.fmt)
    fields = [field.name for field in dataclasses.fields(spec) if field.name != "active"]
    own = [name for name in fields if getattr(spec, name) != getattr(plain, name)]
    own += [] if spec.active is None else ["active"]  # a mask, which `!=` compares by element
    if own:
        try:
            name = format_name(spec.fmt)
        except FormatError:
            name = "its format"
        raise FormatError(
            f"The quantizer has no name: it differs from the default of {name} in"
            f" {' and '.join(own)}."
        )
    return format_name(spec.fmt)


class Recipe(NamedTuple):
    """The static part of a quantizer for one tensor: what programs are compiled for.

    The granularity is resolved to the tensor's axes, and the mapped axis is known; what may be
    traced (format, key, active elements) is left out.
    """

    granularity: Granularity
    calibration: Calibration
    scale_format: str
    edge: str
    rounding: str
    gradient: GradientRule
    axis_name: Hashable | None

    def over(self, ndim: int) -> Over:
        """What a bound is shared over, for a tensor with `ndim` axes before it is split."""
        of_replica = self.granularity.rows
        return Over(shared_axes(ndim, self.granularity), None if of_replica else self.axis_name)


def recipe(q: Quantizer, granularity: Granularity, axis_name: Hashable | None = None) -> Recipe:
    """The static part of `q` with a resolved granularity."""
    return Recipe(
        granularity, q.calibration, q.scale_format, q.edge, q.rounding, q.gradient, axis_name
    )


def operand_format(q: Quantizer, nonnegative: bool) -> NumericFormat:
    """The format of an operand: the unsigned twin where it is known not to be negative."""
    return unsigned_twin(q.fmt) if nonnegative and q.unsigned else q.fmt


def has_zero_point(calibration: Calibration) -> bool:
    """Whether 0 may have another code than 0 under its bounds."""
    return calibration.centred or calibrations.is_asymmetric(calibration)
