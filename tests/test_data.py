import errno
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import grain
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from aqt_search import data
from aqt_search.data import decoding
from aqt_search.data.staging import staging_folder


def write_image(path, shape=(6, 6, 3), seed=0, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze())
    (image.convert(mode) if mode else image).save(path)
    return pixels


def write_folder(root, shape=(6, 6, 3), per_class=10, extension="png"):
    """Two classes, cat and dog; {relative path: pixels}."""
    return {
        path: write_image(root / path, shape, seed)
        for seed, path in enumerate(
            f"{split}/{name}/{number:02}.{extension}"
            for split, count in (("test", 3), ("train", per_class))
            for name in ("cat", "dog")
            for number in range(count)
        )
    }


def open_folder(root, tmp_path, **kwargs):
    return data.open_splits(f"folder:{root}", data_dir=tmp_path / "prepared", **kwargs)


def pixels_of(source):
    return source.read(range(len(source)))["image"]


def random_source(size=50, shape=(8, 8, 3)):
    """Every image's first pixel is its index."""
    images = np.random.default_rng(0).integers(0, 256, (size, *shape), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(size)
    return data.ArraySource(images, np.arange(size, dtype=np.int32))


UNIT = {"mean": np.zeros(3), "std": np.ones(3)}


# Digits


def test_digits_are_scikit_learns(tmp_path):
    splits = data.open_splits("digits", data_dir=tmp_path, held_out=100)
    assert (len(splits.train), len(splits.reward), len(splits.test)) == (1337, 100, 360)
    assert splits.image_shape == (8, 8, 1)
    assert splits.num_classes == 10 == len(splits.class_names)
    digits = sklearn.datasets.load_digits()
    expected = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)  # exact in float64

    def as_set(images, labels):
        pairs = zip(images.reshape(-1, 64), labels, strict=True)
        return {(pixels.tobytes(), int(label)) for pixels, label in pairs}

    parts = [source.read(range(len(source))) for source in splits[:3]]
    sets = [as_set(part["image"], part["label"]) for part in parts]
    assert set.union(*sets) == as_set(expected, digits.target)
    assert sum(map(len, sets)) == len(digits.target)  # and so the parts are disjoint
    counts = np.bincount(parts[2]["label"])
    assert np.abs(counts - np.bincount(digits.target) * 360 / 1797).max() < 1  # stratified


def test_prepared_data_opens_by_its_tfds_name(tmp_path):
    ours = data.open_splits("digits", data_dir=tmp_path)
    generic = data.open_splits("aqt_search_digits", data_dir=tmp_path)
    np.testing.assert_array_equal(pixels_of(ours.train), pixels_of(generic.train))
    assert "tensorflow" not in sys.modules


# Image folders


@pytest.mark.parametrize("shape", [(6, 6, 3), (5, 7, 1)])
@pytest.mark.parametrize("max_decoded_bytes", [0, 2**30])
def test_folder_holds_its_images(tmp_path, shape, max_decoded_bytes):
    files = write_folder(tmp_path / "images", shape)
    (tmp_path / "images/.hidden").touch()
    splits = open_folder(
        tmp_path / "images", tmp_path, held_out=0, max_decoded_bytes=max_decoded_bytes
    )
    assert splits.image_shape == shape
    assert splits.class_names == ("cat", "dog")
    for split, source in (("train", splits.train), ("test", splits.test)):
        paths = sorted(path for path in files if path.startswith(split))
        batch = source.read(range(len(source)))
        np.testing.assert_array_equal(batch["image"], [files[path] for path in paths])
        np.testing.assert_array_equal(batch["label"], ["/dog/" in path for path in paths])
        np.testing.assert_array_equal(source[1]["image"], files[paths[1]])
        assert source[-1]["label"] == 1


def test_jpeg_is_pillows(tmp_path):
    write_folder(tmp_path / "images", extension="jpeg")
    splits = open_folder(tmp_path / "images", tmp_path, held_out=0)
    with Image.open(tmp_path / "images/train/cat/00.jpeg") as image:
        np.testing.assert_array_equal(splits.train[0]["image"], np.asarray(image))


