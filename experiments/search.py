"""Searches the formats of every layer while it trains the weights: one run, no retraining.

    python -m experiments.search --config=configs/digits_resnet8.py --workdir=runs/search

The workdir holds, beside what experiments.train writes, the formats found (policy.json), the space
(space.json) and the policy's probabilities over time (probabilities.jsonl).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search.numerics.formats import format_name
from aqt_search.search import policy as policies
from aqt_search.search.answer import most_probable, most_probable_on_target
from aqt_search.search.one_shot import (
    SearchOptions,
    SearchState,
    check_targets,
    init_policy,
    make_search_step,
)
from aqt_search.search.options import Choice, parsed_rule
from aqt_search.search.searchers import random_search
from aqt_search.search.space import Space, make_space
from aqt_search.training.assignment_batch import evaluate_assignments
from aqt_search.training.guard import QualityGuard
from aqt_search.training.loop import LoopResult, Run
from aqt_search.training.metrics import read_metrics
from aqt_search.training.parallel import unreplicate
from aqt_search.training.workdir import write_json, write_text
from experiments import from_config, results
from experiments.command_line import run_job
from experiments.job import Job, claim_run, run_alone
from experiments.quantizers import configured_quantizers

_PROBABILITY = "probability"


def uniform_rules(config: ml_collections.ConfigDict, formats: Any) -> tuple:
    """The space's rules with `formats` in place of every choice."""
    rules = []
    for pattern, spec in config.search.space:
        offered = parsed_rule(pattern, spec)
        if isinstance(offered, Choice):
            roles = {role: formats for role in offered.options}
            spec = formats if None in roles else {**(offered.fixed or {}), **roles}
        rules.append((pattern, spec))
    return tuple(rules)


def cost_functions(config: ml_collections.ConfigDict) -> dict[str, Callable]:
    """The costs that have a target, by name; the first is the primary one."""
    names = [config.search.cost, *(name for name, _, _ in config.search.further_costs)]
    if len(set(names)) < len(names):
        raise from_config.ConfigError(f"search has two targets for one cost: {names}.")
    return {name: from_config.cost_function(name) for name in names}


def cost_targets(
    config: ml_collections.ConfigDict, sites: Mapping[str, aqs.Site]
) -> dict[str, float]:
    """The targets in the units of `cost_functions`."""
    primary = (config.search.cost, config.search.target, config.search.relative_to)
    targets = {}
    for name, target, relative_to in (primary, *config.search.further_costs):
        if relative_to:
            reference = aqs.assign(sites, uniform_rules(config, relative_to))
            target = target * float(from_config.cost_function(name)(sites, reference))
        targets[name] = target
    return targets


def configured_space(config: ml_collections.ConfigDict, sites: Mapping[str, aqs.Site]) -> Space:
    """The space of `config.search`, with the quantizers of the configuration."""
    space = make_space(sites, config.search.space, decide=config.search.decide)
    quantizers = configured_quantizers(config, format_names(space))
    adapted = dataclasses.replace(space, adapt=quantizers.of_site)
    adapted.assignment(np.zeros(len(space.decisions), int))  # raises where they do not fit
    return adapted


def format_names(space: Space) -> list[str]:
    """The formats that some point of a space uses."""
    named = []
    for column in range(space.max_options):
        choices = [min(column, len(d.options) - 1) for d in space.decisions]
        for formats in space.concrete_assignment(choices).values():
            named += [format_name(aqs.quantizer(spec).fmt) for spec in formats if spec is not None]
    return list(dict.fromkeys([*named, "fp32"]))  # the option of None


_OUTSIDE = ("space", "decide", "cost", "target", "relative_to", "further_costs",
            "held_out_batch_size")  # fmt: skip


