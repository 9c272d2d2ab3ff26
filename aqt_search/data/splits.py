"""Opening a data set by name: train, a part of it held out for the reward, and test."""

import difflib
import functools
import hashlib
import importlib.util
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aqt_search.data.crops import Crop, centre_crop
from aqt_search.data.decoded import decode_once, source_fingerprint
from aqt_search.data.decoding import MODE_OF_CHANNELS, decode_image, decoding_threads
from aqt_search.data.errors import DataError
from aqt_search.data.sources import (
    ArraySource,
    ImageSource,
    RecordSource,
    Subset,
    example_name,
)

MAX_DECODED_BYTES = 2 * 2**30


class Splits(NamedTuple):
    """A data set, ready for `train_batches` and `eval_batches`."""

    train: ImageSource
    reward: ImageSource  # held out of train; empty if nothing was to be held out
    test: ImageSource
    num_classes: int
    image_shape: tuple[int, int, int]  # height, width, channels
    class_names: tuple[str, ...]
    # Tells these images and labels from others, wherever they lie, before any are held out: by the
    # decoded pixels where they are in memory, else by the files' names and sizes.
    fingerprint: str = ""
    # Of `channel_statistics(train)`; None where reading all images anew is as fast.
    statistics_file: Path | None = None


def open_splits(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    crop_fraction: float | None = None,
    held_out: float | int = 0.1,
    seed: int = 0,
    folds: int = 0,
    max_decoded_bytes: int = MAX_DECODED_BYTES,
) -> Splits:
    """Opens a data set, preparing it if need be; no TensorFlow for the first two kinds of name.

    Args:
        name: "digits", scikit-learn's; "folder:PATH", a folder with train/<class>/*.jpg and
            test/<class>/*.jpg (or jpeg, png); or a TFDS name such as "cifar10", or "name/config",
            prepared in a format with random access (array_record).
        data_dir: where TFDS keeps prepared data; None is TFDS's default. A folder that changed (by
            its files' names, sizes and times) is prepared anew, beside the old.
        image_size: resize every image to image_size x image_size, averaging areas when shrinking
            (see `decoding.resize`); None leaves them, and then all must have one shape.
        crop_fraction: cut out of each image its centred square, of this share of the short side,
            and scale that to image_size (bilinear, see `decoding.decode_image`), so that images of
            any aspect ratio keep their proportions; 0.875 is ImageNet's usual. None resizes the
            whole image. Random crops for training are `Augmentation.crop_area`.
        held_out: how much of train is held out for the reward: a share in (0, 1), or a number of
            images; 0 holds out none. Drawn at random without replacement, from `seed`.
        seed: of the held-out part.
        folds: cross-validation, for a data set whose test split is too small to tell much: train
            and test are joined and cut into so many stratified parts, always the same, and part
            seed % folds is the test split. 0 leaves the splits as they are.
        max_decoded_bytes: a data set that fits, decoded and resized, is held in memory, and kept in
            a file beside the prepared data (see `decoded`); a larger one is decoded each time a
            batch is read, which random crops need: 0 for those. It then takes 8 bytes of memory
            for each image here, and 24 in each process that makes batches, whatever its size.

    Returns:
        The splits. "test" is the split named so if it has labels, else "validation".

    Raises:
        DataError: an unknown name, an unusable data set or image, or a bad argument.
    """
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise DataError(f"image_size is {image_size!r}, expected a whole number of pixels >= 1.")
    if crop_fraction is not None and image_size is None:
        raise DataError(f"crop_fraction is {crop_fraction} without image_size. Give image_size.")
    crop = None if crop_fraction is None else centre_crop(crop_fraction)
    builder, contents = _open_builder(name, data_dir)
    channels = _checked_channels(builder)
    class_names = tuple(builder.info.features["label"].names)
    open_source = functools.partial(_open_source, builder, channels, image_size, crop)
    train, test = open_source("train"), open_source(_test_split(builder))
    if test.image_shape != train.image_shape:
        raise DataError(
            f"{test.shape_from}: image of shape {test.image_shape}, but {train.shape_from} has "
            f"{train.image_shape}. Give image_size to bring every image to one size."
        )
    folder, settings = Path(builder.data_dir), (image_size, crop_fraction)
    stored = train
    if (len(train) + len(test)) * int(np.prod(train.image_shape)) <= max_decoded_bytes:
        train, test = (decode_once(source, folder, settings) for source in (train, test))
    fingerprint = _fingerprint(contents, class_names, train, test)
    if folds:
        train, test = _fold(train, test, folds, seed % folds)
    kept, held = _hold_out(len(train), held_out, seed)
    return Splits(
        train=Subset(train, kept),
        reward=Subset(train, held),
        test=test,
        num_classes=len(class_names),
        image_shape=train.image_shape,
        class_names=class_names,
        fingerprint=fingerprint,
        statistics_file=None
        if train.in_memory
        else _statistics_file(stored, folder, settings, kept),
    )


