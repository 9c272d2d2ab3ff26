"""Quantizers: a format with all that decides how a tensor is put into it.

    Quantizer("int8", per_channel(-1), percentile(99.9))
    quantizer("mxfp4")                       # OCP Microscaling: blocks of 32, power-of-two scales

The format is data and may be traced; everything else is static, so that changing it compiles anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aqt_search.numerics import calibration as calibrations
from aqt_search.numerics.calibration import Bounds, Calibration, Over
from aqt_search.numerics.formats import (
    ROUNDINGS,
    FormatError,
    Grid,
    NumericFormat,
    as_grid,
    format_name,
    leading_power,
    numeric_format,
    round_to_grid,
    stack_formats,
    unsigned_twin,
)
from aqt_search.numerics.gradient_rules import PASS_THROUGH, STRAIGHT_THROUGH, GradientRule
from aqt_search.numerics.granularity import Granularity, per_block, shared_axes
from aqt_search.numerics.outline import where

SCALE_FORMATS = {"float32": 32, "e8m0": 8, "e4m3": 8}  # bits of a stored scale
EDGES = ("max_value", "half_step")
_E4M3 = numeric_format("e4m3")
_E4M3_SMALLEST = 2.0**-9


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
                f"A granularity is PER_TENSOR, PER_CHANNEL, per_channel(axes) or per_block(size);"
                f" got {self.granularity!r}."
            )

    @property
    def bits(self) -> int | jax.Array:
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
        return Quantizer("uint1", calibration=mean, gradient=PASS_THROUGH)
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
    for other in quantizers[1:]:
        if dataclasses.replace(other, fmt=first.fmt) != first:
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
    names = [*NAMED_QUANTIZERS, format_name(spec.fmt)]
    for name in names:
        if quantizer(name) == spec:
            return name
    raise FormatError(f"{spec} has no name: it differs from the default of {names[-1]}.")


class Scale(NamedTuple):
    """Scales as they are stored; what they mean is their product."""

    block: jax.Array  # one for every group of elements
    tensor: jax.Array | None = None  # one for the tensor, of every dimension 1
    zero_point: jax.Array | None = None  # the code of 0

    def value(self) -> jax.Array:
        """The factor from codes to values."""
        return self.block if self.tensor is None else self.block * self.tensor


class Recipe(NamedTuple):
    """The static part of a quantizer for one tensor: granularity resolved, mapped axis known."""

    granularity: Granularity
    calibration: Calibration
    scale_format: str
    edge: str
    rounding: str
    gradient: GradientRule
    axis_name: Hashable | None

    def over(self, ndim: int) -> Over:
        """What a bound is shared over, for a tensor with `ndim` axes before it is split."""
        return Over(shared_axes(ndim, self.granularity), self.axis_name)


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


def _inverse_edge(grid: Grid, edge: str) -> jax.Array:
    """1 / what the bound meets."""
    if edge == "max_value":
        return grid.inverse_max
    last_step = leading_power(grid.max_value) * grid.step
    return 1 / (grid.max_value + 0.5 * last_step)


def _floor_power(x: jax.Array) -> jax.Array:
    """The largest power of two not above x, at least the smallest normal one."""
    return jnp.maximum(leading_power(x), jnp.finfo(x.dtype).tiny)


def _power_of_two_scale(bound: jax.Array, grid: Grid) -> jax.Array:
    """2^(floor(log2 bound) - floor(log2 max_value)): OCP Microscaling v1.0, section 6.3."""
    return _floor_power(bound) * (1 / leading_power(grid.max_value))


def _two_level_scale(scale: jax.Array, grid: Grid, axis_name: Hashable | None) -> Scale:
    """`scale` as e4m3 numbers times one that brings the largest to e4m3's largest (NVFP4)."""
    dtype = scale.dtype
    largest = jnp.max(scale, keepdims=True, initial=0)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    tensor = jnp.maximum(largest * dtype.type(1 / _E4M3.max_value), jnp.finfo(dtype).tiny)
    tensor = where((largest == 0) | (grid.unscaled > 0), jnp.ones_like(tensor), tensor)
    block = round_to_grid(scale * (1 / tensor), as_grid(_E4M3, dtype))
    return Scale(jnp.maximum(block, dtype.type(_E4M3_SMALLEST)), tensor)


def _is_integer(grid: Grid) -> jax.Array:
    return (grid.min_power == grid.steps) & (grid.max_value < 2 * grid.min_power)


def _with_middle_at_zero(scale: jax.Array, grid: Grid) -> Scale:
    """`scale`, made for bounds on max_value, for a grid whose middle stands for 0."""
    integer = _is_integer(grid)
    width = grid.max_value - grid.min_value
    scale = scale * where(integer, 2 * grid.max_value / width, 1.0)
    middle = where(integer, 0.5 * (grid.min_value + grid.max_value), 0.0)
    return Scale(scale, None, jnp.reshape(middle, (1,) * scale.ndim))


