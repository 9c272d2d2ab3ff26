"""Random crops, shifts and mirror images of a batch."""

import dataclasses
import sys

import numpy as np

from aqt_search.data.crops import Crop, random_crops
from aqt_search.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        crop_padding: each image is shifted by up to this many pixels in each direction (cut at
            random from the image padded by as many black pixels on every side); 0 leaves it.
        flip: each image is mirrored left to right with probability 1/2.
        crop_area: a part of each image, its share of the area between these two, is cut out at
            random and scaled to the image size (see `crops.random_crops`), before all else; None
            reads images as for evaluation. ImageNet's usual is (0.08, 1).
        crop_aspect: smallest and largest width / height of that part.
    """

    crop_padding: int = 0
    flip: bool = False
    crop_area: tuple[float, float] | None = None
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self):
        if self.crop_padding < 0:
            raise DataError(f"crop_padding is {self.crop_padding}, expected pixels >= 0.")
        if self.crop_area is not None and not _are_bounds(self.crop_area, largest=1):
            raise DataError(
                f"crop_area is {self.crop_area}, expected two shares of an image's area, "
                "0 < smallest <= largest <= 1."
            )
        if not _are_bounds(self.crop_aspect, largest=sys.float_info.max):
            raise DataError(
                f"crop_aspect is {self.crop_aspect}, expected two values of width / height, "
                "0 < smallest <= largest."
            )


def _are_bounds(bounds: tuple[float, float], *, largest: float) -> bool:
    return len(bounds) == 2 and 0 < bounds[0] <= bounds[1] <= largest


NO_AUGMENTATION = Augmentation()


def draw_crops(
    count: int, rng: np.random.Generator, augmentation: Augmentation
) -> list[Crop] | None:
    """What to cut out of each of `count` images, for `ImageSource.read`; None: no random crops."""
    if augmentation.crop_area is None:
        return None
    return random_crops(rng, count, area=augmentation.crop_area, aspect=augmentation.crop_aspect)


def augment(
    images: np.ndarray,
    rng: np.random.Generator,
    augmentation: Augmentation,
    rows: range | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Augments uint8 [B, H, W, C], each image by its own draw from `rng`.

    Args:
        images: [B, H, W, C].
        rng: of the whole batch.
        augmentation: what is done.
        rows: which of the batch the images are; None: they are all of it. Each is then augmented as
            it would be among all.
        batch_size: of the whole batch, with `rows`.
    """
    rows = range(len(images)) if rows is None else rows
    batch_size = len(images) if batch_size is None else batch_size
    own = slice(rows.start, rows.stop)
    if augmentation.crop_padding:
        corners = rng.integers(0, 2 * augmentation.crop_padding + 1, size=(2, batch_size))
        images = shifted_crops(images, augmentation.crop_padding, *corners[:, own])
    if augmentation.flip:
        flipped = np.flatnonzero(rng.integers(0, 2, size=batch_size)[own])
        mirrored = images[flipped][:, :, ::-1]
        images = images.copy()
        images[flipped] = mirrored
    return images


def shifted_crops(
    images: np.ndarray, padding: int, tops: np.ndarray, lefts: np.ndarray
) -> np.ndarray:
    """out[b] = padded[b, tops[b] : tops[b] + H, lefts[b] : lefts[b] + W].

    Args:
        images: [B, H, W, C].
        padding: zeros added on every side.
        tops: int [B], in 0..2 * padding.
        lefts: int [B], the same.

    Returns:
        [B, H, W, C].
    """
    batch_size, height, width, channels = images.shape
    inside = slice(padding, padding + height), slice(padding, padding + width)
    padded = np.zeros(
        (batch_size, height + 2 * padding, width + 2 * padding, channels), images.dtype
    )
    padded[:, inside[0], inside[1]] = images
    # With width and channels as one axis a crop's rows are contiguous, and one indexing copies all.
    rows = padded.reshape(batch_size, height + 2 * padding, -1)
    windows = np.lib.stride_tricks.sliding_window_view(rows, (height, width * channels), (1, 2))
    return windows[np.arange(batch_size), tops, lefts * channels].reshape(images.shape)
