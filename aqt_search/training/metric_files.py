"""The files of a run's metrics: JSON lines and TensorBoard events, on a disk or in a bucket."""

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tensorboardX.event_file_writer import EventsWriter

# pyrefly: ignore[missing-module-attribute]  # made by protobuf when it is imported
from tensorboardX.proto.event_pb2 import Event, SessionLog

from aqt_search.training import storage
from aqt_search.training.bucket_lock import read_lock
from aqt_search.training.workdir import LOCK_FILE, write_text

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_PARTS_FOLDER = "metrics"  # in a bucket, of a run that has not ended


class MetricFiles(Protocol):
    """Where records go; all raise OSError or WorkdirError."""

    def append(self, line: str, event: Event) -> None:
        """Writes one record."""

    def flush(self) -> None:
        """Makes all records so far outlive what happens to this machine."""

    def close(self) -> None:
        """Ends the files, after a flush or a failed one; a second call does nothing."""


def metrics_content(workdir: Path) -> bytes:
    """The lines of all records, the last one perhaps half-written; empty where there are none."""
    path = workdir / METRICS_FILE
    if not storage.in_bucket(workdir):
        return path.read_bytes() if path.exists() else b""
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        content = b""
    # A part is called by where it begins; one that begins elsewhere has been joined already, or
    # is of records that a run which went back has dropped.
    for name in storage.objects(workdir / _PARTS_FOLDER):
        if name == _part_name(len(content)):
            content += storage.read_bytes(workdir / _PARTS_FOLDER / name)
    return content


def _part_name(begin: int) -> str:
    return f"{begin:015d}.jsonl"


def open_metric_files(workdir: Path, kept: str, resume_step: int) -> MetricFiles:
    """The files of a run that begins, or goes on, with the records `kept`."""
    if storage.in_bucket(workdir):
        return _BucketFiles(workdir, kept, resume_step)
    return _DiskFiles(workdir, kept, resume_step)


def _start_event(resume_step: int) -> Event:
    """Tells TensorBoard to hide older events after `resume_step`."""
    start = SessionLog(status=SessionLog.START)
    first = resume_step + 1 if resume_step else 0
    return Event(step=first, wall_time=time.time(), session_log=start)


def _events_writer(folder: str | os.PathLike) -> EventsWriter:
    """A new event file; the suffix keeps two of one second apart: names hold whole seconds."""
    # Events are written by this thread, not by SummaryWriter's, whose death on a full disk is
    # silent.
    prefix = os.path.join(folder, "events")
    return EventsWriter(prefix, filename_suffix=f".{time.time_ns()}")


class _DiskFiles:
    """One file of lines and one of events, which grow."""

    def __init__(self, workdir: Path, kept: str, resume_step: int) -> None:
        folder = workdir / TENSORBOARD_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_text(workdir / METRICS_FILE, kept)
        self._lines = open(workdir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 - close
        self._events = _events_writer(folder)
        self._events.write_event(_start_event(resume_step))

    def append(self, line: str, event: Event) -> None:
        self._lines.write(line)
        self._lines.flush()
        self._events.write_event(event)

    def flush(self) -> None:
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._events.flush()

    def close(self) -> None:
        # a failed flush has been reported; closing would report the same bytes again
        with contextlib.suppress(OSError):
            self._lines.close()
        with contextlib.suppress(OSError):
            self._events.close()


class _BucketFiles:
    """Objects, which cannot grow: a part of the lines, and a file of events, for each flush.

    At the end the parts are joined, so that a run that has ended has one `metrics.jsonl`.
    """

    def __init__(self, workdir: Path, kept: str, resume_step: int) -> None:
        self._workdir, self._written = workdir, len(kept.encode())
        self._holder = self._holder_now()
        self._lines: list[str] = []
        self._events = [_start_event(resume_step)]
        self._join(kept.encode())

    def append(self, line: str, event: Event) -> None:
        self._lines.append(line)
        self._events.append(event)

    def flush(self) -> None:
        if not self._lines or not self._is_held():
            return
        content = "".join(self._lines).encode()
        storage.put(self._workdir / _PARTS_FOLDER / _part_name(self._written), content)
        self._written += len(content)
        self._lines = []
        events, self._events = self._events, []
        _upload_events(self._workdir / TENSORBOARD_FOLDER, events)

    def close(self) -> None:
        # Where a flush failed the next start reads the parts.
        if not self._lines and self._is_held():
            self._join(metrics_content(self._workdir))

    def _holder_now(self) -> str | None:
        return read_lock(self._workdir / LOCK_FILE).get("token")

    def _is_held(self) -> bool:
        """Whether the folder is not another's by now; `check_lock` tells a run that it is."""
        return self._holder_now() == self._holder

    def _join(self, content: bytes) -> None:
        """Writes all lines so far as one object; parts that a kill leaves here do no harm."""
        storage.put(self._workdir / METRICS_FILE, content)
        parts = self._workdir / _PARTS_FOLDER
        storage.delete(parts, storage.objects(parts))


def _upload_events(folder: Path, events: Sequence[Event]) -> None:
    """Writes a file of events of their own."""
    with tempfile.TemporaryDirectory(prefix="aqt_search_") as local:
        writer = _events_writer(local)
        for event in events:
            writer.write_event(event)
        writer.close()
        storage.upload(Path(local), folder, os.listdir(local))