def oriented(pixels, orientation, extension):
    """An image file of these pixels, as a camera held so would store it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file, extension, exif=exif, **{"quality": 95} if extension == "jpeg" else {}
    )
    return file.getvalue()


@pytest.mark.parametrize("extension", ["jpeg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("max_decoded_bytes", [0, 2**30])
def test_images_are_turned_as_exif_says(tmp_path, orientation, extension, max_decoded_bytes):
    """The pixel at EXIF's (row, column) origin is where the tag's definition puts it."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    write_folder(tmp_path / "images", (16, 8, 3), per_class=2, extension=extension)
    upright = (16, 8, 3) if orientation < 5 else (8, 16, 3)
    for path in (tmp_path / "images").rglob(f"*.{extension}"):
        path.write_bytes(oriented(pixels, orientation, extension))
    splits = open_folder(
        tmp_path / "images", tmp_path, held_out=0, max_decoded_bytes=max_decoded_bytes
    )
    assert splits.image_shape == upright
    with Image.open(io.BytesIO(oriented(pixels, orientation, extension))) as image:
        stored = np.asarray(image)
    # Which visual side the stored first row is, and which the stored first column.
    sides = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left", 5: "left top",
             6: "right top", 7: "right bottom", 8: "left bottom"}[orientation].split()  # fmt: skip
    expected = stored if sides[0] in ("top", "bottom") else stored.swapaxes(0, 1)
    expected = expected[::-1] if "bottom" in sides else expected
    expected = expected[:, ::-1] if "right" in sides else expected
    np.testing.assert_array_equal(splits.train[0]["image"], expected)
    np.testing.assert_array_equal(pixels_of(splits.test)[2], expected)
    small = decoding.decode_image(
        oriented(pixels, orientation, extension), channels=3, image_size=4,
        crop=lambda width, height: (0, 0, width // 2, height // 2), name="image",
    )  # fmt: skip
    whole = Image.fromarray(np.ascontiguousarray(expected))
    box = (0, 0, upright[1] // 2, upright[0] // 2)
    np.testing.assert_array_equal(small, whole.resize((4, 4), Image.Resampling.BILINEAR, box=box))


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*", b"Exif\0\0garbage here"])
def test_exif_that_cannot_be_read_counts_as_none(exif):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", exif=exif)
    found = decoding.decode_image(file.getvalue(), channels=3, image_size=None, name="image")
    np.testing.assert_array_equal(found, pixels)


def test_changed_folder_is_prepared_anew(tmp_path):
    root = tmp_path / "images"
    write_folder(root)
    assert len(open_folder(root, tmp_path, held_out=0).train) == 20
    prepared = list((tmp_path / "prepared").rglob("dataset_info.json"))
    assert len(open_folder(root, tmp_path, held_out=0).train) == 20
    assert list((tmp_path / "prepared").rglob("dataset_info.json")) == prepared
    new = write_image(root / "train/cat/00.png", seed=99)
    os.utime(root / "train/cat/00.png", ns=(1, 1))  # for file systems of coarse times
    np.testing.assert_array_equal(open_folder(root, tmp_path).train.parent[0]["image"], new)
    (root / "train/dog/05.png").unlink()
    assert len(open_folder(root, tmp_path, held_out=0).train) == 19


def rename(root, old, new):
    (root / old).rename(root / new)


CHANGES = {
    "removed": lambda root: (root / "train/dog/05.png").unlink(),
    "added": lambda root: write_image(root / "train/dog/99.png", seed=99),
    "renamed": lambda root: rename(root, "train/dog/05.png", "train/dog/99.png"),
    "of another class": lambda root: rename(root, "train/dog/09.png", "train/cat/99.png"),
    "of another split": lambda root: rename(root, "test/dog/02.png", "train/dog/99.png"),
    "class renamed": lambda root: [rename(root, f"{s}/dog", f"{s}/emu") for s in ("train", "test")],
    "edited": lambda root: Image.new("RGB", (6, 6)).save(root / "train/dog/05.png"),
}


@pytest.mark.parametrize("max_decoded_bytes", [0, 2**30])
def test_a_fingerprint_tells_folders_apart_by_what_is_in_them(tmp_path, max_decoded_bytes):
    def fingerprint(name, **more):
        options = {"max_decoded_bytes": max_decoded_bytes} | more
        return open_folder(tmp_path / name, tmp_path, **options).fingerprint

    write_folder(tmp_path / "images")
    whole = fingerprint("images")
    assert whole.startswith("20 and 6 images, ")
    shutil.copytree(tmp_path / "images", tmp_path / "moved", copy_function=shutil.copyfile)
    assert fingerprint("moved") == whole
    assert fingerprint("images", seed=3, held_out=5) == whole
    found = {whole}
    for case, change in CHANGES.items():
        shutil.copytree(tmp_path / "images", tmp_path / case)
        change(tmp_path / case)
        changed = fingerprint(case)
        # Pixels that are not in memory are told by the size of their file, which is another here.
        assert changed != whole, case
        if max_decoded_bytes == 0 or case not in ("renamed", "removed"):
            assert changed not in found, case
        found.add(changed)


def remove_all(*folders):
    return lambda root: [shutil.rmtree(root / folder) for folder in folders]


def truncate(root):
    path = root / "train/dog/05.png"
    path.write_bytes(path.read_bytes()[:-30])


BAD_FOLDERS = {
    "empty": (remove_all("train", "test"), ["images: empty folder", "train/<class>"]),
    "no train": (remove_all("train"), ["no folder train/"]),
    "no test": (remove_all("test"), ["no folder test/"]),
    "no classes": (lambda r: [shutil.rmtree(r / "train"), (r / "train").mkdir()], ["no class fol"]),
    "empty class": (lambda r: (r / "train/emu").mkdir(), ["train/emu: no images"]),
    "unknown class": (lambda r: write_image(r / "test/emu/1.png"), ["test/emu", "'cat', 'dog'"]),
    "other file": (lambda r: (r / "train/cat/notes.txt").touch(), ["cat/notes.txt: not a file"]),
    "loose file": (lambda r: write_image(r / "train/1.png"), ["train/1.png: a file beside"]),
    "truncated": (truncate, ["train/dog/05.png: broken image"]),
    "no image": (lambda r: (r / "train/dog/05.png").write_bytes(b"x"), ["dog/05.png: broken"]),
    "first broken": (lambda r: (r / "train/cat/00.png").write_bytes(b""), ["cat/00.png: broken"]),
    "grey": (
        lambda r: write_image(r / "test/dog/01.png", (6, 6)),
        ["test/dog/01.png: image of mode L", "train/cat/00.png is RGB (3 channels)"],
    ),
    "alpha": (
        lambda r: write_image(r / "train/dog/05.png", (6, 6, 4)),
        ["05.png: image of mode R"],
    ),
    "first palette": (
        lambda r: write_image(r / "train/cat/00.png", mode="P"),
        ["train/cat/00.png: image of mode P", "grey (L) or RGB"],
    ),
    "link to nothing": (
        lambda r: (r / "train/cat/zz.png").symlink_to("nowhere.png"),
        ["train/cat/zz.png (a link to nowhere.png): cannot be read: No such file"],
    ),
    "link to itself": (
        lambda r: (r / "train/cat/zz.png").symlink_to("zz.png"),
        ["train/cat/zz.png (a link to zz.png): cannot be read: Too many levels"],
    ),
    "class that is a link to nothing": (
        lambda r: (r / "train/emu").symlink_to("nowhere"),
        ["train/emu (a link to nowhere): cannot be read"],
    ),
    "name that is not UTF-8": (
        lambda r: (r / os.fsdecode(b"train/cat/\xff.png")).write_bytes(b""),
        ["train/cat/\\udcff.png", "not UTF-8", "Rename"],
    ),
    "size": (
        lambda r: write_image(r / "train/dog/05.png", (6, 7, 3)),
        ["train/dog/05.png: image of shape (6, 7, 3)", "train/cat/00.png has (6, 6, 3)", "image_s"],
    ),
    "size of test": (
        lambda r: [write_image(path, (5, 6, 3)) for path in (r / "test").rglob("*.png")],
        ["test/cat/00.png: image of shape (5, 6, 3)", "train/cat/00.png has (6, 6, 3)"],
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_named(tmp_path, case):
    damage, expected = BAD_FOLDERS[case]
    root = tmp_path / "images"
    write_folder(root)
    damage(root)
    with pytest.raises(data.DataError) as error:
        open_folder(root, tmp_path)
    for part in expected:
        assert part in str(error.value)
    leftovers = list((tmp_path / "prepared").rglob("incomplete*"))
    assert not leftovers


def test_wrong_size_is_named_when_read_lazily(tmp_path):
    root = tmp_path / "images"
    write_folder(root)
    write_image(root / "train/dog/05.png", (6, 7, 3))
    train = open_folder(root, tmp_path, held_out=0, max_decoded_bytes=0).train
    with pytest.raises(data.DataError, match=r"dog/05.png: image of shape \(6, 7, 3\)"):
        list(data.eval_batches(train, batch_size=4, **UNIT))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("folder:/no/such/place", ["/no/such/place: no such folder"]),
        ("cifar_10", ["unknown data set 'cifar_10'", "cifar10", "folder:PATH"]),
        ("cifar10/big", ["data set 'cifar10/big' cannot be opened", "BuilderConfig big not found"]),
        ("cifar10:99.0.0", ["'cifar10:99.0.0'"]),
        ("not a name", ["data set 'not a name'"]),
        ("", ["data set ''"]),
        ("digit", ["unknown data set 'digit'", "digits"]),
        ("cifar10", ["'cifar10' is not prepared in", "TensorFlow", "--file_format=array_record"]),
    ],
)
def test_bad_name_is_named(tmp_path, monkeypatch, name, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no TensorFlow
    with pytest.raises(data.DataError) as error:
        data.open_splits(name, data_dir=tmp_path)
    for part in expected:
        assert part in str(error.value)


def test_tfrecord_says_how_to_convert(tmp_path):
    data.open_splits("digits", data_dir=tmp_path)
    folder = tmp_path / "aqt_search_digits/1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    for file in folder.glob("*array_record*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(data.DataError, match=r"convert_format .*--out_file_format=array_record"):
        data.open_splits("aqt_search_digits", data_dir=tmp_path)


# Preparing


@pytest.mark.parametrize("length", [234, 235, 255])
def test_a_folder_of_a_long_name(tmp_path, length):
    write_folder(tmp_path / ("x" * length), per_class=1)
    assert len(open_folder(tmp_path / ("x" * length), tmp_path, held_out=0).train) == 2


FULL_DISK = """
import resource, sys
from aqt_search.data import DataError, open_splits
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a full disk
try: open_splits("digits", data_dir=sys.argv[1])
except DataError as error:
    assert sys.argv[1] in str(error) and "Free space" in str(error), error
    print("DataError")
"""


def test_a_full_data_folder_is_named(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "DataError\n", result.stderr
    assert not list(tmp_path.rglob("incomplete*"))


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match=r"file/aqt_search_digits.*could not be prepared"):
        data.open_splits("digits", data_dir=tmp_path / "file")


def test_one_that_prepares_is_left_alone_by_the_next(tmp_path):
    with staging_folder(tmp_path) as one:
        (one / "shard").touch()
        with staging_folder(tmp_path) as other:
            assert (one / "shard").exists()
            assert one != other
    left = tmp_path / "incomplete.killed"
    left.mkdir()
    (left / "shard").touch()
    with staging_folder(tmp_path):
        assert not left.exists()
    assert os.listdir(tmp_path) == []


def test_preparing_at_once_in_threads(tmp_path):
    files = write_folder(tmp_path / "images", per_class=100)
    results, start = {}, threading.Barrier(4)

    def prepare(number):
        start.wait()
        results[number] = pixels_of(open_folder(tmp_path / "images", tmp_path, held_out=0).train)

    threads = [threading.Thread(target=prepare, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    expected = [files[path] for path in sorted(files) if path.startswith("train")]
    assert len(results) == 4
    for images in results.values():
        np.testing.assert_array_equal(images, expected)


KILLED_PREPARATION = """
import os, signal, sys
from aqt_search.data import open_splits
os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)  # all written, not yet in place
open_splits("digits", data_dir=sys.argv[1])
"""


def test_killed_preparation_is_not_taken_for_data(tmp_path):
    command = [sys.executable, "-c", KILLED_PREPARATION, str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(tmp_path.rglob("*.array_record*"))
    assert not (tmp_path / "aqt_search_digits/1.0.0").exists()
    assert len(data.open_splits("digits", data_dir=tmp_path).test) == 360
    assert not list(tmp_path.rglob("incomplete*"))


# The file of decoded images


def decoded_files(tmp_path):
    return sorted((tmp_path / "prepared").rglob("decoded-*.npz"))


def test_decoded_images_are_read_back(tmp_path):
    write_folder(tmp_path / "images")
    first = open_folder(tmp_path / "images", tmp_path, held_out=0)
    assert len(decoded_files(tmp_path)) == 2
    second = open_folder(tmp_path / "images", tmp_path, held_out=0)
    for before, after in ((first.train, second.train), (first.test, second.test)):
        assert_same([before.read(range(len(before)))], [after.read(range(len(before)))])
        assert after[0]["image"].dtype == np.uint8
    # Other contents show that it is the files that are read.
    for path in decoded_files(tmp_path):
        with np.load(path) as arrays:
            np.savez(path, images=255 - arrays["images"], labels=arrays["labels"])
    third = open_folder(tmp_path / "images", tmp_path, held_out=0)
    np.testing.assert_array_equal(pixels_of(third.train), 255 - pixels_of(first.train))


@pytest.mark.parametrize("setting", [{"image_size": 3}, {"image_size": 6, "crop_fraction": 0.5}])
def test_decoded_images_of_other_settings_are_not_taken(tmp_path, setting):
    write_folder(tmp_path / "images")
    open_folder(tmp_path / "images", tmp_path)
    other = open_folder(tmp_path / "images", tmp_path, held_out=0, **setting)
    lazy = open_folder(tmp_path / "images", tmp_path, held_out=0, max_decoded_bytes=0, **setting)
    np.testing.assert_array_equal(pixels_of(other.train), pixels_of(lazy.train))


def test_decoded_images_of_other_records_are_not_taken(tmp_path):
    write_folder(tmp_path / "images")
    open_folder(tmp_path / "images", tmp_path)
    (records,) = (tmp_path / "prepared").rglob("*-train.array_record*")
    os.utime(records, ns=(1, 1))
    open_folder(tmp_path / "images", tmp_path)
    assert len(decoded_files(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "other arrays"])
def test_damaged_decoded_images_are_named(tmp_path, damage):
    write_folder(tmp_path / "images", per_class=100)
    open_folder(tmp_path / "images", tmp_path)
    for path in decoded_files(tmp_path):
        content = bytearray(path.read_bytes())
        if damage == "changed":
            content[500] ^= 1  # a pixel
        path.write_bytes({"truncated": content[:-40], "empty": b""}.get(damage, content))
        if damage == "other arrays":
            np.savez(path, pixels=np.zeros(3))
    with pytest.raises(data.DataError, match=r"decoded-\w+.npz: damaged .* Delete it"):
        open_folder(tmp_path / "images", tmp_path)


def test_decoded_images_that_cannot_be_written(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    files = write_folder(tmp_path / "images")
    monkeypatch.setattr(np, "savez", full)
    train = open_folder(tmp_path / "images", tmp_path, held_out=0).train
    expected = [files[path] for path in sorted(files) if path.startswith("train")]
    np.testing.assert_array_equal(pixels_of(train), expected)
    assert not decoded_files(tmp_path)
    assert not list((tmp_path / "prepared").rglob("incomplete*"))


KILLED_WRITING = KILLED_PREPARATION.replace("os.rename", "os.replace")


def test_killed_writing_is_not_taken_for_decoded_images(tmp_path):
    command = [sys.executable, "-c", KILLED_WRITING, str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "aqt_search_digits/1.0.0"
    assert list(folder.glob("incomplete*/decoded-*.npz"))
    assert not list(folder.glob("decoded-*.npz"))
    assert len(data.open_splits("digits", data_dir=tmp_path).test) == 360
    assert not list(tmp_path.rglob("incomplete*"))


# Held-out part


@pytest.mark.parametrize("held_out, count", [(0.1, 144), (0.5, 718), (100, 100), (0, 0)])
def test_held_out_is_disjoint_and_of_the_right_size(tmp_path_factory, held_out, count):
    splits = open_digits(tmp_path_factory, held_out=held_out)
    both = np.concatenate([splits.train.indices, splits.reward.indices])
    assert len(splits.reward) == count
    np.testing.assert_array_equal(np.sort(both), np.arange(1437))


def open_digits(tmp_path_factory, **kwargs):
    folder = tmp_path_factory.getbasetemp() / "digits"
    return data.open_splits("digits", data_dir=folder, **kwargs)


def test_held_out_depends_on_the_seed_alone(tmp_path_factory):
    first, same, other = (
        open_digits(tmp_path_factory, seed=seed).reward.indices for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert len(np.intersect1d(first, other)) < 40  # of 144; expected 14, standard deviation 3.6


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"held_out": 0.0001}, "leaves 0 for the reward and 1437 for training"),
        ({"held_out": 0.9999}, "leaves 1437 for the reward and 0 for training"),
        ({"held_out": 1437}, "0 for training"),
        ({"held_out": 1.5}, "expected a share"),
        ({"held_out": -1}, "expected a share"),
        ({"held_out": True}, "expected a share"),
        ({"held_out": 1.0}, "1.0 would be a share of all"),
        ({"held_out": float("nan")}, "expected a share"),
        ({"held_out": float("inf")}, "expected a share"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 4.5}, "image_size is 4.5"),
    ],
)
def test_bad_argument_is_named(tmp_path_factory, kwargs, message):
    with pytest.raises(data.DataError, match=message):
        open_digits(tmp_path_factory, **kwargs)


# Resizing


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("block", [(2, 2), (1, 2), (4, 4), (16, 16), (3, 5), (13, 20), (200, 200)])
def test_shrinking_by_whole_factors_is_the_mean(channels, block):
    size, (block_height, block_width) = 4, block
    shape = (size * block_height, size * block_width, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    small = np.asarray(decoding.resize(Image.fromarray(pixels.squeeze()), size))
    blocks = pixels.reshape(size, block_height, size, block_width, channels).astype(int)
    area = block_height * block_width
    sums, small = blocks.sum(axis=(1, 3)), small.reshape(size, size, channels)
    if area in (2, 4, 16, 256):
        expected = (2 * sums + area) // (2 * area)  # whole numbers, a half rounded up
        np.testing.assert_array_equal(small, expected)
    assert np.abs(small - sums / area).max() <= 1


def test_shrinking_by_a_fraction_averages_the_pixels_under_each_output_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11), dtype=np.uint8)
    small = np.asarray(decoding.resize(Image.fromarray(pixels), 5))
    rows, columns = ((np.arange(n) + 0.5) * 5 // n for n in pixels.shape)
    for i in range(5):
        for j in range(5):
            mean = pixels[rows == i][:, columns == j].mean()
            assert abs(small[i, j] - mean) <= 1.01  # rounded after each direction


def test_image_size_brings_mixed_sizes_together(tmp_path):
    write_folder(tmp_path / "images")
    large = write_image(tmp_path / "images/train/cat/00.png", (12, 12, 3))
    splits = open_folder(tmp_path / "images", tmp_path, image_size=6, held_out=0)
    assert splits.image_shape == (6, 6, 3)
    blocks = large.reshape(6, 2, 6, 2, 3).astype(int).sum(axis=(1, 3))
    np.testing.assert_array_equal(splits.train[0]["image"], (blocks + 2) // 4)


# Statistics


@pytest.mark.parametrize("size", [50, 300])
def test_channel_statistics_are_numpys(size):
    images = np.random.default_rng(1).integers(0, 256, (size, 5, 4, 3), dtype=np.uint8)
    images[..., 1] //= 3
    source = data.ArraySource(images, np.zeros(size, np.int32))
    mean, std = data.channel_statistics(source)
    assert mean.dtype == std.dtype == np.float32
    scaled = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, scaled.std(axis=0), rtol=1e-6)


# Batches


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(first, second):
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


AUGMENTED = data.Augmentation(crop_padding=2, flip=True)


def test_training_epochs_are_shuffled_anew_without_repeats():
    iterator = data.train_batches(random_source(50), batch_size=8, seed=0, **UNIT)
    epochs = [np.concatenate([b["label"] for b in take(iterator, 6)]) for _ in range(3)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == 48
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    next_seed = data.train_batches(random_source(50), batch_size=8, seed=1, **UNIT)
    assert not np.array_equal(take(next_seed, 1)[0]["label"], epochs[1][:8])


def test_training_batches_are_normalised():
    source = random_source()
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 1.0, 3.0])
    batch = next(data.train_batches(source, batch_size=50, seed=3, mean=mean, std=std))
    assert (batch["image"].dtype, batch["label"].dtype) == (np.float32, np.int32)
    expected = (source.images[batch["label"]] / 255 - mean) / std
    np.testing.assert_allclose(batch["image"], expected, atol=1e-6)


def test_batches_do_not_depend_on_threads():
    runs = [
        take(
            data.train_batches(
                random_source(),
                batch_size=8,
                seed=0,
                augmentation=AUGMENTED,
                readers=data.Readers(threads=threads),
                **UNIT,
            ),
            20,
        )
        for threads in (0, 1, 3)
    ]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_resume_gives_the_same_bits():
    def start(**kwargs):
        return data.train_batches(
            random_source(), batch_size=8, seed=5, augmentation=AUGMENTED, **UNIT, **kwargs
        )

    whole = take(start(), 20)
    iterator = start()
    take(iterator, 7)  # in the second epoch
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = start()
    next(resumed)
    resumed.set_state(state)
    assert_same(take(resumed, 13), whole[7:])
    assert_same(take(start(start_step=7), 13), whole[7:])
    assert start(start_step=7).get_state() == state


def test_augmentation_is_a_crop_of_the_padded_image_or_its_mirror():
    source, padding = random_source(200), 2
    iterator = data.train_batches(
        source, batch_size=200, seed=0, augmentation=AUGMENTED, mean=[0] * 3, std=[1 / 255] * 3
    )
    seen = []
    for batch in take(iterator, 2):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            padded = np.pad(source.images[label], [(padding, padding)] * 2 + [(0, 0)])
            found = [
                (top, left, flip)
                for top in range(5)
                for left in range(5)
                for flip in (1, -1)
                if np.array_equal(image, padded[top : top + 8, left : left + 8][:, ::flip])
            ]
            assert len(found) == 1
            seen += found
    # 400 draws: each of 50 outcomes is missing with probability 0.98^400 = 0.0003.
    assert len(set(seen)) >= 49
    assert abs(np.mean([flip for *_, flip in seen])) < 0.2  # four standard deviations
    assert seen[:200] != seen[200:]


def test_source_is_not_changed_by_augmentation():
    source = random_source()
    before = source.images.copy()
    take(data.train_batches(source, batch_size=50, seed=0, augmentation=AUGMENTED, **UNIT), 3)
    np.testing.assert_array_equal(source.images, before)


def test_evaluation_sees_every_example_once_in_order():
    source = random_source(50)
    batches = list(data.eval_batches(source, batch_size=16, **UNIT))
    assert [batch["image"].shape for batch in batches] == [(16, 8, 8, 3)] * 4
    mask = np.concatenate([batch["mask"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, [1] * 50 + [0] * 14)
    np.testing.assert_array_equal(labels, [*range(50)] + [49] * 14)
    np.testing.assert_allclose(images[:50], source.images / 255, atol=1e-6)


def test_lazy_and_decoded_sources_give_the_same_batches(tmp_path):
    write_folder(tmp_path / "images")
    runs = []
    for limit in (0, 2**30):
        splits = open_folder(tmp_path / "images", tmp_path, max_decoded_bytes=limit)
        assert isinstance(splits.test, data.ArraySource if limit else data.RecordSource)
        iterator = data.train_batches(
            splits.train, batch_size=4, seed=0, augmentation=AUGMENTED, **UNIT
        )
        runs.append(take(iterator, 12))
        assert len(data.channel_statistics(splits.train)[0]) == 3
    assert_same(*runs)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_are_rows_of_the_whole_batches(shards):
    """Together the shards of a batch are its bits: same images, same crops, same mirror images."""
    source, training = random_source(), {"seed": 0, "augmentation": AUGMENTED}

    def batches_of(index=None):
        shard = None if index is None else grain.sharding.ShardOptions(index, shards)
        options = {"batch_size": 8, "shard": shard, **UNIT}
        trained = data.train_batches(source, **training, **options)
        return take(trained, 9) + list(data.eval_batches(source, **options))

    whole, parts = batches_of(), [batches_of(index) for index in range(shards)]
    joined = [{key: np.concatenate([part[key] for part in of_one]) for key in of_one[0]}
              for of_one in zip(*parts, strict=True)]  # fmt: skip
    assert all(len(batch["label"]) == 8 // shards for part in parts for batch in part)
    assert_same(whole, joined)


BAD_BATCHES = {
    "larger than the data": ({"batch_size": 51}, "batch_size is 51, but .* has 50 images"),
    "no images": ({"batch_size": 0}, "batch_size is 0"),
    "negative step": ({"start_step": -1}, "start_step is -1"),
    "mean of one channel": ({"mean": [0.5]}, r"mean has shape \(1,\).*expected \(3,\)"),
    "constant channel": ({"std": [1, 0, 1]}, "std > 0"),
    "not a number": ({"mean": [0, np.nan, 0]}, "finite"),
    "shards": ({"shard": grain.sharding.ShardOptions(0, 3)}, "batch of 8 .* divided .* of 3"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_named(case):
    kwargs, message = BAD_BATCHES[case]
    with pytest.raises(data.DataError, match=message):
        data.train_batches(random_source(), **{"batch_size": 8, "seed": 0, **UNIT, **kwargs})


def test_empty_source_is_named():
    with pytest.raises(data.DataError, match="empty source"):
        data.eval_batches(random_source(0), batch_size=8, **UNIT)
    with pytest.raises(data.DataError, match="empty source"):
        data.channel_statistics(random_source(0))


def test_negative_padding_is_named():
    with pytest.raises(data.DataError, match="crop_padding is -1"):
        data.Augmentation(crop_padding=-1)


def test_import_is_light():
    code = (
        "import sys, aqt_search.data; heavy = {'grain', 'tensorflow_datasets', 'sklearn'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folds_test_on_every_image_once(tmp_path_factory):
    """Stratified parts of train and test together; part seed % folds is the test split."""
    parts = [open_digits(tmp_path_factory, folds=3, seed=seed, held_out=50) for seed in range(4)]
    whole = open_digits(tmp_path_factory, held_out=0)
    images = sorted(whole.train[i]["image"].tobytes() for i in range(len(whole.train)))
    images += [whole.test[i]["image"].tobytes() for i in range(len(whole.test))]
    tested = [[part.test[i]["image"].tobytes() for i in range(len(part.test))] for part in parts]
    assert sorted(images) == sorted(itertools.chain(*tested[:3]))
    assert tested[3] == tested[0]
    digits = sklearn.datasets.load_digits().target
    for part, own in zip(parts, tested):
        labels = [part.test[i]["label"] for i in range(len(own))]
        assert np.abs(np.bincount(labels) - np.bincount(digits) / 3).max() <= 1
        seen = {*own}, {part.train[i]["image"].tobytes() for i in range(len(part.train))}
        held = {part.reward[i]["image"].tobytes() for i in range(len(part.reward))}
        assert (len(own) + len(part.train) + len(held)) == 1797 == len(images)
        assert not held & seen[1]
        assert not seen[0] & (seen[1] | held)


@pytest.mark.parametrize(
    "folds, more, words",
    [(1, {}, ["folds is 1", "2 to 174"]), (200, {}, ["folds is 200", "2 to 174"]),
     (3, {"max_decoded_bytes": 0}, ["folds is 3", "in memory"])],
)  # fmt: skip
def test_folds_that_cannot_be(tmp_path_factory, folds, more, words):
    with pytest.raises(data.DataError) as caught:
        open_digits(tmp_path_factory, folds=folds, **more)
    assert all(word in str(caught.value) for word in words)
