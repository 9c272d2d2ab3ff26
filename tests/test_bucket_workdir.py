"""Workdirs in a bucket: s3fs against an emulated store on loopback, looked into through boto3."""

import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from aqt_search import data
from aqt_search.data import DataError
from aqt_search.report import load_records
from aqt_search.training import storage
from aqt_search.training.checkpoint import (
    CheckpointError,
    checkpoint_fingerprint,
    latest_step,
    restore_latest,
    save_checkpoint,
)
from aqt_search.training.metrics import MetricWriter, read_metrics
from aqt_search.training.storage import BucketError, WorkdirError, as_path
from aqt_search.training.workdir import (
    check_lock,
    claim_workdir,
    lock_workdir,
    read_json,
    write_json,
)
from configs import digits_resnet8
from experiments.assignment import read_policy
from experiments.compiled_programs import keep_compiled
from experiments.from_config import load_images

boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")
pytest.importorskip("moto")

ROOT = Path(__file__).parent.parent
# 60 steps, a checkpoint at every tenth. The sweep's point shares its programs, and a second one and
# the sensitivities read its checkpoint.
QUICK = [
    "--config=configs/digits_resnet8.py:quick", "--config.model.width=0.25", "--config.epochs=3",
    "--config.checkpoint_every=10", "--config.log_every=1",
]  # fmt: skip
TRAIN = ["experiments.train", *QUICK, "--config.formats=(('.*', 'int8'),)"]
SWEEP = [
    "experiments.sweep", *QUICK, "--config.sweep.baselines=('int8',)", "--config.sweep.targets=()",
    "--config.sweep.stages=(('w4a4', 'ptq', {'formats': (('.*', 'int4'),)}),)",
    "--config.sweep.sensitivity=int8", "--config.sensitivity.images=64",
    "--config.sensitivity.formats=('int4',)",
]  # fmt: skip
MOST_SECONDS = 300


@pytest.fixture
def workdir(client, request):
    return as_path(f"s3://runs/{request.node.name.translate(str.maketrans('[]', '--'))}/run")


def keys(client, folder):
    """Names of all objects below a folder."""
    prefix = str(folder).removeprefix("s3://runs/") + "/"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="runs", Prefix=prefix)
    return [o["Key"].removeprefix(prefix) for page in pages for o in page.get("Contents", ())]


def content(client, path):
    key = str(path).removeprefix("s3://runs/")
    return client.get_object(Bucket="runs", Key=key)["Body"].read()


def replace(client, path, value):
    client.put_object(Bucket="runs", Key=str(path).removeprefix("s3://runs/"), Body=value)


def start(module, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process):
    out, err = process.communicate(timeout=MOST_SECONDS)
    return process.returncode, out, err


# --- Runs from end to end -------------------------------------------------------------------------


def test_a_run_that_was_killed_ends_in_the_bits_of_one_on_a_disk(client, workdir, tmp_path):
    command = [*TRAIN, f"--workdir={workdir}"]
    process, until = start(*command), time.monotonic() + MOST_SECONDS
    while "checkpoints/step_000000020/manifest.json" not in keys(client, workdir):
        assert process.poll() is None, ended(process)
        assert time.monotonic() < until
        time.sleep(0.02)
    with (
        pytest.raises(WorkdirError, match=f"in use by process {process.pid}"),
        lock_workdir(workdir),
    ):
        pass
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    assert "metrics.jsonl" in keys(client, workdir)
    before = len(read_metrics(workdir))
    assert before >= 20
    code, _, err = ended(start(*command))
    assert code == 0, err
    assert "taken over from process" in err
    assert "run: going on from step" in err
    code, _, err = ended(start(*TRAIN, f"--workdir={tmp_path}/run"))
    assert code == 0, err
    for name in ("metrics.jsonl", "policy.json", "sites.json", "weights.json"):
        assert content(client, workdir / name) == (tmp_path / "run" / name).read_bytes(), name
    assert read_policy(workdir / "policy.json") == read_policy(tmp_path / "run" / "policy.json")
    last = "checkpoints/step_000000060/manifest.json"
    there, here = content(client, workdir / last), (tmp_path / "run" / last).read_bytes()
    assert json.loads(there)["content"]["leaves"] == json.loads(here)["content"]["leaves"]
    tops = {name.split("/")[0] for name in keys(client, workdir)}
    assert tops == {path.name for path in (tmp_path / "run").iterdir()} - {"run.lock"}


