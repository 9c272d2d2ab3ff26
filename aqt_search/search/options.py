"""What a rule of a search space offers: options to choose from, by name, list or operand."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aqt_search.numerics.formats import FormatError, NumericFormat, format_name
from aqt_search.numerics.quantizer import Quantizer, spec_name
from aqt_search.tracing.rules import FormatSpec
from aqt_search.tracing.sites import SiteFormats


class SpaceError(ValueError):
    """A search space that leaves nothing to choose, or a target outside of its range."""


# The spaces of FLIQS (arXiv 2308.03290, section 4). S holds its uniform baselines; the formats that
# L adds between e2m1 and e4m3 are a choice of ours: one of each width, fewer exponent bits first.
NAMED_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "fliqs_s_int": ("int4", "int8", "bf16"),
    "fliqs_l_int": ("int4", "int5", "int6", "int7", "int8", "bf16"),
    "fliqs_s_fp": ("e2m1", "e4m3", "bf16"),
    "fliqs_l_fp": ("e2m1", "e2m2", "e3m2", "e3m3", "e4m3", "bf16"),
    "fliqs_s_mixed": ("int4", "e2m1", "int8", "e4m3", "bf16"),
    "fliqs_l_mixed": (
        "int4", "e2m1", "int5", "e2m2", "int6", "e3m2", "int7", "e3m3", "int8", "e4m3", "bf16",
    ),
}  # fmt: skip

_ROLES = ("activation", "weight")


class Choice(NamedTuple):
    """What a rule leaves to choose: options by role, None for both operands together."""

    options: dict[str | None, tuple[FormatSpec, ...]]
    fixed: Mapping[str, FormatSpec]  # of the other operands

    def spec(self, column: int) -> FormatSpec:
        """One set of formats of the rule, for checking: option `column` of every role."""
        taken = {role: o[min(column, len(o) - 1)] for role, o in self.options.items()}
        of_roles = {role: option for role, option in taken.items() if role is not None}
        return {**self.fixed, **of_roles} if of_roles else taken[None]


def parsed_rule(pattern: str, spec: Any) -> Any:
    """A rule's second part: `Choice` where there is something to choose."""
    if isinstance(spec, Mapping) and not isinstance(spec, SiteFormats):
        options = {key: _options(value) for key, value in spec.items()}
        chosen = {key: value for key, value in options.items() if value is not None}
        if not chosen:
            return spec
        if odd := sorted(set(spec) - set(_ROLES)):
            raise SpaceError(
                f"Rule {pattern!r} has options beside {odd}: a mapping with options has the keys"
                " 'weight' and 'activation' alone."
            )
        choice = Choice(chosen, {k: v for k, v in spec.items() if k not in chosen})
    elif (options := _options(spec)) is not None:
        choice = Choice({None: options}, {})
    else:
        return spec
    for role, options in choice.options.items():
        _check_options(pattern, role, options)
    return choice


def _options(spec: Any) -> tuple[FormatSpec, ...] | None:
    """The options that a specification offers; None where it is one fixed format."""
    if isinstance(spec, str) and spec in NAMED_OPTIONS:
        return NAMED_OPTIONS[spec]
    if isinstance(spec, (list, tuple)) and not isinstance(spec, (NumericFormat, SiteFormats)):
        return tuple(spec)
    return None


def _check_options(pattern: str, role: str | None, options: Sequence[FormatSpec]) -> None:
    labels = [option_label(option) for option in options]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise SpaceError(
            f"Rule {pattern!r} offers {labels}: a choice needs at least two different formats."
        )
    if role is not None and any(isinstance(option, Mapping) for option in options):
        raise SpaceError(
            f"Rule {pattern!r} offers {labels} to the {role}: formats of one operand have no"
            " operands of their own."
        )


def option_label(option: FormatSpec) -> str:
    """An option's name, for tables and files: of a format without one its five numbers."""
    if isinstance(option, Mapping):
        return ",".join(f"{key}={_named(value)}" for key, value in sorted(option.items()))
    return "none" if option is None else _named(option)


def _named(spec: FormatSpec) -> str:
    if not isinstance(spec, (NumericFormat, Quantizer)):
        return str(spec)
    fmt = spec.fmt if isinstance(spec, Quantizer) else spec
    for name in (lambda: spec_name(spec), lambda: format_name(fmt)):
        with contextlib.suppress(FormatError):
            return name()
    return f"({', '.join(f'{float(number):.6g}' for number in fmt)})"
