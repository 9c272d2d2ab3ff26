"""A job: a training run made from a configuration, ready to be run alone or beside others."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from aqt_search.training import storage
from aqt_search.training.checkpoint import checkpoint_fingerprint
from aqt_search.training.loop import (
    CHECKPOINT_FOLDER,
    LoopResult,
    Run,
    Schedule,
    run_side_by_side,
    run_steps,
)
from aqt_search.training.processes import check_agreed, on_first
from aqt_search.training.storage import as_path
from aqt_search.training.workdir import (
    CONFIG_FILE,
    WorkdirError,
    claim_workdir,
    identity_of,
    lock_workdir,
    read_json,
)
from experiments import from_config, schema


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
_NOT_OF_A_RUN = ("log_every", *from_config.HOW_READ, "sweep", "allocate")
# Keys that say where weights lie: `inputs_of` tells what they are.
_RUNS = ("checkpoint", "sensitivity.checkpoint", "searchers.checkpoint", "subnets.checkpoint")
INPUTS, JOB = "inputs", "job"  # where config.json keeps it, and which job it is of


def inputs_of(config: ml_collections.ConfigDict, images: from_config.Images) -> dict[str, Any]:
    """What a run reads, by its contents, which do not depend on where it lies."""
    found: dict[str, Any] = {"data": images.splits.fingerprint}
    folders = {key: value for key, value in identity_of(config.to_dict()).items() if key in _RUNS}
    for key, folder in folders.items():
        if folder:
            found[key] = checkpoint_fingerprint(as_path(folder) / CHECKPOINT_FOLDER)
    if config.policy and (digest := _file_fingerprint(as_path(config.policy))):
        found["policy"] = digest
    return found


@on_first
def _file_fingerprint(path: Path) -> str | None:
    """Hash of a file's bytes; None where there is none."""
    if not storage.is_file(path):
        return None
    return hashlib.sha256(storage.read_bytes(path)).hexdigest()[:16]


def claim_run(
    workdir: Path,
    config: ml_collections.ConfigDict,
    images: from_config.Images,
    job: str,
    ignore: Sequence[str] = _NOT_OF_A_RUN,
) -> dict[str, Any]:
    """Makes the folder that of this run of experiments.`job`, or checks that it is.

    Returns:
      The run's identity, for its checkpoints: configuration and inputs.

    Raises:
      WorkdirError: it is that of another job, or of another run: as `claim_workdir`.
    """
    _check_job(workdir, job)
    inputs = inputs_of(config, images)
    check_agreed(inputs, "what the run reads")
    claimed = config.to_dict() | {INPUTS: inputs, JOB: {"name": job, "command": command()}}
    claim_workdir(workdir, claimed, ignore=_ignored(claimed, ignore))
    return claimed_identity(claimed, ignore)


def _check_job(workdir: Path, job: str) -> None:
    """Raises WorkdirError if the folder is that of another job, and says of which."""
    try:
        claimed = read_json(workdir / CONFIG_FILE)
    except FileNotFoundError:
        return
    there = claimed.get(JOB) if isinstance(claimed, dict) else None  # of earlier versions none
    if there and there["name"] != job:
        raise WorkdirError(
            f"workdir {workdir} is that of another job: experiments.{there['name']}, and this is"
            f" experiments.{job}. Give another --workdir. The job there goes on by its own"
            f" command:\n  {there['command']}"
        )


def started_module() -> str:
    """The name of the module that this process was started with."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return module.name if module else Path(sys.argv[0]).name


# The command that has had this process started, where it is not the process's own.
COMMAND_VARIABLE = "AQT_SEARCH_COMMAND"


def command() -> str:
    """How this process was started, as one may paste it into a shell."""
    own = shlex.join(["python", "-m", started_module(), *sys.argv[1:]])
    return os.environ.get(COMMAND_VARIABLE) or own


def claimed_identity(
    claimed: Mapping[str, Any], ignore: Sequence[str] = _NOT_OF_A_RUN
) -> dict[str, Any]:
    """The identity of the run whose config.json says `claimed`."""
    return identity_of(claimed, _ignored(claimed, ignore))


def _ignored(claimed: Mapping[str, Any], ignore: Sequence[str]) -> list[str]:
    """With the keys that are paths, for what lies there is among the inputs."""
    is_folder = claimed["data"]["name"].startswith("folder:")
    return [*ignore, JOB, *_RUNS, "policy", *(["data.name"] if is_folder else [])]


@contextlib.contextmanager
def opened(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> Iterator[from_config.Images]:
    """Where every job begins, whoever calls it: its configuration is checked, its folder locked.

    Gives the images, which are loaded unless the caller has them.

    Raises:
      ConfigError, FormatError, PaletteError, RuleError, SpaceError: as `schema.check`.
      WorkdirError: as `lock_workdir`.
    """
    schema.check(config)
    with lock_workdir(workdir):
        yield images or from_config.load_images(config)


def run_alone(
    prepare: Prepare,
    config: ml_collections.ConfigDict,
    workdir: Path,
    images: from_config.Images | None = None,
) -> dict[str, Any]:
    """Runs a job over all devices and returns its result; `images` saves loading them again."""
    with opened(config, workdir, images) as found:
        job = prepare(config, workdir, found)
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
