"""Crops of images of varying sizes: random ones for training, the centre for evaluation."""

import io
import json

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from aqt_search import data
from aqt_search.data import crops
from aqt_search.data.decoding import decode_image
from aqt_search.data.preparation import prepare

UNIT = {"mean": np.zeros(3), "std": np.ones(3)}
AUGMENTED = data.Augmentation(flip=True, crop_area=(0.08, 1.0))
SIZES = [(150, 90), (90, 150), (120, 120), (250, 60), (40, 250), (20, 16), (240, 181), (77, 99)]


def encoded(image, extension="png"):
    buffer = io.BytesIO()
    image.save(buffer, extension)
    return buffer.getvalue()


def noise(width, height, seed=0, channels=3):
    shape = (height, width, channels)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def coordinates(width, height, number):
    """An image that tells where a part of it lies: red is x, green is y, blue is its number."""
    pixels = np.full((height, width, 3), number, np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def write_images(root, image_of, extension="png", copies=2):
    """Two classes of images of `SIZES`; returns the test images in their order."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number, size in enumerate(SIZES * copies):
                path = root / split / name / f"{number:02}.{extension}"
                image_of(*size, number % len(SIZES)).save(path)
    paths = sorted(root.glob(f"test/*/*.{extension}"))
    return [Image.open(io.BytesIO(path.read_bytes())) for path in paths]


def open_folder(tmp_path, **kwargs):
    options = {"image_size": 24, "crop_fraction": 0.875, "held_out": 0, "max_decoded_bytes": 0}
    name = f"folder:{tmp_path / 'images'}"
    return data.open_splits(name, data_dir=tmp_path / "prepared", **options | kwargs)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(first, second):
    for left, right in zip(first, second, strict=True):
        for key in ("image", "label"):
            np.testing.assert_array_equal(left[key], right[key])


def boxes(width, height, count=4000, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), seed=0):
    drawn = crops.random_crops(np.random.default_rng(seed), count, area=area, aspect=aspect)
    return np.array([crop(width, height) for crop in drawn])


# Boxes


@pytest.mark.parametrize(
    "size, fraction, box",
    [
        ((500, 375), 0.875, (86, 23, 414, 351)),  # 0.875 * 375 = 328.125
        ((375, 500), 0.875, (23, 86, 351, 414)),
        ((256, 256), 0.875, (16, 16, 240, 240)),
        ((10, 20), 1.0, (0, 5, 10, 15)),
        ((1, 7), 0.3, (0, 3, 1, 4)),
    ],
)
def test_centre_box(size, fraction, box):
    assert crops.centre_crop(fraction)(*size) == box


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (9, 13), (1, 1), (2000, 30)])
@pytest.mark.parametrize("area", [(0.08, 1.0), (0.25, 0.5), (1.0, 1.0)])
def test_random_boxes_are_inside_and_within_bounds(size, area):
    width, height = size
    aspect = (3 / 4, 4 / 3)
    left, upper, right, lower = boxes(*size, 300, area, aspect).T
    wide, high = right - left, lower - upper
    assert min(left.min(), upper.min()) >= 0
    assert right.max() <= width
    assert lower.max() <= height
    assert min(wide.min(), high.min()) >= 1
    # Sides are rounded to whole pixels: off by at most a half.
    assert ((wide - 0.5) / (high + 0.5)).max() <= aspect[1]
    assert ((wide + 0.5) / (high - 0.5)).min() >= aspect[0]
    # With no part of such an area in the image, it is the largest box of such an aspect ratio.
    largest = min(width, height * aspect[1]) * min(height, width / aspect[0])
    assert ((wide - 0.5) * (high - 0.5)).max() <= max(area[1] * width * height, largest)
    assert ((wide + 0.5) * (high + 0.5)).min() >= min(area[0] * width * height, largest)


def test_random_boxes_are_uniform_in_area_log_aspect_and_place():
    # Every try fits: the longest side is sqrt(0.5 * 4 / 3) = 0.82 of the image's.
    size, count = 1000, 4000
    left, upper, right, lower = boxes(size, size, count, area=(0.08, 0.5)).T
    wide, high = right - left, lower - upper
    uniform = {
        "area": (wide * high / size**2 - 0.08) / 0.42,
        "aspect": (np.log(wide / high) / np.log(4 / 3) + 1) / 2,
        "left": left / (size - wide),
        "upper": upper / (size - high),
    }
    for name, values in uniform.items():
        # Kolmogorov: the distance passes 1.95 / sqrt(n) once in a thousand; the rest is rounding.
        distance = np.abs(np.sort(values) - (np.arange(count) + 0.5) / count).max()
        assert distance < 1.95 / np.sqrt(count) + 0.006, name
    correlation = np.corrcoef(list(uniform.values())) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(count)  # four standard deviations


def test_random_boxes_reach_every_place():
    drawn = boxes(10, 8, 1000, area=(0.2, 0.2), aspect=(1.0, 1.0))  # 4 x 4
    # 35 places of probability 1 / 35: one is missing with probability 35 * (34 / 35)^1000 < 1e-10.
    expected = {(left, upper, left + 4, upper + 4) for left in range(7) for upper in range(5)}
    assert set(map(tuple, drawn.tolist())) == expected


@pytest.mark.parametrize(
    "size, area, aspect, box",
    [
        ((100, 50), (1.0, 1.0), (1.0, 1.0), (25, 0, 75, 50)),
        ((1000, 10), (0.9, 1.0), (3 / 4, 4 / 3), (493, 0, 506, 10)),
        ((9, 1000), (0.9, 1.0), (3 / 4, 4 / 3), (0, 494, 9, 506)),
        ((100, 50), (0.9, 1.0), (4.0, 4.0), (0, 12, 100, 37)),
        ((12, 10), (1.0, 1.0), (1.2, 1.2), (0, 0, 12, 10)),
        ((1, 1), (0.3, 1.0), (1.0, 1.0), (0, 0, 1, 1)),
    ],
)
def test_where_no_box_or_only_one_fits(size, area, aspect, box):
    np.testing.assert_array_equal(boxes(*size, 20, area, aspect), [box] * 20)


# Pixels


def triangle_filter(length, start, stop, size):
    """[size, length] weights of bilinear resampling, by its definition, in float64."""
    scale = (stop - start) / size
    centres = start + (np.arange(size)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centres) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "size, box",
    [
        ((90, 60), (10, 5, 73, 49)),  # shrinks
        ((90, 60), (0, 0, 90, 60)),
        ((90, 60), (80, 2, 87, 59)),  # widens, and lowers
        ((5, 3), (1, 1, 4, 2)),  # enlarges an image smaller than the result
    ],
)
def test_a_crop_is_scaled_bilinearly(size, box, channels):
    image, (left, upper, right, lower) = noise(*size, channels=channels), box
    result = decode_image(
        encoded(image), channels=channels, image_size=24, crop=lambda *_: box, name="x"
    )
    across = triangle_filter(size[0], left, right, 24)
    down = triangle_filter(size[1], upper, lower, 24)
    pixels = np.asarray(image, float).reshape(size[1], size[0], channels)
    expected = np.einsum("iy,jx,yxc->ijc", down, across, pixels)
    assert result.shape == (24, 24, channels)
    # Pillow rounds once a direction, and its weights to 22 bits.
    assert np.abs(result - expected).max() <= 1.01


def test_centre_crop_is_resizing_the_short_side_and_cutting():
    image = noise(768, 512)
    result = decode_image(
        encoded(image), channels=3, image_size=224, crop=crops.centre_crop(0.875), name="x"
    )
    resized = image.resize((384, 256), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(result, np.asarray(resized)[16:240, 80:304])


def test_a_crop_of_the_image_size_is_cut_exactly():
    image = noise(60, 40)
    result = decode_image(
        encoded(image), channels=3, image_size=32, crop=crops.centre_crop(0.8), name="x"
    )
    np.testing.assert_array_equal(result, np.asarray(image)[4:36, 14:46])


@pytest.mark.parametrize("extension", ["png", "jpeg"])
def test_reading_given_boxes_is_pillows_resize(tmp_path, extension):
    images = write_images(tmp_path / "images", noise, extension)
    source = open_folder(tmp_path).test
    given = [crops.centre_crop(0.5), crops.centre_crop(0.9)]
    batch = source.read([5, 3], given)
    for result, image, crop in zip(batch["image"], (images[5], images[3]), given, strict=True):
        expected = image.resize((24, 24), Image.Resampling.BILINEAR, box=crop(*image.size))
        np.testing.assert_array_equal(result, expected)


# Batches


@pytest.mark.parametrize("max_decoded_bytes", [0, 2**30])
def test_evaluation_reads_centre_crops(tmp_path, max_decoded_bytes):
    images = write_images(tmp_path / "images", noise, "jpeg")
    splits = open_folder(tmp_path, max_decoded_bytes=max_decoded_bytes)
    assert splits.image_shape == (24, 24, 3)
    batches = data.eval_batches(splits.test, batch_size=len(images), **UNIT)
    (batch,) = list(batches)
    crop = crops.centre_crop(0.875)
    expected = np.stack(
        [
            np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, box=crop(*image.size)))
            for image in images
        ]
    )
    np.testing.assert_allclose(batch["image"], expected / 255, atol=1e-6)
    # Training without crop_area, as for the reward, reads the same.
    train = data.train_batches(splits.train, batch_size=len(images), seed=0, **UNIT)
    unordered = np.sort(next(train)["image"].reshape(len(images), -1), axis=0)
    np.testing.assert_array_equal(unordered, np.sort(batch["image"].reshape(len(images), -1), 0))
    # And so do the statistics.
    pixels = expected.reshape(-1, 3) / 255
    np.testing.assert_allclose(data.channel_statistics(splits.test)[0], pixels.mean(0), rtol=1e-6)


def test_training_reads_random_parts_within_bounds(tmp_path):
    write_images(tmp_path / "images", coordinates)
    area, size = (0.2, 0.6), 24
    iterator = data.train_batches(
        open_folder(tmp_path).train, batch_size=32, seed=0, mean=[0] * 3, std=[1 / 255] * 3,
        augmentation=data.Augmentation(flip=True, crop_area=area),
    )  # fmt: skip
    images = np.concatenate([batch["image"] for batch in take(iterator, 8)])
    seen = set()
    for image in images.round():
        number = int(image[0, 0, 2])
        width, height = SIZES[number]
        if not 2 / 3 <= width / height <= 3 / 2:
            continue  # a part of such an area need not fit
        flipped = image[0, -2, 0] < image[0, 1, 0]
        x, y = image[0, :: -1 if flipped else 1, 0], image[:, 0, 1]
        # Away from the border, pixel i is the coordinate start + (i + 1 / 2) length / size - 1 / 2.
        lengths = [(line[-3] - line[2]) / (size - 5) * size for line in (x, y)]
        starts = [
            line[2] + 0.5 - 2.5 * length / size
            for line, length in zip((x, y), lengths, strict=True)
        ]
        slack = 2.5  # pixels: each line is known to 1/2 at both ends, and the box is rounded
        assert min(starts) > -slack
        assert starts[0] + lengths[0] < width + slack
        assert starts[1] + lengths[1] < height + slack
        assert (lengths[0] - slack) * (lengths[1] - slack) <= area[1] * width * height
        assert (lengths[0] + slack) * (lengths[1] + slack) >= area[0] * width * height
        assert (lengths[0] - slack) / (lengths[1] + slack) <= 4 / 3
        assert (lengths[0] + slack) / (lengths[1] - slack) >= 3 / 4
        seen.add((number, flipped, *np.round(starts)))
    assert len(seen) > 100  # of about 128: parts of one place are rare
    assert 0.3 < np.mean([flipped for _, flipped, *_ in seen]) < 0.7  # four standard deviations


def test_crops_do_not_depend_on_threads_or_where_the_iterator_started(tmp_path):
    write_images(tmp_path / "images", noise, "jpeg")
    source = open_folder(tmp_path).train

    def start(**kwargs):
        return data.train_batches(
            source, batch_size=5, seed=5, augmentation=AUGMENTED, **UNIT, **kwargs
        )

    whole = take(start(readers=data.Readers(threads=0)), 14)  # into the third epoch
    for threads in (1, 3):
        assert_same(take(start(readers=data.Readers(threads=threads)), 14), whole)
    assert_same(take(start(start_step=7, readers=data.Readers(threads=2)), 7), whole[7:])
    iterator = start()
    take(iterator, 4)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = start()
    resumed.set_state(state)
    assert_same(take(resumed, 10), whole[4:])
    assert not np.array_equal(take(start(), 1)[0]["image"], whole[6]["image"])


def test_channel_statistics_of_some_images_are_of_evenly_spaced_ones():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    source = data.ArraySource(images, np.zeros(50, np.int32))
    mean, std = data.channel_statistics(source, max_examples=8)
    pixels = images[::7].reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-6)


# Errors


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"crop_area": (0.5, 0.2)}, r"crop_area is \(0.5, 0.2\)"),
        ({"crop_area": (0.0, 1.0)}, "0 < smallest"),
        ({"crop_area": (0.1, 1.5)}, "largest <= 1"),
        ({"crop_area": (0.1,)}, "expected two shares"),
        ({"crop_area": (float("nan"), 1.0)}, "crop_area is"),
        ({"crop_aspect": (4 / 3, 3 / 4)}, "crop_aspect is .* two values of width / height"),
        ({"crop_aspect": (-1.0, 1.0)}, "crop_aspect is"),
        ({"crop_aspect": (1.0, float("inf"))}, "crop_aspect is"),
    ],
)
def test_bad_bounds_are_named(kwargs, message):
    with pytest.raises(data.DataError, match=message):
        data.Augmentation(**kwargs)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, float("nan"), 224])
def test_bad_crop_fraction_is_named(tmp_path, fraction):
    with pytest.raises(data.DataError, match=f"crop_fraction is {fraction}, expected a share"):
        data.open_splits("digits", data_dir=tmp_path, image_size=4, crop_fraction=fraction)


def test_crops_without_image_size_are_named(tmp_path):
    with pytest.raises(data.DataError, match=r"crop_fraction is 0\.5 without image_size"):
        data.open_splits("digits", data_dir=tmp_path, crop_fraction=0.5)
    source = data.open_splits("digits", data_dir=tmp_path, max_decoded_bytes=0).train
    with pytest.raises(data.DataError, match="image_size, which is None"):
        next(
            data.train_batches(
                source, batch_size=4, seed=0, mean=[0], std=[1], augmentation=AUGMENTED
            )
        )


def test_random_crops_of_images_in_memory_are_named(tmp_path):
    write_images(tmp_path / "images", noise)
    source = open_folder(tmp_path, max_decoded_bytes=2**30).train
    iterator = data.train_batches(source, batch_size=4, seed=0, augmentation=AUGMENTED, **UNIT)
    with pytest.raises(data.DataError, match=r"crop_area.* max_decoded_bytes=0"):
        next(iterator)


# ImageNet


def image_net(tmp_path, damage=lambda split, number, image: image):
    """A tiny data set in the place, with the features and the version, of TFDS's imagenet2012."""
    original = tfds.builder("imagenet2012", data_dir=tmp_path)

    class ImageNet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "imagenet2012"
        VERSION = original.version
        code_path = None

        def _info(self):
            features = original.info.features
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in IMAGE_NET_LABELS}

        def _generate_examples(self, split):
            for number, size in enumerate(SIZES):
                image = encoded(noise(*size, seed=number), "jpeg")
                label = IMAGE_NET_LABELS[split](number)
                yield (
                    number,
                    {
                        "image": damage(split, number, image),
                        "label": label,
                        "file_name": f"{split}_{number}.JPEG",
                    },
                )

    prepare(ImageNet, data_dir=tmp_path)
    return data.open_splits(
        "imagenet2012", data_dir=tmp_path, image_size=24, crop_fraction=0.875, held_out=2,
        max_decoded_bytes=0,
    )  # fmt: skip


