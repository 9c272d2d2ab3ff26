"""Stores the weights of a finished run as indices of small tables, and evaluates it from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search.palette import (
    DifferentiablePalettes,
    PalettedTensor,
    dequantized,
    differentiable_palettes,
    encoded,
    palettize,
    save,
    soft_apply,
)
from aqt_search.palette.rules import select_weights
from aqt_search.tracing.sites import parameter_name
from aqt_search.training.evaluation import StaticEvaluation, reestimate_batch_stats
from aqt_search.training.loop import LoopResult, Run, Schedule
from aqt_search.training.parallel import AXIS
from aqt_search.training.processes import on_first
from aqt_search.training.storage import as_path
from aqt_search.training.train_step import TrainState, init_train_state
from aqt_search.training.workdir import check_lock, write_json
from experiments import finished_run, from_config, results
from experiments.job import Job, claim_run, run_alone

PALETTE_FILE, SIZES_FILE = "palette.npz", "palette.json"
_SEED_OFFSET = 6_000_011  # of the order of the training images


def check_options(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where there are no weights to store, or formats beside palettes."""
    if not config.checkpoint:
        raise from_config.ConfigError(
            "checkpoint is empty: give the workdir of a finished run, whose weights are stored."
        )
    why = "weights with palettes are served in float"
    from_config.refuse_unread(config, ("formats", "policy"), why)


# --- Training through soft palettes ---------------------------------------------------------------


def _training_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration under which `palette.epochs` are trained."""
    tuned = config.copy_and_resolve_references()
    tuned.epochs = float(config.palette.epochs or config.epochs)
    tuned.optimizer.learning_rate = config.palette.learning_rate
    tuned.optimizer.warmup_epochs = 0.0
    return tuned


def _soft_model(apply: Callable, palettes: DifferentiablePalettes, temperature: float) -> Callable:
    """What `train_step.make_update` takes, on soft weights.

    The centroids follow from the weights as running statistics do, and are kept beside them.
    """
    soft = soft_apply(apply, palettes)

    def qapply(assignment, variables, images, **kwargs):
        stats = variables["batch_stats"]
        own = {"params": variables["params"], "batch_stats": stats["model"]}
        (logits, new), centroids = soft(own, stats["centroids"], temperature, images, **kwargs)
        kept = {"model": new.get("batch_stats", {}), "centroids": centroids}
        return logits, {"batch_stats": kept}

    return qapply


def _first_state(
    config: ml_collections.ConfigDict,
    parts: from_config.Parts,
    variables: Mapping[str, Any],
    palettes: DifferentiablePalettes,
) -> TrainState:
    shape, loss = parts.images.splits.image_shape, parts.range_loss
    auxiliary = {} if loss is None else {"init_auxiliary": loss.init}
    state = init_train_state(parts.model, parts.optimizer, shape, config.seed, **auxiliary)
    centroids = palettes.init(variables)
    return state._replace(
        params=variables["params"],
        batch_stats={"model": variables["batch_stats"], "centroids": centroids},
        auxiliary=() if loss is None else loss.init(variables["params"]),
    )


def training(
    config: ml_collections.ConfigDict,
    workdir: Path,
    parts: from_config.Parts,
    variables: Mapping[str, Any],
) -> tuple[Callable, Run]:
    """The step and the run of training through soft palettes."""
    options = config.palette
    palettes = differentiable_palettes(
        parts.sites, options.rules, iterations=options.iterations, seed=config.seed
    )
    qapply = _soft_model(parts.model.apply, palettes, options.temperature)
    update = from_config.make_update(config, parts, qapply)

    def step(state: TrainState, inputs, batch):
        return update(state, inputs, batch)[:2]

    state = _first_state(config, parts, variables, palettes)
    stream = from_config.training_stream(config, parts.images, _SEED_OFFSET)
    return step, Run(workdir, state, [stream])


# --- Storing --------------------------------------------------------------------------------------


def site_rows(params: Any, paletted: Any) -> dict[str, dict[str, Any]]:
    """What every weight with a palette takes, and its signal-to-noise ratio, by parameter.

    SQNR = 10 log10(sum w^2 / sum (w - stored)^2) dB, null where nothing is lost.
    """

    def is_paletted(node: Any) -> bool:
        return isinstance(node, PalettedTensor)

    stored, _ = jax.tree_util.tree_flatten_with_path(paletted, is_leaf=is_paletted)
    rows = {}
    for (path, tensor), weight in zip(stored, jax.tree.leaves(params), strict=True):
        if is_paletted(tensor):
            weight = np.asarray(weight, np.float64)
            noise = np.sum(np.square(weight - np.asarray(tensor.dequantize(), np.float64)))
            rows[parameter_name(path)] = {
                "bits": tensor.bits,
                "dimension": tensor.dimension,
                "weights": weight.size,
                "bytes": tensor.nbytes,
                "huffman_bytes": tensor.huffman_nbytes(),
                "sqnr_db": 10 * math.log10(np.sum(np.square(weight)) / noise) if noise else None,
            }
    return rows


def judged_by(
    config: ml_collections.ConfigDict, parts: from_config.Parts, variables: Mapping[str, Any]
) -> StaticEvaluation:
    """What `evaluate` takes, with BatchNorm statistics of these weights."""
    qapply = from_config.quantized(parts.model, AXIS)
    assignment = aqs.assign(parts.sites, [])
    if config.evaluation.calibration_batches:
        batches = from_config.statistics_batches(config, parts.images)
        statistics = reestimate_batch_stats(qapply, assignment, variables, batches)
        variables = {**variables, "batch_stats": statistics}
    return StaticEvaluation(qapply, assignment, variables)


def store(
    config: ml_collections.ConfigDict,
    workdir: Path,
    parts: from_config.Parts,
    variables: Mapping[str, Any],
    centroids: Mapping[str, jax.Array] | None,
    architecture: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Clusters and evaluates weights, and writes all files; returns the result.

    Args:
      variables: {"params": ..., "batch_stats": ...} in float.
      centroids: that training found, in `seconds`; None: k-means finds them.
      architecture: what tells the model from the configured one.
    """
    start, params = time.monotonic(), variables["params"]
    paletted = palettize(
        params, parts.sites, config.palette.rules,
        centroids=centroids, seed=config.seed, restarts=config.palette.restarts,
    )  # fmt: skip
    judged = judged_by(config, parts, {**variables, "params": dequantized(paletted)})
    statistics = judged.variables["batch_stats"]
    check_lock(workdir)
    file_bytes = on_first(save)(
        workdir / PALETTE_FILE, {"params": paletted, "batch_stats": statistics}
    )
    float_bytes = len(encoded({"params": params, "batch_stats": statistics}))
    rows = site_rows(params, paletted)
    sizes = {
        "method": "kmeans" if centroids is None else "dkm",
        "file_bytes": file_bytes,
        "float_file_bytes": float_bytes,
        "ratio": float_bytes / file_bytes,
        "paletted_bytes": sum(row["bytes"] for row in rows.values()),
        "huffman_bytes": sum(row["huffman_bytes"] for row in rows.values()),
        "weights": rows,
    }
    write_json(workdir / SIZES_FILE, sizes)
    saved = sum(4 * row["weights"] for row in rows.values()) - sizes["paletted_bytes"]
    facts = {
        "kind": "palette",
        "steps": parts.schedule.total_steps if centroids is not None else 0,
        "seconds": seconds + time.monotonic() - start,
        "weight_bytes": float(aqs.cost.weight_bytes(parts.sites, judged.assignment)) - saved,
    }
    ended = results.Ended(
        config, workdir, parts, judged.assignment, judged.variables, judged, variables,
        architecture,
    )  # fmt: skip
    return results.finish(ended, facts)


