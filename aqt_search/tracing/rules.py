"""Rules: ordered (pattern, formats) pairs that become an assignment of formats to sites."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from aqt_search.numerics.formats import NumericFormat
from aqt_search.numerics.quantizer import Quantizer, operand_spec, quantizer
from aqt_search.tracing.layers import layer_sites
from aqt_search.tracing.sites import Site, SiteError, SiteFormats, is_unquantized

# One format (or quantizer) for both operands, None for no quantization, or formats by operand.
FormatSpec = str | NumericFormat | Quantizer | None | Mapping[str, Any] | SiteFormats

_SIDES = ("lhs", "rhs")
_ROLES = ("activation", "weight")
_OPTIONS = ("lhs_gradient", "rhs_gradient", "unsigned")


class RuleError(ValueError):
    """A rule that matches nothing, is never reached, or whose formats make no sense."""


def _nearest(pattern: str, names: Iterable[str]) -> str:
    names = list(names)
    words = re.sub(r"[^A-Za-z0-9_/#]+", "", pattern)
    near = difflib.get_close_matches(words, names, n=3, cutoff=0.3) or names[:3]
    return ", ".join(near) or "the function has no sites"


def parsed_formats(spec: FormatSpec) -> dict[str, Any]:
    """What a rule says of formats, by key: of a side, a role, a gradient, and "unsigned".

    Raises:
      RuleError: unknown keys.
      FormatError: an unknown format.
    """
    if isinstance(spec, SiteFormats):
        spec = {key: fmt for key, fmt in spec._asdict().items() if fmt is not None} or None
    if not isinstance(spec, Mapping):
        spec = {} if spec is None else dict.fromkeys(_SIDES, spec)
    else:
        _check_keys(spec)
    bare = [key for key, fmt in spec.items() if fmt is None or key == "unsigned"]
    return {key: fmt if key in bare else operand_spec(fmt) for key, fmt in spec.items()}


def site_formats(site: Site, spec: FormatSpec) -> SiteFormats:
    """How a site is quantized under `spec` (see `assign`)."""
    parsed = parsed_formats(spec)

    def of(key: str) -> NumericFormat | Quantizer | None:
        fmt = parsed.get(key)
        if fmt is None or parsed.get("unsigned", True):
            return fmt
        return dataclasses.replace(quantizer(fmt), unsigned=False)

    def of_operand(side: str) -> NumericFormat | Quantizer | None:
        # A constant is known when the model is served, as a weight is.
        role = "activation" if getattr(site, side).role == "activation" else "weight"
        return of(side if side in parsed else role)

    lhs = None if site.kind == "gather" else of_operand("lhs")  # the indices of a lookup
    return SiteFormats(lhs, of_operand("rhs"), of("lhs_gradient"), of("rhs_gradient"))


def _check_keys(spec: Mapping[str, Any]) -> None:
    keys = set(spec) - set(_OPTIONS)
    if not keys or not (keys <= set(_SIDES) or keys <= set(_ROLES)):
        raise RuleError(
            "Formats by operand take the keys 'lhs' and 'rhs', or 'weight' and 'activation', beside"
            f" {', '.join(map(repr, _OPTIONS))}; got {sorted(map(str, spec))}."
        )
    if not isinstance(spec.get("unsigned", True), bool):
        raise RuleError(f"'unsigned' is True or False; got {spec['unsigned']!r}.")


def compiled_pattern(pattern: str) -> re.Pattern:
    """A rule's pattern. Raises RuleError if it is no regular expression."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise RuleError(f"Rule {pattern!r} is no regular expression: {error}.") from error