# The test images of ImageNet come without labels.
IMAGE_NET_LABELS = {
    "train": lambda number: 999 - number,
    "validation": lambda number: 100 * number,
    "test": lambda number: -1,
}


def test_image_net_trains_and_evaluates(tmp_path):
    splits = image_net(tmp_path)
    assert (len(splits.train), len(splits.reward), len(splits.test)) == (6, 2, 8)
    assert splits.num_classes == 1000
    assert splits.class_names[0] == "n01440764"
    train = data.train_batches(splits.train, batch_size=6, seed=0, augmentation=AUGMENTED, **UNIT)
    batch = next(train)
    assert batch["image"].shape == (6, 24, 24, 3)
    kept = np.setdiff1d(np.arange(8), splits.reward.indices)
    np.testing.assert_array_equal(np.sort(batch["label"]), np.sort(999 - kept))
    (batch,) = list(data.eval_batches(splits.test, batch_size=8, **UNIT))
    np.testing.assert_array_equal(batch["label"], 100 * np.arange(8))


def test_images_of_other_modes_are_converted(tmp_path):
    cmyk = encoded(noise(30, 40).convert("CMYK"), "jpeg")
    splits = image_net(tmp_path, lambda split, number, image: image if number else cmyk)
    with Image.open(io.BytesIO(cmyk)) as image:
        expected = image.convert("RGB").resize((24, 24), Image.Resampling.BILINEAR, (2, 7, 28, 33))
    np.testing.assert_array_equal(splits.test[0]["image"], expected)


def test_broken_image_of_image_net_is_named(tmp_path):
    splits = image_net(tmp_path, lambda split, number, image: image[: -200 * (number == 3) or None])
    with pytest.raises(data.DataError, match=r"validation: validation_3\.JPEG: broken image"):
        list(data.eval_batches(splits.test, batch_size=8, **UNIT))


def test_shards_read_the_parts_that_the_whole_batch_would(tmp_path):
    write_images(tmp_path / "images", coordinates)
    source = open_folder(tmp_path).train
    options = {"batch_size": 8, "seed": 0, "mean": [0] * 3, "std": [1] * 3}

    def batches_of(shard):
        return take(data.train_batches(source, augmentation=AUGMENTED, shard=shard, **options), 3)

    halves = [batches_of(grain.sharding.ShardOptions(index, 2)) for index in range(2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves)]
    assert_same(batches_of(None), joined)
