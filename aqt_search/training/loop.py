"""The loop over steps: metrics, checkpoints, exact resume, and a clean stop on trouble."""

from __future__ import annotations

import collections
import contextlib
import io
import math
import sys
import time
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from absl import logging

from aqt_search.training import parallel
from aqt_search.training.checkpoint import (
    CheckpointError,
    delete_after,
    delete_unfinished,
    latest_step,
    restore_latest,
    save_checkpoint,
)
from aqt_search.training.interrupt import SIGNALS, Interrupt
from aqt_search.training.metrics import MetricsError, MetricWriter, Progress
from aqt_search.training.processes import is_first, on_first, several
from aqt_search.training.workdir import check_lock

CHECKPOINT_FOLDER = "checkpoints"


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

    def close(self) -> None:
        """Lets go of threads and processes: no more batches are asked for."""


class Schedule(NamedTuple):
    """When the loop does what, in steps."""

    total_steps: int
    log_every: int
    checkpoint_every: int
    epoch_steps: int = 0  # to say in which epoch a run goes on; 0: it has none


class Run(NamedTuple):
    """What one run begins with, and who looks at it on the way."""

    workdir: Path  # claimed and locked by the caller
    state: Any  # the initial state, not replicated: the template for restoring, too
    streams: Sequence[Stream]  # one per batch argument of the step
    inputs: Any = ()  # pytree given to every step, which may differ between runs of one program
    # Called at each record on the state, leaves [1, ...] on the device; its numbers are added.
    describe: Callable[[Any], Mapping[str, float]] = lambda state: {}
    # Called with every step's metrics, in order; raises to stop the run. A run that goes on calls
    # it again with those of the last `looks_back` steps.
    check: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None
    looks_back: int = 0
    # What tells this run from others (`workdir.identity_of`): its checkpoints carry it.
    identity: Mapping[str, Any] | None = None
    # By number of a step: what the host makes of the state, not replicated, just before that step.
    # A run that goes on from the step before makes it again, so it depends on the state alone.
    turns: Mapping[int, Callable[[Any], Any]] = types.MappingProxyType({})


class LoopResult(NamedTuple):
    """The end of a run."""

    state: Any  # not replicated
    seconds: float  # spent in the loop, over all starts of the run


def run_steps(step: Callable, run: Run, schedule: Schedule) -> LoopResult:
    """Runs `state, metrics = step(state, inputs, *batches)` up to `schedule.total_steps`.

    The run goes on from the newest whole checkpoint in `<workdir>/checkpoints`, with the position
    of every stream and the metrics that await their record, so that a run that was killed or
    stopped ends in the same bits, and the same records, as an undisturbed one.

    Args:
      step: not yet compiled; takes a state, inputs and one batch per stream, on every replica.
      run: what it begins with.
      schedule: steps in all, between records, and between checkpoints.

    Raises:
      DivergedError: a metric is not finite (says the step); the last checkpoint is of good weights.
      InterruptedRunError: SIGTERM or Ctrl-C; the state is saved.
      CheckpointError, MetricsError: the disk is full or what is on it is damaged, or the
        checkpoint is of another run.
      WorkdirError: the folder was deleted or replaced while the run went on.
    """
    (result,) = _run_together(step, [run], schedule, parallel.data_parallel())
    if isinstance(result, Exception):
        raise result
    return result


def run_side_by_side(
    step: Callable, runs: Sequence[Run], schedule: Schedule
) -> list[LoopResult | RuntimeError]:
    """The same for several runs of one program, each on a device of its own.

    Every run ends in the bits it would have on a machine with that device alone. One that fails
    does not stop the others.

    Args:
      step, schedule: as for `run_steps`.
      runs: at most one per device. They go on from the newest step that all of them have.

    Returns:
      For each run its result, or the error that stopped it.

    Raises:
      ValueError: more runs than devices.
      InterruptedRunError, CheckpointError, MetricsError: as `run_steps`, for all of them.
    """
    return _run_together(step, runs, schedule, parallel.side_by_side(len(runs)))


