"""Assignments as JSON values: what a policy.json holds.

{"stem/kernel": {"lhs": "int8", "rhs": "int8"}, "head/kernel": {"lhs": None, "rhs": "mxfp4"}}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from aqt_search.numerics.formats import FormatError, NumericFormat, format_name, is_traced
from aqt_search.numerics.quantizer import Quantizer, operand_spec, quantizer, spec_name
from aqt_search.tracing.sites import SiteFormats

_SIDES = ("lhs", "rhs")  # always told; gradients only where they have a format
_REAL = {"min_value": float, "max_value": float}  # of a format's numbers; the others are whole


class AssignmentError(ValueError):
    """An assignment that JSON cannot say, or a value that says none."""


def to_json(assignment: Mapping[str, SiteFormats]) -> dict[str, dict[str, Any]]:
    """Site -> names of the formats of both operands, and of gradients where they have one.

    A format is told by its name ("int4", "e4m3", "mxfp4"), or its five numbers where it has none;
    an operand that stays signed by {"format": ..., "unsigned": False}; None by None. `from_json`
    gives an equal assignment back. Random keys are left out.

    Raises:
      AssignmentError: a site has no `SiteFormats`; formats are traced, or tables of several; or a
        quantizer differs from its format's in anything else: its calibration, granularity or
        gradient is code, which no file holds.
    """
    return {name: _site_to_json(name, formats) for name, formats in assignment.items()}


def _site_to_json(site: str, formats: SiteFormats) -> dict[str, Any]:
    if not isinstance(formats, SiteFormats):
        raise AssignmentError(
            f"Site {site!r} is assigned {formats!r}; expected SiteFormats(lhs, rhs), as"
            " aqt_search.assign gives them."
        )
    return {
        field: _spec_to_json(site, field, spec)
        for field, spec in formats._asdict().items()
        if spec is not None or field in _SIDES
    }


def _spec_to_json(site: str, field: str, spec: Any) -> str | dict[str, Any] | None:
    if spec is None:
        return None
    try:
        whole = dataclasses.replace(quantizer(spec), key=None, active=None)
        if is_traced(whole.fmt):
            raise FormatError("the format is traced; give the assignment of known choices.")
        if any(np.ndim(number) for number in whole.fmt):
            raise FormatError("this is a table of formats; give the one that was chosen.")
        return _quantizer_to_json(whole)
    except FormatError as error:
        raise AssignmentError(
            f"Site {site!r}, {field}: {error} A file says formats, and whether they may be"
            " unsigned; take the rest from where it was made."
        ) from error


def _quantizer_to_json(whole: Quantizer) -> str | dict[str, Any]:
    try:
        return spec_name(whole)
    except FormatError:
        plain = Quantizer(whole.fmt, unsigned=whole.unsigned)
        if whole != plain:
            if whole.unsigned:
                raise
            return {"format": spec_name(dataclasses.replace(whole, unsigned=True)),
                    "unsigned": False}  # fmt: skip
    value = _format_to_json(whole.fmt)
    return value if whole.unsigned else {"format": value, "unsigned": False}


def _format_to_json(fmt: NumericFormat) -> str | dict[str, float]:
    try:
        return format_name(fmt)
    except FormatError:
        return {name: _REAL.get(name, int)(number) for name, number in fmt._asdict().items()}


def from_json(value: Any) -> dict[str, SiteFormats]:
    """The assignment that `to_json` wrote.

    Raises:
      AssignmentError: it wrote no such thing; the message names the site.
    """
    if not isinstance(value, Mapping):
        raise AssignmentError(
            f'Expected a JSON object of sites, {{"site": {{"lhs": ..., "rhs": ...}}}}; got a'
            f" {type(value).__name__}, which is no JSON object of sites."
        )
    return {name: _site_from_json(name, sides) for name, sides in value.items()}


def _site_from_json(site: str, sides: Any) -> SiteFormats:
    fields = set(SiteFormats._fields)
    if not isinstance(sides, Mapping) or not set(_SIDES) <= set(sides) <= fields:
        raise AssignmentError(
            f'Site {site!r} has {sides!r}; expected {{"lhs": format name or null, "rhs": format'
            " name or null}, with gradients' formats as lhs_gradient and rhs_gradient."
        )
    found = {}
    for field, value in sides.items():
        try:
            found[field] = None if value is None else _spec_from_json(value)
        except (FormatError, TypeError) as error:
            raise AssignmentError(f"Site {site!r}, {field}: {error}") from error
    return SiteFormats(**found)


def _spec_from_json(value: Any) -> NumericFormat | Quantizer:
    if not isinstance(value, Mapping) or set(value) != {"format", "unsigned"}:
        return _format_from_json(value)
    if not isinstance(value["unsigned"], bool):
        raise FormatError(f"'unsigned' is true or false; got {value['unsigned']!r}.")
    whole = quantizer(_format_from_json(value["format"]))
    return dataclasses.replace(whole, unsigned=value["unsigned"])


def _format_from_json(value: Any) -> NumericFormat | Quantizer:
    if not isinstance(value, Mapping):
        return operand_spec(value)
    if set(value) != set(NumericFormat._fields):
        raise FormatError(
            f"{dict(value)} is no format; expected a name, {', '.join(NumericFormat._fields)}, or"
            ' {"format": ..., "unsigned": ...}.'
        )
    numbers: dict[str, Any] = {name: _number(name, number) for name, number in value.items()}
    return NumericFormat(**numbers)


def _number(name: str, number: Any) -> float | int:
    kind, is_number = _REAL.get(name, int), isinstance(number, (int, float))
    if not is_number or isinstance(number, bool) or not math.isfinite(number):
        raise FormatError(f"a format's {name} is a number; got {number!r}.")
    if kind(number) != number:
        raise FormatError(f"a format's {name} is a whole number; got {number!r}.")
    return kind(number)
