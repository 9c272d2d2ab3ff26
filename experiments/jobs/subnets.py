"""Finds subnets of a trained supernet, for any target: trains no weights.

Random subnets are judged on held-out images, BatchNorm and scales of each by the batch at hand. A
predictor learns what they tell, and NSGA-II searches it. The points of its front are cut out as
models of their own and evaluated exactly, with statistics and scales of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search import data
from aqt_search.report import write_report
from aqt_search.search.cost_table import CostTable
from aqt_search.search.options import SpaceError
from aqt_search.search.searchers.evolution import evolution
from aqt_search.search.searchers.points import sample_points, tilted_log_probabilities
from aqt_search.search.searchers.predictor import Predictor, fit_predictor
from aqt_search.search.space import Space
from aqt_search.training.assignment_batch import evaluate_assignments
from aqt_search.training.checkpoint import save_checkpoint
from aqt_search.training.parallel import release_programs
from aqt_search.training.processes import on_first
from aqt_search.training.storage import as_path
from aqt_search.training.subnets import of_points
from aqt_search.training.workdir import (
    CONFIG_FILE,
    check_lock,
    is_there,
    lock_workdir,
    read_json,
    write_json,
)
from experiments import finished_run, from_config, results
from experiments.configured_search import checked_targets, cost_names
from experiments.from_config import cost_function
from experiments.job import claim_run, opened
from experiments.jobs.searched import write_space
from experiments.jobs.supernet import supernet_space
from experiments.subnet import subnet_of

SAMPLES_FILE, SUBNETS_FILE = "samples.json", "subnets.json"
_SEED_OFFSET = 6_000_101  # the order of the images is its own
_CHUNK = 16  # subnets judged before they are written
_COSTS = 10  # along the space, that subnets are drawn for
# Keys that change nothing of what was judged: other targets are found from it.
_NOT_OF_THE_SAMPLES = (
    "log_every", *from_config.HOW_READ, "sweep", "allocate", "subnets.target", "subnets.points",
    "subnets.evaluations", "subnets.samples", "search.cost", "search.target", "search.relative_to",
    "search.further_costs",
)  # fmt: skip


class Setting(NamedTuple):
    """What subnets are cut out of."""

    config: ml_collections.ConfigDict
    parts: from_config.Parts
    space: Space
    variables: Mapping[str, Any]
    matrices: Any
    costs: CostTable


def load(config: ml_collections.ConfigDict, images: from_config.Images) -> Setting:
    """The supernet in `subnets.checkpoint`.

    Raises:
      ConfigError: there is none, or one of another model, data, seed, or of other subnets.
    """
    if not config.subnets.checkpoint:
        raise from_config.ConfigError(
            "subnets.checkpoint is empty: give the workdir of a finished run of"
            " experiments.supernet."
        )
    folder = as_path(config.subnets.checkpoint)
    found = finished_run.load_supernet(config, folder, images)
    space = supernet_space(found.config, found.parts)
    costs = space.cost_table(cost_function(cost_names(config)[0]))
    return Setting(config, found.parts, space, found.variables, found.matrices, costs)


def sampled(setting: Setting, workdir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Random subnets and their accuracies on held-out images: [n, decisions], [n].

    They are written as they are judged; what is there already is not judged again.
    """
    config = setting.config
    points = drawn(setting.space, config.subnets.samples, config.seed)
    path = workdir / SAMPLES_FILE
    there = read_json(path) if is_there(path) else {"choices": [], "accuracies": []}
    known = there["accuracies"][: len(points)]
    if there["choices"][: len(points)] != points[: len(known)].tolist():
        raise from_config.ConfigError(
            f"{path} holds other subnets than these: give another --workdir, or delete it."
        )
    judge = judged_by(setting)
    while len(known) < len(points):
        chunk = points[len(known) : len(known) + _CHUNK]
        known += judge(chunk).tolist()
        check_lock(workdir)
        write_json(path, {"choices": points[: len(known)].tolist(), "accuracies": known})
        print(f"{workdir.name}: {len(known)} of {len(points)} subnets judged.", flush=True)
    return points, np.array(known)