def _statistics_file(
    source: RecordSource, folder: Path, settings: tuple[Any, ...], kept: np.ndarray
) -> Path:
    settings = *settings, zlib.crc32(kept.data)
    return folder / f"statistics-{source_fingerprint(source, folder, settings)}.json"


def _fingerprint(
    contents: str, class_names: tuple[str, ...], train: ImageSource, test: ImageSource
) -> str:
    digest = hashlib.sha256(repr((class_names, train.image_shape)).encode())
    for source in (train, test):
        if isinstance(source, ArraySource):
            arrays = source.images, source.labels
            crcs = [zlib.crc32(np.ascontiguousarray(array).data) for array in arrays]
            digest.update(repr(crcs).encode())
        else:
            digest.update(contents.encode())
    return f"{len(train)} and {len(test)} images, {digest.hexdigest()[:16]}"


def _open_builder(name: str, data_dir: str | os.PathLike | None):
    """(the builder of a prepared data set, what tells its files from others: names and sizes)."""
    if name.startswith("folder:"):
        from aqt_search.data import image_folder
        from aqt_search.data.preparation import prepare

        listing = image_folder.list_folder(name.removeprefix("folder:"))
        return prepare(image_folder.folder_builder(listing), data_dir=data_dir), listing.contents
    if name == "digits":
        from aqt_search.data.digits import Digits
        from aqt_search.data.preparation import prepare

        builder = prepare(Digits, data_dir=data_dir)
    else:
        builder = _open_tfds(name, data_dir)
    records = sorted(Path(builder.data_dir).glob("*array_record*"))
    return builder, repr([(path.name, path.stat().st_size) for path in records])


def _open_tfds(name: str, data_dir: str | os.PathLike | None):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, cutoff=0.5)
        raise DataError(
            f"unknown data set {name!r}. Near names: {', '.join(near) or 'none'}. "
            "Expected digits, folder:PATH or a TFDS name."
        ) from error
    except (ValueError, AssertionError) as error:  # no such configuration or version
        raise DataError(f"data set {name!r} cannot be opened: {error}") from error
    if not builder.is_prepared():
        if importlib.util.find_spec("tensorflow") is None:
            raise DataError(
                f"{name!r} is not prepared in {builder.data_dir}, and TFDS needs TensorFlow to "
                "prepare it. Install the extra 'tensorflow' and run the same command again, or "
                f"copy it from where `tfds build {name} --file_format=array_record` was run."
            )
        builder.download_and_prepare(file_format="array_record")
    return builder


def _checked_channels(builder) -> int:
    """Channel count of a builder's images, after checking that it is an image classification."""
    import tensorflow_datasets as tfds

    features, name = dict(builder.info.features.items()), builder.info.full_name
    image, label = (features.get(key) for key in ("image", "label"))
    if (
        not isinstance(image, tfds.features.Image)
        or image.np_dtype != np.uint8
        or not isinstance(label, tfds.features.ClassLabel)
    ):
        raise DataError(
            f"{name}: expected features 'image' (8-bit Image) and 'label' (ClassLabel), "
            f"found {features}."
        )
    channels = image.shape[-1] or 3
    if channels not in MODE_OF_CHANNELS:
        raise DataError(f"{name}: images of {channels} channels, expected 1 or 3.")
    if "train" not in builder.info.splits:
        raise DataError(f"{name}: no split 'train', only {sorted(builder.info.splits)}.")
    return channels


