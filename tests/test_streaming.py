"""Data sets larger than memory: read in parts, by threads and processes, in the same bits."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import grain
import numpy as np
import pytest
from PIL import Image

from aqt_search import data
from aqt_search.data import image_folder

AUGMENTED = data.Augmentation(flip=True, crop_area=(0.2, 1.0))
UNIT = {"mean": [0.5], "std": [0.25]}
READERS = {
    "in the caller": data.Readers(0, 0),
    "threads": data.Readers(threads=3),
    "more threads than are read ahead": data.Readers(threads=4, prefetch=1),
    "a worker": data.Readers(workers=1),
    "workers with threads, of unequal parts": data.Readers(workers=3, threads=2, prefetch=5),
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits that are decoded as they are read."""
    folder = tmp_path_factory.mktemp("digits")
    return data.open_splits("digits", data_dir=folder, image_size=8, max_decoded_bytes=0)


IN_THE_CALLER = data.Readers(threads=0)


def training(splits, readers=IN_THE_CALLER, **more):
    options = {"batch_size": 8, "seed": 3, "augmentation": AUGMENTED, "readers": readers} | more
    return data.train_batches(splits.train, **options, **UNIT)


def taken(stream, count):
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(first, second):
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


@pytest.fixture(scope="module")
def expected(digits):
    return taken(training(digits), 9)


@pytest.mark.parametrize("case", READERS)
def test_the_bits_of_batches_do_not_depend_on_who_makes_them(digits, expected, case):
    """From the start, after others have made the first ones, and at evaluation."""
    readers = READERS[case]
    stream = training(digits, readers)
    assert stream.get_state() == {"next_index": 0}
    assert_same([next(stream) for _ in range(4)], expected[:4])
    state = json.loads(json.dumps(stream.get_state()))
    assert state == {"next_index": 4}
    stream.set_state({"next_index": 2})
    assert_same(taken(stream, 3), expected[2:5])
    other = training(digits, data.Readers(threads=1))
    other.set_state(state)
    assert_same(taken(other, 5), expected[4:])
    evaluated = [
        list(data.eval_batches(digits.test, batch_size=50, readers=each, **UNIT))
        for each in (readers, IN_THE_CALLER)
    ]
    assert len(evaluated[0]) == 8
    assert_same(*evaluated)


def test_workers_make_a_shard_of_every_batch(digits, expected):
    parts = [
        taken(training(digits, data.Readers(2), shard=grain.sharding.ShardOptions(i, 2)), 3)
        for i in range(2)
    ]
    joined = [{key: np.concatenate([part[key] for part in of_one]) for key in of_one[0]}
              for of_one in zip(*parts, strict=True)]  # fmt: skip
    assert_same(joined, expected[:3])


def test_images_in_memory_are_batched_without_workers(tmp_path):
    splits = data.open_splits("digits", data_dir=tmp_path)
    stream = training(splits, data.Readers(workers=2), augmentation=data.Augmentation())
    next(stream)
    assert not worker_ids()
    stream.close()


# Large folders


