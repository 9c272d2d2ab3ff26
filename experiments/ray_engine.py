"""Runs the points of a sweep as tasks of a Ray cluster, which places, retries and waits for them.

A task is a point that runs alone, or with `sweep.side_by_side` points that share a program. It
starts after the tasks whose policy or weights its points take. All that a task makes goes into the
sweep's folder, which every node sees: a task that has lost its node goes on elsewhere from its last
checkpoint, and a sweep whose command has ended goes on by the same command.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import logging as absl_logging

from aqt_search.training.bucket_lock import LOST_SECONDS
from aqt_search.training.interrupt import Interrupt
from aqt_search.training.loop import InterruptedRunError
from aqt_search.training.metrics import MetricsError, read_metrics
from aqt_search.training.storage import as_path, in_bucket
from aqt_search.training.workdir import (
    BusyWorkdirError,
    WorkdirError,
    check_lock,
    lock_holder,
)
from experiments import from_config, sweep
from experiments.allocator import keep_freed_memory
from experiments.command_line import FailedJobError
from experiments.compiled_programs import keep_compiled
from experiments.finished_run import result_of
from experiments.job import COMMAND_VARIABLE, command, locked
from experiments.jobs import search, train

# A task has these variables of the driver; which devices it has is Ray's to say.
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "NCCL_", "TFDS_", "MALLOC_", "RAY_ACCEL_")
_CHECKOUT = Path(__file__).absolute().parent.parent
# On a network file system the lock of a node that is gone may stay for as long as a lease.
_LOCK_SECONDS = 180
_CONNECT_SECONDS = 10
_SAVE_SECONDS = 60  # that tasks have for their last checkpoint when the sweep is stopped
_POLL_SECONDS = 1.0
_STATUS_SECONDS = 30.0
_MOST_SHOWN = 8  # running points in one line
_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
Results = list[tuple[sweep.Point, dict[str, Any]]]


class LostTaskError(FailedJobError):
    """Ray lost a task, and its retries, with the processes or nodes they ran on."""


# --- The cluster ----------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(config: ml_collections.ConfigDict) -> Iterator[None]:
    """Connects this process to the cluster of `config.sweep`, unless it is connected already.

    Raises:
      ConfigError: Ray is not installed, or there is no cluster at that address.
    """
    try:
        import ray
    except ImportError as error:
        raise from_config.ConfigError(
            "config.sweep.engine is 'ray', but the package ray cannot be imported"
            f" ({error}): pip install 'aqt-search[ray]', or leave the engine 'local'."
        ) from error
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or config.sweep.ray_address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray of its own reports to no one
    try:
        _check_reachable(address)
        # The tasks' progress stays in their logs: the driver tells that of all points.
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        raise from_config.ConfigError(
            f"config.sweep.ray_address (RAY_ADDRESS counts first) is {address!r}, but no Ray"
            f" cluster can be joined there ({error}). Start one by `ray start --head`, and on"
            " further nodes `ray start --address=HOST:6379`; or give 'local', for a Ray of its own"
            " on this machine."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises OSError where no one listens at HOST:PORT, for which Ray would wait for minutes."""
    host, colon, port = address.rpartition("://")[-1].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


def _warn_unless_there(resources: Mapping[str, float]) -> None:
    """Says that no node has what a task asks for: Ray waits until one has, perhaps for ever."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(n.get(name, 0) >= wanted for name, wanted in resources.items()) for n in nodes):
        absl_logging.warning(
            "No node of the Ray cluster has all of config.sweep.resources, %s: the points wait for"
            " one that has (nodes: %s).", resources, nodes,
        )  # fmt: skip


# --- In a task ------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where the sweep is, for every task."""

    current: str  # folder of the driver's process, which relative paths start from
    workdir: Path
    holder: str  # the driver, as the lock of the workdir tells it


def _enter(place: _Place) -> None:
    """Makes this process one that works for the sweep.

    Raises:
      WorkdirError: the sweep's folder is not seen here, or is another sweep's by now.
    """
    try:
        os.chdir(place.current)
    except OSError as error:
        raise _unseen(Path(place.current)) from error
    if not lock_holder(place.workdir):
        raise _unseen(place.workdir)
    check_lock(place.workdir, place.holder)
    keep_freed_memory()
    keep_compiled(place.workdir / sweep.COMPILED_FOLDER, shared=True)


def _unseen(folder: Path) -> WorkdirError:
    return WorkdirError(
        f"the node {platform.node()} does not see the folder"
        f" {folder if in_bucket(folder) else folder.absolute()}. Start the sweep in a folder,"
        " and give it a --workdir, that lie at the same path of every node, on a shared disk."
    )


@contextlib.contextmanager
def _words() -> Iterator[io.StringIO]:
    """What is logged as a warning or an error meanwhile, for the driver to show."""
    words, logger = io.StringIO(), absl_logging.get_absl_logger()
    handler = logging.StreamHandler(words)
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield words
    finally:
        logger.removeHandler(handler)