def _run_together(
    step: Callable, runs: Sequence[Run], schedule: Schedule, placement: parallel.Placement
) -> list[LoopResult | RuntimeError]:
    lanes = [_Lane(run, placement.replicas) for run in runs]
    done = _go_to_one_step(lanes)
    names = ", ".join(run.workdir.name for run in runs)
    if done and is_first():
        print(f"{names}: {_where(done, schedule)}{lanes[0].moved()}", file=sys.stderr)
    if done >= schedule.total_steps or all(lane.error for lane in lanes):
        return [lane.error or LoopResult(lane.state, lane.seconds) for lane in lanes]
    loop = _Loop(placement, placement.compile(step), schedule, lanes)
    with (
        contextlib.ExitStack() as writers,
        _closing(runs),
        _progress(schedule.total_steps, done, names) as progress,
        Interrupt() as interrupt,
    ):
        stops = _StopRequests(interrupt)
        for lane in lanes:
            if not lane.error:
                lane.open_writer(writers, done)
        for number in range(done + 1, schedule.total_steps + 1):
            loop.turn(number)
            loop.advance()
            last = number == schedule.total_steps
            stopped_by = stops.read()  # once: a later signal ends the next step
            due = last or number % schedule.checkpoint_every == 0
            # A stop saves at a step of its own, whose record an undisturbed run does not have.
            shown = loop.record(number) if due or loop.is_due(number) else None
            progress.update(1, shown)
            if due or stopped_by:
                loop.save(number)
            if all(lane.error for lane in lanes):
                break
            if stopped_by and not last:
                raise InterruptedRunError(
                    f"{stopped_by}: saved step {number} of {schedule.total_steps} of {names}."
                    " Run the same command again to go on."
                )
    return loop.results()


@contextlib.contextmanager
def _closing(runs: Sequence[Run]) -> Generator[None]:
    """Closes the streams of runs at the end, however it comes."""
    with contextlib.ExitStack() as stack:
        for run in runs:
            for stream in run.streams:
                stack.callback(stream.close)
        yield


def _progress(total: int, done: int, names: str) -> Progress:
    """The progress of runs, which the first process alone shows."""
    hidden = None if is_first() else io.StringIO()
    return Progress(total, initial=done, description=names, stream=hidden)


class _StopRequests:
    """When to stop: in a run of several processes all stop at one step, whoever was asked to.

    What each was asked is sent in every step, and read when some more have been started: nothing
    waits for it.
    """

    def __init__(self, interrupt: Interrupt):
        self._interrupt = interrupt
        self._sent: collections.deque[jax.Array] = collections.deque()

    def read(self) -> str | None:
        """The name of the signal that was asked to stop by, if all are to stop now."""
        if not several():
            return self._interrupt.requested
        names = [None, *(signal.name for signal in SIGNALS)]
        self._sent.append(parallel.largest(names.index(self._interrupt.requested)))
        if len(self._sent) <= parallel.MOST_STEPS_AHEAD:
            return None
        return names[parallel.value_of(self._sent.popleft())]


def _where(done: int, schedule: Schedule) -> str:
    """Where runs go on that have `done` steps behind them, in words."""
    total, per_epoch = schedule.total_steps, schedule.epoch_steps
    if done >= total:
        return f"all {total} steps are done already."
    epoch = f" (epoch {done / per_epoch:.4g} of {total / per_epoch:.4g})" if per_epoch else ""
    return f"going on from step {done} of {total}{epoch}."


def _go_to_one_step(lanes: Sequence[_Lane]) -> int:
    """Takes every run back to the newest step that all of them have; 0 is their beginning."""
    while len(steps := {lane.done for lane in lanes if not lane.error}) > 1:
        for lane in lanes:
            if not lane.error and lane.done > min(steps):
                lane.go_back(min(steps))
    return min(steps, default=0)


