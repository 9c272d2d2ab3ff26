"""Matching: the formats of one function's sites for another function of the same parameters.

An encoder alone reads once what the whole model reads twice: `embed#1` there is `embed` here. And
it has none of the decoder's sites, which an assignment of the whole model names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

from aqt_search.tracing.layers import by_layer, equal_specs
from aqt_search.tracing.origins import SITE_PRIMITIVES
from aqt_search.tracing.sites import SiteError, SiteFormats
from aqt_search.tracing.trace import Trace


def parameter_of(name: str) -> str:
    """A site's name without its number among those of equal name."""
    return re.sub(r"#\d+$", "", name)


def matched_sites(
    assignment: Mapping[str, SiteFormats], trace: Trace, lookups: Collection[str] | None = None
) -> dict[str, str]:
    """For each site of a function that an assignment is about, the name it has there.

    A site that is not named itself takes what is said of others of its parameter, if they agree.
    Names of parameters that the function does not read are passed over.

    Args:
      assignment: formats by site. Layers that are named are part of the site that is their stack.
      trace: the function.
      lookups: the names in the assignment that are lookups; None: that is not known.

    Returns:
      {the name of a site: its name in the assignment}, both without layers.

    Raises:
      SiteError: a name is of no site and no parameter that is left unread; sites of one parameter
        disagree, so that no one of them says what another takes.
    """
    sites, layers = trace.sites, by_layer(assignment, trace.sites)
    unknown: dict[str, list[str]] = {}
    for name in layers:
        if name not in sites:
            unknown.setdefault(parameter_of(name), []).append(name)
    found = {name: name for name in layers if name in sites}
    for parameter, names in unknown.items():
        wanting = [n for n in sites if parameter_of(n) == parameter and n not in layers]
        if not wanting and not _is_left_unread(parameter, trace.parameters):
            raise unknown_site(names[0], sites)
        for name in wanting:
            is_lookup = sites[name].kind == "gather"
            alike = [n for n in names if lookups is None or (n in lookups) == is_lookup] or names
            if not all(_agree(layers[alike[0]], layers[n], is_lookup) for n in alike):
                raise SiteError(
                    f"Site {name!r} is none of {', '.join(alike)}, whose formats differ (or are"
                    f" traced, and cannot be compared): assign {name!r} itself."
                )
            found[name] = alike[0]
    return found


def for_sites(assignment: Mapping[str, SiteFormats], trace: Trace) -> dict[str, SiteFormats]:
    """An assignment by the names that sites have in this function; see `matched_sites`."""
    layers = by_layer(assignment, trace.sites)
    if all(name in trace.sites for name in layers):
        return dict(assignment)
    return {
        name + layer: _for_kind(formats, trace.sites[name].kind)
        for name, source in matched_sites(assignment, trace).items()
        for layer, formats in layers[source].items()
    }


def _for_kind(formats: SiteFormats, kind: str) -> SiteFormats:
    return SiteFormats(rhs=formats.rhs) if kind == "gather" else formats


def _agree(
    one: Mapping[str, SiteFormats], other: Mapping[str, SiteFormats], is_lookup: bool
) -> bool:
    """Whether what is said of two sites, by layer, is the same."""
    fields = ("rhs",) if is_lookup else SiteFormats._fields
    return one.keys() == other.keys() and all(
        equal_specs(getattr(one[layer], field), getattr(other[layer], field))
        for layer in one
        for field in fields
    )


def _is_left_unread(name: str, parameters: Mapping[str, bool]) -> bool:
    """Whether a name is that of parameters, or of a place among some, that are all unread."""
    parts = name.split("@")
    if all(part in parameters for part in parts):
        return not any(parameters[part] for part in parts)
    scope, _, kind = name.rpartition("/")
    if kind not in SITE_PRIMITIVES:
        return False
    below = [read for leaf, read in parameters.items() if leaf.startswith(f"{scope}/")]
    return bool(scope) and bool(below) and not any(below)


def unknown_site(name: str, sites: Collection[str]) -> SiteError:
    """The error for a name that is of no site."""
    near = difflib.get_close_matches(name, sites, n=3, cutoff=0.4)
    return SiteError(
        f"The assignment names site {name!r}, which the function does not have."
        f" Nearest: {', '.join(near or list(sites)[:3]) or 'it has no sites'}."
    )
