"""Searches the formats of every layer while it trains the weights: one run, no retraining."""

from __future__ import annotations

import itertools
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
from aqt_search.training.parallel import unreplicate
from aqt_search.training.search_step import ClassifierSearchState, make_search_step
from aqt_search.training.subnets import of_points
from experiments import from_config
from experiments.architecture import configured_net
from experiments.configured_search import ConfiguredSearch, configured_search
from experiments.job import Job, claim_run, run_alone
from experiments.jobs import scored_search
from experiments.jobs.searched import Found, finish_search, probabilities_of
from experiments.option_values import VALUES


def check_options(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where formats or weights are given."""
    why = "a search trains from scratch, and chooses formats from search.space"
    from_config.refuse_unread(config, ("formats", "policy", "checkpoint"), why)


def prepare(config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images) -> Job:
    """A search by its searcher: decided once, or by points that are sampled and judged."""
    check_options(config)
    once = config.search.searcher in VALUES
    return (scored_search.prepare if once else prepare_sampled)(config, workdir, images)


def prepare_sampled(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images
) -> Job:
    """A search by points that are sampled; its cost targets are part of the state."""
    # Replicas hold different samples, so each normalises by its own batch.
    parts = from_config.build_parts(config, images, axis_name=None)
    net = configured_net(config, parts.model, images.splits.image_shape)
    setting = configured_search(config, parts.sites, parts.schedule.total_steps, net)
    one_shot = setting.one_shot
    assert one_shot is not None  # of all that sample
    kept = {"residuals": config.residuals, "formats": setting.space.formats}
    qapply = of_points(from_config.quantized(parts.model, **kept), net)
    update = from_config.make_update(config, parts, qapply, net)
    step = make_search_step(qapply, update, setting.space, one_shot, measure=config.search.measure)
    held_out = config.search.quality == "held_out"
    streams = [from_config.training_stream(config, images)]
    streams += [from_config.reward_stream(config, images)] if held_out else []
    state = ClassifierSearchState(
        from_config.initial_state(config, parts, setting.first_assignment()),
        one_shot.init(setting.targets),
    )
    examples = config.search.held_out_batch_size if held_out else config.batch_size

    def log_p(logits: np.ndarray) -> jax.Array:
        temperature = config.search.temperature
        return policies.log_probabilities(logits, setting.space.mask, temperature)

    def finish(found: LoopResult) -> dict[str, Any]:
        train, searched = found.state
        if config.search.searcher == "random":
            choices = best_of_random(config, parts, setting, train.variables)
            ended = Found("random", choices, train.variables, found.seconds)
        else:
            entropy = float(policies.entropy(log_p(searched.policy.logits)).mean())
            choices = np.asarray(one_shot.answer(searched))
            ended = Found("search", choices, train.variables, found.seconds, entropy)
        return finish_search(config, workdir, parts, setting, ended)

    def describe(state: ClassifierSearchState) -> dict[str, float]:
        logits = unreplicate(state.search.policy.logits)
        return probabilities_of(np.exp(log_p(logits)), setting.space)

    # Claimed last, so that a refused configuration does not keep the folder.
    identity = claim_run(workdir, config, images, "search")
    guard = QualityGuard(setting.delay_steps, images.splits.num_classes, examples)
    run = Run(
        workdir, state, streams, describe=describe, check=guard, looks_back=guard.window,
        identity=identity,
    )  # fmt: skip
    return Job(step, run, parts.schedule, finish)


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
    qapply, images = of_points(from_config.quantized(parts.model), space.net), parts.images
    whole = min(count, len(images.splits.reward)) // config.evaluation.batch_size
    stream = from_config.evaluation_batches(config, images, "reward", whole=True)
    batches = list(itertools.islice(stream, max(1, whole)))

    def judge(choices: np.ndarray) -> np.ndarray:
        assignments = jax.vmap(space.point)(choices)
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
