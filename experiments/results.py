"""The files that a finished run leaves for the report: its result, sites and formats."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

import aqt_search as aqs
from aqt_search.numerics.granularity import Granularity
from aqt_search.numerics.quantizer import NAMED_QUANTIZERS
from aqt_search.tracing.layers import apart
from aqt_search.training.evaluation import (
    StaticEvaluation,
    evaluate,
    reestimate_batch_stats,
    static_evaluation,
)
from aqt_search.training.metrics import read_metrics
from aqt_search.training.parallel import AXIS
from aqt_search.training.scales import SCALES
from aqt_search.training.workdir import check_lock, write_json
from aqt_search.weights.statistics import weight_statistics
from experiments.architecture import ARCHITECTURE, FORMATS
from experiments.from_config import (
    Parts,
    cost_function,
    evaluation_batches,
    quantized,
    statistics_batches,
)
from experiments.job import command
from experiments.quantizers import configured_quantizers

POLICY_FILE, SITES_FILE, RESULT_FILE = "policy.json", "sites.json", "result.json"
WEIGHTS_FILE = "weights.json"


def policy_json(
    assignment: Mapping[str, aqs.SiteFormats], *granularities: Granularity | None
) -> dict[str, dict[str, Any]]:
    """`aqs.to_json` of formats alone: calibrations and gradient rules are `config.quantizers`'.

    Args:
      granularities: those of `config.quantizers`, which are left to it, too.

    Raises:
      AssignmentError: a quantizer differs from its format's in anything else.
    """

    def bare(spec: Any) -> Any:
        if not isinstance(spec, aqs.Quantizer) or _is_named(spec):
            return spec
        plain = aqs.Quantizer(spec.fmt)
        left = {"calibration": plain.calibration, "gradient": plain.gradient}
        if spec.granularity in granularities:
            left["granularity"] = None
        return dataclasses.replace(spec, **left)

    return aqs.to_json({n: aqs.SiteFormats(*map(bare, f)) for n, f in assignment.items()})


def _is_named(spec: aqs.Quantizer) -> bool:
    named = (aqs.quantizer(name) for name in NAMED_QUANTIZERS)
    return any(dataclasses.replace(q, unsigned=spec.unsigned) == spec for q in named)


_KINDS = {
    "conv_general_dilated": "conv",
    "dot_general": "dot",
    "gather": "lookup",
    "ragged_dot_general": "ragged",
}


def sites_json(sites: Mapping[str, aqs.Site]) -> dict[str, dict[str, Any]]:
    """Site -> what the cost counts."""
    return {
        name: {
            "kind": _KINDS[site.kind],
            "macs": site.macs * site.repeats,
            "weight_size": site.weight.size if site.weight else 0,
            "lhs_shape": list(site.lhs_shape),
            "rhs_shape": list(site.rhs_shape),
        }
        for name, site in sites.items()
    }


def weights_json(
    model: Any,
    assignment: Mapping[str, aqs.SiteFormats],
    variables: Mapping[str, Any],
    image_shape: tuple[int, ...],
    state: Any = None,
    float_variables: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Site -> statistics of its weight before and after quantization; see `weight_statistics`.

    Args:
      variables: {"params": ..., "batch_stats": ...}; "scales" are left out.
      state: of calibrations, where those of weights have one.
      float_variables: those before the weights were put on a grid; None: `variables`.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    own, floats = (
        tree and {name: value for name, value in tree.items() if name != SCALES}
        for tree in (variables, float_variables)
    )
    found = weight_statistics(
        model.apply, assignment, own, image, state=state, float_params=floats, train=False
    )
    return {label: statistics._asdict() for label, statistics in found.items()}


@functools.lru_cache(maxsize=4)
def _programs(model: Any) -> tuple[Callable, Callable]:
    """The model's function, plain and quantized: the same objects for equal models."""
    # Activation scales are those of a whole batch, however many devices share it.
    return model.apply, quantized(model, AXIS)


def estimated(
    config: ml_collections.ConfigDict,
    parts: Parts,
    assignment: Mapping[str, aqs.SiteFormats],
    variables: Mapping[str, Any],
) -> StaticEvaluation:
    """What `evaluate` takes: BatchNorm statistics and activation scales that fit an assignment.

    With `evaluation.calibration_batches` 0 they are the running statistics, and each evaluation
    batch's own scales.
    """
    apply, qapply = _programs(parts.model)
    if not config.evaluation.calibration_batches:
        return StaticEvaluation(qapply, assignment, variables)
    batches = statistics_batches(config, parts.images)
    statistics = reestimate_batch_stats(qapply, assignment, variables, batches)
    variables = {**variables, "batch_stats": statistics}
    batches = statistics_batches(config, parts.images)
    return static_evaluation(apply, assignment, parts.sites, variables, batches)


