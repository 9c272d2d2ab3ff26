"""Quantizes the weights of a finished run without training, step by step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search import data, ptq
from aqt_search.tracing.sites import is_unquantized
from aqt_search.training import parallel
from aqt_search.training.checkpoint import save_checkpoint
from aqt_search.training.evaluation import StaticEvaluation, evaluate, reestimate_batch_stats
from aqt_search.training.loop import Run, Schedule
from aqt_search.training.workdir import check_lock, write_json
from experiments import finished_run, from_config, results
from experiments.assignment import configured_assignment
from experiments.job import Job, claim_run, run_alone

PTQ_FILE = "ptq.json"
WEIGHTS_FOLDER = "quantized"  # not the folder that training goes on from
_SEED_OFFSET = 5_000_011


class Quantized(NamedTuple):
    """A model on its way into its formats."""

    variables: Mapping[str, Any]  # {"params": ..., "batch_stats": ...}
    assignment: Mapping[str, aqs.SiteFormats]  # with calibrations that have state
    state: Any  # static bounds, by site and operand
    statistics: Any = None  # of BatchNorms by site, where there are no data


@functools.lru_cache(maxsize=4)
def _functions(model: Any) -> tuple[Callable, Callable]:
    """The function of a model, plain and quantized: equal models share them, and so programs."""
    plain = functools.partial(model.apply, train=False)
    return plain, from_config.quantized(model, parallel.AXIS)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the steps work with."""

    model: Any
    formats: Mapping[str, aqs.SiteFormats]  # as they were asked for
    batches: Sequence[np.ndarray]  # calibration images
    options: ml_collections.ConfigDict  # config.ptq

    @property
    def apply(self) -> Callable:
        """apply(variables, images), in evaluation mode."""
        return _functions(self.model)[0]

    @property
    def qapply(self) -> Callable:
        """The quantized model, its static bounds among the variables."""
        return _functions(self.model)[1]

    def calibrated(self, variables: Mapping[str, Any], statistics: Any = None) -> Quantized:
        """The model with bounds of these weights, and of the activations they lead to.

        Args:
          statistics: of the BatchNorms that tell the activations' bounds; None: the data do.
        """
        if statistics is None:
            found = ptq.calibrate(self.apply, self.formats, variables, self.batches)
            return Quantized(variables, *found)
        bounds = dict(self.options.other_bounds)
        image = jax.ShapeDtypeStruct(self.batches[0].shape, np.float32)
        found = ptq.calibrate_data_free(
            self.apply, self.formats, variables, image, statistics, other_bounds=bounds
        )
        return Quantized(variables, *found, statistics)


# --- Steps ----------------------------------------------------------------------------------------


def _fold(setting: Setting, model: Quantized) -> Quantized:
    folded = ptq.fold_batch_norm(setting.apply, model.variables, setting.batches[0])
    return setting.calibrated(folded, model.statistics)


def _equalize(setting: Setting, model: Quantized) -> Quantized:
    arguments = setting.apply, model.variables, setting.batches[0]
    statistics = model.statistics
    if statistics is not None:
        scales = ptq.equalization_scales(*arguments)
        statistics = {
            name: found.divided_by(scales[name]) if name in scales else found
            for name, found in statistics.items()
        }
    return setting.calibrated(ptq.equalize(*arguments), statistics)


def _smooth(setting: Setting, model: Quantized) -> Quantized:
    strength = setting.options.smoothing
    return setting.calibrated(ptq.smooth(setting.apply, model.variables, setting.batches, strength))


def _reestimate(setting: Setting, model: Quantized) -> Quantized:
    """BatchNorm statistics under the quantized weights, whose bounds stay."""
    variables = {**model.variables, "scales": model.state}
    batches = ({"image": images} for images in setting.batches)
    statistics = reestimate_batch_stats(setting.qapply, model.assignment, variables, batches)
    again = setting.calibrated({**model.variables, "batch_stats": statistics})
    sites = aqs.find_sites(setting.apply, model.variables, setting.batches[0])

    def kept(name: str, side: str) -> Any:
        is_activation = getattr(sites[name], side).role == "activation"
        return (again if is_activation else model).state[name][side]

    state = {n: {side: kept(n, side) for side in sides} for n, sides in again.state.items()}
    return again._replace(state=state)


def _adaround(setting: Setting, model: Quantized) -> Quantized:
    rounded = ptq.adaround(
        setting.apply, model.assignment, model.state, model.variables, setting.batches,
        steps=setting.options.adaround_steps,
    )  # fmt: skip
    return model._replace(variables=rounded)