def rule_pairs(rules: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The ordered rules as a list.

    Raises:
      RuleError: something else than pairs whose first part is a pattern.
    """
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise RuleError(f"Rules are {rules!r}; expected pairs (pattern, what holds), in order.")
    pairs = list(rules)
    for rule in pairs:
        pair = isinstance(rule, (tuple, list)) and len(rule) == 2
        if not pair or not isinstance(rule[0], str):
            raise RuleError(f"A rule is {rule!r}; expected a pair (pattern, what holds).")
    return pairs


def matches(pattern: re.Pattern, site: Site) -> bool:
    """Whether a rule is about a site: its name has a match.

    Of a layer that is a site of its own, a match in the name of its stack is enough; one that takes
    in a number of the layer has to take it in from bracket to bracket.
    """
    end = len(site.stack)
    if pattern.search(site.stack):
        return True
    return any(
        match.start() <= end and site.name[: match.end()].endswith("]") and match.end() > end
        for match in pattern.finditer(site.name)
    )


def with_named_layers(sites: Mapping[str, Site], patterns: Iterable[str]) -> dict[str, Site]:
    """The sites, and in place of stacks of which a pattern is about single layers these."""
    layers = layer_sites(sites)
    named = {
        site.stack
        for pattern in map(compiled_pattern, patterns)
        for site in layers.values()
        if site.name not in sites and matches(pattern, site) and not pattern.search(site.stack)
    }
    return layer_sites(sites, named)


def match_rules(sites: Mapping[str, Site], patterns: Iterable[str]) -> list[list[str]]:
    """The sites that each of the ordered patterns takes: a site goes to the first that matches it.

    Raises:
      RuleError: a pattern matches no site, or only sites that earlier ones took (the message shows
        the nearest names), or is no regular expression.
    """
    free, taken = dict.fromkeys(sites), []
    for pattern in patterns:
        compiled = compiled_pattern(pattern)
        matched = [name for name, site in sites.items() if matches(compiled, site)]
        if not matched:
            raise RuleError(
                f"Rule {pattern!r} matches no site. Nearest names: {_nearest(pattern, sites)}."
            )
        taken.append([name for name in matched if name in free])
        if not taken[-1]:
            raise RuleError(
                f"Rule {pattern!r} is never used: earlier rules already took the sites it matches"
                f" ({', '.join(matched[:3])}). Put the narrower rule first."
            )
        for name in taken[-1]:
            del free[name]
    return taken


def assign(
    sites: Mapping[str, Site], rules: Iterable[tuple[str, FormatSpec]]
) -> dict[str, SiteFormats]:
    r"""Builds an assignment: every site takes the formats of the first rule that matches its name.

    A pattern is a regular expression that is searched for in the site's name (`head` matches
    anywhere, `^head/kernel$` that name alone). Its formats are a name, `NumericFormat` or
    `Quantizer` for both operands, None for no quantization, or a mapping by side
    (`{"lhs": "int8", "rhs": "int4"}`) or by role (`{"activation": "int8", "weight": "int4"}`), in
    which `"unsigned": False` keeps the sign bit of operands that are never negative, and
    `"lhs_gradient"` and `"rhs_gradient"` quantize the gradient in the two gradient products.
    Sites without a match stay as they are; of a lookup only the table is quantized.

        assign(sites, [("stem|head", "int8"), (".*", {"weight": "int4", "activation": "e4m3"})])

    A stack of layers (a product inside of `nn.scan` or `jax.lax.scan` over slices of weights) is
    one site, which a rule gives one format. A pattern that spells out a layer's number is about
    that layer alone, and the assignment then names the layers of this stack one by one:

        assign(sites, [(r"blocks/.*kernel\[[0-3]\]", "int8"), (".*", "int4")])

    In a stack of stacks layers are called `kernel[2][0]`, and `kernel\[2\]` is all of `kernel[2]`.

    Args:
      sites: as `find_sites` returns them.
      rules: ordered pairs of pattern and formats.

    Returns:
      `SiteFormats` for every site, in the order of `sites`; of a stack with rules for single
      layers one for each layer.

    Raises:
      RuleError: rules that are no pairs; a rule matches no site, or only sites that earlier rules
        took (the message shows the nearest names); a pattern that is no regular expression;
        unknown operand keys.
      FormatError: unknown format name.
      SiteError: a rule quantizes a site that cannot be.
    """
    rules = rule_pairs(rules)
    sites = with_named_layers(sites, [pattern for pattern, _ in rules])
    assignment = {name: SiteFormats() for name in sites}
    taken = match_rules(sites, [pattern for pattern, _ in rules])
    for (pattern, spec), names in zip(rules, taken):
        for name in names:
            assignment[name] = site_formats(sites[name], spec)
            if sites[name].refused and not is_unquantized(assignment[name]):
                raise SiteError(
                    f"Rule {pattern!r} quantizes site {name!r}, which cannot be:"
                    f" {sites[name].refused}. Put a rule ({re.escape(name)!r}, None) before it."
                )
    return assignment
