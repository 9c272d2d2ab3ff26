"""The loop over steps: metrics, checkpoints, exact resume, and a clean stop on trouble."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from absl import logging

from aqt_search.training import parallel
from aqt_search.training.checkpoint import latest_step, restore_latest, save_checkpoint
from aqt_search.training.interrupt import Interrupt
from aqt_search.training.metrics import MetricWriter, Progress

CHECKPOINT_FOLDER = "checkpoints"
_MOST_STEPS_AHEAD = 4  # how far Python may run ahead of the device


class InterruptedRunError(RuntimeError):
    """The run was asked to stop, and has saved; the same command goes on."""


class DivergedError(RuntimeError):
    """The loss, or a quality, became NaN or infinite, or no longer means anything."""


class Stream(Protocol):
    """Batches with a position that can be saved: a grain iterator."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """The next batch."""

    def get_state(self) -> Any:
        """The position, as JSON values."""

    def set_state(self, state: Any) -> None:
        """Goes on from a position."""


class Schedule(NamedTuple):
    """When the loop does what, in steps."""

    total_steps: int
    log_every: int
    checkpoint_every: int


class LoopResult(NamedTuple):
    """The end of a run."""

    state: Any  # not replicated
    seconds: float  # spent in the loop, over all starts of the run


def run_steps(
    step: Callable,
    state: Any,
    streams: Sequence[Stream],
    schedule: Schedule,
    workdir: Path,
    *,
    describe: Callable[[Any], Mapping[str, float]] = lambda state: {},
    check: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    description: str = "train",
) -> LoopResult:
    """Runs `state, metrics = step(state, *batches)` up to `schedule.total_steps`.

    The run goes on from the newest whole checkpoint in `<workdir>/checkpoints`, with the position
    of every stream, so that a killed run ends in the same bits as an undisturbed one.

    Args:
      step: not yet compiled; takes a state and one batch per stream, runs on every replica.
      state: the initial state, not replicated: the template for restoring, too.
      streams: one per batch argument of `step`.
      schedule: steps in all, between records, and between checkpoints.
      workdir: folder of the run, claimed and locked by the caller.
      describe: called on the replicated state at each record; its numbers are added to it.
      check: called with every step's metrics, in order; raises to stop the run.
      description: a word for the progress line.

    Raises:
      DivergedError: a metric is not finite (says the step); the last checkpoint is of good weights.
      InterruptedRunError: SIGTERM or Ctrl-C; the state is saved.
      CheckpointError, MetricsError: the disk is full or what is on it is damaged.
    """
    folder = workdir / CHECKPOINT_FOLDER
    restored = restore_latest(folder, jax.tree.map(np.asarray, state))
    done, seconds = 0, 0.0
    if restored is not None:
        state, done, seconds = restored.state, restored.step, restored.extra["seconds"]
        for stream, position in zip(streams, restored.extra["streams"], strict=True):
            stream.set_state(position)
        logging.info("Going on from the checkpoint of step %d in %s.", done, folder)
    if done >= schedule.total_steps:
        return LoopResult(state, seconds)
    run = _Run(parallel.pmap_step(step), schedule, folder, describe, check, seconds)
    with (
        MetricWriter(workdir, done) as writer,
        Progress(schedule.total_steps, initial=done, description=description) as progress,
        Interrupt() as interrupt,
    ):
        state = parallel.replicate(state)
        for number in range(done + 1, schedule.total_steps + 1):
            state = run.advance(state, streams, number)
            last = number == schedule.total_steps
            stopped_by = interrupt.requested  # read once: a later signal ends the next step
            saves = last or stopped_by or number % schedule.checkpoint_every == 0
            shown = run.record(state, number, writer) if saves or run.is_due(number) else None
            progress.update(1, shown)
            if saves:
                writer.flush()
                run.save(state, streams, number)
            if stopped_by and not last:
                raise InterruptedRunError(
                    f"{stopped_by}: saved step {number} of {schedule.total_steps} in"
                    f" {folder}. Run the same command again to go on."
                )
    return LoopResult(parallel.unreplicate(state), run.seconds())


class _Run:
    """The parts of one start of a run, and the metrics that are still on the device."""

    def __init__(self, step, schedule, folder, describe, check, seconds):
        self._step = step
        self._schedule = schedule
        self._folder = folder
        self._describe = describe
        self._check = check
        self._seconds_before = seconds
        self._started = time.monotonic()
        self._pending: list[tuple[int, Any]] = []

    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def is_due(self, number: int) -> bool:
        return number % self._schedule.log_every == 0

    def advance(self, state, streams, number: int):
        batches = [parallel.shard(next(stream)) for stream in streams]
        state, metrics = self._step(state, *batches)
        self._pending.append((number, metrics))
        if len(self._pending) > _MOST_STEPS_AHEAD:
            jax.block_until_ready(self._pending[-_MOST_STEPS_AHEAD][1])
        return state

    def record(self, state, number: int, writer: MetricWriter) -> Mapping[str, float]:
        """Checks every step since the last record, and writes the means of their metrics."""
        fetched = [(n, parallel.unreplicate(metrics)) for n, metrics in self._pending]
        self._pending = []
        for at, metrics in fetched:
            self._check_finite(at, metrics)
            self._check(at, metrics)
        means = {
            name: float(np.mean([metrics[name] for _, metrics in fetched]))
            for name in fetched[0][1]
        }
        writer.write(number, means | dict(self._describe(state)))
        return {name: means[name] for name in ("loss", "accuracy", "cost") if name in means}

    def _check_finite(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            kept = latest_step(self._folder)
            where = f"the checkpoint of step {kept} in {self._folder} is good" if kept else (
                "no checkpoint was saved before it"
            )  # fmt: skip
            raise DivergedError(
                f"{', '.join(bad)} became NaN or infinite at step {step}; {where}. Try a lower"
                " learning rate, gradient clipping, or formats with more bits, in a new --workdir."
            )

    def save(self, state, streams, number: int) -> None:
        extra = {
            "streams": [stream.get_state() for stream in streams],
            "seconds": self.seconds(),
        }
        save_checkpoint(self._folder, number, parallel.unreplicate(state), extra)
