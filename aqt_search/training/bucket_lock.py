"""The lock of a workdir in a bucket, which has no file locks: an object that its holder renews.

It is written on the condition that there is none, which the store grants to one writer. A thread
renews its time as long as the holder lives. One that has not been renewed for ten minutes is that
of a machine that was lost, and may be taken over; one of a process of this machine that has ended,
at once. Whoever is taken over finds out when it asks for the holder, as it does before it saves.
Two that take over one lock at the same moment find out in the same way. The clocks of the machines
have to agree to some minutes.
"""

import contextlib
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

from absl import logging

from aqt_search.training import storage
from aqt_search.training.storage import BusyWorkdirError, WorkdirError

_RENEW_SECONDS = 60.0
LOST_SECONDS = 600.0  # without a sign of life


def _machine() -> str | None:
    """What tells processes by number: this start of this machine, and the container's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _content(token: str) -> bytes:
    held = {"process": os.getpid(), "host": platform.node(), "machine": _machine()}
    return json.dumps(held | {"token": token, "renewed": time.time()}).encode()


def read_lock(path: storage.PathLike) -> dict[str, Any]:
    """What a lock says: {"process": number, "token": ..., ...}; {} where there is none.

    Raises:
        WorkdirError: the bucket cannot be reached.
    """
    try:
        told = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return {}
    except ValueError:
        told = None
    if not isinstance(told, dict) or not told.keys() >= {"process", "host", "token", "renewed"}:
        return {"process": "unknown", "host": "unknown", "renewed": 0.0}  # copied from a disk
    return told


def _has_ended(there: dict[str, Any]) -> bool:
    """Whether the holder lives no more, as far as one can tell from here."""
    if time.time() - there["renewed"] > LOST_SECONDS:
        return True
    if there.get("machine") is None or there["machine"] != _machine():
        return False
    try:
        os.kill(there["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return False


def _in_use(workdir: storage.PathLike, there: dict[str, Any]) -> BusyWorkdirError:
    process = f"process {there.get('process', 'unknown')} on {there.get('host', 'unknown')}"
    ago = time.time() - there.get("renewed", time.time())
    return BusyWorkdirError(
        f"workdir {os.fspath(workdir)} is in use by {process}, which was alive {ago:.0f} s ago. "
        "Wait for it to end, stop it, or give another --workdir. If its machine was lost, run the "
        f"same command {max(LOST_SECONDS - ago, 0) + 1:.0f} s from now."
    )


def hold_lock(workdir: Path, name: str, token: str, held: contextlib.ExitStack) -> None:
    """Locks a folder in a bucket for this process, until `held` is closed.

    Raises:
        BusyWorkdirError: another process holds it.
        WorkdirError: the bucket cannot be used.
    """
    path = workdir / name
    if there := read_lock(path):
        if not _has_ended(there):
            raise _in_use(workdir, there)
        logging.warning(
            "%s: taken over from process %s on %s, which has ended or was lost.",
            workdir, there.get("process"), there.get("host"),
        )  # fmt: skip
        storage.delete(workdir, [name])
    content = _content(token)
    written = storage.put_new(path, content)
    if written is None:
        storage.put(path, content)
    elif written:  # a store may not know the condition, and write whatever there is
        written = storage.put_new(path, content + b"\n") is False or None
    if written is False and read_lock(path).get("token") != token:
        raise _in_use(workdir, read_lock(path))
    if written is None:
        logging.warning(
            "%s: this store, or its client, cannot write on a condition: two runs that start here "
            "at the same moment are told apart only when they save.", workdir,
        )  # fmt: skip
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, token, ended), daemon=True)
    renewing.start()
    held.callback(_release, workdir, name, token, ended, renewing)


def _renew(path: Path, token: str, ended: threading.Event) -> None:
    while not ended.wait(_RENEW_SECONDS):
        with contextlib.suppress(Exception):  # what the bucket lacks, the next save tells
            if read_lock(path).get("token") == token:
                storage.put(path, _content(token))


def _release(
    workdir: Path, name: str, token: str, ended: threading.Event, renewing: threading.Thread
) -> None:
    ended.set()
    renewing.join()
    try:
        if read_lock(workdir / name).get("token") == token:
            storage.delete(workdir, [name])
    except (OSError, WorkdirError) as error:
        logging.warning("the lock %s is still there: %s", workdir / name, error)
