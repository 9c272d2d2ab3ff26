"""Searches the formats of every layer while it trains the weights: one run, no retraining.

    python -m experiments.search --config=configs/digits_resnet8.py --workdir=runs/search

The workdir holds, beside what experiments.train writes, the formats found (policy.json), the space
(space.json) and the policy's probabilities over time (probabilities.jsonl).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search.search import policy as policies
from aqt_search.search.one_shot import (
    QualityGuard,
    SearchOptions,
    SearchState,
    best_choices,
    make_search_step,
    policy_optimizer,
)
from aqt_search.search.space import Space, make_space
from aqt_search.training.loop import run_steps
from aqt_search.training.metrics import read_metrics
from aqt_search.training.parallel import unreplicate
from aqt_search.training.train_step import (
    batch_stats_momentum,
    init_train_state,
    make_update,
)
from aqt_search.training.workdir import claim_workdir, lock_workdir, write_json, write_text
from experiments import from_config, results
from experiments.command_line import run_job

_PROBABILITY = "probability"


def uniform_rules(config: ml_collections.ConfigDict, formats: Any) -> tuple:
    """The space's rules with `formats` in place of every choice."""
    return tuple(
        (pattern, formats if isinstance(spec, (tuple, list)) else spec)
        for pattern, spec in config.search.space
    )


def cost_target(config: ml_collections.ConfigDict, sites: Mapping[str, aqs.Site]) -> float:
    """The target in GBOPs."""
    if not config.search.relative_to:
        return config.search.target
    reference = aqs.assign(sites, uniform_rules(config, config.search.relative_to))
    return config.search.target * aqs.cost.gbops(sites, reference)


def search_options(
    config: ml_collections.ConfigDict, total_steps: int, target: float
) -> SearchOptions:
    """The controls of `config.search`."""
    outside = ("space", "decide", "target", "relative_to", "held_out_batch_size")
    controls = {k: v for k, v in config.search.items() if k not in outside}
    with from_config.checked_values("search"):
        return SearchOptions(total_steps=total_steps, target=target, **controls)


def probabilities(logits: np.ndarray, space: Space, temperature: float) -> dict[str, float]:
    """The policy as metrics: "probability/<decision>/<option>"."""
    log_p = policies.log_probabilities(logits, space.mask, temperature)
    return {
        f"{_PROBABILITY}/{decision.name}/{label}": float(p)
        for decision, row in zip(space.decisions, np.exp(log_p))
        for label, p in zip(decision.labels, row)
    }


def write_search_files(workdir: Path, space: Space) -> None:
    """Writes space.json, and probabilities.jsonl from the metrics."""
    decisions = {
        d.name: {"sites": list(d.sites), "options": list(d.labels)} for d in space.decisions
    }
    write_json(workdir / "space.json", decisions)
    lines = []
    for record in read_metrics(workdir):
        table = {
            d.name: [record[f"{_PROBABILITY}/{d.name}/{label}"] for label in d.labels]
            for d in space.decisions
        }
        lines.append(json.dumps({"step": record["step"], "probabilities": table}) + "\n")
    write_text(workdir / "probabilities.jsonl", "".join(lines))


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Searches, evaluates the formats found and returns the result."""
    with lock_workdir(workdir):
        images = images or from_config.load_images(config)
        # Replicas hold different samples, so each normalises by its own batch.
        parts = from_config.build_parts(config, images, axis_name=None)
        space = make_space(parts.sites, config.search.space, decide=config.search.decide)
        target = cost_target(config, parts.sites)
        options = search_options(config, parts.schedule.total_steps, target)
        qapply = aqs.quantize(parts.model.apply)
        update = make_update(qapply, parts.optimizer, label_smoothing=config.label_smoothing)
        costs = space.cost_table(aqs.cost.gbops)
        held_out = options.quality == "held_out"
        streams = [from_config.training_stream(config, images)]
        streams += [from_config.reward_stream(config, images)] if held_out else []
        shape = images.splits.image_shape
        state = SearchState(
            init_train_state(parts.model, parts.optimizer, shape, config.seed),
            policies.init_policy(space.mask, policy_optimizer(options)),
        )
        momentum = batch_stats_momentum(parts.model.apply, state.train, shape)
        step = make_search_step(qapply, update, space, costs, options, momentum)
        examples = config.search.held_out_batch_size if held_out else config.batch_size
        # Claimed last, so that a refused configuration does not keep the folder.
        claim_workdir(workdir, config.to_dict(), ignore=("log_every", "data.data_dir"))
        found = run_steps(
            step, state, streams, parts.schedule, workdir,
            describe=lambda s: probabilities(
                unreplicate(s.policy.logits), space, options.temperature
            ),
            check=QualityGuard(options, images.splits.num_classes, examples),
            description=workdir.name,
        )  # fmt: skip
        write_search_files(workdir, space)
        logits, train = found.state.policy.logits, found.state.train
        log_p = policies.log_probabilities(logits, space.mask, options.temperature)
        return results.finish(
            config, workdir, images, parts.model, parts.sites,
            space.concrete_assignment(best_choices(logits, space.mask)),
            {"params": train.params, "batch_stats": train.batch_stats},
            {
                "kind": "search",
                "steps": parts.schedule.total_steps,
                "seconds": found.seconds,
                "target_gbops": target,
                "final_entropy": float(policies.entropy(log_p).mean()),
                "without_retraining": True,
            },
        )  # fmt: skip


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    results.print_result(run(config, workdir))


if __name__ == "__main__":
    run_job(main)
