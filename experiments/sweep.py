"""Runs baselines and searches over sizes, spaces and cost targets, and draws the fronts.

    python -m experiments.sweep --config=configs/digits_resnet8.py --workdir=runs/sweep

Every point is a run in <workdir>/points/<name>. The same command goes on where an interrupted sweep
stopped: finished points are kept, failed ones are tried again. With `sweep.side_by_side` points
that share a program run at the same time, one on each device, and with `sweep.engine` "ray" points
are tasks of a Ray cluster (experiments.ray_engine). At the end <workdir> holds front.json,
front.png and report.html, and with `sweep.sensitivity` sensitivity.json; programs that are compiled
are kept in <workdir>/compiled for all points.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import logging

from aqt_search.report import format_table, load_records, write_report
from aqt_search.report.against_uniform import UNIFORM_SERIES
from aqt_search.training.checkpoint import latest_step
from aqt_search.training.guard import CollapsedSearchError
from aqt_search.training.loop import CHECKPOINT_FOLDER, DivergedError, InterruptedRunError
from aqt_search.training.parallel import local_replica_count, release_programs
from aqt_search.training.processes import is_first, on_first, several
from aqt_search.training.workdir import check_lock, is_there, lock_workdir, write_json
from configs.base import get_config
from experiments import from_config, results
from experiments.command_line import USER_ERRORS, FailedJobError, run_job
from experiments.compiled_programs import keep_compiled
from experiments.configured_search import uniform_rules
from experiments.finished_run import result_of
from experiments.job import Job, Prepare, claim_run, locked, run_alone, run_together
from experiments.jobs import palettize, ptq, search, sensitivity, train
from experiments.schema import check, check_values, with_homes
from experiments.start_record import start_record, versions_record

COMPILED_FOLDER = "compiled"
# What may differ between points of one program: it is an input, or not part of the program.
_INPUTS = ("seed", "series", "formats", "policy", "checkpoint", "sweep", "log_every")
RAY = "ray"  # `sweep.engine`
_STAGES = {"train": train.prepare, "ptq": ptq.prepare, "palettize": palettize.prepare}


class Point(NamedTuple):
    """One run of the sweep."""

    name: str
    kind: str  # "float", "uniform", "search", "random", "retrained" or a stage's job
    prepare: Prepare
    config: ml_collections.ConfigDict
    follows: bool = False  # whether it takes what another point has found
    baseline: str = ""  # its name in `sweep.baselines`

    @property
    def program(self) -> str:
        """Points with the same have the same step, if their inputs look alike."""
        values = {k: v for k, v in self.config.to_dict().items() if k not in _INPUTS}
        if self.prepare is not search.prepare:
            del values["search"]
        else:
            values["search"] = {k: v for k, v in values["search"].items() if k != "target"}
        prepare = self.prepare.__module__
        return json.dumps([prepare, self.follows, values], sort_keys=True, default=str)


def sweep_points(config: ml_collections.ConfigDict, workdir: Path) -> list[Point]:
    """The points of `config.sweep`, in the order they are run."""
    sweep, defaults, unread = config.sweep, get_config(), _unread_sections(config)
    config = config.copy_and_resolve_references()
    config.update({name: defaults[name] for name in unread})
    points, stages = [], _stages(sweep)
    values = [[(key, value) for value in choices] for key, choices in sweep.grid]
    # Over sizes, and with stages, every format has a front of its own; else they are one together.
    one_front = not sweep.grid and not sweep.stages
    for seed, *place in itertools.product(sweep.seeds, *values):
        prefix = "".join(f"{_label(key, value)}_" for key, value in place)
        suffix = f"_seed{seed}" if len(sweep.seeds) > 1 else ""
        changed = functools.partial(changed_config, config, seed=seed, **dict(place))
        for baseline in sweep.baselines:
            name, rules, changes = _baseline(config, baseline)
            is_format = isinstance(baseline, str) and bool(rules)
            series = UNIFORM_SERIES if is_format and one_front else name
            own = changed(formats=rules, series=series, **changes)
            kind = "uniform" if rules else "float"
            full_name = prefix + name + suffix
            points.append(Point(full_name, kind, train.prepare, own, baseline=name))
            base = points[-1]
            points += [
                _stage_of(base, f"{prefix}{name}_{stage[0]}{suffix}", stage, workdir)
                for *stage, baselines in stages
                if name in baselines
            ]
        for (space, changes), target in itertools.product(
            sweep.spaces or [("", {})], sweep.targets
        ):
            own = changed(**{"search.target": target}, **changes)
            kind = "random" if own.search.searcher == "random" else "search"
            own.series = f"{kind} {space}".strip()
            parts = [kind, *([space] if space else []), f"{target:g}"]
            name = prefix + "_".join(parts) + suffix
            points.append(Point(name, kind, search.prepare, own))
            if sweep.retrain:
                policy = str(workdir / "points" / name / results.POLICY_FILE)
                own = changed(policy=policy, series=f"retrained {space}".strip())
                retrained = prefix + "_".join(["retrained", *parts[1:]]) + suffix
                points.append(Point(retrained, "retrained", train.prepare, own, follows=True))
    return points


def check_points(config: ml_collections.ConfigDict, points: Sequence[Point]) -> None:
    """Checks the names and the whole configuration of every point, before any is run.

    Raises:
      ConfigError: there are none, two have one name, or one a name that no folder can have; the
        sensitivity of no baseline is asked for; formats are given that no point has; and as
        `schema.check` of a point.
    """
    why = "the points of a sweep have formats of their own, from sweep.baselines and search.space"
    from_config.refuse_unread(config, ("formats", "policy"), why)
    if not points:
        raise from_config.ConfigError("sweep has no points: give it baselines, or targets.")
    check_names([point.name for point in points], "sweep")
    wanted = config.sweep.sensitivity
    known = dict.fromkeys(point.baseline for point in points if point.baseline)
    if wanted and wanted not in known:
        raise from_config.ConfigError(
            f"config.sweep.sensitivity is {wanted!r}, which is none of the baselines"
            f" {', '.join(known)}."
        )
    for key, of in (("spaces", "targets"), ("retrain", "targets"), ("stages", "baselines")):
        if config.sweep[key] and not config.sweep[of]:
            logging.warning("sweep.%s is of no use: sweep.%s is empty.", key, of)
    for point in points:
        try:
            check(point.config)
            if point.prepare is search.prepare:
                search.check_options(point.config)
        except ValueError as error:
            raise type(error)(f"Point {point.name!r} of the sweep: {error}") from error


def check_names(names: Sequence[str], section: str) -> None:
    """Raises ConfigError unless the names of points are folders of their own."""
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise from_config.ConfigError(
            f"{section} has two points called {twice[0]!r}, which would share a folder: give names"
            " that differ, or numbers that differ in their first six digits."
        )
    for name in names:
        if "/" in name or name.startswith(".") or len(name.encode()) > 200:
            raise from_config.ConfigError(
                f"{section} has a point called {name!r}, which is no name of a folder: it may have"
                " no /, no . at its start, and 200 bytes. Name such values in sweep.spaces or"
                " sweep.baselines."
            )


def _unread_sections(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Sections that no point of the sweep depends on: they may be corrected while it runs."""
    jobs = {job for _, job, *_ in config.sweep.stages}
    of_stages = {"ptq": "ptq", "palette": "palettize"}
    unused = [section for section, job in of_stages.items() if job not in jobs]
    return ("sensitivity", "searchers", "allocate", *unused)