def test_a_sweep_writes_its_report_there(client, workdir):
    code, out, err = ended(start(*SWEEP, f"--workdir={workdir}"))
    assert code == 0, err + out
    assert f"Report: {workdir}/report.html" in out
    assert content(client, workdir / "report.html").startswith(b"<!DOCTYPE html>")
    assert content(client, workdir / "front.png").startswith(b"\x89PNG")
    assert content(client, workdir / "sensitivity.png").startswith(b"\x89PNG")
    points = {record.name: record.kind for record in load_records(str(workdir))}
    assert points == {"int8": "uniform", "int8_w4a4": "ptq"}
    assert not [name for name in keys(client, workdir) if "run.lock" in name]


# --- Errors ---------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there_ends_in_one_line(client):
    code, _, err = ended(start(*TRAIN, "--workdir=s3://nowhere/run"))
    assert code == 1
    assert "there is no bucket nowhere for s3://nowhere/run/run.lock. Make it" in err
    assert "Traceback" not in err


def test_a_bucket_without_permission_is_named(client, workdir, endpoint):
    def authorize_after(actions):
        where = f"{endpoint}/moto-api/reset-auth"
        told = {"Content-Type": "text/plain"}
        request = urllib.request.Request(where, actions.encode(), told, method="POST")
        urllib.request.urlopen(request).close()

    authorize_after("0")  # the store knows no user of our key
    try:
        for use in (
            lambda: lock_workdir(workdir).__enter__(),
            lambda: write_json(workdir / "a.json", 1),
            lambda: read_json(workdir / "a.json"),
            lambda: restore_latest(workdir, {"a": 1.0}),
            lambda: save_checkpoint(workdir, 1, {"a": 1.0}),
            lambda: MetricWriter(workdir),
        ):
            with pytest.raises((WorkdirError, CheckpointError)) as error:
                use()
            assert "bucket runs" in str(error.value)
            assert "PermissionError" in str(error.value)
    finally:
        authorize_after("inf")
    assert keys(client, workdir) == []


@pytest.mark.parametrize(
    "path, words",
    [
        ("ftp://a/b", ["nothing is known of ftp://", "s3://BUCKET/FOLDER"]),
        ("gs://a/b", ["gcsfs", "pip install 'aqt-search[gcs]'"]),
        ("s3://a/b", ["s3fs", "pip install 'aqt-search[s3]'"]),
    ],
)
def test_a_uri_that_cannot_be_read_says_what_to_install(monkeypatch, path, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkdirError) as error:
        as_path(path)
    assert all(word in str(error.value) for word in [path, *words]), str(error.value)


@pytest.mark.parametrize(
    "path", ["s3://", "s3:///run", "s3://runs/a*", "s3://runs/[a]", "s3:/runs/a", "GS:runs/a"]
)
def test_a_uri_that_is_no_place(path):
    with pytest.raises(WorkdirError, match="no place in a bucket"):
        as_path(path)


def test_a_bucket_that_does_not_answer_is_told(endpoint, monkeypatch, caplog):
    """A store that accepts connections and never answers: that is said while it is waited for."""
    monkeypatch.setattr(storage, "_WAIT_SECONDS", 0.1)
    conf = {"connect_timeout": 2, "read_timeout": 2, "retries": {"max_attempts": 0}}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": conf})
        with pytest.raises(BucketError, match="bucket runs cannot be used"):
            read_json(as_path("s3://runs/a.json"))
    assert "s3://runs/a.json: still at it" in caplog.text


