"""Trains a model in float or under fixed formats (quantization-aware training).

    python -m experiments.train --config=configs/digits_resnet8.py --workdir=runs/int4 \
        --config.formats="((('.*', 'int4'),))"

The same command goes on where an interrupted run stopped. The workdir holds the configuration,
metrics.jsonl, TensorBoard events, checkpoints, the formats of every layer (policy.json) and the
result on the test images (result.json).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_collections

import aqt_search as aqs
from aqt_search.sites import is_unquantized
from aqt_search.training import parallel
from aqt_search.training.evaluation import as_data
from aqt_search.training.loop import LoopResult, Run
from aqt_search.training.train_step import TrainState
from aqt_search.training.workdir import claim_workdir, read_json
from experiments import from_config, results
from experiments.command_line import run_job
from experiments.job import Job, run_alone


def configured_assignment(
    config: ml_collections.ConfigDict, sites: dict[str, aqs.Site]
) -> dict[str, aqs.SiteFormats]:
    """The formats of `config.formats` or of the file `config.policy`."""
    if not config.policy:
        return aqs.assign(sites, config.formats)
    if config.formats:
        raise from_config.ConfigError("Give formats or a policy file, not both.")
    policy = read_policy(Path(config.policy))
    odd = sorted(set(policy) ^ set(sites))
    if odd:
        raise from_config.ConfigError(
            f"The policy {config.policy} is not of this model: only one of them has the sites"
            f" {', '.join(odd[:3])}. Take one from a run with the same config.model and data."
        )
    return {name: policy[name] for name in sites}


def read_policy(path: Path) -> dict[str, aqs.SiteFormats]:
    """Reads a policy.json: {site: {"lhs": format name or null, "rhs": ...}}.

    Raises:
      ConfigError: there is no such file, or it holds something else.
      WorkdirError: it is not JSON.
      FormatError: an unknown format.
    """
    try:
        policy = read_json(path)
    except OSError as error:
        message = f"Cannot read the policy {path}: {error.strerror}. Give a run's policy.json."
        raise from_config.ConfigError(message) from error

    def formats(name: str) -> aqs.SiteFormats:
        sides = policy[name]
        fields = set(aqs.SiteFormats._fields)
        if not isinstance(sides, dict) or not {"lhs", "rhs"} <= set(sides) <= fields:
            raise from_config.ConfigError(
                f'The policy {path} gives site {name!r} {sides!r}; expected {{"lhs": format name or'
                ' null, "rhs": format name or null}, as in the policy.json of a run.'
            )
        return aqs.SiteFormats(**{k: results.spec_from_json(v) for k, v in sides.items()})

    if not isinstance(policy, dict):
        raise from_config.ConfigError(f"The policy {path} is no JSON object of sites.")
    return {name: formats(name) for name in policy}


def prepare(config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images) -> Job:
    """Training under fixed formats, which are an input of the step."""
    parts = from_config.build_parts(config, images)
    assignment = configured_assignment(config, parts.sites)
    qapply = aqs.quantize(parts.model.apply, axis_name=parallel.AXIS)
    update = from_config.make_update(config, parts, qapply)

    def step(state: TrainState, formats, batch):
        return update(state, formats, batch)[:2]

    def finish(trained: LoopResult) -> dict[str, Any]:
        is_float = all(is_unquantized(formats) for formats in assignment.values())
        kind = "retrained" if config.policy else "float" if is_float else "uniform"
        variables = {"params": trained.state.params, "batch_stats": trained.state.batch_stats}
        steps = parts.schedule.total_steps
        facts = {"kind": kind, "steps": steps, "seconds": trained.seconds}
        if config.policy:
            facts["pair"] = Path(config.policy).parent.name
        return results.finish(
            config, workdir, images, parts.model, parts.sites, assignment, variables, facts
        )

    state = from_config.initial_state(config, parts)
    stream = from_config.training_stream(config, images)
    # Claimed last, so that a refused configuration does not keep the folder.
    claim_workdir(workdir, config.to_dict(), ignore=("log_every", "data.data_dir"))
    run = Run(workdir, state, [stream], as_data(assignment))
    return Job(step, run, parts.schedule, finish)


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Trains, evaluates and returns the result; `images` saves loading the data set again."""
    return run_alone(prepare, config, workdir, images)


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    results.print_result(run(config, workdir))


if __name__ == "__main__":
    run_job(main)
