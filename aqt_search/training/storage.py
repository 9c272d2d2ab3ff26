"""Where the files of a run lie: on a disk, or in a bucket (gs://, s3://) through fsspec.

A path is a `pathlib.Path`, or for a URI an `epath.Path`, whose names are made and taken apart in
the same way; epath's own reading is not used, as it goes through TensorFlow where that is
installed, which knows no s3://. A bucket holds whole objects: each is there at once when it is
written. It knows no folders, no rename and no file lock. Credentials, endpoints and retries are
those of s3fs and gcsfs, from the environment or fsspec's configuration files.
"""

import contextlib
import importlib.util
import os
import re
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from absl import logging
from etils import epath

PathLike = str | os.PathLike[str]
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_WAIT_SECONDS = 60.0  # for a bucket, before it is said
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # by the scheme, the package that reads it
_EXTRAS = {"gs": "gcs", "s3": "s3"}  # and the extra of this package that brings it
_CREDENTIALS = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL",
}
_STILL_WAITING = (
    f"%s: still at it after {_WAIT_SECONDS:g} s: a slow network, or a store that does not answer, "
    "which the client asks again for some minutes before it gives up."
)


class WorkdirError(RuntimeError):
    """A run cannot use its folder; the message says why and what to do."""


class BusyWorkdirError(WorkdirError):
    """Another process holds the folder."""


def _scheme(path: PathLike) -> str:
    """The scheme of a URI; "" for a path on this machine."""
    found = _URI.match(os.fspath(path))
    return found[1] if found else ""


def in_bucket(path: PathLike) -> bool:
    """Whether a path is one in a bucket."""
    return bool(_scheme(path))


def as_path(path: PathLike) -> Path:
    """A path on this machine, or for a URI an `epath.Path`, which passes for one here.

    Raises:
        WorkdirError: a URI of another kind than gs:// and s3://, without its slashes or the name
            of a bucket, with a character that means something in patterns, or whose package is not
            installed.
    """
    scheme, text = _scheme(path), os.fspath(path)
    if not scheme:
        head, colon, rest = text.partition(":")
        if colon and head.lower() in _PACKAGES:  # tensorboardX takes such a folder for a bucket
            raise WorkdirError(
                f"{text} is no place in a bucket: expected {head.lower()}://{rest.lstrip('/')}. A "
                "folder of that name of this machine is given by its absolute path."
            )
        return Path(path)
    if scheme not in _PACKAGES:
        raise WorkdirError(
            f"{text}: nothing is known of {scheme}://. Give gs://BUCKET/FOLDER, s3://BUCKET/FOLDER "
            "or a folder of this machine."
        )
    if importlib.util.find_spec(_PACKAGES[scheme]) is None:
        raise WorkdirError(
            f"{text} needs the package {_PACKAGES[scheme]}, which is not installed: "
            f"pip install 'aqt-search[{_EXTRAS[scheme]}]', or pip install {_PACKAGES[scheme]}."
        )
    if not _bucket(text).strip() or re.search(r"[*?\[\]]", text):
        raise WorkdirError(
            f"{text} is no place in a bucket: expected {scheme}://BUCKET/FOLDER, without *, ?, [ "
            "and ]."
        )
    return cast(Path, epath.Path(text))


def _bucket(path: PathLike) -> str:
    return os.fspath(path).partition("://")[2].partition("/")[0]


class BucketError(WorkdirError):
    """A bucket does not answer, or not as asked: what lies there may be whole."""


@contextlib.contextmanager
def _reached(path: PathLike) -> Generator[Any]:
    """The file system of a bucket; what its clients raise, of many kinds, names the bucket.

    Raises:
        FileNotFoundError, FileExistsError: no such object, or no such bucket; there is one.
        BucketError: anything else.
    """
    import fsspec  # takes long, and few runs need it

    scheme = _scheme(path)
    waiting = threading.Timer(_WAIT_SECONDS, logging.warning, (_STILL_WAITING, path))
    waiting.daemon = True
    waiting.start()
    try:
        # Nothing that was listed is remembered: others write there, too.
        yield fsspec.filesystem(scheme, use_listings_cache=False)
    except (FileNotFoundError, FileExistsError, WorkdirError):
        raise
    except Exception as error:
        raise BucketError(_unreachable(path, error)) from error
    finally:
        waiting.cancel()


def _unreachable(path: PathLike, error: Exception) -> str:
    scheme, lines = _scheme(path), str(error).strip().splitlines()
    return (
        f"bucket {_bucket(path)} cannot be used for {os.fspath(path)} "
        f"({type(error).__name__}: {lines[0] if lines else ''}). Check the credentials "
        f"({_CREDENTIALS[scheme]}), that they may list, read, write and delete there, and the "
        "network; then run the same command again."
    )


def exists(path: PathLike) -> bool:
    """Whether there is a file or folder of that name. Raises WorkdirError of a bucket."""
    if not in_bucket(path):
        return Path(path).exists()
    with _reached(path) as store:
        return store.exists(os.fspath(path))


def is_folder(path: PathLike) -> bool:
    """Whether there is a folder of that name: in a bucket, an object below it."""
    if not in_bucket(path):
        return Path(path).is_dir()
    with _reached(path) as store:
        return store.isdir(os.fspath(path))