def _baseline(config: ml_collections.ConfigDict, spec: Any) -> tuple[str, Any, dict[str, Any]]:
    """(name, rules, changes of keys) of an entry of `sweep.baselines`."""
    if isinstance(spec, str):
        return spec, () if spec == "float" else uniform_rules(config, spec), {}
    name, rules, *changes = spec
    return name, rules, changes[0] if changes else {}


def _stages(sweep: ml_collections.ConfigDict) -> list[tuple]:
    """(name, job, changes, the baselines it goes on from) of every entry of `sweep.stages`."""
    found = []
    baselines = [spec if isinstance(spec, str) else spec[0] for spec in sweep.baselines]
    for series, job, changes, *only in sweep.stages:
        names = only[0] if only else baselines
        odd = [name for name in names if name not in baselines]
        if odd:
            raise from_config.ConfigError(
                f"Stage {series!r} of sweep.stages goes on from {odd[0]!r}, which is none of the"
                f" baselines {', '.join(baselines)}."
            )
        found.append((series, job, changes, names))
    return found


def _stage_of(base: Point, name: str, stage: tuple, workdir: Path) -> Point:
    """The point `name` of a stage on the weights of a baseline."""
    series, job, changes = stage
    if job not in _STAGES:
        raise from_config.ConfigError(
            f"Stage {series!r} of sweep.stages has the job {job!r}; expected one of"
            f" {', '.join(_STAGES)}."
        )
    own = changed_config(base.config, **changes)
    own.checkpoint = str(workdir / "points" / base.name)
    own.series = f"{base.config.series} {series}"
    kind = {"train": "uniform", "palettize": "palette"}.get(job, job)
    return Point(name, kind, _STAGES[job], own, follows=True)


