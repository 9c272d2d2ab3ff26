"""What every search ends with: its files, and its weights evaluated under the formats found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from aqt_search.architecture.decisions import ArchitectureDecision
from aqt_search.search.space import Space
from aqt_search.training.metrics import read_metrics
from aqt_search.training.workdir import check_lock, write_json, write_text
from experiments import from_config, results
from experiments.configured_search import ConfiguredSearch
from experiments.subnet import Subnet, subnet_of

_PROBABILITY = "probability"


class Found(NamedTuple):
    """What a search found."""

    kind: str  # "search" or "random"
    choices: np.ndarray  # [decisions]
    variables: Mapping[str, Any]
    seconds: float
    entropy: float | None = None  # of the policy at the end, where there is one: mean, in nats


def probabilities_of(p: np.ndarray, space: Space) -> dict[str, float]:
    """A policy [decisions, max_options] as metrics: "probability/<decision>/<option>"."""
    return {
        f"{_PROBABILITY}/{decision.name}/{label}": float(value)
        for decision, row in zip(space.decisions, p)
        for label, value in zip(decision.labels, row)
    }


def write_space(workdir: Path, space: Space) -> None:
    """Writes space.json."""
    decisions: dict[str, dict[str, list[str]]] = {}
    for decision in space.decisions:
        told = {"sites": list(decision.sites), "options": list(decision.labels)}
        if isinstance(decision, ArchitectureDecision):
            told["about"] = list(decision.about)
        decisions[decision.name] = told
    check_lock(workdir)
    write_json(workdir / "space.json", decisions)


def write_search_files(workdir: Path, space: Space) -> None:
    """Writes space.json, and probabilities.jsonl from the metrics."""
    write_space(workdir, space)
    lines = []
    for record in read_metrics(workdir):
        table = {
            d.name: [record[f"{_PROBABILITY}/{d.name}/{label}"] for label in d.labels]
            for d in space.decisions
        }
        lines.append(json.dumps({"step": record["step"], "probabilities": table}) + "\n")
    write_text(workdir / "probabilities.jsonl", "".join(lines))


def finish_search(
    config: ml_collections.ConfigDict,
    workdir: Path,
    parts: from_config.Parts,
    setting: ConfiguredSearch,
    found: Found,
) -> dict[str, Any]:
    """Evaluates the weights as they are under the formats found, and writes the files."""
    write_search_files(workdir, setting.space)
    formats = setting.space.concrete_assignment(found.choices)
    net, subnet = setting.space.net, Subnet(parts, formats, found.variables, None)
    if net is not None:
        own = np.asarray(setting.space.architecture(found.choices))
        active = np.asarray(setting.space.active(found.choices))
        subnet = subnet_of(parts, net, own, formats, found.variables, active)
    return results.finish(
        results.Ended(
            config,
            workdir,
            subnet.parts,
            subnet.formats,
            subnet.variables,
            architecture=subnet.architecture,
        ),
        {
            "kind": found.kind,
            "steps": parts.schedule.total_steps,
            "seconds": found.seconds,
            "final_entropy": found.entropy,
            "without_retraining": True,
        }
        | results.against_targets(setting.targets, subnet.parts.sites, subnet.formats),
    )
