"""The folder of one run: whole-or-nothing JSON files, its configuration, its lock.

In a run of several processes all call these functions, and the first reads and writes
(`processes`). The folder may lie in a bucket (`storage`), where each file is one object, and the
lock one that is renewed (`bucket_lock`).
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from aqt_search.training import bucket_lock, storage
from aqt_search.training.processes import on_first
from aqt_search.training.storage import BusyWorkdirError, WorkdirError, as_path, in_bucket

CONFIG_FILE = "config.json"
LOCK_FILE = "run.lock"
# This process, also where another machine or container has one of the same number.
_HOLDER = secrets.token_hex(8)
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # as `write_whole` calls them


def sync_folder(folder: str | os.PathLike) -> None:
    """Flush the folder's own entries, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all, by whoever calls: temporary name, fsync, `os.replace`.

    In a bucket it is an object, which is whole by itself.

    Raises:
        WorkdirError: the file cannot be written; what was there before is untouched.
    """
    if in_bucket(path):
        storage.put(path, content)
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise WorkdirError(
            f"could not write {path}: {error.strerror or error}. Free space or make the folder "
            "writable, then run the same command again."
        ) from error


write_bytes = on_first(write_whole)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file whole or not at all.

    Raises:
        WorkdirError: as `write_bytes`.
    """
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` as strict JSON with sorted keys, whole or not at all.

    Raises:
        WorkdirError: the file cannot be written; what was there before is untouched.
        ValueError: `obj` holds a NaN or an infinity, which JSON does not have.
        TypeError: `obj` holds something that is no JSON value.
    """
    write_text(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


@on_first
def is_there(path: str | os.PathLike) -> bool:
    """Whether there is a file or folder of that name."""
    return storage.exists(path)


@on_first
def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: no such file.
        WorkdirError: the file cannot be read, or is not strict JSON in UTF-8.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON value")

    try:
        return json.loads(storage.read_text(path), parse_constant=refuse)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read: {error.strerror}. Mend it.") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise WorkdirError(
            f"{path} is not valid JSON: {error}. It was damaged or edited by hand; repair it, or "
            "delete it if it can be made again."
        ) from error


def _make_folder(workdir: str | os.PathLike) -> Path:
    """The folder, made if needed and known to be writable; of a bucket its lock tells that."""
    workdir = as_path(workdir)
    if in_bucket(workdir):
        return workdir
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError as error:
        raise WorkdirError(
            f"workdir {str(workdir)!r} is a name that is not UTF-8. Give another --workdir."
        ) from error
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise WorkdirError(
            f"workdir {workdir} is not a folder: a file, or a link to nothing, is in its place. "
            "Give another --workdir."
        ) from error
    except OSError as error:
        raise WorkdirError(
            f"workdir {workdir} cannot be made: {error.strerror}. Give another --workdir."
        ) from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise WorkdirError(
            f"workdir {workdir} is not writable by this user. Give another --workdir, or change "
            "its permissions."
        )
    return workdir


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings to {"a.b": value}; an empty mapping is a value."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    flat = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def identity_of(config: Mapping[str, Any], ignore: Iterable[str] = ()) -> dict[str, Any]:
    """What tells a configuration from another: {"a.b": JSON value}, without the ignored keys."""
    ignored = tuple(ignore)
    flat = json.loads(json.dumps(_flatten(config) if config else {}, allow_nan=False))
    return {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(name + ".") for name in ignored)
    }


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Lines "key: there X, now Y" of all keys in which two identities differ; "" for none."""
    lines = []
    for key in sorted(there.keys() | now.keys()):
        old, new = (json.dumps(c[key]) if key in c else "absent" for c in (there, now))
        if old == "absent" or new == "absent" or there[key] != now[key]:
            lines.append(f"  {key}: there {old}, now {new}")
    return "\n".join(lines)


@on_first
def claim_workdir(
    workdir: str | os.PathLike, config: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> Path:
    """Make the folder and write `config.json`, or check that the one there is the same.

    Claim under `lock_workdir`, so that two runs cannot claim at once.

    Args:
        workdir: folder of the run; made, with its parents, if needed.
        config: nested mappings with string keys and JSON values (tuples count as lists).
        ignore: keys that may differ, such as "log_every"; "eval" covers "eval.batch" too. Where
            only these differ, `config.json` is written anew with the values of this call.

    Returns:
        The folder.

    Raises:
        WorkdirError: not a folder, not writable, a damaged `config.json`, or one with other
            values; lists every key that differs.
    """
    workdir = _make_folder(workdir)
    path = workdir / CONFIG_FILE
    now = json.loads(json.dumps(config, allow_nan=False))
    try:
        there = read_json(path)
    except FileNotFoundError:
        there = None
    if there is not None:
        if not isinstance(there, dict):
            raise WorkdirError(f"{path} holds no configuration. Delete {workdir} or give another.")
        listing = differences(identity_of(there, ignore), identity_of(now, ignore))
        if listing:
            raise WorkdirError(
                f"workdir {workdir} holds a run with another configuration:\n{listing}\n"
                f"Give another --workdir, or delete {workdir} to start anew."
            )
    if there != now:
        write_json(path, now)
    return workdir


@contextlib.contextmanager
def lock_workdir(workdir: str | os.PathLike) -> Generator[Path]:
    """Hold the folder for this process; the system lets go when the process ends, however it does.

    The lock is `flock` on `run.lock`, which stays behind and names its last owner: its PID, and a
    token of its own. In a bucket that file itself is the lock (`bucket_lock`), and the system does
    not let go of it: after a kill another machine has to wait for some minutes. A folder may be
    deleted under its run, and made anew by another: ask `check_lock` before writing what would pass
    for the other's. Temporary files that a killed owner left in the folder are deleted.

    Raises:
        BusyWorkdirError: another process holds the folder (names its PID).
        WorkdirError: the folder or the lock file cannot be made or written.
    """
    workdir = as_path(workdir)
    with contextlib.ExitStack() as held:
        _lock(workdir, held)
        yield workdir


@on_first
def _lock(workdir: Path, held: contextlib.ExitStack) -> None:
    """Lock the folder until `held` is closed."""
    if in_bucket(workdir):
        bucket_lock.hold_lock(workdir, LOCK_FILE, _HOLDER, held)
        return
    path = _make_folder(workdir) / LOCK_FILE
    try:
        file = held.enter_context(open(path, "a+", encoding="ascii"))  # noqa: SIM115
    except OSError as error:
        raise WorkdirError(
            f"cannot open the lock {path}: {error.strerror}. Give another --workdir."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        busy = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        kind = BusyWorkdirError if busy else WorkdirError
        raise kind(_lock_message(workdir, file, error)) from error
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} {_HOLDER}\n")
        file.flush()
        os.fsync(file.fileno())  # for other machines that see the folder
    except OSError as error:
        raise WorkdirError(
            f"could not write {path}: {error.strerror}. Free space, then run the same command "
            "again."
        ) from error
    check_lock(workdir)  # it may have been deleted since the file was opened
    delete_leftovers(workdir)


@on_first
def lock_holder(workdir: str | os.PathLike) -> str:
    """What tells the last process that has locked the folder from all others; "" for none."""
    lock = as_path(workdir) / LOCK_FILE
    if in_bucket(lock):
        told = bucket_lock.read_lock(lock)
        return f"{told['process']} {told['token']}" if "token" in told else ""
    try:
        return lock.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


@on_first
def check_lock(workdir: str | os.PathLike, holder: str | None = None) -> None:
    """Check that the folder of this name is the one that a process has locked.

    Args:
        workdir: the folder.
        holder: the process, as `lock_holder` told it; None for this one.

    Raises:
        WorkdirError: it was deleted, and perhaps made anew, since.
    """
    there = lock_holder(workdir)
    if there != (holder or f"{os.getpid()} {_HOLDER}"):
        now = f"and is now that of process {there.split()[0]}" if there else "and is no run's now"
        raise WorkdirError(
            f"workdir {workdir} was deleted or replaced while this run went on, {now}. Nothing is "
            "written there any more. Run the command again, with another --workdir if the other "
            "run is to stay."
        )


@on_first
def delete_leftovers(folder: str | os.PathLike) -> None:
    """Delete what writes that were killed have left in a folder that no one else writes to."""
    if in_bucket(folder):  # where none leaves anything
        return
    for path in Path(folder).glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _lock_message(workdir: Path, file: Any, error: OSError) -> str:
    """Why the lock could not be had."""
    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
        return (
            f"cannot lock {workdir}: {error.strerror}. The file system may not offer flock; give a "
            "--workdir on another one."
        )
    file.seek(0)
    owner = (file.read().split() or ["unknown"])[0]
    return (
        f"workdir {workdir} is in use by process {owner}. Wait for it to end, stop it, or give "
        "another --workdir."
    )
