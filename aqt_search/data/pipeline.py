"""Batches from a source, as grain pipelines: shuffle, batch, crop and read, augment, normalize.

Grain is imported where it is used: it takes most of a second.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING

import numpy as np

from aqt_search.data.augmentation import (
    NO_AUGMENTATION,
    Augmentation,
    augment,
    draw_crops,
)
from aqt_search.data.errors import DataError
from aqt_search.data.normalization import checked_statistics, normalize
from aqt_search.data.sources import ImageSource
from aqt_search.data.stream import IN_THREADS, Batches, Readers

if TYPE_CHECKING:
    import grain


def train_batches(
    source: ImageSource,
    *,
    batch_size: int,
    seed: int,
    mean: np.ndarray,
    std: np.ndarray,
    augmentation: Augmentation = NO_AUGMENTATION,
    start_step: int = 0,
    readers: Readers = IN_THREADS,
    shard: grain.sharding.ShardOptions | None = None,
) -> Batches:
    """An endless iterator over shuffled, augmented, normalized batches.

    Every epoch is a new order of the source; what is left of it at the end and fills no batch is
    dropped. Batch number n depends on the source, `seed`, `batch_size` and n alone, not on who
    reads it or on where the iterator started. Its random draws come from a counter-based generator
    (Philox) at position n, so that `get_state()` is just {"next_index": n}: plain JSON, and
    `set_state` goes on with the same bits.

    Args:
        source: where images come from.
        batch_size: images in a batch.
        seed: of order and augmentation.
        mean: float32 [C], of `channel_statistics`.
        std: float32 [C], the same.
        augmentation: what is done to images.
        start_step: number of the first batch.
        readers: threads and processes that make batches.
        shard: of n shards number i reads rows i B / n to (i + 1) B / n of every batch alone, in
            the bits that they have in the whole one; None reads all.
            `grain.sharding.ShardByJaxProcess()` gives every process its own.

    Returns:
        An iterator of {"image": float32 [B, H, W, C], "label": int32 [B]}, of a shard B / n.

    Raises:
        DataError: a batch larger than the source or that cannot be divided over the shards, or
            statistics that do not fit it; from the iterator: a broken image, or random crops of a
            source that cannot make them.
    """
    import grain

    _check_batch_size(source, batch_size)
    rows = _rows_of(shard, batch_size)
    if start_step < 0:
        raise DataError(f"start_step is {start_step}, expected a batch number >= 0.")
    mean, std = checked_statistics(mean, std, source.image_shape[-1])
    order_seed, augment_seed = np.random.SeedSequence(seed).generate_state(2).tolist()

    def part(rows: range) -> grain.MapDataset:
        return (
            grain.MapDataset.range(len(source) // batch_size)
            .repeat()
            .map_with_index(_ShuffledIndices(len(source), batch_size, order_seed))
            .random_map(
                functools.partial(_read_augmented, source, augmentation, rows), seed=augment_seed
            )
            .map(functools.partial(_normalize_batch, mean, std))
        )

    return Batches(source, part, rows, readers, start_step)


def eval_batches(
    source: ImageSource,
    *,
    batch_size: int,
    mean: np.ndarray,
    std: np.ndarray,
    readers: Readers = IN_THREADS,
    shard: grain.sharding.ShardOptions | None = None,
) -> Batches:
    """An iterator over the source once, in its order, in batches of one size.

    The last batch is filled up with copies of the last example, which "mask" marks.

    Args:
        source: where images come from.
        batch_size: images in a batch; may be more than the source has.
        mean: float32 [C], of `channel_statistics` of the training images.
        std: float32 [C], the same.
        readers, shard: as for `train_batches`.

    Returns:
        An iterator of {"image": float32 [B, H, W, C], "label": int32 [B],
        "mask": float32 [B]}, the mask 1 for examples and 0 for filling; of a shard B / n.

    Raises:
        DataError: an empty source, a batch that cannot be divided over the shards, or statistics
            that do not fit it.
    """
    import grain

    if not len(source):
        raise DataError("evaluation on an empty source (held_out=0 holds out no reward images).")
    _check_positive(batch_size)
    mean, std = checked_statistics(mean, std, source.image_shape[-1])

    def part(rows: range) -> grain.MapDataset:
        return (
            grain.MapDataset.range(-(-len(source) // batch_size))
            .map(functools.partial(_read_in_order, source, batch_size, rows))
            .map(functools.partial(_normalize_batch, mean, std))
        )

    return Batches(source, part, _rows_of(shard, batch_size), readers)


def _check_positive(batch_size: int) -> None:
    if operator.index(batch_size) < 1:
        raise DataError(f"batch_size is {batch_size}, expected a number of images >= 1.")


def _check_batch_size(source: ImageSource, batch_size: int) -> None:
    _check_positive(batch_size)
    if batch_size > len(source):
        raise DataError(
            f"batch_size is {batch_size}, but the training source has {len(source)} images. "
            "Give a smaller batch_size, or hold out less."
        )


def _rows_of(shard: grain.sharding.ShardOptions | None, batch_size: int) -> range:
    """The rows of every batch that a shard reads."""
    if shard is None:
        return range(batch_size)
    index, count = shard.shard_index, shard.shard_count
    if batch_size % count or not 0 <= index < count:
        raise DataError(
            f"A batch of {batch_size} images cannot be divided for shard {index} of {count}:"
            " expected a multiple of their number, and shards that count from 0."
        )
    size = batch_size // count
    return range(index * size, (index + 1) * size)


class _ShuffledIndices:
    """A function of the batch's number to its indices into the source, int64 [B].

    Grain's own shuffle asks for one index at a time: 1 ms for a batch of 128, 3.6 ms at 1,300
    images; and it seeds epoch e with seed + e, so that runs of neighbouring seeds share orders.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self._size, self._batch_size, self._seed = size, batch_size, seed
        # Two, as threads read ahead into the next epoch.
        self._order = functools.lru_cache(maxsize=2)(self._draw)

    def __reduce__(self):  # what goes to another process draws anew
        return type(self), (self._size, self._batch_size, self._seed)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._size)

    def __call__(self, number: int, _: int) -> np.ndarray:
        epoch, step = divmod(number, self._size // self._batch_size)
        return self._order(epoch)[step * self._batch_size : (step + 1) * self._batch_size]


def _read_augmented(
    source: ImageSource,
    augmentation: Augmentation,
    rows: range,
    indices: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    own, crops = slice(rows.start, rows.stop), draw_crops(len(indices), rng, augmentation)
    batch = source.read(indices[own], None if crops is None else crops[own])
    return {**batch, "image": augment(batch["image"], rng, augmentation, rows, len(indices))}


def _normalize_batch(
    mean: np.ndarray, std: np.ndarray, batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {**batch, "image": normalize(batch["image"], mean, std)}


def _read_in_order(
    source: ImageSource, batch_size: int, rows: range, number: int
) -> dict[str, np.ndarray]:
    indices = number * batch_size + np.arange(rows.start, rows.stop)
    mask = (indices < len(source)).astype(np.float32)
    return {**source.read(np.minimum(indices, len(source) - 1)), "mask": mask}
