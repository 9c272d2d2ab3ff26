"""Images a second of the input pipeline, beside those of the training step that takes them.

    python -m benchmarks.input_pipeline --folder=/path/to/images     # read at 256, trained at 224
    python -m benchmarks.input_pipeline --config=configs/imagenet.py:resnet50 --folder=...
    python -m benchmarks.input_pipeline --quick                      # digits, to see that it runs

The folder has train/<class>/*.jpg and test/<class>/*.jpg; images are decoded, cut at random,
mirrored and normalised, by every number of threads and worker processes. With --stored each is
first scaled to so many pixels a side and stored as JPEG: CIFAR-10's do for ImageNet's, whose files
are larger and slower (500 x 375 pixels on the average). Every pipeline makes batches for --seconds,
in turns; the step runs alone, on one batch that stays where it is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from aqt_search import data
from aqt_search.training import parallel
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.train_step import init_train_state, make_update
from benchmarks import timing
from benchmarks.accelerator import Model

ROUNDS = 3
STORED_IMAGES = 2000  # of a folder, that are scaled


class Setting(NamedTuple):
    """A pipeline, by who makes its batches."""

    name: str
    readers: data.Readers


def settings(cores: int) -> list[Setting]:
    """Threads and worker processes, up to one a core."""
    counts = sorted({1, *(2**k for k in range(1, 10) if 2**k < cores), cores})
    threads = [Setting(f"data.threads={n}", data.Readers(0, n)) for n in counts]
    return threads + [Setting(f"data.workers={n}", data.Readers(n)) for n in counts]


def scaled_copy(folder: Path, out: Path, pixels: int) -> None:
    """Stores some of a folder's images at another size."""
    for split in ("train", "test"):
        files = sorted((folder / split).rglob("*.*"))
        for file in files[:: max(1, len(files) // STORED_IMAGES)]:
            target = out / split / file.parent.name / f"{file.stem}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(file) as image:
                image.convert("RGB").resize((pixels, pixels)).save(target, quality=90)


def batches(splits: data.Splits, batch: int, readers: data.Readers) -> data.Batches:
    """ImageNet's training batches of a data set."""
    channels = splits.image_shape[-1]
    return data.train_batches(
        splits.train,
        batch_size=batch,
        seed=0,
        mean=np.full(channels, 0.5),
        std=np.full(channels, 0.25),
        augmentation=data.Augmentation(flip=True, crop_area=(0.08, 1.0)),
        readers=readers,
    )


def rates(splits: data.Splits, batch: int, seconds: float, cores: int) -> dict[str, float]:
    """Images a second of every setting, the median of rounds."""
    found: dict[str, list[float]] = {setting.name: [] for setting in settings(cores)}
    for _ in range(ROUNDS):
        for name, readers in settings(cores):
            stream = batches(splits, batch, readers)
            ahead = 1 + 2 * max(1, readers.threads or 0)  # made before the clock starts
            for _ in range(ahead):
                next(stream)
            start, images = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                images += len(next(stream)["label"])
            found[name].append(images / (time.perf_counter() - start))
            stream.close()
    return {name: statistics.median(values) for name, values in found.items()}


def step_rate(model: Any, batch: dict[str, np.ndarray], rounds: int) -> float:
    """Images a second of the float training step on a batch."""
    optimizer = make_optimizer("sgd", 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    update = make_update(lambda _, *args, **more: model.apply(*args, **more), optimizer)
    step = parallel.pmap_step(lambda state, batch: update(state, (), batch)[:2])
    held = parallel.shard(batch)
    state = parallel.replicate(init_train_state(model, optimizer, batch["image"].shape[1:], 0))

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, held)
        return metrics

    seconds = timing.time_in_turns({"step": run}, rounds)["step"]
    return len(batch["label"]) / statistics.median(seconds)


def advice(pipelines: dict[str, float], step: float) -> str:
    """Which is the slower, and what to set."""
    best = max(pipelines, key=pipelines.__getitem__)
    # The fewest processes and threads, listed first, that do as well as the best or as the step.
    enough = next(n for n, rate in pipelines.items() if rate >= 0.95 * min(pipelines[best], step))
    if pipelines[best] >= step:
        return (
            f"The step is the slower, by {pipelines[best] / step:.2f}: set {enough}; more readers"
            " bring nothing."
        )
    return (
        f"The input pipeline is the slower, by {step / pipelines[best]:.2f}: set {enough}, store"
        " the images smaller (300 pixels on the short side do for 224), or divide a run over more"
        " hosts, each of which reads its part of every batch."
    )


def network(args: argparse.Namespace) -> tuple[Model, str]:
    """(the network and its batch, the dtype) of a configuration, or of the flags without one."""
    if args.quick:
        return Model("resnet8", "cifar", 32, 16), args.dtype
    if not args.config:
        return Model(args.model, args.form, args.pixels, args.batch), args.dtype
    file, _, form = args.config.partition(":")
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--config: {file!r} is no Python file, such as configs/imagenet.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(form) if form else module.get_config()
    pixels = config.data.image_size or args.pixels
    return Model(config.model.name, config.model.form, pixels, args.batch), config.model.dtype


@contextlib.contextmanager
def opened(folder: str, stored: int, pixels: int) -> Generator[data.Splits]:
    """The data set that is read, never in memory."""
    with tempfile.TemporaryDirectory() as temporary:
        name = f"folder:{folder}" if folder else "digits"
        if folder and stored:
            name = f"folder:{temporary}/scaled"
            scaled_copy(Path(folder), Path(temporary) / "scaled", stored)
        yield data.open_splits(
            name, data_dir=temporary, image_size=pixels, crop_fraction=0.875, max_decoded_bytes=0
        )


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="", help="images; without it the digits")
    parser.add_argument("--stored", type=int, default=256, help="pixels a side; 0: as they are")
    parser.add_argument(
        "--config", default="", help="whose network, dtype and image size are taken"
    )
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--form", default="imagenet")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pixels", type=int, default=224, help="that the network is given")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pipeline, in a round")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps")
    parser.add_argument("--quick", action="store_true", help="digits at 32 pixels, ResNet-8")
    args = parser.parse_args()
    if args.quick:
        args.folder, args.seconds = "", 0.5
    (model, dtype), cores = network(args), len(os.sched_getaffinity(0))
    with opened(args.folder, args.stored, model.pixels) as splits:
        pipelines = rates(splits, model.batch, args.seconds, cores)
        batch = next(batches(splits, model.batch, data.Readers(threads=0)))
    step = step_rate(model.build(jnp.dtype(dtype)), batch, args.rounds)
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    print(f"{model.title}, {dtype}, on {devices}; {cores} cores, jax {jax.__version__}")
    for name, rate in [*pipelines.items(), ("the training step", step)]:
        print(f"{name:20} {rate:9.1f} images/s")
    print(advice(pipelines, step))


if __name__ == "__main__":
    main()
