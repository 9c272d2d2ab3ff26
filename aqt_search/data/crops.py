"""Which part of an image is kept: the centre, or one at random."""

import functools
from collections.abc import Callable

import numpy as np

from aqt_search.data.errors import DataError

Box = tuple[int, int, int, int]  # left, upper, right, lower in pixels, right and lower excluded
Crop = Callable[[int, int], Box]  # of an image's width and height

_TRIES = 10


def centre_crop(fraction: float) -> Crop:
    """The centred square of round(fraction * min(width, height)) pixels a side, at least one.

    Scaled to n x n pixels, it is what scaling the short side to n / fraction and cutting the
    centre n x n out gives: 224 / 256 = 0.875 is the usual evaluation on ImageNet.

    Raises:
        DataError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise DataError(
            f"crop_fraction is {fraction!r}, expected a share of the short side in (0, 1]."
        )

    def box(width: int, height: int) -> Box:
        side = max(1, round(fraction * min(width, height)))
        left, upper = (width - side) // 2, (height - side) // 2
        return left, upper, left + side, upper + side

    return box


def random_crops(
    rng: np.random.Generator,
    count: int,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> list[Crop]:
    """Random resized crops (Szegedy et al., 2015, arXiv:1409.4842, section 6), drawn ahead.

    All draws are made here, before the images' sizes are known, so that the boxes do not depend on
    the order in which images are decoded. Each of ten tries draws

        share of the area ~ U(area), log(width / height) ~ U(log aspect), the place ~ uniform,

    rounded to whole pixels; the first that fits into the image counts. If none does, the crop is
    the largest centred box of an aspect ratio within the bounds.

    Args:
        rng: 40 draws for each crop.
        count: how many.
        area: smallest and largest share of the image, in (0, 1].
        aspect: smallest and largest width / height.
    """
    draws = rng.random((count, _TRIES, 4))
    return [functools.partial(_random_box, area, aspect, draw) for draw in draws]


def _random_box(
    area: tuple[float, float],
    aspect: tuple[float, float],
    draws: np.ndarray,  # float64 [_TRIES, 4], uniform in [0, 1)
    width: int,
    height: int,
) -> Box:
    pixels = width * height * (area[0] + draws[:, 0] * (area[1] - area[0]))
    ratios = aspect[0] * (aspect[1] / aspect[0]) ** draws[:, 1]
    widths = np.rint(np.sqrt(pixels * ratios)).astype(int)
    heights = np.rint(np.sqrt(pixels / ratios)).astype(int)
    fits = (np.minimum(widths, heights) > 0) & (widths <= width) & (heights <= height)
    if not fits.any():
        return _largest_centred_box(aspect, width, height)
    first = int(np.argmax(fits))
    wide, high = int(widths[first]), int(heights[first])
    left = int(draws[first, 2] * (width - wide + 1))
    upper = int(draws[first, 3] * (height - high + 1))
    return left, upper, left + wide, upper + high


def _largest_centred_box(aspect: tuple[float, float], width: int, height: int) -> Box:
    wide = max(1, min(width, round(height * aspect[1])))
    high = max(1, min(height, round(width / aspect[0])))
    left, upper = (width - wide) // 2, (height - high) // 2
    return left, upper, left + wide, upper + high