def test_compiled_programs_stay_on_this_machine(monkeypatch, tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update(names[0], None)
        keep_compiled(as_path("s3://runs/sweep/compiled"))
        kept = jax.config.jax_compilation_cache_dir
        assert Path(kept).parent == tmp_path / "aqt_search" / "compiled"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# --- The lock -------------------------------------------------------------------------------------


def test_one_run_at_a_time(client, workdir):
    with lock_workdir(workdir) as folder:
        claim_workdir(folder, {"seed": 0})
        with (
            pytest.raises(WorkdirError, match=f"in use by process {os.getpid()}"),
            lock_workdir(workdir),
        ):
            pass
        check_lock(workdir)
    assert keys(client, workdir) == ["config.json"]
    with lock_workdir(workdir), pytest.raises(WorkdirError, match="seed: there 0, now 1"):
        claim_workdir(workdir, {"seed": 1})


def other_lock(seconds_ago, **changes):
    """The lock of a run on another machine."""
    told = {"process": 7, "host": "other", "machine": "other", "token": "0123456789abcdef"}
    return json.dumps(told | {"renewed": time.time() - seconds_ago} | changes).encode()


def test_a_lock_without_a_sign_of_life_is_taken_over(client, workdir, caplog):
    replace(client, workdir / "run.lock", other_lock(300))
    with pytest.raises(WorkdirError, match=r"process 7 on other, which was alive 30\d s ago"):
        lock_workdir(workdir).__enter__()
    assert json.loads(content(client, workdir / "run.lock"))["process"] == 7
    replace(client, workdir / "run.lock", other_lock(1200))
    with lock_workdir(workdir):
        assert "taken over from process 7 on other" in caplog.text
        check_lock(workdir)
        assert json.loads(content(client, workdir / "run.lock"))["process"] == os.getpid()
        # It was not dead, or a third one comes: whoever lost it writes no more, and leaves it.
        with MetricWriter(workdir) as writer:
            writer.write(1, {"loss": 1.0})
            replace(client, workdir / "run.lock", other_lock(0))
            with pytest.raises(WorkdirError, match="is now that of process 7"):
                check_lock(workdir)
        assert content(client, workdir / "metrics.jsonl") == b""
    assert json.loads(content(client, workdir / "run.lock"))["process"] == 7


def test_a_lock_that_was_copied_from_a_disk_is_no_ones(client, workdir):
    replace(client, workdir / "run.lock", f"{os.getpid()} 0123456789abcdef\n".encode())
    with pytest.raises(WorkdirError, match="is no run's now"):
        check_lock(workdir)
    with lock_workdir(workdir):
        check_lock(workdir)
    assert keys(client, workdir) == []


def test_a_process_that_was_killed_here_holds_nothing(client, workdir):
    code = (
        "import os, signal, sys\n"
        "from aqt_search.training.workdir import lock_workdir\n"
        "with lock_workdir(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(workdir)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert keys(client, workdir) == ["run.lock"]
    with lock_workdir(workdir):
        check_lock(workdir)


def test_a_lock_is_renewed(client, workdir, monkeypatch):
    monkeypatch.setattr("aqt_search.training.bucket_lock._RENEW_SECONDS", 0.02)
    with lock_workdir(workdir):
        first, until = content(client, workdir / "run.lock"), time.monotonic() + 60
        while json.loads(content(client, workdir / "run.lock")) == json.loads(first):
            assert time.monotonic() < until
            time.sleep(0.02)
        check_lock(workdir)


@pytest.mark.parametrize("answer", ["overwrites", "refuses"])
def test_a_store_that_knows_no_conditions_is_said(workdir, monkeypatch, caplog, answer):
    def put_new(path, value):
        if answer == "refuses":
            return None
        storage.put(path, value)
        return True

    monkeypatch.setattr(storage, "put_new", put_new)
    with lock_workdir(workdir):
        assert "cannot write on a condition" in caplog.text
        with pytest.raises(WorkdirError, match="in use by"):
            lock_workdir(workdir).__enter__()


# --- Checkpoints ----------------------------------------------------------------------------------


def state_of(seed):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(64, 3)).astype(np.float32), "empty": np.zeros((0, 2)), "n": seed}


def test_checkpoints_come_back_and_the_last_are_kept(client, workdir, tmp_path):
    for step, seed in ((1, 1), (2, 2), (3, 3), (3, 4)):
        found = save_checkpoint(workdir, step, state_of(seed), {"seed": seed})
        save_checkpoint(tmp_path, step, state_of(seed), {"seed": seed})
    assert found == workdir / "step_000000003-1"
    names = {name.split("/")[0] for name in keys(client, workdir)}
    assert names == {path.name for path in tmp_path.iterdir()}
    restored = restore_latest(workdir, state_of(0))
    assert (restored.step, restored.extra, restored.skipped) == (3, {"seed": 4}, ())
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(4))
    assert checkpoint_fingerprint(workdir) == checkpoint_fingerprint(tmp_path)