def _most_seconds(folders: Sequence[Path]) -> float:
    """How long the lock of a lost node may stay."""
    return max((LOST_SECONDS if in_bucket(f) else 0 for f in folders), default=0) + _LOCK_SECONDS


def _wait_for_locks(folders: Sequence[Path]) -> None:
    """Waits until no other process holds a folder, as one that Ray takes for lost may for a while.

    Raises:
      BusyWorkdirError: one still does.
    """
    most = _most_seconds(folders)
    until = time.monotonic() + most
    while True:
        try:
            with locked(folders):
                return
        except BusyWorkdirError as error:
            if time.monotonic() > until:
                raise BusyWorkdirError(
                    f"{error} {most:g} s were waited for it. Where no such process runs on"
                    " any node, the file server still keeps the lock of a node that is gone: run"
                    " the same command again later."
                ) from error
        time.sleep(_POLL_SECONDS)


def _run_points(
    place: _Place, points: Sequence[sweep.Point], side_by_side: bool, *after: Any
) -> tuple[Results, str]:
    """The task of points that run together: their results, and words for the terminal.

    Args:
      place: where the sweep is.
      points: of one program, or one point.
      side_by_side: as in `sweep.run_points`.
      after: what other tasks have returned, which Ray has waited for.
    """
    with _words() as words:
        _enter(place)
        folder = place.workdir / "points"
        waiting = [folder / p.name for p in points if result_of(folder / p.name) is None]
        _wait_for_locks(waiting)
        images_of = sweep.image_loader()
        found = sweep.run_points(points, folder, images_of, side_by_side, holder=place.holder)
        return list(found), words.getvalue()


def _measure_sensitivity(
    place: _Place, config: ml_collections.ConfigDict, points: Sequence[sweep.Point]
) -> tuple[Results, str]:
    with _words() as words:
        _enter(place)
        sweep.measure_sensitivity(config, points, place.workdir, sweep.image_loader())
        return [], words.getvalue()


# --- On the driver --------------------------------------------------------------------------------


def _place(workdir: Path) -> _Place:
    return _Place(os.getcwd(), workdir, lock_holder(workdir))


def _remote(function: Callable, options: ml_collections.ConfigDict) -> Any:
    """The function as a task with the resources, retries and environment of `config.sweep`."""
    import ray

    own = {k: v for k, v in os.environ.items() if k.startswith(_VARIABLES)}
    own |= {COMMAND_VARIABLE: command(), "PYTHONPATH": f"{_CHECKOUT}:${{PYTHONPATH}}"}
    resources = dict(options.resources)
    named = {_OPTIONS[name]: resources.pop(name) for name in _OPTIONS if name in resources}
    return ray.remote(
        resources=resources,
        max_calls=1,  # a process of its own, which leaves no memory of a device behind
        max_retries=options.ray_retries,
        # A signal that stops a worker makes it save. It is no error of the point.
        retry_exceptions=[InterruptedRunError],
        runtime_env={"env_vars": own},
        **({"num_cpus": 0} | named),
    )(function)


def run_points(
    points: Sequence[sweep.Point],
    workdir: Path,
    options: ml_collections.ConfigDict,
    images: from_config.Images,
) -> Iterator[tuple[sweep.Point, dict[str, Any]]]:
    """`sweep.run_points` on the cluster: yields each point when its task has ended.

    Args:
      points: of the sweep.
      workdir: the sweep's, locked by this process and seen by all nodes.
      options: `config.sweep`.
      images: of the first point, which tell how many steps runs have.

    Raises:
      InterruptedRunError: SIGTERM or Ctrl-C; running points are saved.
      WorkdirError: a node does not see the folder, or it was deleted or replaced.
    """
    import ray

    points = [sweep.Point(*point) for point in points]  # not __main__'s, which tasks do not have
    folder = workdir / "points"
    kept = {p.name: result for p in points if (result := result_of(folder / p.name)) is not None}
    yield from ((point, kept[point.name]) for point in points if point.name in kept)
    waiting = [point for point in points if point.name not in kept]
    view = _View(waiting, folder, images, len(kept))
    task, place = _remote(_run_points, options), _place(workdir)
    tasks: dict[Any, list[sweep.Point]] = {}
    if waiting:
        _warn_unless_there(dict(options.resources))
    try:
        with Interrupt() as interrupt:
            for group in sweep.groups(waiting, options.side_by_side):
                taken = {name for point in group for name in _taken(point, folder)}
                after = [ref for ref, others in tasks.items() if taken & {p.name for p in others}]
                tasks[task.remote(place, group, options.side_by_side, *after)] = group
            while tasks:
                ended, _ = ray.wait(list(tasks), timeout=_POLL_SECONDS)
                for ref in ended:
                    yield from _ends(ref, tasks.pop(ref), folder)
                check_lock(workdir)
                view.show(tasks)
                if interrupt.requested and tasks:
                    raise InterruptedRunError(
                        f"{interrupt.requested}: the points that ran have saved. Run the same"
                        " command again to go on."
                    )
    finally:
        _stop(tasks)


