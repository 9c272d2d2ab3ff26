"""A data set's decoded images in a file beside its records, as reading it is faster than decoding.

CIFAR-10's 60,000 images, stored as JPEG, take 7 s to decode on one core and 0.3 s to read back.
"""

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from aqt_search.data import crops, decoding
from aqt_search.data.errors import DataError
from aqt_search.data.sources import ArraySource, RecordSource, decode_all
from aqt_search.data.staging import staging_folder


def decode_once(source: RecordSource, folder: Path, settings: tuple[Any, ...]) -> ArraySource:
    """Reads a source's decoded images from their file, or decodes them and writes it.

    The file is written whole or not at all, and only where it can be: in a folder that is full or
    read-only the images are decoded each time.

    Args:
        source: what to decode.
        folder: where its records lie, and the file will.
        settings: all that decoding depends on besides the records and the code.

    Raises:
        DataError: as `RecordSource.read`; or the file is damaged.
    """
    path = folder / f"decoded-{source_fingerprint(source, folder, settings)}.npz"
    if path.is_file():
        return _load(path)
    decoded = decode_all(source)
    with contextlib.suppress(OSError):
        _save(path, decoded)
    return decoded


def source_fingerprint(source: RecordSource, folder: Path, settings: tuple[Any, ...]) -> str:
    """Hash of the settings, the record files' names, sizes and times, and the code that decodes."""
    digest = hashlib.sha256()
    for module in (crops, decoding):
        digest.update(Path(module.__file__).read_bytes())
    libraries = [features.version(library) for library in ("pil", "jpg", "libjpeg_turbo", "zlib")]
    digest.update(repr((source.name, settings, libraries)).encode())
    for path in sorted(folder.glob("*array_record*")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def _load(path: Path) -> ArraySource:
    try:
        # A zip file, with a check sum for each array.
        with path.open("rb") as file, np.load(file) as arrays:
            return ArraySource(arrays["images"], arrays["labels"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged file of decoded images: {error}. Delete it.") from error


def _save(path: Path, decoded: ArraySource) -> None:
    with staging_folder(path.parent) as staging:
        staged = staging / path.name
        with staged.open("wb") as file:
            np.savez(file, images=decoded.images, labels=decoded.labels)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
