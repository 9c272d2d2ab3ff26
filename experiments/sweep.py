"""Runs baselines and searches at several cost targets, and draws the accuracy-cost front.

    python -m experiments.sweep --config=configs/digits_resnet8.py --workdir=runs/sweep

Every point is a run in <workdir>/points/<name>. The same command goes on where an interrupted sweep
stopped: finished points are kept, failed ones are tried again. At the end <workdir> holds
front.json, front.png and report.html.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import logging

from aqt_search.report import format_table, load_records, write_report
from aqt_search.training.loop import InterruptedRunError
from aqt_search.training.workdir import claim_workdir, lock_workdir, read_json, write_json
from experiments import from_config, results, search, train
from experiments.command_line import run_job


class Point(NamedTuple):
    """One run of the sweep."""

    name: str
    kind: str  # "float", "uniform", "search" or "retrained"
    run: Callable
    config: ml_collections.ConfigDict


def sweep_points(config: ml_collections.ConfigDict, workdir: Path) -> list[Point]:
    """The points of `config.sweep`, in the order they are run."""
    points = []
    for seed in config.sweep.seeds:
        suffix = f"_seed{seed}" if len(config.sweep.seeds) > 1 else ""

        def changed(seed: int = seed, **values: Any) -> ml_collections.ConfigDict:
            copy = config.copy_and_resolve_references()
            copy.update_from_flattened_dict({"seed": seed, **values})
            return copy

        for baseline in config.sweep.baselines:
            is_float = baseline == "float"
            formats = () if is_float else search.uniform_rules(config, baseline)
            kind = "float" if is_float else "uniform"
            points.append(Point(baseline + suffix, kind, train.run, changed(formats=formats)))
        for target in config.sweep.targets:
            name = f"search_{target:g}{suffix}"
            points.append(Point(name, "search", search.run, changed(**{"search.target": target})))
            if config.sweep.retrain:
                policy = str(workdir / "points" / name / results.POLICY_FILE)
                retrained = f"retrained_{target:g}{suffix}"
                points.append(Point(retrained, "retrained", train.run, changed(policy=policy)))
    return points


def run_point(point: Point, folder: Path, images: from_config.Images) -> dict[str, Any]:
    """Runs a point, unless its result is there; a failure becomes its result."""
    path = folder / results.RESULT_FILE
    if path.exists():
        result = read_json(path)
        if "error" not in result:
            return result
    try:
        return point.run(point.config, folder, images)
    except InterruptedRunError:
        raise
    except Exception as error:
        logging.error("Point %s failed:\n%s", point.name, traceback.format_exc())
        result = {
            "name": point.name,
            "kind": point.kind,
            "seed": point.config.seed,
            "error": f"{type(error).__name__}: {error}",
        }
        write_json(path, result)
        return result


def run(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Runs every point and writes the report; returns the path of report.html."""
    with lock_workdir(workdir):
        images, seed = from_config.load_images(config), config.seed
        points = sweep_points(config, workdir)
        claim_workdir(workdir, config.to_dict(), ignore=("log_every", "data.data_dir"))
        for number, point in enumerate(points, start=1):
            if point.config.seed != seed:  # the held-out images depend on it
                images, seed = from_config.load_images(point.config), point.config.seed
            result = run_point(point, workdir / "points" / point.name, images)
            told = result.get("error") or (
                f"{100 * result['accuracy']:.2f} % at {result['gbops']:.6g} GBOPs"
            )
            print(f"[{number}/{len(points)}] {point.name}: {told}", flush=True)
        return write_report(workdir)


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    report = run(config, workdir)
    print()
    print(format_table(load_records(report.parent)))
    print(f"\nReport: {report}")


if __name__ == "__main__":
    run_job(main)