def drawn(space: Space, count: int, seed: int) -> np.ndarray:
    """Random subnets: [count, decisions].

    One half is uniform, which tells most of each decision. But all of these are small in one thing
    or another, so the other half lies along the space: decisions are independent, with a mean cost
    that is one of ten from the cheapest subnet's GBOPs to the dearest's, in equal ratios. Of more
    subnets the first are the same.
    """
    costs = space.cost_table(aqs.cost.gbops)
    points = np.zeros((count, len(space.mask)), int)
    uniform, along = points[::2], points[1::2]
    uniform[:] = np.random.default_rng(seed).integers(0, space.mask.sum(1), uniform.shape)
    for number, target in enumerate(np.geomspace(*costs.range, _COSTS)):
        here = along[number::_COSTS]
        log_p = tilted_log_probabilities(costs, target)
        here[:] = sample_points(np.random.default_rng((seed, number)), log_p, len(here))
    return points


def judged_by(setting: Setting) -> Callable[[np.ndarray], np.ndarray]:
    """Accuracies of points [n, decisions] on the same held-out images, by one program."""
    config, parts, space = setting.config, setting.parts, setting.space
    qapply = of_points(from_config.quantized(parts.model), space.net, setting.matrices)
    points_of = jax.jit(jax.vmap(space.point))
    batches = list(_image_batches(config, parts.images))

    def judge(choices: np.ndarray) -> np.ndarray:
        filled = np.resize(choices, (_CHUNK, choices.shape[1]))  # the last chunk, too
        found = evaluate_assignments(qapply, points_of(filled), setting.variables, batches)
        return found.accuracy[: len(choices)]

    return judge


def _image_batches(
    config: ml_collections.ConfigDict, images: from_config.Images
) -> Iterator[Mapping[str, np.ndarray]]:
    source = images.splits.reward
    if not len(source):
        raise from_config.ConfigError(
            "There are no held-out images to judge subnets by: train the supernet with"
            " data.held_out."
        )
    wanted = config.subnets.images
    count = from_config.available("subnets.images", wanted, len(source), "held-out images")
    batches, size = from_config.equal_batches(count, config.evaluation.batch_size)
    stream = data.train_batches(
        source, batch_size=size, seed=config.seed + _SEED_OFFSET, mean=images.mean, std=images.std
    )
    for _, batch in zip(range(batches), stream):
        yield {**batch, "mask": np.ones(size, np.float32)}


def target_of(setting: Setting) -> float | None:
    """`subnets.target` in units of the cost; None for a whole front.

    Raises:
      SpaceError: no subnet has that cost.
    """
    config = setting.config.copy_and_resolve_references()
    if not config.subnets.target:
        return None
    config.search.target, config.search.further_costs = config.subnets.target, ()
    try:
        found = checked_targets(config, setting.parts.sites, {cost_names(config)[0]: setting.costs})
    except SpaceError as error:  # which was told its key as that of a search
        message = str(error).replace("config.search.target", "config.subnets.target")
        raise SpaceError(message) from error
    return next(iter(found.values()))


