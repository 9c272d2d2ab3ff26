"""Which weights are stored as a palette and indices, and of what size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aqt_search.tracing.layers import check_whole
from aqt_search.tracing.rules import RuleError, match_rules, rule_pairs
from aqt_search.tracing.sites import Site, parameter_name


class PaletteError(ValueError):
    """A weight that cannot be clustered as asked, or a palette that makes no sense."""


@dataclasses.dataclass(frozen=True)
class Palette:
    """A table of 2^bits vectors of `dimension` weights each.

    A weight tensor is cut into vectors of `dimension` neighbours in storage order (along its last
    axis first), and each is one index of `bits` bits: bits / dimension bits for a weight.

    Args:
      bits: of an index, 1 to 8.
      dimension: weights that share an index; it has to divide the weights of a tensor.

    Raises:
      PaletteError: a number out of range, or no integer.
    """

    bits: int
    dimension: int = 1

    def __post_init__(self):
        for name, most in (("bits", 8), ("dimension", None)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < 1 or (most and value > most):
                expected = f"1 to {most}" if most else "at least 1"
                raise PaletteError(f"The {name} of a palette is {value!r}; expected {expected}.")

    @property
    def clusters(self) -> int:
        """Vectors in the table."""
        return 2**self.bits


PaletteSpec = Palette | int | Mapping[str, int] | None  # bits; or arguments of `Palette`


class ClusteredWeight(NamedTuple):
    """A parameter that gets a palette."""

    parameter: str  # its name, as `parameter_name` gives it
    copies: int  # stacked layers, each of which has a palette of its own
    palette: Palette


def palette_of(spec: PaletteSpec, pattern: str) -> Palette | None:
    """The palette that the rule of `pattern` says.

    Raises:
      RuleError: it says none.
      PaletteError: bits or a dimension out of range.
    """
    if spec is None or isinstance(spec, Palette):
        return spec
    if isinstance(spec, Mapping) and {"bits"} <= set(spec) <= {"bits", "dimension"}:
        return Palette(**spec)
    if isinstance(spec, int):
        return Palette(spec)
    raise RuleError(
        f"Rule {pattern!r} has the palette {spec!r}; expected a number of bits, a mapping of 'bits'"
        " and perhaps 'dimension', a Palette, or None."
    )


def select_weights(
    sites: Mapping[str, Site], rules: Iterable[tuple[str, PaletteSpec]]
) -> dict[str, ClusteredWeight]:
    """The weights that rules give a palette, by site.

    Sites without a weight are left out, and a parameter of several sites counts once, as its first
    site says. A parameter is clustered as it is stored: before what the model computes on the way
    to the site.

    Args:
      sites: as `find_sites` returns them.
      rules: ordered pairs of pattern, as `assign` has them, and palette: a `Palette`, its
        bits, a mapping of its arguments, or None for a weight that stays as it is.

    Raises:
      RuleError: a rule matches no site, is never used, or has no palette; or no site with a weight
        gets one.
      PaletteError: bits or a dimension out of range.
    """
    check_whole(sites, "A palette")
    rules = rule_pairs(rules)
    taken = match_rules(sites, [pattern for pattern, _ in rules])
    chosen: dict[str, ClusteredWeight] = {}
    seen: set[str] = set()
    for (pattern, spec), names in zip(rules, taken):
        palette = palette_of(spec, pattern)
        for name in names:
            weight = sites[name].weight
            if weight is None or weight.parameter is None or weight.parameter in seen:
                continue
            seen.add(weight.parameter)
            if palette:
                chosen[name] = ClusteredWeight(weight.parameter, weight.copies, palette)
    if not chosen:
        raise RuleError("There is nothing to cluster: no rule gives a palette to a weight.")
    return chosen


def weight_leaves(params: Any, chosen: Mapping[str, ClusteredWeight]) -> dict[str, jax.Array]:
    """The weights of `chosen` by site, as they are stored.

    Args:
      params: as `find_sites` was given them, or their "params".

    Raises:
      PaletteError: a parameter is missing or not floating point, or the dimension of its palette
        does not divide its weights.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = {parameter_name(path): leaf for path, leaf in flat}
    found = {}
    for name, weight in chosen.items():
        if weight.parameter not in leaves:
            raise PaletteError(
                f"The parameters have no {weight.parameter!r}: give those that find_sites was"
                " given, before any were stored with palettes."
            )
        found[name] = leaves[weight.parameter]
        _check_leaf(found[name], name, weight)
    return found


def _check_leaf(leaf: jax.Array, name: str, weight: ClusteredWeight) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise PaletteError(f"Site {name!r}: its weight is {leaf.dtype}, not floating point.")
    size, dimension = leaf.size // weight.copies, weight.palette.dimension
    if size % dimension:
        raise PaletteError(
            f"Site {name!r} has {size} weights, which vectors of {dimension} do not divide. Give it"
            " a rule of its own, with a dimension that does, or None."
        )


def as_vectors(leaf: jax.Array, weight: ClusteredWeight) -> jax.Array:
    """A weight as vectors [copies, n, dimension], cut in storage order."""
    return leaf.reshape(weight.copies, -1, weight.palette.dimension)


def replace_weights(
    params: Any, chosen: Mapping[str, ClusteredWeight], weights: Mapping[str, Any]
) -> Any:
    """`params` with the weights of `chosen`, by site, in place of its own."""
    new = {chosen[name].parameter: weight for name, weight in weights.items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(parameter_name(path), leaf), params
    )