def _gptq(setting: Setting, model: Quantized) -> Quantized:
    rounded = ptq.gptq(
        setting.apply, model.assignment, model.state, model.variables, setting.batches
    )
    return model._replace(variables=rounded)


def _correct_bias(setting: Setting, model: Quantized) -> Quantized:
    arguments = setting.apply, model.assignment, model.state, model.variables
    if model.statistics is None:
        return model._replace(variables=ptq.correct_bias(*arguments, setting.batches))
    corrected = ptq.correct_bias_data_free(*arguments, setting.batches[0], model.statistics)
    return model._replace(variables=corrected)


class Step(NamedTuple):
    """One step, and what has to come before it or may not."""

    run: Callable[[Setting, Quantized], Quantized]
    after: tuple[str, ...] = ()  # steps that must have been done
    before: tuple[str, ...] = ()  # steps that must not
    needs_data: bool = True


_ROUNDINGS = ("adaround", "gptq")
STEPS: Mapping[str, Step] = {
    "fold_batch_norm": Step(_fold, (), _ROUNDINGS, needs_data=False),
    "equalize": Step(_equalize, ("fold_batch_norm",), _ROUNDINGS, needs_data=False),
    "smooth": Step(_smooth, (), _ROUNDINGS),
    # Folded BatchNorms have the scale of their statistics in the weights.
    "reestimate_batch_norm": Step(_reestimate, (), ("fold_batch_norm", "correct_bias")),
    "adaround": Step(_adaround, (), _ROUNDINGS),
    "gptq": Step(_gptq, (), _ROUNDINGS),
    "correct_bias": Step(_correct_bias, needs_data=False),
}


def check_options(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where there is nothing to quantize, or its steps do not go together."""
    if not config.checkpoint:
        raise from_config.ConfigError(
            "checkpoint is empty: give the workdir of a finished run, whose weights are quantized."
        )
    check_steps(config.ptq.steps, config.ptq.data_free)


def check_steps(names: Sequence[str], data_free: bool = False) -> None:
    """Raises ConfigError for steps that do not exist or do not go together."""
    done: list[str] = []
    for name in names:
        if name not in STEPS:
            raise from_config.ConfigError(
                f"Unknown step {name!r} in ptq.steps: expected {', '.join(STEPS)}."
            )
        step = STEPS[name]
        missing = [other for other in step.after if other not in done]
        if missing:
            raise from_config.ConfigError(f"ptq.steps: {name!r} needs {missing[0]!r} before it.")
        odd = [other for other in step.before if other in done]
        if odd:
            raise from_config.ConfigError(f"ptq.steps: {name!r} cannot come after {odd[0]!r}.")
        if data_free and step.needs_data:
            raise from_config.ConfigError(
                f"ptq.steps: {name!r} needs data, and ptq.data_free is set. Leave one of them out."
            )
        done.append(name)


# --- The job --------------------------------------------------------------------------------------


def calibration_batches(
    config: ml_collections.ConfigDict, images: from_config.Images
) -> list[np.ndarray]:
    """`ptq.images` training images, each once and not augmented, in full batches.

    Raises:
      ConfigError: there are fewer training images.
    """
    options = config.ptq
    if options.images > len(images.splits.train):
        raise from_config.ConfigError(
            f"ptq.images is {options.images}, but there are {len(images.splits.train)} training"
            " images."
        )
    size = min(options.batch_size, options.images)
    stream = data.train_batches(
        images.splits.train, batch_size=size, seed=config.seed + _SEED_OFFSET,
        mean=images.mean, std=images.std,
    )  # fmt: skip
    return [batch["image"] for batch in itertools.islice(stream, options.images // size)]


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


def prepare(config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images) -> Job:
    """Quantization of a finished run: a job without training steps."""
    check_options(config)
    there = finished_run.load(config, Path(config.checkpoint), images)
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
        write_json(workdir / PTQ_FILE, {"images": config.ptq.images, "steps": rows})
        evaluation = judged_by(setting, variables, quantized)
        folder = workdir / WEIGHTS_FOLDER
        save_checkpoint(folder, 0, evaluation.variables, identity=identity)
        facts = {"kind": "ptq", "steps": 0, "seconds": time.monotonic() - start}
        ended = results.Ended(
            config, workdir, there.parts, formats, quantized.variables, evaluation, variables
        )
        return results.finish(ended, facts)

    identity = claim_run(workdir, config, images)
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