def changed_config(config: ml_collections.ConfigDict, **values: Any) -> ml_collections.ConfigDict:
    """A copy with other values, by keys such as "search.target"."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(values)
    return with_homes(copy)


def _label(key: str, value: Any) -> str:
    """A grid value's part of a point's name."""
    text = f"{value:g}" if isinstance(value, (int, float)) else str(value)
    return text if key == "model.name" else key.rsplit(".", 1)[-1] + text


def failure(point: Point, folder: Path, error: Exception) -> dict[str, Any]:
    """The result of a point that failed, as written."""
    reason = f"{type(error).__name__}: {error}"
    known = isinstance(error, USER_ERRORS)
    trace = "" if known else "\n" + "".join(traceback.format_exception(error))
    logging.error("Point %s failed: %s%s", point.name, reason, trace)
    result = {
        "name": point.name,
        "kind": point.kind,
        "seed": point.config.seed,
        "series": point.config.series,
        "error": reason,
    }
    write_json(folder / results.RESULT_FILE, result)
    return result


def image_loader() -> Callable[[Point], from_config.Images]:
    """Loads a data set once for points in a row that share it; held-out images are by seed."""
    loaded: dict[Any, from_config.Images] = {}

    def images_of(point: Point) -> from_config.Images:
        key = point.config.seed, json.dumps(point.config.data.to_dict(), default=str)
        if key not in loaded:
            loaded.clear()  # two at a time would add up over a sweep's seeds
            loaded[key] = from_config.load_images(point.config)
        return loaded[key]

    return images_of


def groups(points: Sequence[Point], side_by_side: bool) -> list[list[Point]]:
    """The points that run together, in an order in which each comes after those it follows."""
    found = dict[str, list[Point]]()
    for point in points:
        found.setdefault(point.program if side_by_side else point.name, []).append(point)
    return sorted(found.values(), key=lambda group: side_by_side and group[0].follows)


# Of so many points programs are kept: each takes some tens of MB, and letting go some seconds.
_POINTS_KEPT = 8


def run_points(
    points: Sequence[Point],
    folder: Path,
    images_of: Callable[[Point], from_config.Images],
    side_by_side: bool,
    release: bool = True,
    holder: str | None = None,
) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Runs every point unless its result is there; a failure becomes its result.

    With `release` compiled programs are let go of now and then, so that hundreds of points end in
    the memory of a few. The sweep's folder is locked by `holder`, as `lock_holder` tells it, or by
    this process.
    """
    side_by_side = side_by_side and not several()  # each then has the devices of all of them
    kept = 0
    for group in groups(points, side_by_side):
        waiting = []
        for point in group:
            result = result_of(folder / point.name)
            if result is None:
                waiting.append(point)
            else:
                yield point, result
        if side_by_side:
            check_lock(folder.parent, holder)  # else a later sweep would take these for its own
            yield from _run_group(waiting, folder, images_of)
        else:
            for point in waiting:
                check_lock(folder.parent, holder)
                yield point, _run_point(point, folder / point.name, images_of(point))
                kept += 1
        if release and (kept == _POINTS_KEPT or (side_by_side and waiting)):
            release_programs()
            kept = 0


def _run_point(point: Point, folder: Path, images: from_config.Images) -> dict[str, Any]:
    try:
        return run_alone(point.prepare, point.config, folder, images)
    except InterruptedRunError:
        raise
    except Exception as error:
        if several() and not isinstance(error, (CollapsedSearchError, DivergedError)):
            raise  # what failed in one process alone leaves the others where they were
        return failure(point, folder, error)


