"""Layers of stacks: each layer of a scan as a site of its own.

    layers = layer_sites(sites)        # "blocks/mlp/kernel" becomes "blocks/mlp/kernel[0]", ...

A product inside of a scan through layers is one site, and an assignment may name it as a whole or
layer by layer; what it says of a layer goes before what it says of the whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.formats import NumericFormat, numeric_format
from aqt_search.numerics.quantizer import Quantizer, quantizer
from aqt_search.tracing.control_flow import Path
from aqt_search.tracing.sites import Operand, Site, SiteError, SiteFormats

_LAYER = re.compile(r"^(.+?)((?:\[\d+\])+)$", re.DOTALL)


def layer_indices(site: Site) -> list[tuple[int, ...]]:
    """The places in its stack that a site's layers have, in order; [()] where it is no stack."""
    return list(itertools.product(*(range(length) for _, length in site.layers)))


def layer_name(name: str, index: Sequence[int]) -> str:
    """The name of a layer: `kernel[3]`, in a stack of stacks `kernel[3][0]`."""
    return name + "".join(f"[{i}]" for i in index)


def split_layer(name: str, sites: Collection[str] = ()) -> tuple[str, str]:
    """The name of the stack that a name is of a layer of, and which: ("kernel", "[3]").

    A name among `sites` is of a whole one: (name, "").
    """
    found = None if name in sites else _LAYER.match(name)
    return (found[1], found[2]) if found else (name, "")


def layer_sites(
    sites: Mapping[str, Site], stacks: Collection[str] | None = None
) -> dict[str, Site]:
    """The sites with every stack of L layers as L sites, as those of the unrolled model.

    In program order: that of the stack's sites within a layer, layer after layer.

    Args:
      sites: as `find_sites` returns them.
      stacks: the names of those to take apart; None: all.
    """
    found: dict[str, Site] = {}
    for _, members in itertools.groupby(sites.items(), key=lambda item: item[1].layers[:1]):
        apart, whole = [], {}
        for name, site in members:
            if site.layers and not site.layer and (stacks is None or name in stacks):
                apart += [_of_layer(site, index) for index in layer_indices(site)]
            else:
                whole[name] = site
        if not apart:
            found |= whole
        else:
            everything = sorted([*whole.values(), *apart], key=lambda site: site.layer)
            found |= {site.name: site for site in everything}
    return found


def _of_layer(site: Site, index: tuple[int, ...]) -> Site:
    places = dict(zip((path for path, _ in site.layers), index))
    count = math.prod(length for _, length in site.layers)
    return dataclasses.replace(
        site,
        name=layer_name(site.name, index),
        lhs=_slice(site.lhs, places),
        rhs=_slice(site.rhs, places),
        repeats=None if site.repeats is None else site.repeats // max(count, 1),
        layer=index,
    )


def _slice(operand: Operand, places: Mapping[Path, int]) -> Operand:
    """What a layer takes of an operand: other layers take other arrays, if each has its own."""
    own = [(path, length) for path, length in operand.sliced_by if path in places]
    array: Hashable = operand.array
    if own and operand.role == "weight":
        array = operand.parameter if array is None else array
        array = array, tuple(places[path] for path, _ in own)
    return dataclasses.replace(
        operand,
        copies=operand.copies // max(math.prod(length for _, length in own), 1),
        array=array,
        sliced_by=tuple(loop for loop in operand.sliced_by if loop not in own),
    )


def by_stack(
    assignment: Mapping[str, SiteFormats], sites: Mapping[str, Site]
) -> dict[str, tuple[SiteFormats, ...]]:
    """The formats of each site that an assignment is about: one, or one for each of its layers.

    There is one, too, where those of all layers are known to be the same.
    """
    named = by_layer(assignment, sites)
    found = {}
    for name, own in named.items():
        whole = own.get("", SiteFormats())
        labels = [layer_name("", index) for index in layer_indices(sites[name])]
        each = [own.get(label, whole) for label in labels] if set(own) != {""} else [whole]
        alike = len(each) > 0 and all(_alike(each[0], formats) for formats in each[1:])
        found[name] = (each[0],) if alike else tuple(each)
    return found


def by_layer(assignment: Mapping[str, Any], sites: Collection[str]) -> dict[str, dict[str, Any]]:
    """What an assignment says of each site, by layer: {"kernel": {"": ..., "[3]": ...}}."""
    found: dict[str, dict[str, Any]] = {}
    for name, formats in assignment.items():
        stack, layer = split_layer(name, sites)
        found.setdefault(stack, {})[layer] = formats
    return found


def apart(
    sites: Mapping[str, Site], assignment: Mapping[str, SiteFormats]
) -> tuple[Mapping[str, Site], Mapping[str, SiteFormats]]:
    """The same with those stacks taken apart that the assignment names layer by layer."""
    named = {split_layer(name, sites)[0] for name in assignment if name not in sites}
    stacks = {name for name in named if name in sites and sites[name].layers}
    if not stacks:
        return sites, assignment
    layers = layer_sites(sites, stacks)
    whole = {
        name: assignment[site.stack]
        for name, site in layers.items()
        if site.layer and name not in assignment and site.stack in assignment
    }
    return layers, {n: f for n, f in assignment.items() if n not in stacks} | whole


def check_whole(sites: Mapping[str, Site], what: str) -> None:
    """Raises SiteError for layers, where what is done is done to whole parameters."""
    for site in sites.values():
        if site.layer:
            raise SiteError(
                f"{what} works on whole parameters, but {site.name!r} is one layer of"
                f" {site.stack!r}. Give the sites as find_sites returns them."
            )


def stack_of(name: str, sites: Mapping[str, Site]) -> Site:
    """The site that a name is of, or of a layer of."""
    return sites[split_layer(name, sites)[0]]


def float_format(dtype: Any) -> NumericFormat:
    """The format that values of a float dtype are of: it rounds them to themselves."""
    if dtype == np.float32 or not jnp.issubdtype(dtype, jnp.floating):  # indices have none
        return numeric_format("fp32")
    info = jnp.finfo(dtype)
    return NumericFormat(info.nmant, info.minexp, float(info.min), float(info.max), info.bits)


def filled(specs: Sequence[Any], dtype: Any) -> list[Quantizer]:
    """The quantizers of all layers: where one has none, the format of its dtype."""
    given = [quantizer(spec) for spec in specs if spec is not None]
    if len(given) == len(specs):
        return given
    unquantized = dataclasses.replace(given[0], fmt=float_format(dtype))
    return [unquantized if spec is None else quantizer(spec) for spec in specs]


def _alike(one: SiteFormats, other: SiteFormats) -> bool:
    return all(equal_specs(a, b) for a, b in zip(one, other))


def equal_specs(one: Any, other: Any) -> bool:
    """Whether two formats or quantizers are known to be the same."""
    if one is other:
        return True
    if one is None or other is None:
        return False
    try:
        return bool(quantizer(one) == quantizer(other))
    except (TypeError, ValueError):  # traced formats and random keys cannot be compared
        return False
