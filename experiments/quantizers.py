"""How tensors are put into their formats, from `config.quantizers`: scales and gradient rules.

Rules and spaces name formats; the calibration and the gradient of each role hold for all of them.
Formats that come with their own (mxfp4, nvfp4, binary) keep it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

import aqt_search as aqs
from aqt_search.numerics import calibration, gradient_rules
from aqt_search.numerics.by_name import (
    named_calibration,
    named_gradient_rule,
    named_granularity,
)
from aqt_search.numerics.calibration import Calibration
from aqt_search.numerics.granularity import Granularity
from aqt_search.numerics.quantizer import Quantizer, quantizer
from experiments.from_config import checked_values

_ROLES = ("weight", "activation")


@dataclasses.dataclass(frozen=True)
class Quantizers:
    """The calibrations, gradient rules and granularities of the roles, by name."""

    calibrations: Mapping[str, Calibration]
    gradients: Mapping[str, gradient_rules.GradientRule]
    granularities: Mapping[str, Granularity | None]

    @property
    def is_default(self) -> bool:
        """Whether formats alone say it all."""
        rules, found = set(self.gradients.values()), set(self.calibrations.values())
        return (
            rules == {gradient_rules.STRAIGHT_THROUGH}
            and found == {calibration.absmax()}
            and set(self.granularities.values()) == {None}
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
                granularity=self.granularities[role],
                calibration=self.calibrations[role],
                gradient=self.gradients[role],
            )

        return formats._replace(lhs=of("lhs"), rhs=of("rhs"))

    def of_assignment(
        self, sites: Mapping[str, aqs.Site], assignment: Mapping[str, aqs.SiteFormats]
    ) -> dict[str, aqs.SiteFormats]:
        """The same for all sites."""
        sites = {**aqs.layer_sites(sites), **sites}  # an assignment may name either
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
        found = Quantizers(
            {role: named_calibration(options[role], formats) for role in _ROLES},
            {role: named_gradient_rule(options[f"{role}_gradient"]) for role in _ROLES},
            {role: named_granularity(options[f"{role}_granularity"], role) for role in _ROLES},
        )
        for role in _ROLES:  # what does not go together is told here, before there are formats
            parts = found.granularities[role], found.calibrations[role]
            Quantizer("int8", *parts, gradient=found.gradients[role])
    return found