def _taken(point: sweep.Point, folder: Path) -> set[str]:
    """Names of the points of the sweep whose policy or weights a point takes."""
    runs = [as_path(point.config.policy).parent] if point.config.policy else []
    runs += [as_path(point.config.checkpoint)] if point.config.checkpoint else []
    return {run.name for run in runs if _place_of(run.parent) == _place_of(folder)}


def _place_of(folder: Path) -> str:
    """A folder's name, the same for all paths to it."""
    return str(folder if in_bucket(folder) else folder.resolve())


def _ends(
    ref: Any, points: Sequence[sweep.Point], folder: Path
) -> Iterator[tuple[sweep.Point, dict[str, Any]]]:
    """The results of a task that has ended; of one that Ray gave up, its points' failures."""
    try:
        yield from _returned(ref)
    except LostTaskError as error:
        for point in points:
            result = result_of(folder / point.name)
            if result is None:
                if not in_bucket(folder):
                    (folder / point.name).mkdir(parents=True, exist_ok=True)
                result = sweep.failure(point, folder / point.name, error)
            yield point, result


def _returned(ref: Any) -> Results:
    """What a task has returned, or raises what it has raised, or LostTaskError."""
    import ray

    try:
        results, words = ray.get(ref)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)  # of what the task itself has raised
        if isinstance(cause, Exception) and not isinstance(cause, ray.exceptions.RayError):
            raise cause from None
        reason = " ".join(str(cause or error).split())[:500]
        raise LostTaskError(
            f"Ray gave up its task, or that of a point it follows, with all its retries: {reason}"
        ) from None
    print(words, end="", file=sys.stderr, flush=True)
    return results


def _stop(tasks: Mapping[Any, Sequence[sweep.Point]]) -> None:
    """Ends tasks: those that run save first, if they do so in time."""
    import ray

    if not tasks:
        return
    names = [point.name for points in tasks.values() for point in points]
    print(f"ray: stopping {_listed(names)} ...", file=sys.stderr, flush=True)
    for ref in tasks:
        ray.cancel(ref)
    _, running = ray.wait(list(tasks), num_returns=len(tasks), timeout=_SAVE_SECONDS)
    for ref in running:
        ray.cancel(ref, force=True)


def measure_sensitivity(
    config: ml_collections.ConfigDict, points: Sequence[sweep.Point], workdir: Path, *_: Any
) -> None:
    """`sweep.measure_sensitivity` as a task, as the driver leaves the devices to tasks."""
    if config.sweep.sensitivity:
        points = [sweep.Point(*point) for point in points]
        task = _remote(_measure_sensitivity, config.sweep)
        _returned(task.remote(_place(workdir), config, points))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_SHOWN
    return ", ".join([*names[:_MOST_SHOWN], *([f"{more} more"] if more > 0 else [])])


class _View:
    """One line for all points, now and then, from what they write."""

    def __init__(
        self,
        points: Sequence[sweep.Point],
        folder: Path,
        images: from_config.Images,
        done: int,
    ):
        self._folder, self._done, self._all = folder, done, len(points)
        self._before = {point.name: lock_holder(folder / point.name) for point in points}
        self._data = points[0].config.data if points else None
        self._images = images
        self._last = time.monotonic()

    def show(self, tasks: Mapping[Any, Sequence[sweep.Point]]) -> None:
        """Prints the line if it is time to, and a task is left."""
        if tasks and time.monotonic() - self._last >= _STATUS_SECONDS:
            self._last = time.monotonic()
            print(self.line(tasks), file=sys.stderr, flush=True)

    def line(self, tasks: Mapping[Any, Sequence[sweep.Point]]) -> str:
        """How many points run, with the steps they have done, how many wait, and have ended."""
        left = [point for points in tasks.values() for point in points]
        left = [point for point in left if result_of(self._folder / point.name) is None]
        running = [p for p in left if lock_holder(self._folder / p.name) != self._before[p.name]]
        told = f" ({_listed(list(map(self._told, running)))})" if running else ""
        done = self._done + self._all - len(left)
        return f"ray: {len(running)} running{told}, {len(left) - len(running)} waiting, {done} done"

    def _told(self, point: sweep.Point) -> str:
        """A running point's name, and its steps where it has recorded any."""
        try:
            records = read_metrics(self._folder / point.name)
        except (MetricsError, OSError):
            records = []
        if not records:
            return point.name
        trains = point.prepare in (train.prepare, search.prepare)
        if not trains or point.config.data != self._data:
            return f"{point.name} {records[-1]['step']}"
        total = from_config.total_steps(point.config, self._images)
        return f"{point.name} {records[-1]['step']}/{total}"
