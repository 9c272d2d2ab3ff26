"""Encoded images to uint8 arrays, cropped and resized."""

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

from aqt_search.data.crops import Crop
from aqt_search.data.errors import DataError

# Pillow's modes for the channel counts in use; every one of them has 8 bits a channel.
MODE_OF_CHANNELS = {1: "L", 3: "RGB"}

# In pixels. `Image.reduce` divides by multiplying with a truncated 24-bit reciprocal, whose error
# grows with the block: 10 grey levels for 1000 x 1000.
_LARGEST_BLOCK = 256

# What Pillow raises on damaged files, by format and by the place of the damage.
_BROKEN_IMAGE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# How to turn an image upright, by EXIF's tag "orientation"; 1 is upright (CIPA DC-008, 4.6.5).
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes, *, name: str) -> Image.Image:
    """Decodes an image completely, in the mode it is stored in, and turns it upright.

    A camera may store an image as its sensor lay, and in EXIF how it was held; it is turned as
    viewers do. EXIF data that cannot be read counts as none.

    Args:
        data: the encoded image (PNG, JPEG or another format of Pillow's).
        name: what an error calls it: a path, or the example's place in its data set.

    Raises:
        DataError: the bytes are no image, or are damaged or truncated.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except _BROKEN_IMAGE as error:
        raise DataError(
            f"{name}: broken image ({len(data)} bytes): {error}. Replace or delete it."
        ) from error
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION)
    except _BROKEN_IMAGE:
        return 1
    return found if isinstance(found, int) else 1


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resizes to size x size pixels, whatever the aspect ratio was.

    Shrinking averages areas: out[i, j] = mean of the source pixels whose centres lie under output
    pixel (i, j), off by at most 1. It is exact, a half rounded up, where these are equal blocks of
    2^k pixels, up to 256. Enlarging is bilinear.
    """
    width, height = image.size
    if (width, height) == (size, size):
        return image
    equal_blocks = width % size == 0 and height % size == 0
    if equal_blocks and width * height <= _LARGEST_BLOCK * size**2:
        # Pillow's BOX filter rounds once a direction, its `reduce` once in all.
        return image.reduce((width // size, height // size))
    shrinks = width >= size and height >= size
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return image.resize((size, size), method)


def decode_image(
    data: bytes, *, channels: int, image_size: int | None, crop: Crop | None = None, name: str
) -> np.ndarray:
    """Decodes an image to uint8 [height, width, channels].

    An image stored in another mode (palette, CMYK) is converted to the channel count that its data
    set declares, as TFDS does. The image folder refuses such images when it is prepared.

    Args:
        data: the encoded image.
        channels: 1 or 3.
        image_size: side length to resize to; None leaves the image as it is.
        crop: what to cut out of the image. The part is scaled to image_size x image_size by
            Pillow's bilinear filter: weights fall linearly to 0 over max(1, source pixels per
            output pixel), so that shrinking averages. None: the whole image, see `resize`.
        name: as for `open_image`.

    Raises:
        DataError: broken image, or a crop without image_size.
    """
    image = open_image(data, name=name)
    mode = MODE_OF_CHANNELS[channels]
    if image.mode != mode:
        image = image.convert(mode)
    if crop is not None:
        if image_size is None:
            raise DataError(f"{name}: a crop is scaled to image_size, which is None. Give one.")
        size, box = (image_size, image_size), crop(*image.size)
        image = image.resize(size, Image.Resampling.BILINEAR, box=box)
    elif image_size is not None:
        image = resize(image, image_size)
    array = np.asarray(image)
    return array.reshape(*array.shape[:2], channels)


def decoding_threads(height: int, width: int) -> int:
    """How many threads decode images of this size fastest.

    Pillow releases Python's lock while it decodes; for small images the threads spend more on
    handing the lock over than they win (32 x 32: two threads take twice as long as one).
    """
    return (os.cpu_count() or 1) if height * width >= 128 * 128 else 1