class _Lane:
    """One run: where it goes on, its files, and the error that stopped it."""

    def __init__(self, run: Run, replicas: int):
        self.run = run
        self._devices = replicas, jax.process_count()  # in all, of so many processes
        self.folder = run.workdir / CHECKPOINT_FOLDER
        self.error: RuntimeError | None = None
        # Of the first process, opened before the first step, if one is left.
        self.writer: MetricWriter
        self._first_positions = [stream.get_state() for stream in run.streams]
        with contextlib.suppress(OSError):  # a save would say so
            delete_unfinished(self.folder)
        self._restore()

    def _restore(self) -> None:
        self.state, self.done = self.run.state, 0
        self.seconds = self.spent = 0.0  # before this start, and up to the newest checkpoint
        self.metrics: list[tuple[int, dict[str, float]]] = []  # of the steps still needed
        self.recorded = 0  # step of the last record
        self.devices: tuple[int, int] | None = None  # that made the checkpoint
        template = jax.tree.map(np.asarray, self.run.state)
        try:
            found = restore_latest(self.folder, template, identity=self.run.identity)
        except CheckpointError as error:
            self.error = error
            return
        positions = found.extra["streams"] if found else self._first_positions
        for stream, position in zip(self.run.streams, positions, strict=True):
            stream.set_state(position)
        if found is not None:
            self.state, self.done = found.state, found.step
            self.seconds = found.extra["seconds"]
            self.recorded = found.extra.get("recorded", self.done)
            self.devices = tuple(found.extra.get("devices", ())) or None
            self.metrics = [(step, values) for step, values in found.extra.get("metrics", ())]

    @on_first
    def open_writer(self, writers: contextlib.ExitStack, done: int) -> None:
        self.writer = writers.enter_context(MetricWriter(self.run.workdir, done))

    @on_first
    def _write(self, number: int, values: Mapping[str, float]) -> None:
        self.writer.write(number, values)

    def moved(self) -> str:
        """That a run goes on elsewhere than where it was, in words; "" where it does not."""
        there, now = self.devices, self._devices
        if there is None or there == now:
            return ""
        where = f" It ran on {_told(*there)} and goes on on {_told(*now)}, with the same batches"
        if there[0] == now[0]:
            return f"{where}."
        return f"{where}: what each device samples is drawn anew, and sums round otherwise."

    def go_back(self, step: int) -> None:
        logging.warning(
            "%s goes back from step %d to %d, or before, where a run beside it has to go on.",
            self.run.workdir, self.done, step,
        )  # fmt: skip
        delete_after(self.folder, step)
        self._restore()

    def look_back(self) -> None:
        """Shows `check` what it has seen before this start."""
        for at, metrics in self.metrics:
            self.run.check(at, metrics)

    def take(self, fetched: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Checks every step's metrics, and keeps them."""
        for at, metrics in fetched:
            self._check_finite(at, metrics)
            self.run.check(at, metrics)
            self.metrics.append((at, {name: float(value) for name, value in metrics.items()}))

    def record(self, number: int, state: Any) -> Mapping:
        """Writes the means since the last record."""
        since = [metrics for at, metrics in self.metrics if at > self.recorded]
        means = {name: float(np.mean([metrics[name] for metrics in since])) for name in since[0]}
        self._write(number, means | dict(self.run.describe(state)))
        self.recorded = number
        self.metrics = [kept for kept in self.metrics if kept[0] > number - self.run.looks_back]
        return {name: means[name] for name in ("loss", "accuracy", "cost") if name in means}

    def _check_finite(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            kept = latest_step(self.folder)
            where = f"the checkpoint of step {kept} in {self.folder} is good" if kept else (
                "no checkpoint was saved before it"
            )  # fmt: skip
            raise DivergedError(
                f"{', '.join(bad)} became NaN or infinite at step {step}; {where}. Try a lower"
                " learning rate, gradient clipping, or formats with more bits, in a new --workdir."
            )

    def save(self, number: int) -> None:
        extra = {
            "streams": [stream.get_state() for stream in self.run.streams],
            "seconds": self.spent,
            "recorded": self.recorded,
            "metrics": self.metrics,
            "devices": list(self._devices),
        }
        self._save(number, extra)

    @on_first
    def _save(self, number: int, extra: Mapping[str, Any]) -> None:
        check_lock(self.run.workdir)
        self.writer.flush()
        save_checkpoint(self.folder, number, self.state, extra, identity=self.run.identity)


def _told(devices: int, processes: int) -> str:
    """A run's devices in words."""
    of = f" of {processes} processes" if processes > 1 else ""
    return f"{devices} device{'s' if devices > 1 else ''}{of}"


class _Loop:
    """The runs on the devices, and the metrics that are still there."""

    def __init__(self, placement, step, schedule: Schedule, lanes: Sequence[_Lane]):
        self._placement, self._step = placement, step
        self._schedule, self._lanes = schedule, lanes
        self._state = self._put([lane.state for lane in lanes])
        self._inputs = self._put([lane.run.inputs for lane in lanes])
        self._started = time.monotonic()
        self._pending: list[Any] = []  # metrics of the newest steps
        self._each(lambda index, lane: lane.look_back())

    def is_due(self, number: int) -> bool:
        return number % self._schedule.log_every == 0

    def advance(self) -> None:
        streams = zip(*(lane.run.streams for lane in self._lanes), strict=True)
        batches = [self._placement.shard([next(s) for s in of_runs]) for of_runs in streams]
        self._state, metrics = self._step(self._state, self._inputs, *batches)
        self._pending.append(metrics)
        if len(self._pending) > parallel.MOST_STEPS_AHEAD:
            jax.block_until_ready(self._pending[-parallel.MOST_STEPS_AHEAD])

    def _each(self, act: Callable[[int, _Lane], None]) -> None:
        """Does something for every run that goes on; what fails stops that run alone."""
        for index, lane in enumerate(self._lanes):
            if lane.error:
                continue
            try:
                act(index, lane)
            except RuntimeError as error:  # its numbers or its folder, not the disk
                if isinstance(error, (CheckpointError, MetricsError)):
                    raise
                lane.error = error

    def turn(self, number: int) -> None:
        """Lets every run that has something to do before the step `number` do it."""
        if not any(number in lane.run.turns for lane in self._lanes):
            return
        states = [self._fetch(self._state, index) for index in range(len(self._lanes))]

        def act(index: int, lane: _Lane) -> None:
            if number in lane.run.turns:
                states[index] = lane.run.turns[number](states[index])

        self._each(act)
        self._state = self._put(states)

    def _put(self, trees: Sequence[Any]) -> Any:
        """Onto the devices: the first process's trees, though all have made the same ones.

        Hosts of other kinds may round otherwise, and replicas must not differ in a bit.
        """
        if several():
            trees = on_first(lambda: jax.tree.map(np.asarray, list(trees)))()
        return self._placement.put(trees)

    def _fetch(self, tree: Any, index: int) -> Any:
        return parallel.unreplicate(self._placement.view(tree, index))

    def _take(self, number: int) -> None:
        """Gives every run its metrics of the steps up to `number`."""
        pending, self._pending = self._pending, []
        first = number - len(pending) + 1

        def act(index: int, lane: _Lane) -> None:
            lane.take([(at, self._fetch(m, index)) for at, m in enumerate(pending, first)])

        self._each(act)

    def record(self, number: int) -> Mapping[str, float]:
        """Writes the metrics of all runs since the last record; returns the first run's."""
        self._take(number)
        shown: list[Mapping[str, float]] = []

        def act(index: int, lane: _Lane) -> None:
            shown.append(lane.record(number, self._placement.view(self._state, index)))

        self._each(act)
        return shown[0] if shown else {}

    def save(self, number: int) -> None:
        """Saves all runs, whose metrics up to there have been good."""
        self._take(number)

        def act(index: int, lane: _Lane) -> None:
            lane.state = self._fetch(self._state, index)
            lane.spent = lane.seconds + time.monotonic() - self._started
            lane.save(number)

        self._each(act)

    def results(self) -> list[LoopResult | RuntimeError]:
        return [lane.error or LoopResult(lane.state, lane.spent) for lane in self._lanes]
