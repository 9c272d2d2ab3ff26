"""Searches the formats of every layer while it trains the weights: one run, no retraining."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from aqt_search.search import policy as policies
from aqt_search.search.searchers import random_search
from aqt_search.search.space import Space
from aqt_search.training.assignment_batch import evaluate_assignments
from aqt_search.training.guard import QualityGuard
from aqt_search.training.loop import LoopResult, Run
from aqt_search.training.metrics import read_metrics
from aqt_search.training.parallel import unreplicate
from aqt_search.training.search_step import ClassifierSearchState, make_search_step
from aqt_search.training.workdir import write_json, write_text
from experiments import from_config, results
from experiments.configured_search import ConfiguredSearch, configured_search
from experiments.job import Job, claim_run, run_alone

_PROBABILITY = "probability"


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


def prepare(config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images) -> Job:
    """A search; its cost targets are part of the state."""
    # Replicas hold different samples, so each normalises by its own batch.
    parts = from_config.build_parts(config, images, axis_name=None)
    setting = configured_search(config, parts.sites, parts.schedule.total_steps)
    qapply = from_config.quantized(parts.model)
    update = from_config.make_update(config, parts, qapply)
    step = make_search_step(
        qapply, update, setting.space, setting.one_shot, measure=config.search.measure
    )
    held_out = config.search.quality == "held_out"
    streams = [from_config.training_stream(config, images)]
    streams += [from_config.reward_stream(config, images)] if held_out else []
    state = ClassifierSearchState(
        from_config.initial_state(config, parts, setting.first_assignment()),
        setting.one_shot.init(setting.targets),
    )
    examples = config.search.held_out_batch_size if held_out else config.batch_size

    def finish(found: LoopResult) -> dict[str, Any]:
        write_search_files(workdir, setting.space)
        return finish_search(config, workdir, parts, setting, found)

    def describe(state: ClassifierSearchState) -> dict[str, float]:
        logits = unreplicate(state.search.policy.logits)
        return probabilities(logits, setting.space, config.search.temperature)

    # Claimed last, so that a refused configuration does not keep the folder.
    claim_run(workdir, config)
    guard = QualityGuard(setting.delay_steps, images.splits.num_classes, examples)
    run = Run(workdir, state, streams, describe=describe, check=guard)
    return Job(step, run, parts.schedule, finish)


def finish_search(
    config: ml_collections.ConfigDict,
    workdir: Path,
    parts: from_config.Parts,
    setting: ConfiguredSearch,
    found: LoopResult,
) -> dict[str, Any]:
    """Takes the formats found, and evaluates the weights as they are under them."""
    train, searched = found.state
    logits = searched.policy.logits
    log_p = policies.log_probabilities(logits, setting.space.mask, config.search.temperature)
    random = config.search.searcher == "random"
    choices = (
        best_of_random(config, parts, setting, train.variables)
        if random
        else np.asarray(setting.one_shot.answer(searched))
    )
    formats = setting.space.concrete_assignment(choices)
    costs = {
        name: float(from_config.cost_function(name)(parts.sites, formats)) for name in setting.costs
    }
    return results.finish(
        results.Ended(config, workdir, parts, formats, train.variables),
        {
            "kind": "random" if random else "search",
            "steps": parts.schedule.total_steps,
            "seconds": found.seconds,
            "targets": dict(setting.targets),
            "costs": costs,
            "target_gbops": setting.targets.get("gbops"),
            "final_entropy": None if random else float(policies.entropy(log_p).mean()),
            "without_retraining": True,
        },
    )


def held_out_accuracy(
    config: ml_collections.ConfigDict,
    parts: from_config.Parts,
    space: Space,
    variables: Mapping[str, Any],
    count: int,
) -> Callable[[np.ndarray], np.ndarray]:
    """A judge of points, [n, decisions] -> [n], by about `count` held-out images, always the same.

    As in the search, BatchNorm takes the statistics of each batch.
    """
    qapply, images = from_config.quantized(parts.model), parts.images
    whole = min(count, len(images.splits.reward)) // config.evaluation.batch_size
    stream = from_config.evaluation_batches(config, images, "reward")
    batches = list(itertools.islice(stream, max(1, whole)))

    def judge(choices: np.ndarray) -> np.ndarray:
        assignments = jax.vmap(space.assignment)(choices)
        return evaluate_assignments(qapply, assignments, variables, batches).accuracy

    return judge


_JUDGED_IMAGES = 1000  # for each point of a random search


def best_of_random(
    config: ml_collections.ConfigDict,
    parts: from_config.Parts,
    setting: ConfiguredSearch,
    variables: Mapping[str, Any],
) -> np.ndarray:
    """The best of random points, on as many held-out images as the policy gradient would see."""
    if len(setting.targets) > 1:
        raise from_config.ConfigError(
            f"Random search meets one target; got {', '.join(setting.targets)}: empty"
            " further_costs."
        )
    judge = held_out_accuracy(config, parts, setting.space, variables, _JUDGED_IMAGES)
    steps = parts.schedule.total_steps - setting.delay_steps
    seen = steps * config.search.samples * config.search.held_out_batch_size
    ((name, target),) = setting.targets.items()
    points = max(1, seen // _JUDGED_IMAGES)
    return random_search(judge, setting.costs[name], target, points, config.seed).choices


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Searches, evaluates the formats found and returns the result."""
    return run_alone(prepare, config, workdir, images)
