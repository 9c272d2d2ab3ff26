"""The formats of every site, from rules or from a run's policy.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_collections

import aqt_search as aqs
from aqt_search.training.storage import as_path
from experiments.architecture import ARCHITECTURE, FORMATS, read_policy_file
from experiments.errors import ConfigError
from experiments.quantizers import configured_quantizers


def configured_assignment(
    config: ml_collections.ConfigDict, sites: dict[str, aqs.Site]
) -> dict[str, aqs.SiteFormats]:
    """The formats of `config.formats` or of the file `config.policy`, with their quantizers."""
    formats = _configured_formats(config, sites)
    return configured_quantizers(config).of_assignment(sites, formats)


def _configured_formats(
    config: ml_collections.ConfigDict, sites: dict[str, aqs.Site]
) -> dict[str, aqs.SiteFormats]:
    if not config.policy:
        return aqs.assign(sites, config.formats)
    if config.formats:
        raise ConfigError("Give formats or a policy file, not both.")
    policy = read_policy(as_path(config.policy))
    layers = {**sites, **aqs.layer_sites(sites)}
    named = {layers[name].stack if name in layers else name for name in policy}
    odd = sorted(named ^ set(sites))
    if odd:
        raise ConfigError(
            f"The policy {config.policy} is not of this model: only one of them has the sites"
            f" {', '.join(odd[:3])}. Take one from a run with the same config.model and data."
        )
    return {name: policy[name] for name in layers if name in policy}


def read_policy(path: Path) -> dict[str, aqs.SiteFormats]:
    """The formats in a policy.json: what `aqs.to_json` gives, alone or beside an architecture.

    Raises:
      ConfigError: there is no such file, or it holds something else.
      WorkdirError: it is not JSON.
    """
    value = read_policy_file(path)
    if isinstance(value, Mapping) and ARCHITECTURE in value:
        value = value.get(FORMATS)
    try:
        return aqs.from_json(value)
    except aqs.AssignmentError as error:
        raise ConfigError(f"In the policy {path}: {error}") from error