def _asymmetric_scale(bounds: Bounds, grid: Grid, how: Recipe) -> Scale:
    """low .. high on min_value .. max_value with a zero point; symmetric in float formats."""
    high, low = bounds
    info = jnp.finfo(high.dtype)
    quarter = high.dtype.type(info.max / 4)
    high, low = jnp.minimum(high, quarter), jnp.maximum(low, -quarter)
    integer = _is_integer(grid)
    symmetric = jnp.maximum(high, -low) * grid.inverse_max
    scale = where(integer, (high - low) * (1 / (grid.max_value - grid.min_value)), symmetric)
    if how.scale_format == "e8m0":  # the next power of two, so that nothing is clipped
        floor = _floor_power(scale)
        scale = where(floor < scale, 2 * floor, floor)
    scale = jnp.maximum(scale, info.tiny)
    scale = where((high == low) | (grid.unscaled > 0), jnp.ones_like(scale), scale)
    zero = jax.lax.round(grid.min_value - low / scale, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    zero = where(integer, jax.lax.clamp(grid.min_value, zero, grid.max_value), 0.0)
    return Scale(scale + 0 * (bounds.high + bounds.low), None, zero)


def scale_of(bounds: Bounds, grid: Grid, how: Recipe) -> Scale:
    """The scale under which the format holds the bounds.

    Bounds are cut to a quarter of the dtype's largest value and the scale is at least its smallest
    normal number, so that nothing overflows or is flushed to zero. The scale is 1 where the bound
    is 0 or the format is used unscaled, NaN where a bound is not finite.
    """
    if bounds.low is not None:
        return _asymmetric_scale(bounds, grid, how)
    bound = bounds.high
    info = jnp.finfo(bound.dtype)
    cut = jax.lax.min(bound, bound.dtype.type(info.max / 4))
    if how.scale_format == "e8m0":
        scale = _power_of_two_scale(cut, grid)
    else:
        # A product, as XLA rewrites a division by a broadcast scalar into one: the scale, and so
        # every rounded value, is then the same bits in every program.
        scale = cut * _inverse_edge(grid, how.edge)
    found = Scale(jax.lax.max(scale, bound.dtype.type(info.tiny)))
    if how.scale_format == "e4m3":
        found = _two_level_scale(scale, grid, how.axis_name)
    if how.calibration.centred:
        found = _with_middle_at_zero(found.block, grid)
    block = found.block + 0 * bound  # NaN where the bound is not finite
    unscaled = grid.unscaled > 0
    if not how.calibration.centred:  # which has no level at 0: the smallest scale comes nearest
        unscaled = unscaled | (bound == 0)
    return found._replace(block=jax.lax.select(unscaled, 1 + 0 * block, block))


class Codes(NamedTuple):
    """A tensor split into blocks: values = (codes - scale.zero_point) * scale.value()."""

    codes: jax.Array  # float numbers on the format's grid
    scale: Scale
    inside: jax.Array | None  # which elements lie within the bounds; None: all, or not told here

    def values(self) -> jax.Array:
        """What the codes stand for."""
        zero = self.scale.zero_point
        codes = self.codes if zero is None else self.codes - zero
        return codes * self.scale.value()


def _encode(x: jax.Array, bounds: Bounds, grid: Grid, how: Recipe, random) -> Codes:
    scale = scale_of(bounds, grid, how)
    steps = x * (1 / scale.value())
    if scale.zero_point is not None:
        steps = steps + scale.zero_point
    return Codes(round_to_grid(steps, grid, how.rounding, random), scale, None)


def calibrate(x: jax.Array, grid: Grid, how: Recipe, state: Any) -> tuple[Bounds, Any]:
    """Bounds of x (split into blocks) by the calibration, and its next state."""
    ndim = x.ndim - (how.granularity.block_axis is not None)
    over = how.over(ndim)
    nearest = how._replace(rounding="nearest_even")

    def error(bounds: Bounds) -> jax.Array:
        return over.sum(jnp.square(_encode(x, bounds, grid, nearest, None).values() - x))

    return how.calibration.apply(state, x, over, grid, error)


def encode(
    x: jax.Array, bounds: Bounds | None, grid: Grid, how: Recipe, random: jax.Array | None = None
) -> Codes:
    """Quantizes x (split into blocks); bounds of None are left to a calibration without state.

    What is not finite becomes NaN, whatever the bounds say.
    """
    if bounds is None:
        bounds, _ = calibrate(x, grid, how, ())
    found = _encode(x, bounds, grid, how, random)
    if how.calibration.covers:
        return found
    low = -bounds.high if bounds.low is None else bounds.low
    codes = where(jnp.isfinite(x), found.codes, jnp.nan)
    if not how.gradient.clips or how.calibration.derivative is not None:
        return Codes(codes, found.scale, None)  # learned bounds tell where they are differentiated
    inside = ((x >= low) & (x <= bounds.high)) | (grid.unscaled > 0)
    return Codes(codes, found.scale, inside)
