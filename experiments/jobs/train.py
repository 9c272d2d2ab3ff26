"""Trains a model in float or under fixed formats (quantization-aware training)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from aqt_search.tracing.sites import is_unquantized
from aqt_search.training import parallel
from aqt_search.training.evaluation import as_data
from aqt_search.training.loop import LoopResult, Run
from aqt_search.training.storage import as_path
from aqt_search.training.train_step import TrainState
from experiments import finished_run, from_config, results
from experiments.architecture import policy_architecture
from experiments.assignment import configured_assignment
from experiments.job import Job, claim_run, run_alone


def prepare(config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images) -> Job:
    """Training under fixed formats, which are an input of the step."""
    parts = from_config.build_parts(config, images)
    assignment = configured_assignment(config, parts.sites)
    kept = {"residuals": config.residuals, "formats": from_config.formats_like(assignment)}
    qapply = from_config.quantized(parts.model, parallel.AXIS, **kept)
    update = from_config.make_update(config, parts, qapply)

    def step(state: TrainState, formats, batch):
        return update(state, formats, batch)[:2]

    def finish(trained: LoopResult) -> dict[str, Any]:
        is_float = all(is_unquantized(formats) for formats in assignment.values())
        kind = "retrained" if config.policy else "float" if is_float else "uniform"
        steps = parts.schedule.total_steps
        facts = {"kind": kind, "steps": steps, "seconds": trained.seconds}
        if config.policy:
            facts["pair"] = Path(config.policy).parent.name
        ended = results.Ended(
            config, workdir, parts, assignment, trained.state.variables,
            architecture=policy_architecture(config),
        )  # fmt: skip
        return results.finish(ended, facts)

    state = from_config.initial_state(config, parts, assignment)
    if config.checkpoint:
        there = _start(config, images)
        state = state._replace(params=there["params"], batch_stats=there["batch_stats"])
        if parts.range_loss is not None:  # its margins start from these weights
            state = state._replace(auxiliary=parts.range_loss.init(there["params"]))
    stream = from_config.training_stream(config, images)
    # Claimed last, so that a refused configuration does not keep the folder.
    identity = claim_run(workdir, config, images, "train")
    run = Run(workdir, state, [stream], as_data(assignment), identity=identity)
    return Job(step, run, parts.schedule, finish)


def _start(config: ml_collections.ConfigDict, images: from_config.Images) -> Mapping[str, Any]:
    """The variables of `config.checkpoint`.

    Raises:
      ConfigError: they are of another architecture than that of `config.policy`.
    """
    there, own = finished_run.load(config, as_path(config.checkpoint), images), {}
    for name, told in (("there", there.architecture), ("now", policy_architecture(config))):
        own[name] = None if told is None else told["blocks"]
    if own["there"] != own["now"]:
        raise from_config.ConfigError(
            f"The run in {config.checkpoint} is of another architecture than the model that is"
            " trained. Give config.policy the policy.json of that run, or another"
            " config.checkpoint."
        )
    return there.variables


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Trains, evaluates and returns the result; `images` saves loading the data set again."""
    return run_alone(prepare, config, workdir, images)
