"""A job: a training run made from a configuration, ready to be run alone or beside others."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from aqt_search.training.checkpoint import checkpoint_fingerprint
from aqt_search.training.loop import (
    CHECKPOINT_FOLDER,
    LoopResult,
    Run,
    Schedule,
    run_side_by_side,
    run_steps,
)
from aqt_search.training.workdir import claim_workdir, identity_of, lock_workdir
from experiments import from_config


class Job(NamedTuple):
    """Jobs whose configurations differ in their inputs alone have equal steps."""

    step: Callable  # step(state, inputs, *batches) -> (state, metrics)
    run: Run
    schedule: Schedule
    finish: Callable[[LoopResult], dict[str, Any]]  # evaluates and writes the result

    @property
    def structure(self) -> Any:
        """What the state and inputs look like; jobs that share a program have the same."""
        leaves, tree = jax.tree.flatten((self.run.state, self.run.inputs))
        return tree, tuple((jax.numpy.shape(leaf), jax.numpy.result_type(leaf)) for leaf in leaves)


# prepare(config, workdir, images) of a kind of job; the workdir is locked.
Prepare = Callable[[ml_collections.ConfigDict, Path, from_config.Images], Job]


# Keys that change nothing of what a run does; of one of many, neither do the other points.
_NOT_OF_A_RUN = ("log_every", "data.data_dir", "sweep", "allocate")
# Keys that say where weights lie: `inputs_of` tells what they are.
_RUNS = ("checkpoint", "sensitivity.checkpoint", "searchers.checkpoint")
INPUTS = "inputs"  # where config.json keeps it


def inputs_of(config: ml_collections.ConfigDict, images: from_config.Images) -> dict[str, Any]:
    """What a run reads, by its contents, which do not depend on where it lies."""
    found: dict[str, Any] = {"data": images.splits.fingerprint}
    folders = {key: value for key, value in identity_of(config.to_dict()).items() if key in _RUNS}
    for key, folder in folders.items():
        if folder:
            found[key] = checkpoint_fingerprint(Path(folder) / CHECKPOINT_FOLDER)
    if config.policy and Path(config.policy).is_file():
        found["policy"] = hashlib.sha256(Path(config.policy).read_bytes()).hexdigest()[:16]
    return found


def claim_run(
    workdir: Path,
    config: ml_collections.ConfigDict,
    images: from_config.Images,
    ignore: Sequence[str] = _NOT_OF_A_RUN,
) -> dict[str, Any]:
    """Makes the folder that of this run, or checks that it is: `claim_workdir`.

    Returns:
      The run's identity, for its checkpoints: configuration and inputs.
    """
    claimed = config.to_dict() | {INPUTS: inputs_of(config, images)}
    claim_workdir(workdir, claimed, ignore=_ignored(claimed, ignore))
    return claimed_identity(claimed, ignore)


def claimed_identity(
    claimed: Mapping[str, Any], ignore: Sequence[str] = _NOT_OF_A_RUN
) -> dict[str, Any]:
    """The identity of the run whose config.json says `claimed`."""
    return identity_of(claimed, _ignored(claimed, ignore))


def _ignored(claimed: Mapping[str, Any], ignore: Sequence[str]) -> list[str]:
    """With the keys that are paths, for what lies there is among the inputs."""
    is_folder = claimed["data"]["name"].startswith("folder:")
    return [*ignore, *_RUNS, "policy", *(["data.name"] if is_folder else [])]


def run_alone(
    prepare: Prepare,
    config: ml_collections.ConfigDict,
    workdir: Path,
    images: from_config.Images | None = None,
) -> dict[str, Any]:
    """Runs a job over all devices and returns its result; `images` saves loading them again."""
    with lock_workdir(workdir):
        job = prepare(config, workdir, images or from_config.load_images(config))
        return job.finish(run_steps(job.step, job.run, job.schedule))


def run_together(step: Callable, jobs: Sequence[Job]) -> list[dict[str, Any] | Exception]:
    """Runs jobs of equal steps, one on each device, and returns each one's result or error.

    The step may be that of another equal job, which is compiled already. The caller holds the locks
    of their workdirs.
    """
    ends = run_side_by_side(step, [job.run for job in jobs], jobs[0].schedule)
    results: list[dict[str, Any] | Exception] = []
    for job, end in zip(jobs, ends):
        if isinstance(end, LoopResult):
            try:
                results.append(job.finish(end))
            except Exception as error:  # the other jobs' results are still to be written
                results.append(error)
        else:
            results.append(end)
    return results


@contextlib.contextmanager
def locked(workdirs: Sequence[Path]):
    """Holds the locks of several workdirs."""
    with contextlib.ExitStack() as stack:
        for workdir in workdirs:
            stack.enter_context(lock_workdir(workdir))
        yield
