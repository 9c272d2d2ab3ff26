"""Random access to labelled images: in memory, in record files, or a part of either."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from aqt_search.data.crops import Crop
from aqt_search.data.decoding import decode_image
from aqt_search.data.errors import DataError

_DECODE_CHUNK = 256  # images that a thread decodes at a time


class ImageSource(Protocol):
    """What the pipeline reads from: labelled images of one shape, by index.

    `source[i]` is {"image": uint8 [H, W, C], "label": int}; `source.read(indices)` the same for a
    batch, {"image": uint8 [B, H, W, C], "label": int32 [B]}, and what the pipeline calls.

    `source.read(indices, crops)` cuts crops[b] out of image b as it is stored, whatever its size,
    and scales that to H x W.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""

    @property
    def read_threads(self) -> int:
        """How many threads should read batches at a time."""

    @property
    def in_memory(self) -> bool:
        """Whether images lie in memory, decoded: reading a batch is a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def read(
        self, indices: Sequence[int] | np.ndarray, crops: Sequence[Crop] | None = None
    ) -> dict[str, np.ndarray]:
        """Reads a batch."""


class Records(Protocol):
    """Examples by index, as TFDS data sources hand them over."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Mapping[str, Any]]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Images decoded into memory."""

    images: np.ndarray  # [N, H, W, C], uint8
    labels: np.ndarray  # [N], int32

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.images.shape[1:]

    @property
    def read_threads(self) -> int:
        """One: a batch is a copy, and more threads would only compete for Python's lock."""
        return 1

    @property
    def in_memory(self) -> bool:
        """That they are."""
        return True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def read(
        self, indices: Sequence[int] | np.ndarray, crops: Sequence[Crop] | None = None
    ) -> dict[str, np.ndarray]:
        """Copies a batch out of the array.

        Raises:
            DataError: crops, which this source cannot make: it holds images already resized.
        """
        if crops is not None:
            raise DataError(
                "random crops (crop_area) are cut out of images as they are stored, but these were "
                "decoded and resized into memory. Open the data set with max_decoded_bytes=0."
            )
        indices = np.asarray(indices)
        return {"image": self.images[indices], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """Images decoded, and resized, each time they are read.

    Attributes:
        records: examples with "image" (encoded bytes), "label", perhaps "filename" or "file_name";
            a TFDS data source whose images are left undecoded.
        name: what errors call it.
        num_classes: labels must lie in [0, num_classes).
        image_shape: height, width and channels that every image must have after resizing.
        shape_from: name of the example that `image_shape` was taken from.
        image_size: side length to resize to; None leaves images as they are.
        crop: what is cut out of each image before that, where `read` is given nothing else; None:
            the whole image is resized.
        read_threads: threads that read batches at a time.
    """

    records: Records
    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    shape_from: str
    image_size: int | None
    crop: Crop | None
    read_threads: int

    @property
    def in_memory(self) -> bool:
        """That they are not."""
        return False

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self._decode(index, self.records[index], self.crop)

    def read(
        self, indices: Sequence[int] | np.ndarray, crops: Sequence[Crop] | None = None
    ) -> dict[str, np.ndarray]:
        """Decodes a batch.

        Raises:
            DataError: an image is broken or has another shape, a label is out of range, or there
                are crops but no image_size.
        """
        indices = [int(index) for index in indices]
        records = self.records.__getitems__(indices)
        cuts: Sequence[Crop | None] = [self.crop] * len(indices) if crops is None else crops
        examples = [self._decode(*args) for args in zip(indices, records, cuts, strict=True)]
        return {
            "image": np.stack([example["image"] for example in examples]),
            "label": np.array([example["label"] for example in examples], np.int32),
        }

    def _decode(self, index: int, record: Mapping[str, Any], crop: Crop | None) -> dict[str, Any]:
        name = example_name(self.name, index, record)
        image = decode_image(
            record["image"],
            channels=self.image_shape[-1],
            image_size=self.image_size,
            crop=crop,
            name=name,
        )
        if image.shape != self.image_shape:
            raise DataError(
                f"{name}: image of shape {image.shape}, but {self.shape_from} has "
                f"{self.image_shape}. Give image_size to bring every image to one size."
            )
        label = int(record["label"])
        if not 0 <= label < self.num_classes:
            raise DataError(f"{name}: label {label} is not in 0..{self.num_classes - 1}.")
        return {"image": image, "label": label}


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of another source, in the order of `indices`."""

    parent: ImageSource
    indices: np.ndarray  # [N], int64

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.parent.image_shape

    @property
    def read_threads(self) -> int:
        """The parent's."""
        return self.parent.read_threads

    @property
    def in_memory(self) -> bool:
        """The parent's."""
        return self.parent.in_memory

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.parent[int(self.indices[index])]

    def read(
        self, indices: Sequence[int] | np.ndarray, crops: Sequence[Crop] | None = None
    ) -> dict[str, np.ndarray]:
        """Reads a batch from the parent."""
        return self.parent.read(self.indices[np.asarray(indices)], crops)


def example_name(source_name: str, index: int, record: Mapping[str, Any]) -> str:
    """The example's file where it is known, else its place in its source."""
    names = (record.get(key, b"") for key in ("filename", "file_name"))  # ours; ImageNet's
    filename = b"".join(names).decode("utf-8", "replace")
    return f"{source_name}: {filename}" if filename else f"{source_name}[{index}]"


def decode_all(source: RecordSource) -> ArraySource:
    """Decodes every image once, into one array.

    Raises:
        DataError: as `RecordSource.read`.
    """
    images = np.empty((len(source), *source.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)

    def decode_chunk(start: int) -> None:
        chunk = slice(start, min(start + _DECODE_CHUNK, len(source)))
        batch = source.read(range(chunk.start, chunk.stop))
        images[chunk], labels[chunk] = batch["image"], batch["label"]

    with ThreadPoolExecutor(source.read_threads) as pool:
        for _ in pool.map(decode_chunk, range(0, len(source), _DECODE_CHUNK)):
            pass  # the loop raises what a thread raised
    return ArraySource(images, labels)
