"""Mean and standard deviation of each channel, and normalization by them."""

import contextlib
import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from aqt_search.data.errors import DataError
from aqt_search.data.sources import ImageSource
from aqt_search.data.staging import staging_folder

_READ_CHUNK = 64  # images that a thread holds at a time


def channel_statistics(
    source: ImageSource, *, max_examples: int = 10_000, file: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of pixel / 255, for each channel, over all pixels.

    Exact (sums in whole numbers) over the images looked at: all of them, or, of a larger source,
    `max_examples` evenly spaced ones.

    Args:
        source: training images.
        max_examples: the most that are looked at.
        file: where the result is kept, and found again; it is for this source alone
            (`Splits.statistics_file`). One that is damaged, or of other examples, is made anew, and
            where it cannot be written there is none.

    Returns:
        mean and std, float32 [C].

    Raises:
        DataError: the source is empty.
    """
    if not len(source):
        raise DataError("channel statistics of an empty source. Give one with images.")
    count = min(len(source), max_examples)
    counts = None if file is None else _kept_counts(file, count)
    if counts is None:
        counts = _all_counts(source, count)
        if file is not None:
            with contextlib.suppress(OSError):
                _keep_counts(file, count, counts)
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def _all_counts(source: ImageSource, count: int) -> np.ndarray:
    """How often each value occurs in `count` evenly spaced examples, int64 [C, 256]."""
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    chunks = [chosen[start : start + _READ_CHUNK] for start in range(0, len(chosen), _READ_CHUNK)]
    with ThreadPoolExecutor(source.read_threads) as pool:
        found = pool.map(functools.partial(_value_counts, source), chunks)
        return np.sum(list(found), axis=0)


def _kept_counts(file: Path, count: int) -> np.ndarray | None:
    try:
        kept = json.loads(file.read_text())
        counts = np.array(kept["counts"], np.int64)
        return counts if kept["examples"] == count and counts.shape[1:] == (256,) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep_counts(file: Path, count: int, counts: np.ndarray) -> None:
    with staging_folder(file.parent) as staging:
        staged = staging / file.name
        staged.write_text(json.dumps({"examples": count, "counts": counts.tolist()}))
        os.replace(staged, file)


def _value_counts(source: ImageSource, indices: np.ndarray) -> np.ndarray:
    """How often each of the 256 values occurs in each channel, int64 [C, 256]."""
    images = source.read(indices)["image"]
    channels = np.moveaxis(images, -1, 0)
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])


def checked_statistics(mean: Any, std: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std as float32 [C].

    Raises:
        DataError: a wrong shape, a value that is not finite, or a std that is not positive.
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if mean.shape != (channels,) or std.shape != (channels,):
        raise DataError(
            f"mean has shape {mean.shape} and std {std.shape}, expected ({channels},) for images "
            f"of {channels} channels."
        )
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise DataError(
            f"mean {mean} and std {std}: expected finite values and std > 0 (a channel of one "
            "constant value has std 0 and carries nothing: leave it out)."
        )
    return mean, std


def normalize(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(pixel / 255 - mean) / std, with mean and std per channel.

    Args:
        images: uint8 [B, H, W, C].
        mean: float32 [C], in units of the full range.
        std: float32 [C], the same.

    Returns:
        float32 [B, H, W, C].
    """
    width = images.shape[2]
    # One row of pixels at a time: an inner loop over 3 channels is four times slower.
    scale = np.tile(1 / (255 * std), width)
    offset = np.tile(-mean / std, width)
    rows = images.reshape(*images.shape[:2], -1).astype(np.float32)
    rows *= scale
    rows += offset
    return rows.reshape(images.shape)
