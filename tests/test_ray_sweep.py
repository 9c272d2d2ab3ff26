"""Sweeps on a Ray cluster of two nodes on this machine: what the local engine ends with.

The cluster and every sweep are processes of their own, as Ray starts its processes by forking.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aqt_search.training.bucket_lock import LOST_SECONDS, read_lock
from aqt_search.training.checkpoint import latest_step
from aqt_search.training.storage import as_path
from configs import base
from experiments import ray_engine, sweep
from experiments.from_config import ConfigError
from experiments.schema import check_values

ROOT = Path(__file__).parent.parent
# A search of 60 steps, which saves every 5, what follows it, and two points that fail.
SWEEP = [
    "-m", "experiments.sweep", "--config=configs/digits_resnet8.py:quick",
    "--config.model.width=0.25", "--config.epochs=3", "--config.optimizer.warmup_epochs=0",
    "--config.log_every=5", "--config.checkpoint_every=5",
    "--config.evaluation.calibration_batches=2", "--config.search.score_images=64",
    "--config.sweep.baselines=('int8', ('bad', (('no_such_site', 'int4'),)))",
    "--config.sweep.targets=(1.1,)", "--config.sweep.retrain=True",
    "--config.sweep.stages=(('after', 'ptq', {}, ('bad',)),)",
]  # fmt: skip
POINTS = ("bad", "bad_after", "int8", "retrained_1.1", "search_1.1")
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
MOST_SECONDS = 400


def start(arguments, **environment):
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | ENVIRONMENT | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process):
    out, err = process.communicate(timeout=MOST_SECONDS)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def cluster(endpoint):
    """(address, lose): `lose(pid)` kills the node of that worker, in whose place comes another.

    All nodes know the emulated store, by the environment that they were started in.
    """
    process = start(["tests/local_ray_cluster.py"])
    address = process.stdout.readline().strip()

    def lose(worker):
        process.stdin.write(f"lose {worker}\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    yield address, lose
    ended(process)  # at the end of its input


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """(the workdir of the local engine's sweep, its standard output)."""
    workdir = tmp_path_factory.mktemp("local") / "sweep"
    code, out, err = ended(start([*SWEEP, f"--workdir={workdir}"]))
    assert code == 0, err
    return workdir, out


def table(out):
    return out[out.index("\npoint ") : out.index("\nReport")]


def content(path, where):
    """What a file of a point says, but for the command, the time it took, and where it lies."""
    text = path.read_text().replace(where, "")
    if path.name not in ("config.json", "result.json"):
        return text
    values = json.loads(text)
    return {k: v for k, v in values.items() if k not in ("seconds", "command", "job", "sweep")}


def outcome(workdir, written_as=""):
    """Of every point each file, and the checksums of all that its last checkpoint holds."""
    where = written_as or str(workdir)
    found = {}
    for folder in sorted((workdir / "points").iterdir()):
        files = {p.name: content(p, where) for p in folder.iterdir() if p.is_file()}
        if not written_as:  # a bucket keeps none
            del files["run.lock"]
        saved = sorted(folder.glob("checkpoints/step_*/manifest.json"))
        leaves = json.loads(saved[-1].read_text())["content"]["leaves"] if saved else None
        found[folder.name] = files, leaves
    return found


def wait_for_step(folder, step, process):
    """Waits until a run has recorded a step."""
    path, until = folder / "metrics.jsonl", time.monotonic() + MOST_SECONDS
    while not path.exists() or f'"step": {step}}}' not in path.read_text():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < until
        time.sleep(0.02)


def test_stops_and_lost_nodes_change_no_bit(cluster, local, tmp_path):
    address, lose = cluster
    workdir, searched = tmp_path / "sweep", tmp_path / "sweep/points/search_1.1"
    command = [*SWEEP, f"--workdir={workdir}", "--config.sweep.engine=ray"]
    # The driver is asked to stop, and the tasks save.
    driver = start(command, RAY_ADDRESS=address)
    wait_for_step(searched, 10, driver)
    driver.send_signal(signal.SIGTERM)
    code, out, err = ended(driver)
    assert code == 130, err
    assert "SIGTERM: the points that ran have saved" in err
    assert re.search("ray: stopping .*search_1.1", err)
    assert "step/s" not in err + out
    assert not (searched / "result.json").exists()
    (saved, *_) = sorted(path.name for path in searched.glob("checkpoints/step_*"))[::-1]
    # It goes on from there, and loses the node of the search.
    driver = start(command, RAY_ADDRESS=address)
    step = 5 * (int(saved[5:14]) // 5) + 10
    wait_for_step(searched, step, driver)
    assert lose((searched / "run.lock").read_text().split()[0]) == "lost"
    code, out, err = ended(driver)
    assert code == 0, err
    assert "Point bad failed: RuleError: Rule 'no_such_site' matches no site." in err
    assert "Traceback" not in err
    workdir_of_local, out_of_local = local
    assert table(out) == table(out_of_local)
    found, expected = outcome(workdir), outcome(workdir_of_local)
    assert tuple(found) == POINTS
    for name in POINTS:
        assert found[name] == expected[name], name
    command_of_point = json.loads((searched / "result.json").read_text())["command"]
    assert command_of_point.startswith("python -m experiments.sweep --config=")
    assert not (workdir_of_local / "points" / "bad" / "sites.json").exists()


def test_a_sweep_in_a_bucket_ends_as_on_a_disk(cluster, client, local, tmp_path):
    address, lose = cluster
    workdir = as_path("s3://runs/ray/sweep")
    searched = workdir / "points/search_1.1"
    command = [*SWEEP, f"--workdir={workdir}", "--config.sweep.engine=ray"]
    driver, until = start(command, RAY_ADDRESS=address), time.monotonic() + MOST_SECONDS
    while latest_step(searched / "checkpoints") is None:
        assert driver.poll() is None, ended(driver)
        assert time.monotonic() < until
        time.sleep(0.1)
    assert lose(read_lock(searched / "run.lock")["process"]) == "lost"
    code, out, err = ended(driver)
    assert code == 0, err
    assert "taken over from process" in err
    workdir_of_local, out_of_local = local
    without_words = [
        [line for line in table(text).splitlines() if "Error" not in line]  # which name a path
        for text in (out, out_of_local)
    ]
    assert without_words[0] == without_words[1]
    copied = tmp_path / "sweep"
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="runs", Prefix="ray/"):
        for key in (found["Key"] for found in page["Contents"]):
            path = copied / key.removeprefix("ray/sweep/")
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file("runs", key, str(path))
    found, expected = outcome(copied, f"{workdir}"), outcome(workdir_of_local)
    assert tuple(found) == POINTS
    for name in POINTS:
        assert found[name] == expected[name], name


def changed(**values):
    config = base.get_config()
    config.update_from_flattened_dict(values)
    return config


def test_each_task_follows_those_whose_policy_or_weights_it_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "sweep.retrain": True, "sweep.seeds": (0, 1), "sweep.baselines": ("float", "int4"),
        "sweep.stages": (("w4", "ptq", {}, ("float",)),),
    }  # fmt: skip
    bucket = as_path("s3://bucket/sweep")
    own = tmp_path / "sweep"
    for workdir, there in ((Path("sweep"), own), (own, own), (bucket, bucket)):
        points = sweep.sweep_points(changed(**values), workdir)
        taken = {p.name: ray_engine._taken(p, there / "points") for p in points}
        assert {name: found for name, found in taken.items() if found} == {
            f"{follower}_seed{seed}": {f"{followed}_seed{seed}"}
            for follower, followed in (("float_w4", "float"), ("retrained_1.1", "search_1.1"))
            for seed in (0, 1)
        }
        for side_by_side in (False, True):
            before = set()
            for group in sweep.groups(points, side_by_side):
                assert all(taken[point.name] <= before for point in group)
                before |= {point.name for point in group}
            assert before == set(taken)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("engine", "slurm", ["sweep.engine", "'slurm'", "local, ray"]),
        ("resources", (("GPU",),), ["sweep.resources", "(resource, amount)"]),
        ("resources", (("GPU", 1.5),), ["sweep.resources", "whole where above 1"]),
        ("resources", (("GPU", -1),), ["sweep.resources", "amount of GPU is -1"]),
        ("resources", (("GPU", 1), ("GPU", 1)), ["sweep.resources", "each once"]),
        ("ray_address", "", ["sweep.ray_address", "HOST:PORT"]),
        ("ray_retries", -1, ["sweep.ray_retries", "-1"]),
    ],
)
def test_what_is_asked_of_ray_is_checked(key, value, words):
    config = base.get_config()
    config.sweep[key] = value
    with pytest.raises(ConfigError) as caught:
        check_values(config)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def closed_port():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@pytest.mark.parametrize("case", ["no package", "no cluster", "no address"])
