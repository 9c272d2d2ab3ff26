"""Images that lie in a bucket, copied once to a folder of this machine.

The copy is in the user's cache folder (`XDG_CACHE_HOME`, or ~/.cache), under a name for the place
in the bucket and one for what lies there (names, sizes, tags of the objects). What a killed copy
has brought is kept, and is not asked for again. Processes of one machine copy one after another.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_collections

from aqt_search.data import DataError
from aqt_search.training import storage
from aqt_search.training.storage import WorkdirError, as_path, in_bucket

_FOLDER = "folder:"
_AT_ONCE = 1000  # objects of one request for many


def on_this_machine(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration with images in a bucket replaced by their copy here.

    Both `data.name` (folder:s3://BUCKET/IMAGES) and `data.data_dir` may lie in a bucket, the latter
    for a data set that TFDS has prepared there, of which its own folder is copied.

    Raises:
      DataError: there is nothing at that place, or it cannot be copied.
    """
    name, data_dir = config.data.name, config.data.data_dir
    changed = config.copy_and_resolve_references()
    if in_bucket(name.removeprefix(_FOLDER)):
        changed.data.name = _FOLDER + str(local_copy(name.removeprefix(_FOLDER)))
    if in_bucket(data_dir):
        if name == "digits" or name.startswith(_FOLDER):
            raise DataError(
                f"data.data_dir is {data_dir!r}, but images are prepared and read on this machine:"
                " give a folder of it, or none."
            )
        own = name.partition(":")[0].partition("/")[0]
        copy = local_copy(f"{data_dir.rstrip('/')}/{own}", within=own)
        changed.data.data_dir = str(copy.parent)
    return changed


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "aqt_search" / "images"


def local_copy(uri: str, within: str = "") -> Path:
    """The folder of this machine that holds what lies below a URI, copied if need be.

    Args:
      uri: gs:// or s3://.
      within: a name for the innermost folder.

    Raises:
      DataError: as `on_this_machine`.
    """
    try:
        found = storage.tags(as_path(uri))
        tags = {name: tag for name, tag in found.items() if not name.endswith("/")}
        if not tags:
            raise DataError(f"There is nothing below {uri}: give another place for the images.")
        if odd := [name for name in tags if {"", ".", ".."} & set(name.split("/"))]:
            raise DataError(f"{uri}/{odd[0]} has a name that no file can have: rename it.")
        told = hashlib.sha256(json.dumps(sorted(tags.items())).encode()).hexdigest()[:16]
        home = _cache_folder() / hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:16]
        target = home / told / within
        with _alone(home):
            if not target.is_dir():
                _copy(uri, tags, home / f"{told}.part" / within)
                (home / f"{told}.part").rename(home / told)
        return target
    except WorkdirError as error:
        raise DataError(f"{uri}: the images cannot be copied: {error}") from error
    except OSError as error:
        raise DataError(
            f"{uri}: the images cannot be copied to {_cache_folder()}: {error}. Free space, or set"
            " XDG_CACHE_HOME to a folder with more; then run the same command again."
        ) from error


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Waits until no other process of this machine copies there."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy(uri: str, tags: Mapping[str, storage.Tag], target: Path) -> None:
    """Copies what is not there yet, in its whole size."""

    def is_there(name: str) -> bool:
        path = target / name
        return path.is_file() and path.stat().st_size == tags[name].size

    wanted = [name for name in tags if not is_there(name)]
    print(
        f"Copying {len(wanted)} of {len(tags)} files from {uri}: {target}", file=sys.stderr,
        flush=True,
    )  # fmt: skip
    for start in range(0, len(wanted), _AT_ONCE):
        storage.download(as_path(uri), wanted[start : start + _AT_ONCE], target)
    short = [name for name in tags if not is_there(name)]
    if short:
        raise DataError(
            f"{uri}/{short[0]} was not copied in its whole size: it changed meanwhile? Run the same"
            " command again."
        )
