"""A job: a training run made from a configuration, ready to be run alone or beside others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from aqt_search.training.loop import LoopResult, Run, Schedule, run_side_by_side, run_steps
from aqt_search.training.workdir import claim_workdir, lock_workdir
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


def claim_run(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Makes the folder that of this run, or checks that it is: `claim_workdir`."""
    claim_workdir(workdir, config.to_dict(), ignore=_NOT_OF_A_RUN)


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