def found_by(setting: Setting, predictor: Predictor, target: float | None) -> dict[str, np.ndarray]:
    """The points to evaluate exactly, by name: that of the target, or some along the front."""
    config, costs = setting.config, setting.costs
    cost = cost_names(config)[0]
    of_cost = "" if cost == "gbops" else f"{cost.replace('/', '_')}_"
    search = functools.partial(
        evolution, predictor.predict, costs, evaluations=config.subnets.evaluations,
        seed=config.seed, population=min(500, config.subnets.evaluations // 5),
    )  # fmt: skip
    if target is not None:
        return {f"{of_cost}target_{config.subnets.target:g}": search(target=target).choices}
    low, high = costs.range
    limits = np.geomspace(low, high, config.subnets.points + 2)[1:-1]
    front = search(target=high).front
    prices, qualities = costs.of_many(front), predictor.predict(front)
    along: dict[bytes, np.ndarray] = {}
    for limit in limits:
        fits = prices <= limit
        if fits.any():
            best = front[fits][np.argmax(qualities[fits])]
            along[best.tobytes()] = best
    return {f"{of_cost}subnet_{n}": point for n, point in enumerate(along.values(), start=1)}


def evaluated(
    setting: Setting, workdir: Path, name: str, choices: np.ndarray, predicted: float
) -> dict[str, Any]:
    """A subnet as a model of its own: evaluated, with its weights in `points/<name>/weights`."""
    net, space, parts = setting.space.net, setting.space, setting.parts
    assert net is not None
    folder = workdir / "points" / name
    known = finished_run.result_of(folder)
    if known is not None and known["choices"] == choices.tolist():
        return known
    cost, price = cost_names(setting.config)[0], setting.costs.of_many(choices[None])[0]
    print(
        f"{name}: {cost} {price:.4g}, predicted {100 * predicted:.2f} %. Evaluating ...", flush=True
    )
    own = np.asarray(space.architecture(choices))
    subnet = subnet_of(
        parts, net, own, space.concrete_assignment(choices), setting.variables,
        np.asarray(space.active(choices)), setting.matrices,
    )  # fmt: skip
    costs = {n: float(cost_function(n)(subnet.parts.sites, subnet.formats))
             for n in cost_names(setting.config)}  # fmt: skip
    judged = results.estimated(setting.config, subnet.parts, subnet.formats, subnet.variables)
    statistics = judged.variables.get("own", judged.variables).get("batch_stats", {})
    variables = {**subnet.variables, "batch_stats": statistics}
    ended = results.Ended(
        setting.config, folder, subnet.parts, subnet.formats, variables, judged,
        architecture=subnet.architecture,
    )  # fmt: skip
    facts = {
        "kind": finished_run.SUBNET, "steps": 0, "seconds": 0.0, "costs": costs,
        "without_retraining": True, "predicted_accuracy": predicted, "choices": choices.tolist(),
    }  # fmt: skip
    with lock_workdir(folder):
        # That of this job, so that the folder says all of itself.
        write_json(folder / CONFIG_FILE, read_json(workdir / CONFIG_FILE))
        save_checkpoint(folder / finished_run.WEIGHTS_FOLDER, 0, variables)
        write_space(folder, space)
        return results.finish(ended, facts)


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Judges, predicts, searches, evaluates, and writes subnets.json and the report."""
    with opened(config, workdir, images) as found_images:
        why = "the weights are those of subnets.checkpoint, and formats are searched"
        from_config.refuse_unread(config, ("formats", "policy", "checkpoint"), why)
        setting = load(config, found_images)
        target = target_of(setting)
        # Claimed last, so that a refused configuration does not keep the folder.
        claim_run(workdir, config, found_images, "subnets", ignore=_NOT_OF_THE_SAMPLES)
        points, accuracies = sampled(setting, workdir)
        active = jax.jit(jax.vmap(setting.space.active))
        predictor = fit_predictor(
            points, accuracies, setting.space.mask, lambda c: np.asarray(active(c)), config.seed
        )
        found = {}
        for name, choices in found_by(setting, predictor, target).items():
            predicted = float(predictor.predict(choices[None])[0])
            found[name] = evaluated(setting, workdir, name, choices, predicted)
            release_programs()  # of a model of its own: after some ten no more would be mapped
        answer = {
            "rank_correlation": predictor.rank_correlation,
            "samples": len(points),
            "subnets": {
                name: {k: result[k] for k in ("accuracy", "predicted_accuracy", "gbops", "costs")}
                for name, result in found.items()
            },
        }
        path = workdir / SUBNETS_FILE
        before = read_json(path)["subnets"] if is_there(path) else {}
        check_lock(workdir)
        write_json(path, answer | {"subnets": before | answer["subnets"]})
        on_first(write_report)(workdir)
        return answer
