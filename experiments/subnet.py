"""The plain model that a search of the architecture found, cut out of the whole one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

import aqt_search as aqs
from aqt_search.architecture.subnet_scales import cut_scales
from aqt_search.architecture.subnet_sites import subnet_sites
from aqt_search.models.fitting import fitted
from aqt_search.training.scales import SCALES
from experiments import from_config
from experiments.architecture import model_json


class Subnet(NamedTuple):
    """What a search ends with."""

    parts: from_config.Parts  # with the model and its sites
    formats: Mapping[str, aqs.SiteFormats]
    variables: Mapping[str, Any]
    architecture: Mapping[str, Any] | None  # what tells the model from the configured one


def subnet_of(
    parts: from_config.Parts,
    net: aqs.Elastic,
    choices: np.ndarray,
    formats: Mapping[str, aqs.SiteFormats],
    variables: Mapping[str, Any],
    active: np.ndarray | None = None,
    matrices: Any = None,
) -> Subnet:
    """The model that is built like a subnet, with formats and scales by its own names.

    Args:
      parts: of the whole model.
      net, choices: the subnet.
      formats: of sites of the whole model; {} for none.
      variables: of the whole model.
      active: [decisions], bool: those that decide anything, which are told; None: all.
      matrices: of the kernels, as of `Elastic.extract`.
    """
    scales = cut_scales(net, choices, variables.get(SCALES, {}))
    rest = {name: part for name, part in variables.items() if name != SCALES}
    model, cut = fitted(parts.model, net.extract(choices, rest, matrices or None))
    sites = from_config.model_sites(model, parts.images.splits.image_shape)
    names = dict(zip(sites, subnet_sites(net, choices), strict=True))
    own = {new: scales[old] for new, old in names.items() if old in scales}
    told = net.description(choices)
    if active is not None:
        told = {name: told[name] for name, on in zip(list(told), active) if on}
    return Subnet(
        parts._replace(model=model, sites=sites),
        {new: formats[old] for new, old in names.items() if old in formats},
        cut | ({SCALES: own} if scales else {}),
        {
            **model_json(model),
            "choices": told,
            # Blocks behind a skipped one move up: the names that those have in the whole model.
            "sites": {new: old for new, old in names.items() if new != old},
        },
    )
