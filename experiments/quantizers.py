"""How tensors are put into their formats, from `config.quantizers`: scales and gradient rules.

Rules and spaces name formats; the calibration and the gradient of each role hold for all of them.
Formats that come with their own (mxfp4, nvfp4, binary) keep it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

import aqt_search as aqs
from aqt_search.numerics import calibration, gradient_rules, learned_scales
from aqt_search.numerics.calibration import Calibration
from aqt_search.numerics.granularity import PER_TENSOR, Granularity, per_block
from aqt_search.numerics.quantizer import Quantizer, quantizer
from experiments.from_config import ConfigError, checked_values

T = TypeVar("T")
_ROLES = ("weight", "activation")

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
GRADIENTS: Mapping[str, Callable[..., gradient_rules.GradientRule]] = {
    "straight_through": lambda: gradient_rules.STRAIGHT_THROUGH,
    "pass_through": lambda: gradient_rules.PASS_THROUGH,
    "ewgs": gradient_rules.ewgs,
}
# None is an operand's own: a scale per channel.
GRANULARITIES: Mapping[str, Callable[..., Granularity | None]] = {
    "channel": lambda: None,
    "tensor": lambda: PER_TENSOR,
    "block": per_block,
}


def _parts(spec: str) -> tuple[str, tuple]:
    """A name and its arguments, numbers or such texts: "mse", "percentile(99.9)", "centred(mse)".

    Raises:
      ConfigError: it is none.
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
    raise ConfigError(f"{spec!r} is no name or name(argument, ...), such as 'percentile(99.9)'.")


def _argument(text: str) -> float | int | str:
    with contextlib.suppress(ValueError):
        return ast.literal_eval(text)
    return text


def _known(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise ConfigError(f"Unknown {what} {name!r}: expected one of {', '.join(known)}.")


def named_calibration(spec: str, formats: Sequence[str] = ()) -> Calibration:
    """The calibration called `spec`: name or name(argument, ...).

    Beside `CALIBRATIONS`: "lsq", with a step size for each of `formats` if there are any, and
    "centred(calibration)".

    Raises:
      ConfigError: unknown name.
      TypeError, ValueError: arguments that it does not take.
    """
    name, arguments = _parts(spec)
    _known(name, (*CALIBRATIONS, "lsq", "centred"), "calibration")
    if name == "centred":
        return calibration.centred(named_calibration(*arguments, formats=formats))
    if name == "lsq":
        return learned_scales.lsq(*arguments, *formats)
    return CALIBRATIONS[name](*arguments)


def named(spec: str, table: Mapping[str, Callable[..., T]], what: str) -> T:
    """What `spec` calls of `table`, `GRADIENTS` or `GRANULARITIES`: name or name(argument, ...).

    Raises:
      ConfigError: unknown name; the message says `what` was looked for.
      TypeError, ValueError: arguments that it does not take.
    """
    name, arguments = _parts(spec)
    _known(name, tuple(table), what)
    return table[name](*arguments)


@dataclasses.dataclass(frozen=True)
class Quantizers:
    """The calibrations and gradient rules of the roles, by name; which weights share a scale."""

    calibrations: Mapping[str, Calibration]
    gradients: Mapping[str, gradient_rules.GradientRule]
    weight_granularity: Granularity | None

    @property
    def is_default(self) -> bool:
        """Whether formats alone say it all."""
        rules, found = set(self.gradients.values()), set(self.calibrations.values())
        return (
            rules == {gradient_rules.STRAIGHT_THROUGH}
            and found == {calibration.absmax()}
            and self.weight_granularity is None
        )

    def of_site(self, site: aqs.Site, formats: aqs.SiteFormats) -> aqs.SiteFormats:
        """The site's formats with the quantizers of its operands' roles."""
        if self.is_default:
            return formats

        def of(side: str) -> Any:
            spec = getattr(formats, side)
            role = "activation" if getattr(site, side).role == "activation" else "weight"
            # Lookups of rows have weights that no calibration with state can see.
            if spec is None or site.kind == "gather" or not _is_plain(spec):
                return spec
            return dataclasses.replace(
                quantizer(spec),
                granularity=self.weight_granularity if role == "weight" else None,
                calibration=self.calibrations[role],
                gradient=self.gradients[role],
            )

        return formats._replace(lhs=of("lhs"), rhs=of("rhs"))

    def of_assignment(
        self, sites: Mapping[str, aqs.Site], assignment: Mapping[str, aqs.SiteFormats]
    ) -> dict[str, aqs.SiteFormats]:
        """The same for all sites."""
        return {name: self.of_site(sites[name], formats) for name, formats in assignment.items()}


def _is_plain(spec: Any) -> bool:
    """Whether only a format was asked for."""
    if not isinstance(spec, Quantizer):
        return True
    plain = Quantizer(spec.fmt, unsigned=spec.unsigned)
    return spec == plain


def configured_quantizers(
    config: ml_collections.ConfigDict, formats: Sequence[str] = ()
) -> Quantizers:
    """The quantizers of `config.quantizers`.

    Args:
      formats: those that a learned step size is to tell apart; () where each site has one.

    Raises:
      ConfigError: a value that cannot be.
    """
    options = config.quantizers
    with checked_values("quantizers"):
        return Quantizers(
            {role: named_calibration(options[role], formats) for role in _ROLES},
            {role: named(options[f"{role}_gradient"], GRADIENTS, "gradient") for role in _ROLES},
            named(options.weight_granularity, GRANULARITIES, "granularity"),
        )