def write_flat_images(root, per_class, pixels=4):
    """Two classes of images of one colour each, which tells their number."""
    for split, count in (("train", per_class), ("test", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (pixels, pixels), (number, len(name), ord(name[0])))
                image.save(root / split / name / f"{number:03}.png")


def test_a_folder_is_prepared_a_file_of_records_at_a_time(tmp_path, monkeypatch):
    """All images are there, in order, however many files they take."""
    monkeypatch.setattr(image_folder, "_SHARD_BYTES", 500)
    write_flat_images(tmp_path / "images", 40)
    name = f"folder:{tmp_path / 'images'}"
    options = {"data_dir": tmp_path / "data", "held_out": 0, "max_decoded_bytes": 0}
    train = data.open_splits(name, **options).train
    assert len(list((tmp_path / "data").rglob("*-train.array_record*"))) > 5
    pixels = train.read(range(len(train)))["image"][:, 0, 0]
    assert pixels.tolist() == [[n, 3, c] for c in map(ord, "cd") for n in range(40)]


def test_a_large_data_set_is_never_in_memory(tmp_path):
    """A folder, and the same by its TFDS name: what is read takes batches' memory, not the set's.

    200 images of 256 x 256 x 3 bytes are 39 MB; a batch of 4, in float32 and twice, is 6 MB.
    """
    write_flat_images(tmp_path / "images", 100, pixels=256)
    options = {"data_dir": tmp_path / "data", "max_decoded_bytes": 10_000_000}
    data.open_splits(f"folder:{tmp_path / 'images'}", **options)
    (prepared,) = (tmp_path / "data").glob("*/images-*")
    for name in (f"folder:{tmp_path / 'images'}", f"{prepared.parent.name}/{prepared.name}"):
        tracemalloc.start()
        splits = data.open_splits(name, **options)
        mean, std = data.channel_statistics(splits.train, max_examples=16)
        readers = data.Readers(threads=1, prefetch=1)
        common = {"batch_size": 4, "mean": mean, "std": np.maximum(std, 0.1), "readers": readers}
        stream = data.train_batches(splits.train, seed=0, **common)
        seen = sum(len(batch["label"]) for batch in itertools.islice(stream, 45))
        stream.close()
        seen += sum(len(b["label"]) for b in data.eval_batches(splits.reward, **common))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert isinstance(splits.train.parent, data.RecordSource)
        assert seen == 200
        assert peak < 30_000_000
    assert "tensorflow" not in sys.modules


def test_statistics_of_a_large_data_set_are_kept(tmp_path):
    def opened(**more):
        options = {"data_dir": tmp_path, "image_size": 8, "max_decoded_bytes": 0} | more
        return data.open_splits("digits", **options)

    splits = opened()
    found = data.channel_statistics(splits.train, max_examples=100, file=splits.statistics_file)
    assert splits.statistics_file.is_file()
    records = next(tmp_path.rglob("*-train.array_record*"))
    kept = data.channel_statistics(  # of a source that cannot be read
        data.Subset(None, splits.train.indices), max_examples=100, file=opened().statistics_file
    )
    np.testing.assert_array_equal(kept, found)
    others = [opened(seed=1), opened(image_size=4), opened(held_out=3)]
    files = {other.statistics_file for other in others}
    assert len(files | {splits.statistics_file}) == 4
    os.utime(records, ns=(1, 1))
    assert opened().statistics_file != splits.statistics_file
    assert opened(max_decoded_bytes=2**30).statistics_file is None
    more = data.channel_statistics(splits.train, max_examples=200, file=splits.statistics_file)
    np.testing.assert_array_equal(more, data.channel_statistics(splits.train, max_examples=200))
    splits.statistics_file.write_text('{"examples": 200')
    again = data.channel_statistics(splits.train, max_examples=200, file=splits.statistics_file)
    np.testing.assert_array_equal(more, again)


# Workers that end


def worker_ids():
    return [child.pid for child in multiprocessing.active_children()]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(pids, seconds=20):
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def test_workers_end_with_their_stream(digits):
    for end in (lambda stream: stream.close(), lambda stream: stream.set_state({"next_index": 0})):
        stream = training(digits, data.Readers(workers=2))
        next(stream)
        pids = worker_ids()
        assert len(pids) == 2
        end(stream)
        assert ended(pids)
    evaluated = data.eval_batches(digits.test, batch_size=200, readers=data.Readers(1), **UNIT)
    next(evaluated)
    pids = worker_ids()
    assert len(list(evaluated)) == len(pids) == 1
    assert ended(pids)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_told_as_one_here(tmp_path, workers):
    write_flat_images(tmp_path / "images", 4)
    Image.new("RGB", (4, 5)).save(tmp_path / "images/train/dog/002.png")
    options = {"data_dir": tmp_path / "data", "held_out": 0, "max_decoded_bytes": 0}
    train = data.open_splits(f"folder:{tmp_path / 'images'}", **options).train
    batches = data.eval_batches(
        train, batch_size=4, mean=[0] * 3, std=[1] * 3, readers=data.Readers(workers)
    )
    next(batches)
    pids = worker_ids()
    with pytest.raises(data.DataError, match=r"train: train/dog/002.png: image of shape \(5, 4"):
        next(batches)
    assert ended(pids)


def test_a_worker_that_is_killed_is_told(digits):
    stream = training(digits, data.Readers(workers=1))
    next(stream)
    (pid,) = worker_ids()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(data.DataError, match=r"data\.workers.*exit code -9.*fewer workers"):
        taken(stream, 20)


STREAMING = """
import multiprocessing, sys
from aqt_search import data
from aqt_search.training.interrupt import Interrupt

if __name__ == "__main__":
    with Interrupt() as interrupt:
        splits = data.open_splits("digits", data_dir=sys.argv[1], max_decoded_bytes=0)
        stream = data.train_batches(splits.train, batch_size=8, seed=0, mean=[0], std=[1],
                                    readers=data.Readers(workers=2))
        next(stream)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        while not interrupt.requested:
            next(stream)
        for _ in range(20):  # more than was made ahead
            next(stream)
        if "close" in sys.argv:
            stream.close()
    print("went on", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_run_and_not_before(tmp_path, number):
    """SIGTERM and Ctrl-C go to all processes: batches come until the run has saved."""
    script = tmp_path / "streaming.py"
    script.write_text(STREAMING)
    command = [sys.executable, str(script), str(tmp_path)]
    command += ["close"] if number == signal.SIGTERM else []  # else the interpreter's end does it
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout is not None
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(is_running, pids))
    if number == signal.SIGKILL:
        run.kill()
    else:
        os.killpg(run.pid, number)
    told, _ = run.communicate(timeout=60)
    assert told == ("" if number == signal.SIGKILL else "went on\n")
    assert run.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert ended(pids)
