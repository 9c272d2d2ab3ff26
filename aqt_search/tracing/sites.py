"""Sites: the products and table lookups of a function, found in its jaxpr and named.

`analyze` follows which values come from parameters, which from data, and which can never be
negative (`aqt_search.tracing.origins`), and names the products and lookups whose results are used.
`aqt_search.tracing.transform` runs the same jaxpr with those quantized.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np

from aqt_search.numerics.formats import NumericFormat
from aqt_search.numerics.granularity import free_axes
from aqt_search.numerics.quantizer import Quantizer
from aqt_search.tracing.control_flow import Body, Path
from aqt_search.tracing.origins import (
    FOREIGN_PRODUCTS,
    LOOKUP_PRIMITIVES,
    Found,
    Loop,
    Origin,
    array_type,
    find_products,
    join_scope,
    lookup_axis,
)
from aqt_search.tracing.uniform_axes import collapsed
from aqt_search.tracing.value_numbers import ValueNumbers


class SiteError(ValueError):
    """A site that does not exist, or that cannot be quantized where it stands."""


class SiteFormats(NamedTuple):
    """How a site is quantized: each field a `NumericFormat` of scalars, a `Quantizer` or None.

    None leaves an operand, or the gradient in a gradient product, in floating point.
    """

    lhs: NumericFormat | Quantizer | None = None
    rhs: NumericFormat | Quantizer | None = None
    # Of the result, in the products for the gradient of lhs and of rhs.
    lhs_gradient: NumericFormat | Quantizer | None = None
    rhs_gradient: NumericFormat | Quantizer | None = None


SIDES = ("lhs", "rhs")  # its fields that are of operands
GRADIENTS = ("lhs_gradient", "rhs_gradient")
Key = tuple[str, str]  # a site's name, and a field of its `SiteFormats`


def is_unquantized(formats: SiteFormats) -> bool:
    """Whether formats leave their site as it is."""
    return all(fmt is None for fmt in formats)


@dataclasses.dataclass(frozen=True)
class Operand:
    """One side of a product, or the table or the indices of a lookup."""

    shape: tuple[int, ...]
    dtype: np.dtype
    role: str  # "weight" (parameters only), "activation" (depends on data), "constant" (neither)
    parameter: str | None  # the parameter leaf a weight comes from
    channel_axes: tuple[int, ...]  # axes with a scale of their own: output channels; () activations
    copies: int = 1  # how many of this shape are stored: the iterations of scans it is sliced by
    nonnegative: bool = False  # whether no element can be negative (False: that is not known)
    contracting: tuple[int, ...] = ()  # axes the product sums over; blocks run along the last
    # Of a weight: equal numbers are the same array, whose axes `order` has in this operand's order
    # (() as they are).
    array: Hashable = dataclasses.field(default=None, repr=False, compare=False)
    order: tuple[int, ...] = dataclasses.field(default=(), repr=False, compare=False)
    # The scans that give it a slice in each iteration, outer first.
    sliced_by: tuple[Loop, ...] = dataclasses.field(default=(), repr=False, compare=False)
    # Batch axes of the product along which a weight is one and the same: stored once.
    uniform: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    # Parameters whose product it is, `query@key/kernel`, where it is no leaf and no sum with one.
    product_of: str | None = dataclasses.field(default=None, repr=False)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in which one copy is stored."""
        return collapsed(self.shape, self.uniform)

    @property
    def size(self) -> int:
        """Number of stored elements."""
        return self.copies * math.prod(self.stored_shape)

    @property
    def scales(self) -> int:
        """Number of stored scales once the operand is quantized."""
        return self.copies * math.prod(self.shape[axis] for axis in self.channel_axes)


@dataclasses.dataclass(frozen=True)
class Site:
    """A product or a table lookup that quantization applies to.

    The equation of a product has the operands (lhs, rhs). That of a lookup, of kind "gather", has
    them the other way round: it is (table, indices) = (rhs, lhs). The table is a weight with one
    scale per row; the indices are integers, which are never quantized.
    """

    name: str
    kind: str  # the primitive: dot_general, conv_general_dilated, ragged_dot_general, gather
    lhs: Operand
    rhs: Operand
    macs: int  # multiply-accumulates of one execution, at the trace's batch size; lookups have 0
    repeats: int | None  # executions per call: the length of a scan; None in a while loop
    scope: str  # the name scopes it was traced under
    refused: str | None = None  # why it cannot be quantized
    out_shape: tuple[int, ...] = ()  # of its result
    # The scans around it that go through layers, each with weights of its own; outer first.
    layers: tuple[Loop, ...] = dataclasses.field(default=(), repr=False, compare=False)
    layer: tuple[int, ...] = ()  # of a layer that is a site of its own: its place in the stack

    @property
    def stack(self) -> str:
        """The name of the stack that it is a layer of; its own where it is none."""
        return self.name.removesuffix("".join(f"[{i}]" for i in self.layer))

    @property
    def lhs_shape(self) -> tuple[int, ...]:
        """Shape of the left operand."""
        return self.lhs.shape

    @property
    def rhs_shape(self) -> tuple[int, ...]:
        """Shape of the right operand."""
        return self.rhs.shape

    @property
    def equation_sides(self) -> tuple[str, str]:
        """The sides that the operands of its equation are, in their order."""
        return ("rhs", "lhs") if self.kind == "gather" else SIDES

    @property
    def weight(self) -> Operand | None:
        """The operand that is a weight (the right one if both are not data), None if neither is."""
        for operand in (self.rhs, self.lhs):
            if operand.role == "weight":
                return operand
        return None


