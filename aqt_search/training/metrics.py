"""Metrics of a run as JSON lines and TensorBoard events, and its progress on the terminal."""

import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

# pyrefly: ignore[missing-module-attribute]  # made by protobuf when it is imported
from tensorboardX.proto.event_pb2 import Event

# pyrefly: ignore[missing-module-attribute]
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from aqt_search.training.metric_files import METRICS_FILE, metrics_content, open_metric_files
from aqt_search.training.processes import on_first
from aqt_search.training.storage import as_path

_RESERVED = ("step", "nonfinite")


class MetricsError(RuntimeError):
    """Metrics cannot be read or written; the message says why and what to do."""


def _record(step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """One line of `metrics.jsonl`: non-finite numbers are null, and named under "nonfinite"."""
    nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
    record = {"step": step} | {n: None if n in nonfinite else v for n, v in values.items()}
    return record | ({"nonfinite": nonfinite} if nonfinite else {})


def _parse(line: bytes) -> dict[str, Any]:
    """The inverse of `_record`; ValueError for a line that is no record."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError('not an object with a whole number "step"')
    nonfinite = record.pop("nonfinite", {})
    return record | {name: float(text) for name, text in nonfinite.items()}


def _read_lines(workdir: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Whole lines with their records; a last line without its newline is left out."""
    path = workdir / METRICS_FILE
    lines = metrics_content(workdir).split(b"\n")[:-1]
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append((line, _parse(line)))
        except ValueError as error:
            raise MetricsError(
                f"line {number} of {path} is no metrics record: {error}. The file was damaged or "
                "edited by hand; remove that line."
            ) from error
    return parsed


@on_first
def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a run in the order of writing: {"step": int, name: float, ...}.

    Empty if there are none yet. NaN and infinities come back as floats; a half-written last line,
    as a run that was killed leaves it, is left out.

    Raises:
        MetricsError: another line is no record.
    """
    return [record for _, record in _read_lines(as_path(workdir))]


class MetricWriter:
    """Writes `metrics.jsonl` and TensorBoard event files under one folder.

    A line of `metrics.jsonl` is one strict JSON object with sorted keys, `step` and the metrics.
    NaN and infinities are null there and named: {"loss": null, "nonfinite": {"loss": "nan"}}.
    TensorBoard files are in `tensorboard/`, one for each start of the run.

    A run resumed at step s drops the records of later steps and a half-written last line, so that
    each step is there once: write a step's metrics, then `flush`, then save its checkpoint. In
    `metrics.jsonl` a record outlives the death of the process as soon as `write` returns, and a
    power cut after `flush`; in TensorBoard both after `flush`. In a bucket records are written by
    `flush` alone, each time as objects of their own (`metrics/`, `tensorboard/`), and `close` joins
    those of the lines to `metrics.jsonl`.

    Args:
        workdir: folder of the run; made if needed.
        resume_step: step of the checkpoint the run goes on from; 0 for a run from the start,
            which drops all earlier records.

    Raises:
        MetricsError: a damaged `metrics.jsonl`, or a file that cannot be written.
        WorkdirError: the file cannot be rewritten without the dropped records, or a bucket cannot
            be reached, then and in `flush` and `close`.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0) -> None:
        if resume_step < 0:
            raise ValueError(f"resume_step is {resume_step!r}; expected at least 0")
        self._workdir, self._closed = as_path(workdir), False
        self._last_step = resume_step
        try:
            kept = [
                line.decode("utf-8") + "\n"
                for line, record in _read_lines(self._workdir)
                if 0 < resume_step >= record["step"]
            ]
            self._files = open_metric_files(self._workdir, "".join(kept), resume_step)
        except OSError as error:
            raise self._error(error) from error

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one record.

        Args:
            step: not below the step of the record before.
            metrics: name -> number, or array of size one; converted to float.

        Raises:
            ValueError: step goes back, or a metric is called "step" or "nonfinite".
            TypeError: a metric is not a number.
            MetricsError: the files cannot be written.
        """
        step = int(step)
        if step < self._last_step:
            raise ValueError(f"metrics of step {step} after those of step {self._last_step}")
        values = {name: _to_float(name, value) for name, value in metrics.items()}
        self._last_step = step
        line = json.dumps(_record(step, values), sort_keys=True, allow_nan=False)
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=scalars))
        try:
            self._files.append(line + "\n", event)
        except OSError as error:
            raise self._error(error) from error

    def flush(self) -> None:
        """Make all records so far outlive a power cut. Raises MetricsError."""
        try:
            self._files.flush()
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Flush and close the files; a second call does nothing. Raises MetricsError."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self._files.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _error(self, error: OSError) -> MetricsError:
        return MetricsError(
            f"could not write the metrics in {self._workdir}: {error.strerror or error}. Free "
            "space or make the folder writable, then run the same command again."
        )


def _to_float(name: str, value: Any) -> float:
    """A number or an array of size one as a Python float."""
    if name in _RESERVED:
        raise ValueError(f"a metric cannot be called {name!r}; give it another name")
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"metric {name!r} is {value!r:.80}; expected a number or an array of size one"
        ) from error


class Progress:
    """Progress of a run: rate, time left and a few metrics.

    On a terminal a bar; elsewhere a plain line at the first update after each
    `interval_seconds`, and one at the end, so that logs stay readable. Before the first update it
    says that the step compiles; rate and time left are those of the steps after it.

    Args:
        total: steps in the run.
        initial: steps done by earlier starts of the run.
        description: short text before the numbers.
        interval_seconds: shortest time between two plain lines.
        stream: where to write; standard error by default.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        description: str = "",
        interval_seconds: float = 30.0,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = interval_seconds
        self._last_line = time.monotonic()
        self._printed = initial
        self._total, self._description = total, description
        self._bar: tqdm | None = None  # made after the first step, so that its time does not count
        self._say(f"{description}: compiling ..." if description else "compiling ...")

    def _make_bar(self, done: int) -> tqdm:
        # tqdm reads the description as part of a format, where braces are doubled.
        escaped = self._description.replace("{", "{{").replace("}", "}}")
        prefix = escaped + ": " if escaped else ""
        plain = prefix + "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        # Elsewhere than on a terminal tqdm keeps the time and formats; the lines are printed here.
        return tqdm(
            total=self._total,
            initial=done,
            desc=self._description if self._terminal else None,
            unit="step",
            file=self._stream if self._terminal else io.StringIO(),
            mininterval=0.1 if self._terminal else math.inf,
            dynamic_ncols=self._terminal,
            bar_format=None if self._terminal else plain,
        )

    def update(self, steps: int = 1, metrics: Mapping[str, float] | None = None) -> None:
        """Count steps; with `metrics`, show them from now on."""
        first = self._bar is None
        if self._bar is None:
            self._bar = self._make_bar(self._printed + steps)
        if metrics is not None:
            postfix = {name: f"{float(value):.4g}" for name, value in metrics.items()}
            self._bar.set_postfix(postfix, refresh=first)
        if not first:
            self._bar.update(steps)
        if not self._terminal and time.monotonic() - self._last_line >= self._interval:
            self._print_line()

    def close(self) -> None:
        """Finish the bar, or print the last line."""
        if self._bar is None:
            return
        if not self._terminal and self._bar.n > self._printed:
            self._print_line()
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print_line(self) -> None:
        assert self._bar is not None
        self._say(str(self._bar))
        self._printed = self._bar.n
        self._last_line = time.monotonic()

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
