"""Quantizes the weights of a finished run without training, step by step."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from aqt_search import data, ptq
from aqt_search.tracing.sites import is_unquantized
from aqt_search.training.checkpoint import save_checkpoint
from aqt_search.training.evaluation import StaticEvaluation, evaluate
from aqt_search.training.loop import Run, Schedule
from aqt_search.training.storage import as_path
from aqt_search.training.workdir import check_lock, write_json
from experiments import finished_run, from_config, results
from experiments.assignment import configured_assignment
from experiments.job import Job, claim_run, run_alone
from experiments.ptq_steps import STEPS, Quantized, Setting

PTQ_FILE = "ptq.json"
WEIGHTS_FOLDER = "quantized"  # not the folder that training goes on from
_SEED_OFFSET = 5_000_011


def check_options(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where there is nothing to quantize."""
    if not config.checkpoint:
        raise from_config.ConfigError(
            "checkpoint is empty: give the workdir of a finished run, whose weights are quantized."
        )


def calibration_batches(
    config: ml_collections.ConfigDict, images: from_config.Images
) -> list[np.ndarray]:
    """At most `ptq.images` training images, each once and not augmented, in equal batches."""
    source, options = images.splits.train, config.ptq
    count = from_config.available("ptq.images", options.images, len(source), "training images")
    number, size = from_config.equal_batches(count, options.batch_size)
    stream = data.train_batches(
        source, batch_size=size, seed=config.seed + _SEED_OFFSET,
        mean=images.mean, std=images.std,
    )  # fmt: skip
    return [batch["image"] for batch in itertools.islice(stream, number)]


def quantize_in_steps(
    setting: Setting, variables: Mapping[str, Any], judge: Callable[[Any], tuple[float, float]]
) -> tuple[Quantized, list[dict[str, Any]]]:
    """Runs the steps; returns the model, and a row of the table for each."""
    rows, skipped = [], []

    def told(name: str, model: Any, seconds: float) -> None:
        accuracy, loss = judge(model)
        rows.append({"step": name, "accuracy": accuracy, "loss": loss, "seconds": seconds,
                     "skipped": list(skipped)})  # fmt: skip

    def timed(fun: Callable, *arguments: Any) -> tuple[Any, float]:
        skipped.clear()
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = jax.block_until_ready(fun(*arguments))
        for warning in caught:
            if issubclass(warning.category, ptq.SkippedSite):
                skipped.append(str(warning.message))
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        return found, time.monotonic() - start

    told("float", None, 0.0)
    statistics = None
    if setting.options.data_free:
        statistics = ptq.batch_norm_statistics(setting.apply, variables, setting.batches[0])
    model, seconds = timed(setting.calibrated, variables, statistics)
    told("nearest", model, seconds)
    for name in setting.options.steps:
        model, seconds = timed(STEPS[name].run, setting, model)
        told(name, model, seconds)
    return model, rows


def prepare(
    config: ml_collections.ConfigDict,
    workdir: Path,
    images: from_config.Images,
    targets: Mapping[str, float] | None = None,
) -> Job:
    """Quantization of a finished run: a job without training steps.

    Args:
      targets: by the name of the cost, what the formats were chosen to cost, for the result.
    """
    check_options(config)
    there = finished_run.load(config, as_path(config.checkpoint), images)
    model, sites = there.parts.model, there.parts.sites
    formats = configured_assignment(config, sites)
    if all(is_unquantized(f) for f in formats.values()):
        raise from_config.ConfigError("formats is empty: give the formats to quantize to.")
    variables = {name: there.variables[name] for name in ("params", "batch_stats")}
    batches = calibration_batches(config, images)
    setting = Setting(model, formats, batches, config.ptq)

    def judge(quantized: Quantized | None) -> tuple[float, float]:
        split = "reward" if len(images.splits.reward) else "train"
        found = evaluate(
            *judged_by(setting, variables, quantized),
            from_config.evaluation_batches(config, images, split),
        )
        return found.accuracy, found.loss

    def finish(_: Any) -> dict[str, Any]:
        start = time.monotonic()
        quantized, rows = quantize_in_steps(setting, variables, judge)
        check_lock(workdir)
        write_json(workdir / PTQ_FILE, {"images": sum(map(len, batches)), "steps": rows})
        evaluation = judged_by(setting, variables, quantized)
        folder = workdir / WEIGHTS_FOLDER
        save_checkpoint(folder, 0, evaluation.variables, identity=identity)
        facts = {"kind": "ptq", "steps": 0, "seconds": time.monotonic() - start}
        if targets:
            facts |= results.against_targets(targets, there.parts.sites, formats)
        ended = results.Ended(
            config, workdir, there.parts, formats, quantized.variables, evaluation, variables,
            there.architecture,
        )  # fmt: skip
        return results.finish(ended, facts)

    identity = claim_run(workdir, config, images, "ptq")
    return Job(None, Run(workdir, (), []), Schedule(0, 1, 1), finish)


def judged_by(
    setting: Setting, variables: Mapping[str, Any], quantized: Quantized | None
) -> StaticEvaluation:
    """What `evaluate` takes; the float model for None."""
    if quantized is None:
        return StaticEvaluation(setting.qapply, {}, variables)
    own = {**quantized.variables, "scales": quantized.state}
    return StaticEvaluation(setting.qapply, quantized.assignment, own)


def format_steps(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for the terminal."""
    lines = [f"{'step':<22} {'held-out %':>10} {'gain':>7} {'loss':>8} {'seconds':>8}  left as is"]
    before = None
    for row in rows:
        accuracy = 100 * row["accuracy"]
        gain = "" if before is None else f"{accuracy - before:+.2f}"
        left = f"{len(row['skipped'])} sites" if row["skipped"] else ""
        lines.append(
            f"{row['step']:<22} {accuracy:>10.2f} {gain:>7} {row['loss']:>8.4f}"
            f" {row['seconds']:>8.1f}  {left}".rstrip()
        )
        before = accuracy
    reasons = dict.fromkeys(reason for row in rows for reason in row["skipped"])
    return "\n".join([*lines, *reasons])


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Quantizes, evaluates and returns the result."""
    return run_alone(prepare, config, workdir, images)
