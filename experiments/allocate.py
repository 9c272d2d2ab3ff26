"""Chooses formats for a network that is trained already: a front over targets, without training.

    python -m experiments.allocate --config=configs/digits_resnet8.py --workdir=runs/allocated \
        --config.checkpoint=runs/float --config.allocate.targets="(0.8, 1.1, 1.5)"

One pass over a few training images gives every option of `config.search.space` its value; the best
point for each target follows in a moment, and so do those of further targets, asked for by the same
command in the same folder. Each is quantized and evaluated as by experiments.ptq (the steps of
`config.ptq`, the scales of `config.quantizers`), beside uniform formats. Writes values.json, for
each point <workdir>/policies/<name>.json and a run in <workdir>/points/<name>, and the report.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

import ml_collections
import numpy as np

from aqt_search import search
from aqt_search.report import write_report
from aqt_search.report.against_uniform import ALLOCATED_SERIES, UNIFORM_SERIES
from aqt_search.search.space import Space
from aqt_search.training.processes import on_first
from aqt_search.training.storage import as_path, make_folder
from aqt_search.training.workdir import (
    check_lock,
    delete_leftovers,
    is_there,
    read_json,
    write_json,
)
from experiments import finished_run, from_config
from experiments.command_line import run_job
from experiments.configured_search import (
    checked_targets,
    cost_names,
    plain_space,
    uniform_rules,
)
from experiments.job import claim_run, opened
from experiments.jobs import ptq
from experiments.option_values import VALUES
from experiments.quantizers import configured_quantizers
from experiments.results import policy_json
from experiments.sweep import Point, changed_config, check_names, main, run_points, tell_points

VALUES_FILE, POLICIES_FOLDER = "values.json", "policies"
# Another front of the same values may be asked for in the same folder.
_NOT_OF_THE_VALUES = ("log_every", *from_config.HOW_READ, "allocate.targets", "allocate.uniform")


def check_options(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where there is no network, or two points would share a folder."""
    if not config.checkpoint:
        raise from_config.ConfigError(
            "checkpoint is empty: give the workdir of a finished run, whose network is quantized."
        )
    why = "the points have formats of their own, from search.space and allocate.uniform"
    from_config.refuse_unread(config, ("formats", "policy"), why)
    names = list(map(_name_of, config.allocate.targets))
    check_names([*names, *config.allocate.uniform], "allocate")


def _name_of(target: float) -> str:
    return f"{ALLOCATED_SERIES}_{target:g}"


def values_of(
    config: ml_collections.ConfigDict,
    there: finished_run.FinishedRun,
    space: Space,
    workdir: Path,
) -> np.ndarray:
    """The values of the space's options: read from values.json, or measured and written there."""
    path = workdir / VALUES_FILE
    values = np.zeros(space.mask.shape)
    if not is_there(path):
        start = time.monotonic()
        values = VALUES[config.allocate.by](config, there.parts, space, there.variables)
        seconds = time.monotonic() - start
        table = {
            d.name: dict(zip(d.labels, map(float, row))) for d, row in zip(space.decisions, values)
        }
        write_json(path, {"by": config.allocate.by, "seconds": seconds, "values": table})
        print(f"{len(table)} decisions were judged in {seconds:.1f} s.", flush=True)
        return values
    table = read_json(path)["values"]
    for row, decision in zip(values, space.decisions):
        row[: len(decision.labels)] = [table[decision.name][label] for label in decision.labels]
    return values


def allocated_points(
    config: ml_collections.ConfigDict,
    there: finished_run.FinishedRun,
    workdir: Path,
) -> list[Point]:
    """A point for each target, whose formats are decided here, and one for each uniform format."""
    sites = there.parts.sites
    space = plain_space(config, sites)
    costs = {name: space.cost_table(from_config.cost_function(name)) for name in cost_names(config)}
    targets = {}
    for target in config.allocate.targets:
        own, name = changed_config(config, **{"search.target": target}), _name_of(target)
        targets[name] = checked_targets(own, sites, costs, key="allocate.targets")
    # Claimed last, so that a refused configuration does not keep the folder.
    claim_run(workdir, config, there.parts.images, "allocate", ignore=_NOT_OF_THE_VALUES)
    values = values_of(config, there, space, workdir)
    points, granularities = [], configured_quantizers(config).granularities.values()
    on_first(make_folder)(workdir / POLICIES_FOLDER)
    delete_leftovers(workdir / POLICIES_FOLDER)
    for name, limits in targets.items():
        assignment = space.concrete_assignment(search.allocate(values, costs, limits))
        path = workdir / POLICIES_FOLDER / f"{name}.json"
        write_json(path, policy_json(assignment, *granularities))
        own = changed_config(config, policy=str(path), formats=(), series=ALLOCATED_SERIES)
        prepare = functools.partial(ptq.prepare, targets=limits)
        points.append(Point(name, "ptq", prepare, own))
    for name in config.allocate.uniform:
        own = changed_config(config, formats=uniform_rules(config, name), series=UNIFORM_SERIES)
        points.append(Point(name, "ptq", ptq.prepare, own))
    return points


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> Path:
    """Decides, quantizes and evaluates every point; returns the path of report.html."""
    with opened(config, workdir, images) as images:
        check_options(config)
        there = finished_run.load(config, as_path(config.checkpoint), images)
        points = allocated_points(config, there, workdir)
        found = run_points(
            points, workdir / "points", lambda point: images, side_by_side=False, release=False
        )
        tell_points(found, len(points))
        check_lock(workdir)
        return on_first(write_report)(workdir)


if __name__ == "__main__":
    run_job(functools.partial(main, run=run))
