"""Rules: ordered (pattern, formats) pairs that become an assignment of formats to sites."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from aqt_search.formats import NumericFormat, numeric_format
from aqt_search.sites import Site, SiteError, SiteFormats

# One format for both operands, None for no quantization, or formats by operand.
FormatSpec = str | NumericFormat | None | Mapping[str, str | NumericFormat | None] | SiteFormats

_SIDES = ("lhs", "rhs")
_ROLES = ("activation", "weight")


class RuleError(ValueError):
    """A rule that matches nothing, is never reached, or whose formats make no sense."""


def _nearest(pattern: str, names: Iterable[str]) -> str:
    names = list(names)
    words = re.sub(r"[^A-Za-z0-9_/#]+", "", pattern)
    near = difflib.get_close_matches(words, names, n=3, cutoff=0.3) or names[:3]
    return ", ".join(near) or "the function has no sites"


def site_formats(site: Site, spec: FormatSpec) -> SiteFormats:
    """The formats of a site's operands under `spec` (see `assign`)."""
    if isinstance(spec, SiteFormats):
        spec = spec._asdict()
    if not isinstance(spec, Mapping):
        fmt = None if spec is None else numeric_format(spec)
        return SiteFormats(fmt, fmt)
    keys = set(spec)
    if not keys or not (keys <= set(_SIDES) or keys <= set(_ROLES)):
        raise RuleError(
            f"Formats by operand take the keys 'lhs' and 'rhs', or 'weight' and 'activation';"
            f" got {sorted(keys)}."
        )

    def of(side: str, role: str) -> NumericFormat | None:
        # A constant is known when the model is served, as a weight is.
        key = side if keys <= set(_SIDES) else ("activation" if role == "activation" else "weight")
        fmt = spec.get(key)
        return None if fmt is None else numeric_format(fmt)

    return SiteFormats(of("lhs", site.lhs.role), of("rhs", site.rhs.role))


def match_rules(sites: Mapping[str, Site], patterns: Iterable[str]) -> list[list[str]]:
    """The sites that each of the ordered patterns takes: a site goes to the first that matches it.

    Raises:
      RuleError: a pattern matches no site, or only sites that earlier ones took (the message shows
        the nearest names), or is no regular expression.
    """
    free, taken = dict.fromkeys(sites), []
    for pattern in patterns:
        try:
            matched = [name for name in sites if re.search(pattern, name)]
        except re.error as error:
            raise RuleError(f"Rule {pattern!r} is no regular expression: {error}.") from error
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
    """Builds an assignment: every site takes the formats of the first rule that matches its name.

    A pattern is a regular expression that is searched for in the site's name (`head` matches
    anywhere, `^head/kernel$` that name alone). Its formats are a name or `NumericFormat` for both
    operands, None for no quantization, or a mapping by side (`{"lhs": "int8", "rhs": "int4"}`) or
    by role (`{"activation": "int8", "weight": "int4"}`). Sites without a match stay as they are.

        assign(sites, [("stem|head", "int8"), (".*", {"weight": "int4", "activation": "e4m3"})])

    Args:
      sites: as `find_sites` returns them.
      rules: ordered pairs of pattern and formats.

    Returns:
      `SiteFormats` for every site, in the order of `sites`.

    Raises:
      RuleError: a rule matches no site, or only sites that earlier rules took (the message shows
        the nearest names); a pattern that is no regular expression; unknown operand keys.
      FormatError: unknown format name.
      SiteError: a rule quantizes a site that cannot be.
    """
    rules = list(rules)
    assignment = {name: SiteFormats() for name in sites}
    taken = match_rules(sites, [pattern for pattern, _ in rules])
    for (pattern, spec), names in zip(rules, taken):
        for name in names:
            assignment[name] = site_formats(sites[name], spec)
            if sites[name].refused and assignment[name] != SiteFormats():
                raise SiteError(
                    f"Rule {pattern!r} quantizes site {name!r}, which cannot be:"
                    f" {sites[name].refused}. Put a rule ({re.escape(name)!r}, None) before it."
                )
    return assignment