# --- Names ----------------------------------------------------------------------------------------


def parameter_name(path: Sequence) -> str:
    """The path of a leaf, without Flax's leading collection 'params' and NNX's last 'value'."""
    parts = [jax.tree_util.keystr((key,), simple=True, separator="/") for key in path]
    layer = ""
    while len(parts) > 1 and re.fullmatch(r"\[\d+\]", parts[-1]):  # of a leaf kept by layers
        layer = parts.pop() + layer
    if len(parts) > 1 and parts[0] == "params":
        parts = parts[1:]
    if len(parts) > 1 and parts[-1] in ("value", "raw_value"):
        parts = parts[:-1]
    return ("/".join(parts) or "params") + layer


def _lhs_rhs(eqn: jex_core.JaxprEqn, values: Sequence) -> tuple:
    """Of values by operand of a site's equation those of (lhs, rhs)."""
    first, second = values[:2]
    return (second, first) if eqn.primitive.name in LOOKUP_PRIMITIVES else (first, second)


def _contracting(eqn: jex_core.JaxprEqn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of (lhs, rhs) that share one scale at finest: of a product those it sums over."""
    if eqn.primitive.name in LOOKUP_PRIMITIVES:
        axis = lookup_axis(eqn)
        assert axis is not None  # else it is no site
        return (), free_axes(array_type(eqn.invars[0]).ndim, (axis,))
    if eqn.primitive.name == "dot_general":
        return eqn.params["dimension_numbers"][0]
    if eqn.primitive.name == "ragged_dot_general":
        return eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0]
    if eqn.primitive.name in FOREIGN_PRODUCTS:  # of [..., rows, inputs] and [..., outputs, inputs]
        return ((array_type(eqn.invars[0]).ndim - 1,), (array_type(eqn.invars[1]).ndim - 1,))
    lhs_spec, rhs_spec, _ = eqn.params["dimension_numbers"]
    images = lhs_spec[:1] if eqn.params["batch_group_count"] > 1 else ()  # a scale for them all
    return (*images, *lhs_spec[2:], lhs_spec[1]), (*rhs_spec[2:], rhs_spec[1])


def _macs(eqn: jex_core.JaxprEqn) -> int:
    if eqn.primitive.name in LOOKUP_PRIMITIVES:
        return 0
    output, lhs = (array_type(v).shape for v in (eqn.outvars[0], eqn.invars[0]))
    if eqn.primitive.name == "conv_general_dilated":
        return _conv_macs(eqn)
    if eqn.primitive.name == "ragged_dot_general":
        return _ragged_macs(eqn)
    return math.prod(output) * math.prod(lhs[axis] for axis in _contracting(eqn)[0])


def _ragged_macs(eqn: jex_core.JaxprEqn) -> int:
    """Every element of lhs meets one row of the matrix of its group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = (array_type(v).shape for v in eqn.invars[:2])
    outputs = free_axes(len(rhs), (*contracting, *batch, *numbers.rhs_group_dimensions))
    return math.prod(lhs) * math.prod(rhs[axis] for axis in outputs)


def _conv_macs(eqn: jex_core.JaxprEqn) -> int:
    """Products of a convolution, each axis of space counted by whichever end has fewer.

    An output place meets every tap of the kernel, and so does an input place: a transposed
    convolution has more outputs than products, as it multiplies neither the zeros it inserts nor
    those around its input. Zeros that pad an ordinary convolution are counted, as is the custom.
    """
    lhs, rhs, out = eqn.params["dimension_numbers"]
    (x, kernel), result = (array_type(v).shape for v in eqn.invars[:2]), array_type(eqn.outvars[0])
    macs = result.shape[out[0]] * result.shape[out[1]] * kernel[rhs[1]]
    for place, tap, end, gap in zip(lhs[2:], rhs[2:], out[2:], eqn.params["lhs_dilation"]):
        macs *= min(result.shape[end] * kernel[tap] // gap, x[place] * kernel[tap])
    return macs


def _operand(
    atom, origin: Origin, contracting, batch: Sequence[int], names: Sequence[str | None],
    leaves: Sequence[tuple[int, ...]], numbers: ValueNumbers,
) -> Operand:  # fmt: skip
    aval = array_type(atom)
    shape, dtype = tuple(aval.shape), np.dtype(aval.dtype)
    contracting = tuple(contracting)
    if origin.data:
        return Operand(shape, dtype, "activation", None, (), 1, origin.nonnegative, contracting)
    uniform = tuple(axis for axis in batch if axis in origin.uniform)
    axes = free_axes(len(shape), (*contracting, *uniform))
    slices = tuple(sorted(origin.sliced_by))
    copies = math.prod(length for _, length in slices)
    stored = copies, origin.nonnegative, contracting
    if not origin.parameters:
        return Operand(shape, dtype, "constant", None, axes, *stored, sliced_by=slices)
    size = copies * math.prod(collapsed(shape, uniform))
    sizes = [math.prod(leaf) for leaf in leaves]
    # A weight computed from several leaves (a LoRA sum, a gain) is named by the one of its size.
    leaf = min(origin.parameters, key=lambda i: (sizes[i] != size, -sizes[i], i))
    summed = origin.parameters - origin.multiplied
    product_of = None
    if origin.multiplied and not any(sizes[i] == size and len(leaves[i]) > 1 for i in summed):
        # No size tells which of them it is, and with another batch the sizes are others.
        leaf = min(origin.multiplied, key=lambda i: (-sizes[i], i))
        factors = [i for i in sorted(origin.multiplied) if len(leaves[i]) > 1]  # no gains or biases
        product_of = "@".join(str(names[i]) for i in factors or sorted(origin.multiplied))
    array, order = (None, ()) if origin.number is None else numbers.untransposed(origin.number)
    return Operand(
        shape, dtype, "weight", names[leaf], axes, *stored, array, order, slices, uniform,
        product_of,
    )  # fmt: skip


def _site(
    found: Found, names: Sequence[str | None], leaves: Sequence[tuple[int, ...]],
    numbers: ValueNumbers,
) -> Site:  # fmt: skip
    eqn = found.eqn
    batch = eqn.params["dimension_numbers"][1] if eqn.primitive.name == "dot_general" else ((), ())
    sides = _lhs_rhs(eqn, eqn.invars), _lhs_rhs(eqn, found.origins), _contracting(eqn), batch
    lhs, rhs = (_operand(v, o, c, b, names, leaves, numbers) for v, o, c, b in zip(*sides))
    macs, kind, (_, repeats, scope, layers) = _macs(eqn), eqn.primitive.name, found.place
    result = tuple(array_type(eqn.outvars[0]).shape)
    site = Site("", kind, lhs, rhs, macs, repeats, scope, found.refused, result, layers)
    weight = site.weight
    named = weight and (weight.product_of or weight.parameter)
    return dataclasses.replace(site, name=named or join_scope(_in_model(scope, names), kind))


def _in_model(scope: str, names: Sequence[str | None]) -> str:
    """Scopes from the first that begins a parameter's name: a module's own stands before them."""
    tops, parts = {name.split("/")[0] for name in names if name}, scope.split("/")
    known = (place for place, part in enumerate(parts) if part in tops)
    return "/".join(parts[next(known, 0) :])


def _with_unique_names(sites: Sequence[Site]) -> list[Site]:
    """Numbers sites of equal name in program order: `name#1`, `name#2`; a lone name stays bare."""
    totals = collections.Counter(site.name for site in sites)
    # A lone name may itself end in a number that the numbering must not give again.
    taken = {name for name, total in totals.items() if total == 1}
    named = []
    for site in sites:
        name = site.name
        if totals[name] > 1:
            numbered = (f"{name}#{number}" for number in itertools.count(1))
            name = next(candidate for candidate in numbered if candidate not in taken)
            taken.add(name)
        named.append(dataclasses.replace(site, name=name))
    return named


def analyze(
    jaxpr: jex_core.Jaxpr, names: Sequence[str | None], consts: Sequence = ()
) -> tuple[dict[str, Site], dict[Path, str]]:
    """Finds the sites of a jaxpr.

    Args:
      jaxpr: the function's jaxpr.
      names: for every input of the jaxpr the name of its parameter leaf, or None for data.
      consts: the values of its constants; without them their signs are not known.

    Returns:
      The sites by name in program order, and the name of the site at each path.
    """
    origins = [
        Origin(frozenset(), True)
        if name is None
        else Origin(frozenset([index]), False, number=-1 - index)
        for index, name in enumerate(names)
    ]
    found, numbers = find_products(Body(jaxpr, consts), origins)
    leaves = [tuple(getattr(v.aval, "shape", ())) for v in jaxpr.invars]
    sites = _with_unique_names([_site(one, names, leaves, numbers) for one in found])
    return (
        {site.name: site for site in sites},
        {one.place.path: site.name for one, site in zip(found, sites)},
    )