def prepare(config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images) -> Job:
    """Palettes for a finished run: a job without training steps unless `palette.epochs` asks."""
    check_options(config)
    there = finished_run.load(config, as_path(config.checkpoint), images)
    variables = {name: there.variables[name] for name in ("params", "batch_stats")}
    tuned = _training_config(config)
    parts = from_config.build_parts(tuned, images, architecture=there.architecture)
    select_weights(parts.sites, config.palette.rules)  # complains about rules before the claim
    step, run, schedule = None, Run(workdir, (), []), Schedule(0, 1, 1)
    if config.palette.epochs:
        step, run = training(tuned, workdir, parts, variables)
        schedule = parts.schedule

    def finish(end: LoopResult) -> dict[str, Any]:
        if not config.palette.epochs:
            return store(config, workdir, parts, variables, None, there.architecture)
        stats = end.state.batch_stats
        trained = {"params": end.state.params, "batch_stats": stats["model"]}
        centroids = stats["centroids"]
        return store(config, workdir, parts, trained, centroids, there.architecture, end.seconds)

    identity = claim_run(workdir, config, images, "palettize")
    return Job(step, run._replace(identity=identity), schedule, finish)


def format_sizes(sizes: Mapping[str, Any]) -> str:
    """The table of the weights, and the file's size."""
    rows = sizes["weights"]
    width = max(map(len, rows))
    lines = [
        f"{'weight':{width}} {'bits':>4} {'dimension':>9} {'weights':>9} {'bytes':>9}"
        f" {'Huffman':>9} {'SQNR dB':>8}"
    ]
    for name, row in rows.items():
        ratio = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
        lines.append(
            f"{name:{width}} {row['bits']:>4} {row['dimension']:>9} {row['weights']:>9}"
            f" {row['bytes']:>9} {row['huffman_bytes']:>9} {ratio:>8}"
        )
    lines += [
        f"{'all':{width}} {'':>24} {sizes['paletted_bytes']:>9} {sizes['huffman_bytes']:>9}",
        f"{PALETTE_FILE}: {sizes['file_bytes']} bytes, {sizes['float_file_bytes']} with float32"
        f" weights: {sizes['ratio']:.2f} times smaller",
    ]
    return "\n".join(lines)


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Clusters, evaluates and returns the result."""
    return run_alone(prepare, config, workdir, images)