def damage_arrays(client, folder):
    """Turns bits in the middle of every object that holds some; orbax does not read all of them."""
    for name in keys(client, folder):
        if "/d/" in name:
            value = bytearray(content(client, folder / name))
            value[len(value) // 2] ^= 255
            replace(client, folder / name, bytes(value))


def lose_arrays(client, folder):
    for name in keys(client, folder):
        if "/d/" in name:
            key = str(folder / name).removeprefix("s3://runs/")
            client.delete_object(Bucket="runs", Key=key)


def damage_manifest(client, folder):
    replace(client, folder / "manifest.json", content(client, folder / "manifest.json")[:-20])


# As in test_checkpoint.py: orbax ends at the first leaf it cannot read, and closes its event loop
# while tensorstore still reads others.
@pytest.mark.filterwarnings(
    "ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("damage", [damage_arrays, lose_arrays, damage_manifest])
def test_a_damaged_checkpoint_is_passed_over(client, workdir, damage, caplog):
    for step in (1, 2):
        save_checkpoint(workdir, step, state_of(step))
    damage(client, workdir / "step_000000002")
    there = keys(client, workdir / "step_000000002")
    restored = restore_latest(workdir, state_of(0))
    assert restored.step == 1
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(1))
    ((step, _, moved_to),) = restored.skipped
    assert (step, moved_to) == (2, workdir / "damaged_step_000000002")
    assert "step_000000002 is damaged" in caplog.text
    assert keys(client, moved_to) == there
    assert latest_step(workdir) == 1


def test_a_bucket_that_does_not_answer_is_no_damage(client, workdir, monkeypatch):
    save_checkpoint(workdir, 1, state_of(1))
    save_checkpoint(workdir, 2, state_of(2))
    there = keys(client, workdir)

    def lost(*_):
        raise BucketError("bucket runs cannot be used")

    for name in ("download", "read_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(storage, name, lost)
            with pytest.raises(BucketError, match="cannot be used"):
                restore_latest(workdir, state_of(0))
    assert keys(client, workdir) == there


def test_a_save_or_a_deletion_that_was_killed_counts_for_nothing(client, workdir):
    save_checkpoint(workdir, 1, {"a": np.ones(3)})
    code = (
        "import os, signal, sys\n"
        "import numpy as np\n"
        "from aqt_search.training import storage\n"
        "from aqt_search.training.checkpoint import save_checkpoint\n"
        "upload = storage.upload\n"
        "def killed(local, folder, names):\n"
        "    if 'manifest.json' in names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    upload(local, folder, names)\n"
        "storage.upload = killed\n"
        "save_checkpoint(sys.argv[1], 2, {'a': np.zeros(3)})\n"
    )
    command = [sys.executable, "-c", code, str(workdir)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert keys(client, workdir / "step_000000002")
    assert latest_step(workdir) == 1
    # Deleted in part: its manifest went first.
    half = keys(client, workdir / "step_000000001")
    for name in half:
        replace(client, workdir / "step_000000000" / name, b"")
    client.delete_object(
        Bucket="runs", Key=str(workdir).removeprefix("s3://runs/") + "/step_000000000/manifest.json"
    )
    assert restore_latest(workdir, {"a": np.zeros(3)}).step == 1
    save_checkpoint(workdir, 2, {"a": np.zeros(3)})
    names = {name.split("/")[0] for name in keys(client, workdir)}
    assert names == {"step_000000001", "step_000000002"}


# --- Metrics --------------------------------------------------------------------------------------


def events_of(client, folder):
    """(step, value) of all events, and the steps of the starts, in the order TensorBoard reads."""
    scalars, starts = [], []
    for name in sorted(keys(client, folder)):
        data = content(client, folder / name)
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            scalars += [(event.step, v.simple_value) for v in event.summary.value]
            starts += [event.step] if event.WhichOneof("what") == "session_log" else []
    return scalars, starts


@pytest.mark.parametrize("resume_step, kept", [(0, []), (2, [1, 2]), (3, [1, 2, 3])])
def test_metrics_of_a_killed_run_are_those_up_to_the_last_flush(client, workdir, resume_step, kept):
    writer = MetricWriter(workdir)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
        writer.flush()
    writer.flush()
    writer.write(4, {"loss": float("nan")})  # and is killed
    assert len(keys(client, workdir / "metrics")) == 3
    assert read_metrics(workdir) == [{"step": s, "loss": float(s)} for s in (1, 2, 3)]
    assert events_of(client, workdir / "tensorboard") == ([(1, 1.0), (2, 2.0), (3, 3.0)], [0])
    with MetricWriter(workdir, resume_step=resume_step) as writer:
        assert [record["step"] for record in read_metrics(workdir)] == kept
        writer.write(resume_step + 1, {"loss": 0.5})
    assert [record["step"] for record in read_metrics(workdir)] == [*kept, resume_step + 1]
    assert keys(client, workdir / "metrics") == []
    lines = content(client, workdir / "metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*kept, resume_step + 1]
    assert events_of(client, workdir / "tensorboard")[1] == [0, resume_step and resume_step + 1]


def test_parts_that_were_joined_already_are_not_read_again(client, workdir):
    writer = MetricWriter(workdir)
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
        writer.flush()
    parts = {name: content(client, workdir / "metrics" / name)
             for name in keys(client, workdir / "metrics")}  # fmt: skip
    writer.close()
    for name, value in parts.items():  # as if it had been killed before it deleted them
        replace(client, workdir / "metrics" / name, value)
    assert [record["step"] for record in read_metrics(workdir)] == [1, 2]
    with MetricWriter(workdir, resume_step=1):
        assert [record["step"] for record in read_metrics(workdir)] == [1]
    assert keys(client, workdir / "metrics") == []


# --- Images ---------------------------------------------------------------------------------------


def png(value):
    content = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(content, format="png")
    return content.getvalue()


@pytest.fixture
def images(client, tmp_path, monkeypatch):
    """A configuration of images in the bucket, whose pixels are 0, 1, 2, ..."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = [f"{split}/{kind}/{n}.png" for split in ("test", "train") for kind in "ab"
             for n in range(3)]  # fmt: skip
    for value, name in enumerate(names):
        replace(client, f"s3://runs/images/{name}", png(value))
    config = digits_resnet8.get_config()
    config.data.held_out = 0
    config.data.name, config.data.data_dir = "folder:s3://runs/images", str(tmp_path / "prepared")
    return config


def test_images_are_copied_once(client, images, monkeypatch):
    def pixels(config):
        found = load_images(config).splits.train
        return sorted(found.read(range(len(found)))["image"][:, 0, 0, 0])

    assert pixels(images) == [6, 7, 8, 9, 10, 11]
    downloads = []
    original = storage.download
    monkeypatch.setattr(storage, "download", lambda *a: (downloads.append(a[1]), original(*a)))
    assert pixels(images) == [6, 7, 8, 9, 10, 11]
    assert not downloads

    def killed(folder, names, local):
        original(folder, names[:-2], local)
        (local / names[0]).write_bytes(b"half")
        raise KeyboardInterrupt

    # One that has changed makes it another set, whose copy is killed.
    replace(client, "s3://runs/images/train/a/0.png", png(200))
    monkeypatch.setattr(storage, "download", killed)
    with pytest.raises(KeyboardInterrupt):
        pixels(images)
    monkeypatch.setattr(storage, "download", lambda *a: (downloads.append(a[1]), original(*a)))
    assert pixels(images) == [7, 8, 9, 10, 11, 200]
    assert downloads == [["test/a/0.png", "train/b/1.png", "train/b/2.png"]]


def test_images_that_cannot_be_copied_are_named(client, images):
    images.data.data_dir = "s3://runs/prepared"
    with pytest.raises(DataError, match="prepared and read on this machine"):
        load_images(images)
    images.data.name, images.data.data_dir = "folder:s3://runs/none", ""
    with pytest.raises(DataError, match="nothing below s3://runs/none"):
        load_images(images)


def test_a_prepared_data_set_is_copied(client, images, tmp_path):
    own = data.open_splits("digits", data_dir=tmp_path / "here")
    for path in (tmp_path / "here").rglob("*"):
        if path.is_file():
            name = path.relative_to(tmp_path / "here")
            replace(client, f"s3://runs/tfds/{name}", path.read_bytes())
    images.data.name, images.data.data_dir = "aqt_search_digits", "s3://runs/tfds"
    there = load_images(images).splits
    indices = range(len(own.test))
    np.testing.assert_array_equal(
        there.test.read(indices)["image"], own.test.read(indices)["image"]
    )
