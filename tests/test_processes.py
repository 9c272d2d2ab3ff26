"""Runs of several processes on loopback: the bits of one process, whatever happens to one of them.

Two processes with one device each against one with two.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A search of 60 steps, 20 an epoch, which saves every 10.
SEARCH = [
    "-m", "experiments.search", "--config=configs/digits_resnet8.py:quick",
    "--config.model.width=0.25", "--config.epochs=3", "--config.log_every=1",
    "--config.checkpoint_every=10", "--config.search.delay=0.3",
]  # fmt: skip
MOST_SECONDS = 300


def free_port():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def start(arguments, devices=1, **environment):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, text=True,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def start_both(arguments, *own):
    """Two processes of one run, with more arguments for each in `own`."""
    where = f"--coordinator=127.0.0.1:{free_port()}"
    more = own or ([], [])
    return [
        start([*arguments, where, "--processes=2", f"--process={number}", *more[number]])
        for number in range(2)
    ]


def ended(started):
    """(status, standard output, standard error) of each."""
    outputs = [process.communicate(timeout=MOST_SECONDS) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs)]


def wait_for_records(workdir, count, started):
    """Waits until a run has written so many records of its metrics."""
    path, until = workdir / "metrics.jsonl", time.monotonic() + MOST_SECONDS
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert all(process.poll() is None for process in started), ended(started)
        assert time.monotonic() < until
        time.sleep(0.02)


def outcome(workdir):
    """All that a search ends with, to the bit: its records, its answer, its weights."""
    (folder,) = (workdir / "checkpoints").glob("step_000000060*")
    leaves = json.loads((folder / "manifest.json").read_text())["content"]["leaves"]
    names = ("metrics.jsonl", "policy.json", "probabilities.jsonl", "weights.json")
    result = json.loads((workdir / "result.json").read_text())
    own = {key: result[key] for key in ("accuracy", "loss", "held_out_accuracy", "gbops")}
    return leaves, own, [(workdir / name).read_text() for name in names]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The outcome of one process with two devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    ((code, _, err),) = ended([start([*SEARCH, f"--workdir={workdir}"], devices=2)])
    assert code == 0, err
    return outcome(workdir)


def test_stops_kills_and_other_numbers_of_processes_change_no_bit(tmp_path, alone):
    command = [*SEARCH, f"--workdir={tmp_path}"]
    # One of two is asked to stop, and both save.
    started = start_both(command)
    wait_for_records(tmp_path, 12, started)
    started[1].send_signal(signal.SIGTERM)
    (code, _, first), (other_code, out, second) = ended(started)
    assert (code, other_code) == (130, 130), first + second
    assert "SIGTERM: saved step" in first
    assert "2 x cpu of 2 processes, batch 64 = 2 x 32, seed 0; aqt-search" in first
    assert "step/s" not in second + out  # the first process shows progress
    # One process goes on, and saves at its 30th step.
    started = [start(command, devices=2)]
    wait_for_records(tmp_path, 31, started)
    started[0].kill()
    ((_, _, err),) = ended(started)
    assert "It ran on 2 devices of 2 processes and goes on on 2 devices" in err
    # One of two is killed, and the other ends.
    started = start_both(command)
    wait_for_records(tmp_path, 42, started)
    started[1].kill()
    killed = time.monotonic()
    (code, _, err), _ = ended(started)
    assert code == 1
    assert time.monotonic() - killed < 60
    assert "It ran on 2 devices and goes on on 2 devices of 2 processes" in err
    assert "another process of this run has ended" in err
    assert "Traceback" not in err
    # Two go on to the end.
    (code, out, first), (other_code, other_out, second) = ended(start_both(command))
    assert (code, other_code) == (0, 0), first + second
    assert "test accuracy" in out
    assert "test accuracy" not in other_out
    assert outcome(tmp_path) == alone


def test_what_all_processes_call_gives_all_of_them_what_one_would_have():
    """Evaluation, statistics, scales and many assignments; results and errors of the first."""
    calls = str(ROOT / "tests" / "collective_calls.py")
    where = f"127.0.0.1:{free_port()}"
    found = ended(
        [start([calls, where, "2", number]) for number in "01"]
        + [start([calls, where, "1", "0"], devices=2)]
    )
    for code, _, err in found:
        assert code == 0, err
    first, second, one = (json.loads(out.splitlines()[-1]) for _, out, _ in found)
    assert (first.pop("processes"), second.pop("processes"), one.pop("processes")) == (2, 2, 1)
    own_errors = [facts.pop("errors") for facts in (first, second, one)]
    assert first == second == one
    # What cannot be sent arrives in words.
    gone, odd = ["FileNotFoundError", "[Errno 2] gone"], ["OddError", "this and that"]
    in_words = ["ProcessError", "OddError: this and that"]
    assert own_errors == [[gone, odd], [gone, in_words], [gone, odd]]


def test_processes_that_disagree_on_the_configuration(tmp_path):
    command = [*SEARCH, f"--workdir={tmp_path}"]
    for code, _, err in ended(start_both(command, [], ["--config.seed=1", "--config.epochs=4"])):
        assert code == 1
        assert "seed: process 0 has 0, process 1 has 1" in err
        assert "epochs: process 0 has 3.0, process 1 has 4.0" in err
        assert "Traceback" not in err
    assert not (tmp_path / "config.json").exists()


def test_a_batch_that_they_cannot_divide(tmp_path):
    command = [*SEARCH, f"--workdir={tmp_path}", "--config.batch_size=63"]
    for code, _, err in ended(start_both(command)):
        assert code == 1
        assert "batch_size 63 cannot be divided over 2 devices" in err
        assert "Traceback" not in err


def test_slurm_tells_them(tmp_path):
    """As srun does: no flag names the others, and the batch is refused by both together."""
    told = {
        # jax takes a port of the last 4,096 by the number of the job.
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip
    command = [*SEARCH, f"--workdir={tmp_path}", "--config.batch_size=63"]
    started = [start(command, **told, SLURM_PROCID=number, SLURM_LOCALID=number) for number in "01"]
    for code, _, err in ended(started):
        assert code == 1
        assert "batch_size 63 cannot be divided over 2 devices" in err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--processes=2"], ["--coordinator is None", "10.0.0.1:8476"]),
        (["--coordinator=host", "--processes=2", "--process=0"], ["'host'", "HOST:PORT"]),
        (
            ["--coordinator=127.0.0.1:1", "--processes=2", "--process=2"],
            ["--process is 2", "from 0 to 1"],
        ),
        (
            ["--coordinator=127.0.0.1:9", "--processes=2", "--process=1", "--wait_seconds=2"],
            ["process 1 of 2 waited 2 s at 127.0.0.1:9", "--wait_seconds"],
        ),
        (
            ["--coordinator=nowhere.invalid:9", "--processes=2", "--process=1"],
            ["'nowhere.invalid' has no address", "process 0's host"],
        ),
        (["--processes=1", "--process=5"], ["--process 5", "expected all three"]),
    ],
)  # fmt: skip
def test_flags_that_find_no_other_process(tmp_path, flags, words):
    ((code, _, err),) = ended([start([*SEARCH, f"--workdir={tmp_path}", *flags])])
    assert code == 1
    assert all(word in err for word in words), err
    assert "Traceback" not in err


def test_a_port_that_is_in_use(tmp_path):
    command = [*SEARCH, f"--workdir={tmp_path}", "--processes=2", "--process=0"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"
        ((code, _, err),) = ended([start([*command, f"--coordinator={where}"])])
    assert code == 1
    assert f"cannot listen on port {where.rpartition(':')[2]}" in err
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="a claim is a name that only Linux knows")
def test_a_number_is_given_once(tmp_path):
    """Of two processes with one number one waits for the others, and the other ends in words."""
    where = f"--coordinator=127.0.0.1:{free_port()}"
    flags = ["--processes=2", "--process=1", "--wait_seconds=20"]
    command = [*SEARCH, f"--workdir={tmp_path}", where, *flags]
    found = ended([start(command), start(command)])
    words = sorted(err for _, _, err in found)
    assert [code for code, _, _ in found] == [1, 1]
    assert "process 1 of 2 waited 20 s" in "".join(words)
    assert sum("runs on this host already" in err for err in words) == 1


def test_processes_of_unequal_numbers_of_devices(tmp_path):
    where = f"--coordinator=127.0.0.1:{free_port()}"
    command = [*SEARCH, f"--workdir={tmp_path}", where, "--processes=2"]
    found = ended([start([*command, f"--process={n}"], devices=n + 1) for n in range(2)])
    for code, _, err in found:
        assert code == 1
        assert "process 0 has 1, process 1 has 2" in err
        assert "Traceback" not in err


def test_processes_that_were_told_other_numbers(tmp_path):
    where = f"--coordinator=127.0.0.1:{free_port()}"
    command = [*SEARCH, f"--workdir={tmp_path}", where]
    started = [start([*command, f"--processes={n + 2}", f"--process={n}"]) for n in range(2)]
    for code, _, err in ended(started):
        assert code == 1
        assert "--processes: process 0 has 2, process 1 has 3" in err
