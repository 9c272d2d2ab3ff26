"""Calibrations, gradient rules and granularities by name, as configurations say them.

named_calibration("percentile(99.9)")
named_gradient_rule("ewgs(0.01)")
named_granularity("block(32)")
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from aqt_search.numerics import calibration, gradient_rules, learned_scales
from aqt_search.numerics.calibration import Calibration
from aqt_search.numerics.formats import FormatError
from aqt_search.numerics.gradient_rules import GradientRule
from aqt_search.numerics.granularity import PER_TENSOR, PER_TOKEN, Granularity, per_block

T = TypeVar("T")

# By name: a calibration of the arguments behind the name.
CALIBRATIONS: Mapping[str, Callable[..., Calibration]] = {
    "absmax": calibration.absmax,
    "min_max": calibration.min_max,
    "mse": calibration.mse,
    "percentile": calibration.percentile,
    "mean_deviation": calibration.mean_deviation,
    "moving_average": lambda decay=0.9: calibration.moving_average(calibration.absmax(), decay),
    "fixed": calibration.fixed,
    "pact": learned_scales.pact,
    "batch_quant": learned_scales.batch_quant,
}
GRADIENT_RULES: Mapping[str, Callable[..., GradientRule]] = {
    "straight_through": lambda: gradient_rules.STRAIGHT_THROUGH,
    "pass_through": lambda: gradient_rules.PASS_THROUGH,
    "ewgs": gradient_rules.ewgs,
}
# By the role of an operand; None is its own: a scale per channel of weights, one of activations.
GRANULARITIES: Mapping[str, Mapping[str, Callable[..., Granularity | None]]] = {
    "weight": {"channel": lambda: None, "tensor": lambda: PER_TENSOR, "block": per_block},
    "activation": {"tensor": lambda: None, "token": lambda: PER_TOKEN},
}


def _parts(spec: str) -> tuple[str, tuple]:
    """A name and its arguments, numbers or such texts: "mse", "percentile(99.9)", "centred(mse)".

    Raises:
      FormatError: it is none.
    """
    try:
        node = ast.parse(spec, mode="eval").body
    except (SyntaxError, TypeError):
        node = None
    if isinstance(node, ast.Name):
        return node.id, ()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        texts = [ast.unparse(argument) for argument in node.args]
        return node.func.id, tuple(map(_argument, texts))
    raise FormatError(f"{spec!r} is no name or name(argument, ...), such as 'percentile(99.9)'.")


def _argument(text: str) -> float | int | str:
    with contextlib.suppress(ValueError):
        return ast.literal_eval(text)
    return text


def _known(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise FormatError(f"Unknown {what} {name!r}: expected one of {', '.join(known)}.")


def named_calibration(spec: str, formats: Sequence[str] = ()) -> Calibration:
    """The calibration called `spec`: name or name(argument, ...).

    Beside `CALIBRATIONS`: "lsq", with a step size for each of `formats` if there are any, and
    "centred(calibration)".

    Raises:
      FormatError: unknown name.
      TypeError, ValueError: arguments that it does not take.
    """
    name, arguments = _parts(spec)
    _known(name, (*CALIBRATIONS, "lsq", "centred"), "calibration")
    if name == "centred":
        return calibration.centred(named_calibration(*arguments, formats=formats))
    if name == "lsq":
        return learned_scales.lsq(*arguments, *formats)
    return CALIBRATIONS[name](*arguments)


def named_gradient_rule(spec: str) -> GradientRule:
    """The rule that `spec` calls of `GRADIENT_RULES`: name or name(argument, ...).

    Raises:
      FormatError: unknown name.
      TypeError, ValueError: arguments that it does not take.
    """
    return _named(spec, GRADIENT_RULES, "gradient")


def named_granularity(spec: str, role: str = "weight") -> Granularity | None:
    """The granularity that `spec` calls of `GRANULARITIES[role]`: name or name(argument, ...).

    Raises:
      FormatError: unknown name.
      TypeError, ValueError: arguments that it does not take.
    """
    return _named(spec, GRANULARITIES[role], "granularity")


def _named(spec: str, table: Mapping[str, Callable[..., T]], what: str) -> T:
    name, arguments = _parts(spec)
    _known(name, tuple(table), what)
    return table[name](*arguments)