def is_file(path: PathLike) -> bool:
    """Whether there is a file, or an object, of that name."""
    if not in_bucket(path):
        return Path(path).is_file()
    with _reached(path) as store:
        return store.isfile(os.fspath(path))


def make_folder(path: PathLike) -> None:
    """Makes a folder in one that is there; a bucket needs none."""
    if not in_bucket(path):
        Path(path).mkdir(exist_ok=True)


def read_bytes(path: PathLike) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read; of a bucket a BucketError.
    """
    if not in_bucket(path):
        return Path(path).read_bytes()
    with _reached(path) as store:
        return store.cat_file(os.fspath(path))


def read_text(path: PathLike) -> str:
    """The content of a UTF-8 file. Raises UnicodeDecodeError, and as `read_bytes`."""
    if not in_bucket(path):
        return Path(path).read_text(encoding="utf-8")
    return read_bytes(path).decode("utf-8")


def matching(folder: Path, pattern: str) -> list[Path]:
    """What is there under names such as "points/*"."""
    if not in_bucket(folder):
        return list(folder.glob(pattern))
    with _reached(folder) as store:
        scheme = _scheme(folder)
        return [as_path(f"{scheme}://{name}") for name in store.glob(f"{folder}/{pattern}")]


def put(path: PathLike, content: bytes) -> None:
    """Writes an object, whole. Raises WorkdirError, also where there is no such bucket."""
    with _reached(path) as store:
        try:
            store.pipe_file(os.fspath(path), content)
        except FileNotFoundError as error:
            raise BucketError(_no_bucket(path)) from error


def _no_bucket(path: PathLike) -> str:
    return (
        f"there is no bucket {_bucket(path)} for {os.fspath(path)}. Make it, or give another "
        "--workdir."
    )


def put_new(path: PathLike, content: bytes) -> bool | None:
    """Writes an object if there is none of that name, which of two writers one only does.

    Returns:
        Whether it was written; None if the client cannot make that a condition.

    Raises:
        WorkdirError: as `put`.
    """
    try:
        with _reached(path) as store:
            store.pipe_file(os.fspath(path), content, mode="create")
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise BucketError(_no_bucket(path)) from error
    except BucketError as error:
        # Stores, and versions of the clients, tell a failed condition in several ways; one that
        # was asked twice, as its first answer was lost, finds its own object.
        if exists(path):
            return read_bytes(path) == content
        if isinstance(error.__cause__, NotImplementedError | TypeError | ValueError):
            return None
        raise
    return True


def objects(folder: PathLike) -> list[str]:
    """Names of all objects below a folder of a bucket, such as "arrays/d/0"; sorted."""
    with _reached(folder) as store:
        try:
            found = store.find(os.fspath(folder))
        except FileNotFoundError:
            return []
    place = os.fspath(folder).partition("://")[2].rstrip("/") + "/"
    return sorted(name.removeprefix(place) for name in found if name.startswith(place))


class Tag(NamedTuple):
    """What tells one state of an object from another."""

    size: int  # bytes
    version: str  # of its content: the store's tag, or else when it was written


def tags(folder: PathLike) -> dict[str, Tag]:
    """Names of all objects below a folder of a bucket, sorted, with their tags."""
    with _reached(folder) as store:
        try:
            found = store.find(os.fspath(folder), detail=True)
        except FileNotFoundError:
            return {}
    place = os.fspath(folder).partition("://")[2].rstrip("/") + "/"

    def tag(about: dict[str, Any]) -> Tag:
        version = about.get("ETag") or about.get("etag") or about.get("LastModified")
        return Tag(about["size"], str(version or about.get("updated")))

    return {
        name.removeprefix(place): tag(about)
        for name, about in sorted(found.items())
        if name.startswith(place)
    }


def delete(folder: PathLike, names: Sequence[str]) -> None:
    """Deletes objects of a folder; one that is gone already is none to delete."""
    with _reached(folder) as store:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                store.rm_file(f"{os.fspath(folder)}/{name}")


def upload(local: Path, folder: PathLike, names: Sequence[str]) -> None:
    """Writes files below a local folder to objects of the same names. Raises WorkdirError."""
    with _reached(folder) as store:
        try:
            targets = [f"{os.fspath(folder)}/{name}" for name in names]
            store.put([str(local / name) for name in names], targets)
        except FileNotFoundError as error:
            raise BucketError(_no_bucket(folder)) from error


def download(folder: PathLike, names: Sequence[str], local: Path) -> None:
    """Writes objects of a folder to files of the same names. Raises as `read_bytes`."""
    for name in names:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
    with _reached(folder) as store:
        store.get([f"{os.fspath(folder)}/{name}" for name in names],
                  [str(local / name) for name in names])  # fmt: skip


def copy(folder: PathLike, target: PathLike, names: Sequence[str]) -> None:
    """Copies objects of a folder to another of the bucket; the store does it by itself."""
    with _reached(folder) as store:
        for name in names:
            store.cp_file(f"{os.fspath(folder)}/{name}", f"{os.fspath(target)}/{name}")