def against_targets(
    targets: Mapping[str, float],
    sites: Mapping[str, aqs.Site],
    assignment: Mapping[str, aqs.SiteFormats],
) -> dict[str, Any]:
    """What a result says of formats that were chosen to meet targets, by the names of the costs."""
    costs = {name: float(cost_function(name)(sites, assignment)) for name in targets}
    return {"targets": dict(targets), "costs": costs, "target_gbops": targets.get("gbops")}


class Ended(NamedTuple):
    """What a run ends with."""

    config: ml_collections.ConfigDict
    workdir: Path
    parts: Parts
    assignment: Mapping[str, aqs.SiteFormats]
    variables: Mapping[str, Any]  # {"params": ..., "batch_stats": ...}, with "scales" if any
    # What is evaluated, where statistics and scales are known already.
    judged: StaticEvaluation | None = None
    # Weights before they were put on a grid, to compare with.
    float_variables: Mapping[str, Any] | None = None
    # Of a model that was cut out of the configured one: what tells it from that.
    architecture: Mapping[str, Any] | None = None


def finish(ended: Ended, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluates weights under an assignment, without training them further, and writes the files.

    BatchNorm statistics and activation scales are first estimated under the assignment, on training
    images.

    Args:
      ended: the run.
      facts: what the caller knows: "kind", "seconds", "steps", and for a search its target.

    Returns:
      The result, as written.
    """
    config, workdir, parts, assignment, variables = ended[:5]
    judged = ended.judged or estimated(config, parts, assignment, variables)
    result = _result(ended, judged) | dict(facts)
    check_lock(workdir)
    write_json(workdir / SITES_FILE, sites_json(apart(parts.sites, assignment)[0]))
    granularities = configured_quantizers(config).granularities.values()
    policy: dict[str, Any] = policy_json(assignment, *granularities)
    if ended.architecture is not None:
        policy = {ARCHITECTURE: dict(ended.architecture), FORMATS: policy}
    write_json(workdir / POLICY_FILE, policy)
    statistics = weights_json(
        parts.model, judged.assignment, variables, parts.images.splits.image_shape,
        judged.variables.get(SCALES), ended.float_variables,
    )  # fmt: skip
    write_json(workdir / WEIGHTS_FILE, statistics)
    write_json(workdir / RESULT_FILE, result)
    return result


def _result(ended: Ended, judged: StaticEvaluation) -> dict[str, Any]:
    """What a result holds of every run; keys in the order they are written."""
    config, workdir, parts, assignment = ended[:4]
    splits = parts.images.splits
    sizes = {split: len(getattr(splits, split)) for split in ("reward", "test")}
    sizes["train"] = config.evaluation.train_images
    held_out, test, train = (
        evaluate(*judged, evaluation_batches(config, parts.images, split)) if sizes[split] else None
        for split in ("reward", "test", "train")
    )
    return {
        "name": workdir.name,
        "model": config.model.name,
        "width": config.model.width,
        "series": config.series or None,
        "data": config.data.name.rsplit("/", 1)[-1],
        "seed": config.seed,
        "accuracy": test.accuracy,
        "loss": test.loss,
        "held_out_accuracy": held_out and held_out.accuracy,
        "train_accuracy": _last_metrics(workdir).get("accuracy"),
        "train_split_accuracy": train and train.accuracy,
        "gbops": float(aqs.cost.gbops(parts.sites, assignment)),
        "weight_bytes": float(aqs.cost.weight_bytes(parts.sites, assignment)),
        "target_gbops": None,
        "final_entropy": None,
        "without_retraining": None,
        "command": command(),
    }


def _last_metrics(workdir: Path) -> Mapping[str, Any]:
    """The last record of training; {} of a job that trains nothing."""
    return (read_metrics(workdir) or [{}])[-1]


def print_result(result: Mapping[str, Any]) -> None:
    """One line for the terminal."""
    print(
        f"{result['name']}: test accuracy {100 * result['accuracy']:.2f} %,"
        f" {result['gbops']:.6g} GBOPs, weights {result['weight_bytes'] / 1000:.2f} kB"
    )
