import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from aqt_search.training.metrics import MetricsError, MetricWriter, Progress, read_metrics


def read_events(folder):
    """TensorBoard's record format: length, its CRC, data, its CRC (little endian)."""
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            body = data[12 : 12 + size]
            assert masked_crc32c(body) == int.from_bytes(data[12 + size : 16 + size], "little")
            yield Event.FromString(body)
            data = data[16 + size :]


def test_values_come_back_as_they_went_in(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.1, "accuracy": jnp.float32(0.1), "lr": np.ones((1, 1))})
        writer.write(2, {"loss": float("nan"), "a": math.inf, "b": -math.inf, "c": 3})
        writer.write(2, {"eval/loss": True})
    first, second, third = read_metrics(tmp_path)
    assert first == {"step": 1, "loss": 0.1, "accuracy": float(np.float32(0.1)), "lr": 1.0}
    assert math.isnan(second.pop("loss"))
    assert second == {"step": 2, "a": math.inf, "b": -math.inf, "c": 3.0}
    assert third == {"step": 2, "eval/loss": 1.0}


def test_lines_are_strict_json_with_sorted_keys(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(7, {"z": float("nan"), "a": 1.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert list(record.items()) == [
        ("a", 1.5),
        ("nonfinite", {"z": "nan"}),
        ("step", 7),
        ("z", None),
    ]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": 0.25, "accuracy": 0.5})
    with MetricWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"loss": 0.125})
    events = list(read_events(tmp_path / "tensorboard"))
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(3, "loss", 0.25), (3, "accuracy", 0.5), (4, "loss", 0.125)]
    # a START event tells TensorBoard to hide what older files hold from that step on
    starts = [e.step for e in events if e.WhichOneof("what") == "session_log"]
    assert starts == [0, 4]
    assert sum(e.file_version == "brain.Event:2" for e in events) == 2


@pytest.mark.parametrize(
    "resume_step, kept", [(0, []), (1, [0, 1]), (2, [0, 1, 2, 2]), (9, [0, 1, 2, 2, 3])]
)
def test_resuming_drops_later_records_and_a_torn_line(tmp_path, resume_step, kept):
    with MetricWriter(tmp_path) as writer:
        for step in (0, 1, 2, 2, 3):
            writer.write(step, {"loss": 1.0 / (step + 1)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"loss": 0.3, "st')
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 2, 3]
    with MetricWriter(tmp_path, resume_step=resume_step) as writer:
        assert [r["step"] for r in read_metrics(tmp_path)] == kept
        writer.write(resume_step + 1, {"loss": 0.5})
    assert [r["step"] for r in read_metrics(tmp_path)] == [*kept, resume_step + 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_record_outlives_sigkill(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from aqt_search.training.metrics import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1])\n"
        "for step in range(1, 6): writer.write(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_full_disk_is_an_error(tmp_path):
    code = (
        "import resource, sys\n"
        "from aqt_search.training.metrics import MetricsError, MetricWriter\n"
        "writer = MetricWriter(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try:\n"
        "    for step in range(1000): writer.write(step, {'loss': 1.0})\n"
        "except MetricsError as error:\n"
        "    assert sys.argv[1] in str(error) and 'Free space' in str(error), error\n"
        "    print('MetricsError')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.stdout == "MetricsError\n", result.stderr
    assert len(read_metrics(tmp_path)) > 10


@pytest.mark.parametrize(
    "step, metrics, kind, words",
    [
        (3, {"loss": 1.0}, ValueError, ["step 3", "step 5"]),
        (6, {"step": 1.0}, ValueError, ["'step'"]),
        (6, {"nonfinite": 1.0}, ValueError, ["'nonfinite'"]),
        (6, {"loss": np.ones(2)}, TypeError, ["'loss'", "size one"]),
        (6, {"loss": "high"}, TypeError, ["'loss'", "high"]),
        (6, {"loss": None}, TypeError, ["'loss'", "None"]),
    ],
)
def test_bad_metrics_are_named_and_not_written(tmp_path, step, metrics, kind, words):
    with MetricWriter(tmp_path) as writer:
        writer.write(5, {"loss": 1.0})
        with pytest.raises(kind) as error:
            writer.write(step, metrics)
        assert all(word in str(error.value) for word in words), str(error.value)
    assert read_metrics(tmp_path) == [{"step": 5, "loss": 1.0}]


@pytest.mark.parametrize("line", ["garbage", "3", '{"loss": 1.0}', '{"step": "1"}', "\0\0\0"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(MetricsError, match=r"line 2 of .*metrics\.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(MetricsError, match=r"line 2 of .*metrics\.jsonl"):
        MetricWriter(tmp_path, resume_step=1)


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []
    with pytest.raises(ValueError, match="-1"):
        MetricWriter(tmp_path, resume_step=-1)


def test_progress_prints_few_plain_lines_elsewhere_than_on_a_terminal():
    stream = io.StringIO()
    with Progress(100, description="{search}", interval_seconds=3600, stream=stream) as progress:
        for step in range(50):
            progress.update(metrics={"loss": step / 7} if step % 10 == 0 else None)
    first, line = stream.getvalue().splitlines()
    assert first == "{search}: compiling ..."
    assert line.startswith("{search}: 50/100 [")
    assert "loss=5.714" in line
    assert "step" in line
    assert "\r" not in stream.getvalue()


def test_progress_prints_a_line_each_interval():
    stream = io.StringIO()
    progress = Progress(10, initial=4, interval_seconds=0.05, stream=stream)
    progress.update()
    assert stream.getvalue() == "compiling ...\n"
    time.sleep(0.06)
    progress.update()
    progress.update()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" ")[0] for line in lines] == ["compiling", "6/10", "7/10"]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_time_left_is_that_of_steps_that_do_not_compile(terminal):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    stream = Stream()
    with Progress(1000, initial=100, stream=stream, interval_seconds=3600) as progress:
        time.sleep(1.5)  # the first step compiles
        progress.update()
        for _ in range(10):
            time.sleep(0.02)
            progress.update(metrics={"loss": 1.0})
        time.sleep(0.12)
        progress.update()  # shows it on a terminal
    last = stream.getvalue().replace("\r", "\n").splitlines()[-1]
    assert "112/1000 [" in last
    # 888 steps of 0.02 s; 115 s if the first counted among 12. More on a busy machine.
    minutes, seconds = re.search(r"<(\d+):(\d+),", last).groups()
    assert 10 <= 60 * int(minutes) + int(seconds) <= 90


def test_a_run_that_ends_before_its_first_step_has_only_compiled():
    stream = io.StringIO()
    with Progress(10, stream=stream):
        pass
    assert stream.getvalue() == "compiling ...\n"


def test_progress_draws_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(2, description="train", stream=stream) as progress:
        progress.update(2, {"loss": 0.5})
    assert "\r" in stream.getvalue()
    assert "train: 100%" in stream.getvalue()
    assert "2/2" in stream.getvalue()
    assert "loss=0.5" in stream.getvalue()


def test_a_closed_writer_may_be_closed_again(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.close()
    writer.close()
    assert os.listdir(tmp_path / "tensorboard")
