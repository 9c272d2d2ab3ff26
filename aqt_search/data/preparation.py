"""Preparing a TFDS data set of our own: written whole or not at all, without TensorFlow."""

import contextlib
import io
import os
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from aqt_search.data.errors import DataError
from aqt_search.data.staging import staging_folder


def prepare(
    builder_class: type[tfds.core.DatasetBuilder],
    *,
    data_dir: str | os.PathLike | None,
) -> tfds.core.DatasetBuilder:
    """Returns a builder of the data on disk, as array_record files, preparing them if need be.

    It is one that reads the folder and knows nothing of `builder_class`, which may hold a listing
    of many files.

    Data is written under a fresh name beside its place and moved there in one rename, so a killed
    preparation leaves nothing that is taken for data, and of several processes preparing the same
    data set the first to end provides it. (TFDS's own temporary names are drawn from Python's
    global random state: two processes with equal seeds would write into one folder.)

    Args:
        builder_class: the builder; of several configurations its first is prepared.
        data_dir: where prepared data sets lie; None is TFDS's default.

    Raises:
        DataError: as the builder; or the data cannot be written.
    """
    builder = builder_class(data_dir=data_dir)
    target = Path(builder.data_dir)
    if _is_whole(builder):
        return tfds.builder_from_directory(str(target))
    # One place for all configurations: a folder that changed after a kill has another.
    home = next(folder for folder in target.parents if folder.name == builder.name)
    print(f"Preparing data set {builder.name} in {target}.", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(home) as staging:
            staged = builder_class(data_dir=str(staging))
            # TFDS announces a download and the temporary folder, and draws a bar per shard.
            quiet = io.StringIO()
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                staged.download_and_prepare(file_format="array_record")
            _sync_files(Path(staged.data_dir))
            try:
                os.rename(staged.data_dir, target)
            except OSError:
                if not _is_whole(builder):  # else another process was first
                    raise
    except (OSError, RuntimeError) as error:  # array_record raises the latter on a full disk
        raise DataError(
            f"{target}: the data set could not be prepared: {error}. Free space or make the folder "
            "writable, or give another data_dir; then run the same command again."
        ) from error
    return tfds.builder_from_directory(str(target))


def _is_whole(builder: tfds.core.DatasetBuilder) -> bool:
    # The folder appears by a rename, complete; asking TFDS instead would log a warning when it is
    # not there.
    return (Path(builder.data_dir) / "dataset_info.json").is_file()


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
