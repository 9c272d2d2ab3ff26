"""Kinds of values: what the value of a key may be, in words, with an example and a check."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from aqt_search.numerics.formats import FormatError
from aqt_search.palette.rules import PaletteError
from aqt_search.search.options import SpaceError
from aqt_search.tracing.rules import RuleError
from experiments.from_config import ConfigError

# Errors that keep their name when that of the key is put before them.
_NAMED_ERRORS = (FormatError, PaletteError, RuleError, SpaceError)
_LARGEST = float(np.finfo(np.float32).max)
_LARGEST_INT = 2**31 - 1
_SHOWN = 160  # characters of a value in a message


class Kind(NamedTuple):
    """What a value may be."""

    expected: str
    example: Any
    # Raises TypeError or ValueError, whose message says more or nothing.
    check: Callable[[Any], None]


class Misfit(ValueError):
    """A value that is none of its kind; the message says what was expected instead."""

    def __init__(self, message: str, told_as: type[ValueError]):
        super().__init__(message)
        self.told_as = told_as  # what `require` raises for it


def require(what: str, value: Any, kind: Kind) -> None:
    """Raises an error that names `what`, the value, what is expected and an example.

    Raises:
      ConfigError: the value is none of the kind.
      FormatError, PaletteError, RuleError, SpaceError: likewise, by what is in it.
    """
    try:
        require_part(what, value, kind)
    except Misfit as misfit:
        raise misfit.told_as(f"{misfit}.") from misfit


def require_part(what: str, value: Any, kind: Kind) -> None:
    """`require` of a part of a value, within its check: what fits least is what was expected.

    Raises:
      Misfit: the part is none of the kind.
    """
    try:
        kind.check(value)
    except Misfit as inner:
        raise Misfit(f"{_said(what, value)}: {inner}", inner.told_as) from inner
    except (TypeError, ValueError) as error:
        told_as = type(error) if isinstance(error, _NAMED_ERRORS) else ConfigError
        raise Misfit(
            f"{_said(what, value, error)}; expected {kind.expected}, such as {kind.example!r}",
            told_as,
        ) from error


def _said(what: str, value: Any, error: Exception | None = None) -> str:
    """What a value is, cut short, and why that cannot be."""
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    why = str(error or "").rstrip(".")
    return f"{what} is {shown}" + (f": {why}" if why else "")


def demand(fits: bool) -> None:
    """Raises a ValueError without a message, for `require` to say it all."""
    if not fits:
        raise ValueError


# --- Kinds ----------------------------------------------------------------------------------------


def in_range(
    least: float | None, above: float | None, most: float, below: float | None
) -> Callable:
    """value -> whether it is a number in the range."""

    def within(value: Any) -> bool:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value <= most):
            return False
        low = (least is None or value >= least) and (above is None or value > above)
        return low and (below is None or value < below)

    return within


def _words(least: float | None, above: float | None, most: float, below: float | None) -> str:
    ends = [("at least", least), ("above", above), ("at most", most), ("below", below)]
    told = [f"{word} {end:.10g}" for word, end in ends if end is not None and end != _LARGEST]
    return " and ".join(told)


def number(
    example: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float = _LARGEST,
    below: float | None = None,
) -> Kind:
    """A number that float32 holds, in a range."""
    limits = least, above, most, below
    within = in_range(*limits)
    return Kind(f"a finite number {_words(*limits)}", example, lambda v: demand(within(v)))


def whole(
    example: int, *, least: int | None = None, above: int | None = None, most: int = _LARGEST_INT
) -> Kind:
    """A whole number in a range."""
    limits = least, above, most, None
    within = in_range(*limits)
    return Kind(
        f"a whole number {_words(*limits)}",
        example,
        lambda v: demand(isinstance(v, numbers.Integral) and within(v)),
    )


def flag() -> Kind:
    """True or False."""
    return Kind("True or False", True, lambda v: demand(isinstance(v, (bool, np.bool_))))


def text(expected: str, example: str, *, empty: bool = True) -> Kind:
    """A text in one line."""

    def check(value: Any) -> None:
        demand(isinstance(value, str) and value.isprintable() and (empty or bool(value.strip())))

    return Kind(expected, example, check)


def one_of(names: Iterable[Any]) -> Kind:
    """One of some names."""
    known = tuple(names)
    listing = ", ".join(str(name) if name else repr(name) for name in known)
    example = next(name for name in known if name)
    # Compared one by one, as a value may not be hashable.
    return Kind(
        f"one of {listing}", example, lambda v: demand(any(v is n or v == n for n in known))
    )


def accepted(by: Callable[[Any], Any], expected: str, example: str) -> Kind:
    """A text that a function of the library takes; its own error says what is wrong."""

    def check(value: Any) -> None:
        demand(isinstance(value, str))
        by(value)

    return Kind(expected, example, check)


def either(*kinds: Kind) -> Kind:
    """A value of one of several kinds, told apart by type: the last one's error is told."""

    def check(value: Any) -> None:
        for kind in kinds[:-1]:
            try:
                return kind.check(value)
            except (TypeError, ValueError):
                continue
        return kinds[-1].check(value)

    return Kind(" or ".join(kind.expected for kind in kinds), kinds[0].example, check)


def several(kind: Kind, *, least: int = 0, example: Any = None) -> Kind:
    """A tuple of values of a kind."""

    def check(value: Any) -> None:
        demand(is_tuple(value, least))
        for position, item in enumerate(value, start=1):
            what = f"its value {position}"
            try:
                kind.check(item)
            except Misfit as inner:
                raise Misfit(f"{_said(what, item)}: {inner}", inner.told_as) from inner
            except (TypeError, ValueError) as error:  # what is expected, the whole tuple's says
                own = type(error) if isinstance(error, _NAMED_ERRORS) else ValueError
                raise own(_said(what, item, error)) from error

    count = " of at least one" if least else ""
    return Kind(f"a tuple{count}, each {kind.expected}", example or (kind.example,), check)


def is_tuple(value: Any, least: int = 0, most: int | None = None) -> bool:
    """Whether a value is a tuple, or a list as in a config.json, of so many parts."""
    return isinstance(value, (tuple, list)) and least <= len(value) <= (most or math.inf)