def _open_records(builder, split: str):
    import tensorflow_datasets as tfds

    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise DataError(
            f"{builder.info.full_name} in {builder.data_dir} has no random access: it is stored as "
            f"{builder.info.file_format.value}. Convert it once, where TensorFlow is installed: "
            f"`tfds convert_format --dataset_version_dir={builder.data_dir} "
            "--out_file_format=array_record`."
        ) from error


def _test_split(builder) -> str:
    """The split "test", or "validation" where there is no test or one without labels (ImageNet)."""
    present = [split for split in ("test", "validation") if split in builder.info.splits]
    for split in present:
        records = _open_records(builder, split)
        if len(records) and records[0]["label"] >= 0:
            return split
    raise DataError(
        f"{builder.info.full_name}: expected a split 'test' or 'validation' with labels, found "
        f"{sorted(builder.info.splits)}."
    )


def _open_source(
    builder, channels: int, image_size: int | None, crop: Crop | None, split: str
) -> RecordSource:
    """A source whose image shape is the first example's."""
    records = _open_records(builder, split)
    name = f"{builder.info.full_name}, {split}"
    if not len(records):
        raise DataError(f"{name}: no examples.")
    record = records[0]
    first = example_name(name, 0, record)
    stored = decode_image(record["image"], channels=channels, image_size=None, name=first)
    height, width = stored.shape[:2] if image_size is None else (image_size, image_size)
    return RecordSource(
        records=records,
        name=name,
        num_classes=builder.info.features["label"].num_classes,
        image_shape=(height, width, channels),
        shape_from=first,
        image_size=image_size,
        crop=crop,
        read_threads=decoding_threads(*stored.shape[:2]),
    )


def _fold(train: ImageSource, test: ImageSource, folds: int, fold: int) -> tuple[Subset, Subset]:
    """(train, test) of a fold of both together."""
    from sklearn.model_selection import StratifiedKFold

    if not (isinstance(train, ArraySource) and isinstance(test, ArraySource)):
        raise DataError(
            f"folds is {folds}, but the images are not held in memory: leave folds at 0, or raise"
            " max_decoded_bytes and cut no parts out of images (crop_area)."
        )
    labels = np.concatenate([train.labels, test.labels])
    smallest = np.bincount(labels).min()
    if not 2 <= folds <= smallest:
        raise DataError(
            f"folds is {folds}; expected 0, or 2 to {smallest}, the images of the smallest class."
        )
    joined = ArraySource(np.concatenate([train.images, test.images]), labels)
    parts = StratifiedKFold(folds, shuffle=True, random_state=0).split(labels, labels)
    kept, tested = list(parts)[fold]
    return Subset(joined, kept), Subset(joined, tested)


def _hold_out(size: int, held_out: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of what stays in train and of what is held out, each in ascending order."""
    is_share = isinstance(held_out, float) and 0 < held_out < 1
    whole = not isinstance(held_out, bool) and held_out >= 0 and held_out % 1 == 0
    if not is_share and (not whole or (isinstance(held_out, float) and held_out == 1)):
        raise DataError(
            f"held_out is {held_out!r}; expected a share in (0, 1) or a number of images >= 0 (of"
            " one image 1: 1.0 would be a share of all)."
        )
    count = round(size * held_out) if is_share else int(held_out)
    if count >= size or (is_share and count == 0):
        raise DataError(
            f"held_out={held_out!r} of {size} training images leaves {count} for the reward and "
            f"{size - count} for training. Both need at least one."
        )
    order = np.random.default_rng(seed).permutation(size)
    return np.sort(order[count:]), np.sort(order[:count])
