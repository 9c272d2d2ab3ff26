"""A folder of images, train/<class>/*.jpg and test/<class>/*.jpg, as a TFDS data set."""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import tensorflow_datasets as tfds
from PIL import Image

from aqt_search.data.decoding import MODE_OF_CHANNELS, decoding_threads, open_image
from aqt_search.data.errors import DataError

_EXTENSIONS = (".jpg", ".jpeg", ".png")
_LONGEST_NAME = 100
_CHECK_CHUNK = 256  # images held in memory while they are checked
_SHARD_BYTES = 2**28  # of images in a file of records, which is in memory while it is written


class LabelledFile(NamedTuple):
    """An image file and its class."""

    path: str  # relative to the folder, with forward slashes
    label: int
    size: int  # bytes


@dataclasses.dataclass(frozen=True)
class FolderListing:
    """What a folder holds.

    Attributes:
        root: the folder.
        class_names: sorted; a label is an index into it.
        files: for "train" and "test", the files in the order of their paths.
        fingerprint: hash of every file's path, size and modification time.
        contents: hash of every file's path and size alone, which a copy of the folder keeps.
    """

    root: Path
    class_names: tuple[str, ...]
    files: dict[str, tuple[LabelledFile, ...]]
    fingerprint: str
    contents: str


def list_folder(root: str | os.PathLike) -> FolderListing:
    """Lists the images of a folder. Names that start with a dot are left out.

    Raises:
        DataError: the folder is missing or empty, has no train/ or test/, a class without images or
            one that only test/ has, or holds a file that is no JPEG or PNG by its name, that cannot
            be read (such as a link to nothing), or whose name is not UTF-8.
    """
    root = Path(root).expanduser().absolute()
    _check_name(str(root))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder.")
    if not _entries(root):
        raise DataError(f"{root}: empty folder. {_layout(root)}")
    digests = hashlib.sha256(), hashlib.sha256()
    names = {split: _list_split(root, split, digests) for split in ("train", "test")}
    class_names = tuple(names["train"])
    for name in names["test"]:
        if name not in class_names:
            raise DataError(
                f"{root / 'test' / name}: class {name!r} is not in train/, which has "
                f"{', '.join(map(repr, class_names[:20]))}."
            )
    files = {
        split: tuple(
            LabelledFile(path, label, size)
            for label, sizes in ((class_names.index(name), own) for name, own in classes.items())
            for path, size in sizes.items()
        )
        for split, classes in names.items()
    }
    with_times, without = (digest.hexdigest()[:20] for digest in digests)
    return FolderListing(root, class_names, files, with_times, without)


def _layout(root: Path) -> str:
    return f"Expected {root}/train/<class>/*.jpg and {root}/test/<class>/*.jpg (or jpeg, png)."


def _entries(folder: Path) -> list[os.DirEntry]:
    path = os.fspath(folder)
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in visible:
            path = entry.path
            entry.stat()  # of what a link leads to; kept for later
    except OSError as error:
        raise _unreadable(path, error) from error
    for entry in visible:
        _check_name(entry.path)
    return sorted(visible, key=lambda entry: entry.name)


def _unreadable(path: str | os.PathLike, error: OSError) -> DataError:
    link = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
    return DataError(f"{path}{link}: cannot be read: {error.strerror}. Mend it, or delete it.")


def _check_name(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path!r}: a name that is not UTF-8. Rename it.") from error


def _list_split(root: Path, split: str, digests: tuple[Any, Any]) -> dict[str, dict[str, int]]:
    """{class: {path relative to root: bytes}} of one split.

    Each file's path, size and time go into the first digest, without the time into the second, a
    class at a time: what is known of a file takes several times the memory of its path.
    """
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{root}: no folder {split}/ in it. {_layout(root)}")
    classes: dict[str, dict[str, int]] = {}
    for entry in _entries(folder):
        if not entry.is_dir():
            raise DataError(f"{entry.path}: a file beside the class folders. {_layout(root)}")
        sizes = classes[entry.name] = {}
        for image in _images(entry.path):
            path, stat = f"{split}/{entry.name}/{image.name}", image.stat()
            for digest, time in zip(digests, (stat.st_mtime_ns, 0), strict=True):
                digest.update(os.fsencode(f"{path}\0{stat.st_size}\0{time}\n"))
            sizes[path] = stat.st_size
        if not sizes:
            raise DataError(
                f"{entry.path}: no images in this class. Add some or delete the folder."
            )
    if not classes:
        raise DataError(f"{folder}: no class folders, no images. {_layout(root)}")
    return classes