def search_options(config: ml_collections.ConfigDict, total_steps: int) -> SearchOptions:
    """The controls of `config.search`."""
    controls = {k: v for k, v in config.search.items() if k not in _OUTSIDE}
    with from_config.checked_values("search"):
        return SearchOptions(total_steps=total_steps, **controls)


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
    """A search; its cost targets are an input of the step."""
    # Replicas hold different samples, so each normalises by its own batch.
    parts = from_config.build_parts(config, images, axis_name=None)
    space = configured_space(config, parts.sites)
    options = search_options(config, parts.schedule.total_steps)
    costs = {name: space.cost_table(cost) for name, cost in cost_functions(config).items()}
    targets = cost_targets(config, parts.sites)
    check_targets(costs, targets)
    qapply = from_config.quantized(parts.model)
    update = from_config.make_update(config, parts, qapply)
    held_out = options.quality == "held_out"
    streams = [from_config.training_stream(config, images)]
    streams += [from_config.reward_stream(config, images)] if held_out else []
    state = SearchState(
        from_config.initial_state(config, parts, first_assignment(space)),
        init_policy(space, options),
    )
    examples = config.search.held_out_batch_size if held_out else config.batch_size

    def finish(found: LoopResult) -> dict[str, Any]:
        return finish_search(config, workdir, images, parts, space, options, targets, found)

    # Claimed last, so that a refused configuration does not keep the folder.
    claim_run(workdir, config)
    run = Run(
        workdir, state, streams, {name: np.float32(t) for name, t in targets.items()},
        describe=lambda s: probabilities(unreplicate(s.policy.logits), space, options.temperature),
        check=QualityGuard(options, images.splits.num_classes, examples),
    )  # fmt: skip
    step = make_search_step(qapply, update, space, costs, options)
    return Job(step, run, parts.schedule, finish)


def first_assignment(space: Space) -> dict[str, aqs.SiteFormats]:
    """The assignment of some point: what calibration states are made for."""
    return space.assignment(np.zeros(len(space.decisions), int))


def finish_search(
    config: ml_collections.ConfigDict,
    workdir: Path,
    images: from_config.Images,
    parts: from_config.Parts,
    space: Space,
    options: SearchOptions,
    targets: Mapping[str, float],
    found: LoopResult,
) -> dict[str, Any]:
    """Takes the formats found, and evaluates the weights as they are under them."""
    write_search_files(workdir, space)
    logits, train = found.state.policy.logits, found.state.train
    variables = train.variables
    log_p = policies.log_probabilities(logits, space.mask, options.temperature)
    random = options.searcher == "random"
    choices = (
        best_of_random(config, images, parts, space, options, targets, variables)
        if random
        else answer(config, space, options, targets, np.asarray(log_p))
    )
    formats = space.concrete_assignment(choices)
    return results.finish(
        config, workdir, images, parts.model, parts.sites, formats, variables,
        {
            "kind": "random" if random else "search",
            "steps": parts.schedule.total_steps,
            "seconds": found.seconds,
            "targets": dict(targets),
            "costs": {
                name: float(cost(parts.sites, formats))
                for name, cost in cost_functions(config).items()
            },
            "target_gbops": targets.get("gbops"),
            "final_entropy": None if random else float(policies.entropy(log_p).mean()),
            "without_retraining": True,
        },
    )  # fmt: skip


def answer(
    config: ml_collections.ConfigDict,
    space: Space,
    options: SearchOptions,
    targets: Mapping[str, float],
    log_p: np.ndarray,
) -> np.ndarray:
    """The most probable point, within `tolerance` of the targets if there is one.

    A critic has settled on it before the end.
    """
    if options.searcher == "critic" or not options.tolerance:
        return np.asarray(most_probable(log_p))
    costs = {name: space.cost_table(cost) for name, cost in cost_functions(config).items()}
    one_sided = options.reward in ("one_sided", "hard")
    found = most_probable_on_target(log_p, costs, targets, options.tolerance, one_sided=one_sided)
    return np.asarray(found)


def held_out_accuracy(
    config: ml_collections.ConfigDict,
    images: from_config.Images,
    model: Any,
    space: Space,
    variables: Mapping[str, Any],
    count: int,
) -> Callable[[np.ndarray], np.ndarray]:
    """A judge of points, [n, decisions] -> [n], by about `count` held-out images, always the same.

    As in the search, BatchNorm takes the statistics of each batch.
    """
    qapply = from_config.quantized(model)
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
    images: from_config.Images,
    parts: from_config.Parts,
    space: Space,
    options: SearchOptions,
    targets: Mapping[str, float],
    variables: Mapping[str, Any],
) -> np.ndarray:
    """The best of random points, on as many held-out images as the policy gradient would see."""
    if len(targets) > 1:
        raise from_config.ConfigError(
            f"Random search meets one target; got {', '.join(targets)}: empty further_costs."
        )
    judge = held_out_accuracy(config, images, parts.model, space, variables, _JUDGED_IMAGES)
    steps = options.total_steps - options.start
    seen = steps * options.samples * config.search.held_out_batch_size
    ((name, target),) = targets.items()
    costs = space.cost_table(from_config.cost_function(name))
    points = max(1, seen // _JUDGED_IMAGES)
    return random_search(judge, costs, target, points, config.seed).choices


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Searches, evaluates the formats found and returns the result."""
    return run_alone(prepare, config, workdir, images)


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    results.print_result(run(config, workdir))


if __name__ == "__main__":
    run_job(main)
