"""Folders that are there whole or not at all: on a disk by a rename, in a bucket by what is last.

A bucket has no rename. There a folder is written object by object and `manifest.json` last, and
deleted with `manifest.json` first: without it a folder is unfinished, and counts for nothing.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from aqt_search.training import storage
from aqt_search.training.storage import in_bucket
from aqt_search.training.workdir import sync_folder

MANIFEST_FILE = "manifest.json"
_TEMPORARY = ".unfinished_"
_DAMAGED = "damaged_"


def whole_folders(directory: Path) -> list[str]:
    """Names of what is whole in a directory, and perhaps of other things there; no order."""
    if in_bucket(directory):
        return [name for name, whole in _in_bucket(directory).items() if whole]
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []


def _in_bucket(directory: Path) -> dict[str, bool]:
    """Name of a folder -> whether it has its manifest."""
    found: dict[str, bool] = {}
    for name in storage.objects(directory):
        folder, _, inner = name.partition("/")
        found[folder] = found.get(folder, False) or inner == MANIFEST_FILE
    return found


@contextlib.contextmanager
def written_whole(folder: Path) -> Generator[Path]:
    """A folder of this machine to write into; what is there at the end becomes `folder`.

    Raises:
        OSError, BucketError: it cannot; nothing of that name is there then.
    """
    if in_bucket(folder):
        delete_unfinished(folder.parent)
        with tempfile.TemporaryDirectory(prefix="aqt_search_") as temporary:
            yield Path(temporary)
            _upload(Path(temporary), folder)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    delete_unfinished(folder.parent)
    own = folder.with_name(_TEMPORARY + folder.name)
    own.mkdir()
    yield own
    _sync_tree(own)
    os.rename(own, folder)
    sync_folder(folder.parent)


def _upload(local: Path, folder: Path) -> None:
    files = [str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()]
    storage.upload(local, folder, [name for name in files if name != MANIFEST_FILE])
    storage.upload(local, folder, [MANIFEST_FILE])


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder below, so that the rename to come shows whole data only."""
    for parent, _, files in os.walk(folder):
        for name in files:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(parent)


@contextlib.contextmanager
def read_locally(folder: Path) -> Generator[Path]:
    """The folder on this machine: itself, or a copy that is deleted at the end."""
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="aqt_search_") as temporary:
        storage.download(folder, storage.objects(folder), Path(temporary))
        yield Path(temporary)


def delete_unfinished(directory: Path) -> None:
    """Delete what a killed save, or a killed deletion, left behind."""
    if in_bucket(directory):
        for name, whole in _in_bucket(directory).items():
            if not whole:
                storage.delete(directory / name, storage.objects(directory / name))
        return
    for path in directory.glob(_TEMPORARY + "*"):
        shutil.rmtree(path)


def delete_whole(folder: Path) -> None:
    """Delete a folder such that a kill leaves no half of it that passes for whole."""
    if in_bucket(folder):
        storage.delete(folder, [MANIFEST_FILE])
        storage.delete(folder, storage.objects(folder))
        return
    doomed = folder.with_name(_TEMPORARY + folder.name)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def set_aside(folder: Path) -> Path:
    """Move a folder to `damaged_<its name>`, in place of what is there; returns where it is.

    Raises:
        OSError, BucketError: it cannot.
    """
    target = folder.with_name(_DAMAGED + folder.name)
    if in_bucket(folder):
        storage.delete(target, storage.objects(target))
        names = storage.objects(folder)
        storage.copy(folder, target, sorted(names, key=lambda name: name == MANIFEST_FILE))
        delete_whole(folder)
        return target
    if target.exists():
        shutil.rmtree(target)
    os.rename(folder, target)
    return target
