"""Lets several searchers choose formats for one set of weights, by the same evaluations.

    python -m experiments.compare_searchers --config=configs/digits_resnet8.py \
        --workdir=runs/searchers --config.searchers.checkpoint=runs/search

The weights are those of a finished run of experiments.search (with search.searcher="random" they
belong to no point more than to another), and are not trained further. Points are judged on one half
of the held-out images and reported on the other: the best of many judged points looks better than
it is. Writes searchers.json.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from aqt_search import data
from aqt_search.search.searchers import SEARCHERS, regret, scored
from aqt_search.search.space import Space
from aqt_search.training.assignment_batch import evaluate_assignments
from aqt_search.training.storage import as_path
from aqt_search.training.workdir import check_lock, write_json
from experiments import finished_run, from_config
from experiments.command_line import run_job
from experiments.configured_search import ConfiguredSearch, configured_search
from experiments.job import claim_run, opened
from experiments.option_values import SCORES, by_gradients

SEARCHERS_FILE = "searchers.json"
_SEED_OFFSET = 5_000_011  # the order of the images is its own


def check_options(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where there are no weights to choose formats for."""
    if not config.searchers.checkpoint:
        raise from_config.ConfigError(
            "searchers.checkpoint is empty: give the workdir of a finished run of"
            " experiments.search, for whose weights the searchers choose formats."
        )


def judges(
    config: ml_collections.ConfigDict,
    parts: from_config.Parts,
    space: Space,
    variables: Mapping[str, Any],
) -> tuple[Callable, Callable]:
    """Judges of points, [n, decisions] -> accuracies [n], by either half of held-out images."""
    images = parts.images
    source, wanted = images.splits.reward, config.searchers.images
    if len(source) < 2:
        raise from_config.ConfigError(
            "There are no held-out images to judge by: the run was trained with data.held_out=0."
        )
    count = from_config.available("searchers.images", wanted, len(source), "held-out images")
    stream = data.train_batches(
        source, batch_size=count // 2, seed=config.seed + _SEED_OFFSET,
        mean=images.mean, std=images.std,
    )  # fmt: skip
    halves = [next(stream), next(stream)]  # of one order of the images: none is in both
    qapply = from_config.quantized(parts.model)
    assignments_of = jax.jit(jax.vmap(space.assignment))

    def judge_by(half: Mapping[str, np.ndarray]) -> Callable:
        batch = {**half, "mask": np.ones(len(half["label"]), np.float32)}

        def judge(choices: np.ndarray) -> np.ndarray:
            found = evaluate_assignments(qapply, assignments_of(choices), variables, [batch])
            return found.accuracy

        return judge

    return judge_by(halves[0]), judge_by(halves[1])


class Setting(NamedTuple):
    """What the searchers work with."""

    run: finished_run.FinishedRun
    search: ConfiguredSearch
    judge: Callable[[np.ndarray], np.ndarray]  # points [n, decisions] -> accuracies [n]
    report: Callable[[np.ndarray], np.ndarray]  # likewise, by other images


def prepare(config: ml_collections.ConfigDict, images: from_config.Images | None = None) -> Setting:
    """What the searchers work with, checked; `images` saves loading them again."""
    check_options(config)
    run = finished_run.load(config, as_path(config.searchers.checkpoint), images)
    search = configured_search(run.config, run.parts.sites, run.parts.schedule.total_steps)
    return Setting(run, search, *judges(config, run.parts, search.space, run.variables))


def compare(config: ml_collections.ConfigDict, setting: Setting) -> dict[str, Any]:
    """What each searcher found. Raises ConfigError where one has too few evaluations."""
    run, search, judge, report = setting
    space, (name, target) = search.space, next(iter(search.targets.items()))
    searchers = dict(SEARCHERS)
    if SCORES in config.searchers.names:
        values = by_gradients(run.config, run.parts, search.plain, run.variables)
        searchers[SCORES] = functools.partial(scored, values=values)
    evaluations, outcomes = config.searchers.evaluations, {}
    for searcher in config.searchers.names:
        with from_config.checked_values("searchers"):
            outcomes[searcher] = searchers[searcher](
                judge, search.costs[name], target, evaluations, config.seed
            )
    best = max(outcomes.values(), key=lambda outcome: outcome.quality)
    return {
        "cost": name,
        "target": target,
        "images": min(config.searchers.images, len(run.parts.images.splits.reward)) // 2 * 2,
        "points": float(np.prod([len(d.options) for d in space.decisions], dtype=float)),
        "searchers": {
            searcher: {
                "accuracy": outcome.quality,
                "regret": regret(outcome, best),
                "accuracy_other_half": float(report(outcome.choices[None])[0]),
                "cost": outcome.cost,
                "evaluations": len(outcome.evaluated.costs),
                "formats": {d.name: d.labels[c] for d, c in zip(space.decisions, outcome.choices)},
            }
            for searcher, outcome in outcomes.items()
        },
    }


def format_outcomes(found: Mapping[str, Any]) -> str:
    """A table for the terminal."""
    lines = [
        f"{'searcher':<16} {'judged %':>9} {'regret':>7} {'other half %':>13} {'cost/target':>12}"
        f" {'evaluations':>12}"
    ]
    for name, row in found["searchers"].items():
        lines.append(
            f"{name:<16} {100 * row['accuracy']:>9.2f} {100 * row['regret']:>7.2f}"
            f" {100 * row['accuracy_other_half']:>13.2f} {row['cost'] / found['target']:>12.3f}"
            f" {row['evaluations']:>12}"
        )
    lines.append(f"{found['points']:.4g} points in the space; regret against the best of these")
    return "\n".join(lines)


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Compares, writes searchers.json and returns what it holds."""
    with opened(config, workdir, images) as found_images:
        why = "the weights are those of searchers.checkpoint, and the searchers choose formats"
        from_config.refuse_unread(config, ("formats", "policy", "checkpoint"), why)
        found = compare(config, prepare(config, found_images))
        # Claimed last, so that a refused configuration does not keep the folder: that a searcher
        # has too few evaluations for the space, it says itself.
        claim_run(workdir, config, found_images, "compare_searchers")
        check_lock(workdir)
        write_json(workdir / SEARCHERS_FILE, found)
    return found


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    print(format_outcomes(run(config, workdir)))
    print(f"\nWritten to {workdir}: {SEARCHERS_FILE}")


if __name__ == "__main__":
    run_job(main)
