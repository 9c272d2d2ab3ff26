"""Random shifts and mirror images of a batch."""

import dataclasses

import numpy as np

from aqt_search.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        crop_padding: each image is shifted by up to this many pixels in each direction (cut at
            random from the image padded by as many black pixels on every side); 0 leaves it.
        flip: each image is mirrored left to right with probability 1/2.
    """

    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self):
        if self.crop_padding < 0:
            raise DataError(f"crop_padding is {self.crop_padding}, expected pixels >= 0.")


NO_AUGMENTATION = Augmentation()


def augment(images: np.ndarray, rng: np.random.Generator, augmentation: Augmentation) -> np.ndarray:
    """Augments uint8 [B, H, W, C], each image by its own draw from `rng`."""
    batch_size = len(images)
    if augmentation.crop_padding:
        corners = rng.integers(0, 2 * augmentation.crop_padding + 1, size=(2, batch_size))
        images = shifted_crops(images, augmentation.crop_padding, *corners)
    if augmentation.flip:
        flipped = np.flatnonzero(rng.integers(0, 2, size=batch_size))
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
