"""The formats of every site, from rules or from a run's policy.json."""

from __future__ import annotations

from pathlib import Path

import ml_collections

import aqt_search as aqs
from aqt_search.training.workdir import read_json
from experiments import results
from experiments.from_config import ConfigError
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
    policy = read_policy(Path(config.policy))
    odd = sorted(set(policy) ^ set(sites))
    if odd:
        raise ConfigError(
            f"The policy {config.policy} is not of this model: only one of them has the sites"
            f" {', '.join(odd[:3])}. Take one from a run with the same config.model and data."
        )
    return {name: policy[name] for name in sites}


def read_policy(path: Path) -> dict[str, aqs.SiteFormats]:
    """Reads a policy.json: {site: {"lhs": format name or null, "rhs": ...}}.

    Raises:
      ConfigError: there is no such file, or it holds something else.
      WorkdirError: it is not JSON.
      FormatError: an unknown format.
    """
    try:
        policy = read_json(path)
    except OSError as error:
        message = f"Cannot read the policy {path}: {error.strerror}. Give a run's policy.json."
        raise ConfigError(message) from error

    def formats(name: str) -> aqs.SiteFormats:
        sides = policy[name]
        fields = set(aqs.SiteFormats._fields)
        if not isinstance(sides, dict) or not {"lhs", "rhs"} <= set(sides) <= fields:
            raise ConfigError(
                f'The policy {path} gives site {name!r} {sides!r}; expected {{"lhs": format name or'
                ' null, "rhs": format name or null}, as in the policy.json of a run.'
            )
        return aqs.SiteFormats(**{k: results.spec_from_json(v) for k, v in sides.items()})

    if not isinstance(policy, dict):
        raise ConfigError(f"The policy {path} is no JSON object of sites.")
    return {name: formats(name) for name in policy}