def test_without_ray_a_sweep_says_what_to_do(case, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = changed(**{"sweep.engine": "ray", "sweep.ray_address": "nowhere"})
    words = ["'nowhere'", "ray start --head"]
    if case == "no package":
        monkeypatch.setitem(sys.modules, "ray", None)
        words = ["sweep.engine", "pip install 'aqt-search[ray]'"]
    if case == "no cluster":
        address = f"127.0.0.1:{closed_port()}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        words = [address, "refused", "ray start --head", "'local'"]
    with pytest.raises(ConfigError) as caught:
        sweep.run(config, tmp_path / "sweep")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_a_lost_lock_in_a_bucket_is_waited_for_until_it_is_no_ones(client):
    """A machine that was lost has held it for ten minutes, less a second, without a sign."""
    held = {"process": 7, "host": "other", "machine": "other", "token": "0123456789abcdef"}
    held["renewed"] = time.time() - LOST_SECONDS + 1
    client.put_object(Bucket="runs", Key="lost/run.lock", Body=json.dumps(held).encode())
    folder = as_path("s3://runs/lost")
    assert ray_engine._most_seconds([folder]) > LOST_SECONDS
    ray_engine._wait_for_locks([folder])
    assert time.time() >= held["renewed"] + LOST_SECONDS


def test_a_lost_lock_is_waited_for_and_then_told(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_LOCK_SECONDS", 0.1)
    monkeypatch.setattr(ray_engine, "_POLL_SECONDS", 0.05)
    hold = "import sys; from aqt_search.training.workdir import lock_workdir\n"
    hold += "with lock_workdir(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    other = start(["-c", hold, str(tmp_path)])
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ray_engine.BusyWorkdirError, match=f"process {other.pid}.*waited for"):
        ray_engine._wait_for_locks([tmp_path])
    assert ended(other)[0] == 0
    ray_engine._wait_for_locks([tmp_path])
