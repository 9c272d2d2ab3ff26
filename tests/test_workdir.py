import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from aqt_search.training.interrupt import Interrupt
from aqt_search.training.workdir import (
    WorkdirError,
    check_lock,
    claim_workdir,
    lock_workdir,
    read_json,
    write_json,
)

CONFIG = {"model": {"depth": 20, "width": 1.0}, "seed": 0, "formats": ("int4", "int8"), "tags": {}}


def test_json_round_trip_leaves_no_other_file(tmp_path):
    path = tmp_path / "a.json"
    for value in ({"b": [1, 2.5, None, True, "é"]}, []):
        write_json(path, value)
        assert read_json(path) == value
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("value, kind", [({"a": float("nan")}, ValueError), ({1, 2}, TypeError)])
def test_what_is_no_json_leaves_the_file_alone(tmp_path, value, kind):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(kind):
        write_json(path, value)
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b'{"a": NaN}', b"\xff\xfe", b"\0\0"])
def test_garbage_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(WorkdirError, match=r"a\.json is not valid JSON"):
        read_json(path)


def test_full_disk_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, "before")
    code = (
        "import resource, sys\n"
        "from aqt_search.training.workdir import WorkdirError, write_json\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_json(sys.argv[1], 'x' * 5000)\n"
        "except WorkdirError as error:\n"
        "    assert sys.argv[1] in str(error) and 'Free space' in str(error)\n"
        "    print('WorkdirError')\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.stdout == "WorkdirError\n", result.stderr
    assert read_json(path) == "before"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_same_configuration_may_come_again(tmp_path):
    folder = claim_workdir(tmp_path / "a" / "b", CONFIG)
    assert folder == tmp_path / "a" / "b"
    assert claim_workdir(folder, CONFIG) == folder
    assert read_json(folder / "config.json")["formats"] == ["int4", "int8"]


def test_another_configuration_is_refused_key_by_key(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    other = {"model": {"depth": 8, "width": 1.0}, "formats": ["int4"], "tags": {}, "lr": "x"}
    with pytest.raises(WorkdirError) as error:
        claim_workdir(tmp_path, other)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[1:-1] == [
        'formats: there ["int4", "int8"], now ["int4"]',
        'lr: there absent, now "x"',
        "model.depth: there 20, now 8",
        "seed: there 0, now absent",
    ]
    assert "another --workdir" in lines[-1]
    assert "delete" in lines[-1]
    assert read_json(tmp_path / "config.json")["seed"] == 0


def test_ignored_keys_may_differ(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    other = CONFIG | {"model": {"depth": 8, "width": 2.0}, "log_every": 5}
    claim_workdir(tmp_path, other, ignore=("model", "log_every"))
    assert read_json(tmp_path / "config.json")["model"] == {"depth": 8, "width": 2.0}
    with pytest.raises(WorkdirError, match=r"model\.depth: there 8, now 20"):
        claim_workdir(tmp_path, CONFIG, ignore=("model.width", "log_every", "mod"))


def test_bad_folders_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="file is not a folder"):
        claim_workdir(tmp_path / "file", CONFIG)
    with pytest.raises(WorkdirError, match="is not a folder"):
        claim_workdir(tmp_path / "file" / "below", CONFIG)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("loop", "dangling"):
        with pytest.raises(WorkdirError, match="a link to nothing"):
            claim_workdir(tmp_path / name, CONFIG)
    for use in (
        lambda path: claim_workdir(path, CONFIG),
        lambda path: lock_workdir(path).__enter__(),
    ):
        with pytest.raises(WorkdirError, match=r"\\udcff.* not UTF-8"):
            use(tmp_path / os.fsdecode(b"\xff"))
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read: Too many levels"):
        claim_workdir(tmp_path, CONFIG)
    (tmp_path / "config.json").unlink()
    for content in ("{", "3"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(WorkdirError, match=r"config\.json"):
            claim_workdir(tmp_path, CONFIG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(WorkdirError, match="not writable"):
            claim_workdir(tmp_path, CONFIG)
        with pytest.raises(WorkdirError, match="cannot be made"):
            claim_workdir(tmp_path / "below", CONFIG)
    finally:
        tmp_path.chmod(0o700)


def test_not_writable_folder_is_refused_whoever_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root passes the real check
    with pytest.raises(WorkdirError, match="not writable"):
        claim_workdir(tmp_path, CONFIG)


def test_one_process_at_a_time(tmp_path):
    with (
        lock_workdir(tmp_path),
        pytest.raises(WorkdirError, match=f"in use by process {os.getpid()}"),
        lock_workdir(tmp_path),
    ):
        pass
    with lock_workdir(tmp_path):
        pass


def test_the_lock_ends_with_its_process(tmp_path):
    code = (
        "import sys, time\n"
        "from aqt_search.training.workdir import lock_workdir\n"
        "with lock_workdir(sys.argv[1]):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with (
            pytest.raises(WorkdirError, match=f"process {process.pid}"),
            lock_workdir(tmp_path / "new"),
        ):
            pass
        process.kill()
    with lock_workdir(tmp_path / "new"):
        pass


def test_a_lock_is_that_of_the_folder_of_this_name(tmp_path):
    workdir = tmp_path / "run"
    with lock_workdir(workdir):
        check_lock(workdir)
        shutil.rmtree(workdir)
        with pytest.raises(WorkdirError, match=r"run was deleted or replaced.* is no run's now"):
            check_lock(workdir)
        workdir.mkdir()
        # Of another container, where processes may have the same numbers.
        (workdir / "run.lock").write_text(f"{os.getpid()} 0123456789abcdef\n")
        with pytest.raises(WorkdirError, match=f"now that of process {os.getpid()}"):
            check_lock(workdir)
        (workdir / "run.lock").write_bytes(b"\xff")
        with pytest.raises(WorkdirError, match="deleted or replaced"):
            check_lock(workdir)


def test_what_a_killed_owner_left_is_deleted_by_the_next(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from aqt_search.training.workdir import lock_workdir, write_json\n"
        "os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with lock_workdir(sys.argv[1]) as workdir: write_json(workdir / 'a.json', 1)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (tmp_path / ".own.tmp").touch()  # of someone else
    assert len(list(tmp_path.glob(".a.json.*.tmp"))) == 1
    with lock_workdir(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".own.tmp", "run.lock"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert interrupt.requested is None
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while interrupt.requested is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert interrupt.requested == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # changes nothing
        time.sleep(0.01)
        assert interrupt.requested == number.name
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal arrives in the sleep
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former


def test_handlers_come_back_after_an_error():
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="inside"), Interrupt():
        raise RuntimeError("inside")
    assert signal.getsignal(signal.SIGINT) is former


def test_outside_the_main_thread_signals_are_left_alone():
    former = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with Interrupt() as interrupt:
            seen.append((signal.getsignal(signal.SIGINT), interrupt.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(former, None)]