def _run_group(
    points: Sequence[Point], folder: Path, images_of: Callable[[Point], from_config.Images]
) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Runs points of one program, as many at a time as there are devices."""
    with locked([folder / point.name for point in points]):
        alike: dict[Any, list[tuple[Point, Job]]] = {}
        for point in points:
            own = folder / point.name
            try:
                job = point.prepare(point.config, own, images_of(point))
            except Exception as error:
                yield point, failure(point, own, error)
                continue
            # Runs side by side make the same steps.
            done = latest_step(own / CHECKPOINT_FOLDER) or 0
            alike.setdefault((done, job.structure), []).append((point, job))
        for members in alike.values():
            for start in range(0, len(members), local_replica_count()):
                together = members[start : start + local_replica_count()]
                found = run_together(members[0][1].step, [job for _, job in together])
                for (point, _), result in zip(together, found):
                    if isinstance(result, Exception):
                        result = failure(point, folder / point.name, result)
                    yield point, result


def run(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Runs every point and writes the report; returns the path of report.html."""
    from experiments import ray_engine  # which is built on this file

    check_values(config)
    _check_processes(config)
    on_ray = config.sweep.engine == RAY
    with contextlib.ExitStack() as held:
        if on_ray:  # before JAX has threads: a Ray of its own is started by forking
            held.enter_context(ray_engine.connected(config))
        points = sweep_points(config, workdir)
        check_points(config, points)
        held.enter_context(lock_workdir(workdir))
        images_of = image_loader()
        images = images_of(points[0])  # complains before the folder is claimed
        claim_run(workdir, config, images, "sweep", ignore=_free_keys(config, workdir))
        if on_ray:
            found = ray_engine.run_points(points, workdir, config.sweep, images)
        else:
            found = run_points(points, workdir / "points", images_of, config.sweep.side_by_side)
        tell_points(found, len(points))
        check_lock(workdir)
        measure = ray_engine.measure_sensitivity if on_ray else measure_sensitivity
        measure(config, points, workdir, images_of)
        return on_first(write_report)(workdir)


def _check_processes(config: ml_collections.ConfigDict) -> None:
    if config.sweep.engine == RAY and several():
        raise from_config.ConfigError(
            "config.sweep.engine is 'ray', and there are several processes; expected one, as Ray"
            " starts all others: leave out --coordinator, --processes and --process, or give"
            " --processes=1."
        )


def _free_keys(config: ml_collections.ConfigDict, workdir: Path) -> list[str]:
    """Keys that may change while the sweep goes on; of sensitivities until they are measured."""
    keys = ["log_every", "data.data_dir", "sweep.sensitivity", *_unread_sections(config)]
    keys += [f"sweep.{key}" for key in ("engine", "resources", "ray_address", "ray_retries")]
    if is_there(workdir / sensitivity.SENSITIVITY_FILE):
        keys = [key for key in keys if "sensitivity" not in key]
    return keys


def tell_points(found: Iterator[tuple[Point, dict[str, Any]]], count: int) -> None:
    """Prints a line for each of `count` points as it ends."""
    for number, (point, result) in enumerate(found, start=1):
        told = result.get("error") or (
            f"{100 * result['accuracy']:.2f} % at {result['gbops']:.6g} GBOPs"
        )
        print(f"[{number}/{count}] {point.name}: {told}", flush=True)


def measure_sensitivity(
    config: ml_collections.ConfigDict,
    points: Sequence[Point],
    workdir: Path,
    images_of: Callable[[Point], from_config.Images],
) -> None:
    """Sensitivity of every site, on the weights of the first point of `sweep.sensitivity`."""
    if not config.sweep.sensitivity or is_there(workdir / sensitivity.SENSITIVITY_FILE):
        return
    named = [point for point in points if point.baseline == config.sweep.sensitivity]
    if result_of(workdir / "points" / named[0].name) is None:
        logging.error("Point %s failed: its sensitivity is not measured.", named[0].name)
        return
    own = named[0].config.copy_and_resolve_references()
    own.sensitivity = config.sensitivity.copy_and_resolve_references()
    own.sensitivity.checkpoint = str(workdir / "points" / named[0].name)
    on_first(sensitivity.write)(sensitivity.prepare(own, images_of(named[0]))(), workdir)


def main(
    config: ml_collections.ConfigDict,
    workdir: Path,
    run: Callable[[ml_collections.ConfigDict, Path], Path] = run,
) -> None:
    """Runs the job of the command line: `run(config, workdir)` returns the path of its report."""
    if is_first():
        keep_compiled(workdir / COMPILED_FOLDER)
    report = run(config, workdir)
    records = on_first(load_records)(report.parent)
    print()
    print(format_table(records))
    print(f"\nReport: {report}")
    if all(record.error is not None for record in records):
        raise FailedJobError(
            f"All {len(records)} points failed. The same command tries them again."
        )


def record(config: ml_collections.ConfigDict) -> str:
    """`start_record`; with Ray the devices are left to its tasks.

    This process touches none before, and would keep all from then on.
    """
    if config.sweep.engine != RAY:
        return start_record(config)
    jax.config.update("jax_platforms", "cpu")
    return f"tasks of a Ray cluster, each with {dict(config.sweep.resources)}; {versions_record()}"


if __name__ == "__main__":
    run_job(main, check_values, record)  # the points are checked as a whole