def _images(folder: str) -> list[os.DirEntry]:
    entries = _entries(Path(folder))
    for entry in entries:
        if not entry.name.lower().endswith(_EXTENSIONS) or not entry.is_file():
            raise DataError(
                f"{entry.path}: not a file named {', '.join('*' + end for end in _EXTENSIONS)}. "
                "Convert it, or move it out of the folder."
            )
    return entries


@dataclasses.dataclass(eq=False)
class ImageFolderConfig(tfds.core.BuilderConfig):
    """Which folder; its fingerprint is in the name, so a changed folder is prepared anew."""

    listing: FolderListing | None = dataclasses.field(default=None, repr=False)


def folder_builder(listing: FolderListing) -> type["ImageFolder"]:
    """The builder class of a listed folder, its only configuration."""
    # File systems take names of 255 bytes, of which the fingerprint has 21.
    folder_name = re.sub(r"[^A-Za-z0-9_-]", "_", listing.root.name)[:_LONGEST_NAME]

    # TFDS logs a warning at each configuration that its builder class does not list.
    class Builder(ImageFolder, skip_registration=True):
        name = ImageFolder.name
        code_path = None
        BUILDER_CONFIGS: ClassVar = [
            # pyrefly: ignore[unexpected-keyword]  # the base class is a dataclass of TFDS
            ImageFolderConfig(name=f"{folder_name}-{listing.fingerprint}", listing=listing)
        ]

    return Builder


class ImageFolder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Hands over the files' bytes as they are, after decoding each once to see that it is whole.

    A file of records at a time: TFDS's other builder sorts all examples, above 1 GB in files of
    their own, for which it needs TensorFlow.
    """

    name = "aqt_search_image_folder"
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # as in `Digits`

    def _info(self) -> tfds.core.DatasetInfo:
        listing = self.builder_config.listing
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images of {listing.root}.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, _channels(listing))),
                    "label": tfds.features.ClassLabel(names=listing.class_names),
                    "filename": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        listing = self.builder_config.listing
        return {
            split: [functools.partial(_examples, listing, shard) for shard in _shards(files)]
            for split, files in listing.files.items()
        }


def _shards(files: Sequence[LabelledFile]) -> Iterator[list[LabelledFile]]:
    """The files in runs of about `_SHARD_BYTES`."""
    ends = itertools.accumulate(file.size for file in files)
    numbered = ((end // _SHARD_BYTES, file) for end, file in zip(ends, files, strict=True))
    for _, shard in itertools.groupby(numbered, key=lambda pair: pair[0]):
        yield [file for _, file in shard]


def _examples(
    listing: FolderListing, files: Sequence[LabelledFile]
) -> Iterator[tuple[int, dict[str, Any]]]:
    read = functools.partial(_checked_bytes, listing, _channels(listing))
    threads = decoding_threads(*_open(listing, listing.files["train"][0]).size)
    chunks = (files[i : i + _CHECK_CHUNK] for i in range(0, len(files), _CHECK_CHUNK))
    keys = itertools.count()
    with ThreadPoolExecutor(threads) as pool:
        for chunk in chunks:
            # A thread is for large images; for small ones handing over costs more than reading.
            images = pool.map(read, chunk) if threads > 1 else map(read, chunk)
            for file, data in zip(chunk, images, strict=True):
                yield next(keys), {"image": data, "label": file.label, "filename": file.path}


def _open(listing: FolderListing, file: LabelledFile) -> Image.Image:
    return open_image(_read(listing, file), name=str(listing.root / file.path))


def _read(listing: FolderListing, file: LabelledFile) -> bytes:
    path = listing.root / file.path
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _channels(listing: FolderListing) -> int:
    """Channel count of the first training image; all others must have it."""
    file = listing.files["train"][0]
    mode = _open(listing, file).mode
    for channels, known in MODE_OF_CHANNELS.items():
        if mode == known:
            return channels
    raise DataError(
        f"{listing.root / file.path}: image of mode {mode}, expected 8-bit grey (L) or RGB. "
        "Convert the folder's images to one of them."
    )


def _checked_bytes(listing: FolderListing, channels: int, file: LabelledFile) -> bytes:
    path = listing.root / file.path
    data = _read(listing, file)
    mode = open_image(data, name=str(path)).mode
    if mode != MODE_OF_CHANNELS[channels]:
        raise DataError(
            f"{path}: image of mode {mode}, but {listing.files['train'][0].path} is "
            f"{MODE_OF_CHANNELS[channels]} ({channels} channels). Convert all to one mode."
        )
    return data
