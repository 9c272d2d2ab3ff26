"""Measures how much each site of a trained model suffers from each format: trains nothing."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_collections
import numpy as np

from aqt_search import data
from aqt_search.training.processes import on_first
from aqt_search.training.sensitivity import Sensitivity, sensitivity
from aqt_search.training.storage import as_path
from aqt_search.training.workdir import check_lock, write_bytes, write_json
from experiments import finished_run, from_config
from experiments.job import claim_run, opened

SENSITIVITY_FILE, FIGURE_FILE = "sensitivity.json", "sensitivity.png"
_SEED_OFFSET = 4_000_037  # the order of the images is its own


def check_options(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where there is no run to measure."""
    if not config.sensitivity.checkpoint:
        raise from_config.ConfigError(
            "sensitivity.checkpoint is empty: give the workdir of a finished run of"
            " experiments.train or experiments.search."
        )


def image_batches(
    config: ml_collections.ConfigDict, images: from_config.Images
) -> Iterator[Mapping[str, np.ndarray]]:
    """At most `sensitivity.images` images, each once and in random order, in equal batches.

    None is filled up, because filling would count in the statistics of its batch.

    Raises:
      ConfigError: there are none.
    """
    options = config.sensitivity
    source = getattr(images.splits, options.split)
    if not len(source):
        raise from_config.ConfigError(
            "There are no held-out images: the run was trained with data.held_out=0. Train it with"
            " data.held_out, or set sensitivity.split to 'train'."
        )
    what = {"reward": "held-out images", "train": "training images"}[options.split]
    count = from_config.available("sensitivity.images", options.images, len(source), what)
    batches, size = from_config.equal_batches(count, config.evaluation.batch_size)
    stream = data.train_batches(
        source, batch_size=size, seed=config.seed + _SEED_OFFSET,
        mean=images.mean, std=images.std,
    )  # fmt: skip
    mask = np.ones(size, np.float32)
    return ({**batch, "mask": mask} for batch in itertools.islice(stream, batches))


def prepare(
    config: ml_collections.ConfigDict, images: from_config.Images | None = None
) -> Callable[[], Sensitivity]:
    """Checks everything, and returns what measures the run `sensitivity.checkpoint`.

    Args:
      config: of the run, with what to measure in `config.sensitivity`.
      images: saves loading the data set again.
    """
    check_options(config)
    folder = as_path(config.sensitivity.checkpoint)
    run = finished_run.load(config, folder, images)
    parts, formats = run.parts, tuple(config.sensitivity.formats)
    return functools.partial(
        sensitivity, parts.model.apply, run.variables, parts.sites, formats,
        image_batches(config, parts.images),
        reference=config.sensitivity.reference, chunk=config.sensitivity.chunk,
    )  # fmt: skip


def check_finite(found: Sensitivity, folder: str) -> None:
    """Raises ConfigError where the reference has no loss to compare with."""
    if not math.isfinite(found.reference_loss):
        raise from_config.ConfigError(
            f"The loss of {folder} is {found.reference_loss} already in the reference"
            f" {found.reference!r}. Give another run, or another reference."
        )


def sensitivity_table(found: Sensitivity) -> str:
    """Increase of the loss by site and format, as aligned text."""
    width = max(map(len, found.sites))
    lines = [f"{'loss increase':{width}}" + "".join(f"  {name:>8}" for name in found.formats)]
    for site, losses in zip(found.sites, found.loss - found.reference_loss):
        lines.append(f"{site:{width}}" + "".join(f"  {loss:+8.4f}" for loss in losses))
    return "\n".join(
        [
            *lines,
            f"one site at a time, all others {found.reference}: loss {found.reference_loss:.4f},"
            f" accuracy {100 * found.reference_accuracy:.2f} % on {found.images} images",
        ]
    )


def write(found: Sensitivity, folder: Path) -> None:
    """Writes sensitivity.json and sensitivity.png."""
    content = found.to_json()
    write_json(folder / SENSITIVITY_FILE, content)
    from aqt_search.report.sensitivity_plot import sensitivity_figure  # matplotlib takes long

    write_bytes(folder / FIGURE_FILE, sensitivity_figure(content))


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> Sensitivity:
    """Measures, and writes sensitivity.json and sensitivity.png."""
    with opened(config, workdir, images) as found_images:
        why = "the run of sensitivity.checkpoint has its own, and sites are put into formats alone"
        from_config.refuse_unread(config, ("formats", "policy", "checkpoint"), why)
        measure = prepare(config, found_images)
        # Claimed last, so that a refused configuration does not keep the folder.
        claim_run(workdir, config, found_images, "sensitivity")
        found = measure()
        check_finite(found, config.sensitivity.checkpoint)
        check_lock(workdir)
        on_first(write)(found, workdir)
        return found
