"""Measures how much each site of a trained model suffers from each format: trains nothing.

    python -m experiments.sensitivity --config=configs/digits_resnet8.py --workdir=runs/alone \
        --config.sensitivity.checkpoint=runs/float

The weights are those of a finished run of experiments.train or experiments.search with the same
model, data and seed; the images are held out of its training. The workdir holds the configuration,
sensitivity.json and sensitivity.png.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from aqt_search import data
from aqt_search.formats import numeric_format
from aqt_search.search import policy as policies
from aqt_search.search.one_shot import SearchState, policy_optimizer
from aqt_search.search.sensitivity import FLOAT, Sensitivity, sensitivity
from aqt_search.search.space import make_space
from aqt_search.training.checkpoint import restore_latest
from aqt_search.training.loop import CHECKPOINT_FOLDER
from aqt_search.training.train_step import init_train_state
from aqt_search.training.workdir import (
    CONFIG_FILE,
    claim_workdir,
    lock_workdir,
    read_json,
    write_json,
)
from experiments import from_config, results
from experiments.command_line import run_job
from experiments.search import search_options

SENSITIVITY_FILE, FIGURE_FILE = "sensitivity.json", "sensitivity.png"
SPLITS = ("reward", "train")
_SEED_OFFSET = 4_000_037  # the order of the images is its own


def check_options(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for values of `config.sensitivity` that cannot be."""
    options = config.sensitivity
    if not options.checkpoint:
        raise from_config.ConfigError(
            "sensitivity.checkpoint is empty: give the workdir of a finished run of"
            " experiments.train or experiments.search."
        )
    if options.split not in SPLITS:
        raise from_config.ConfigError(
            f"sensitivity.split is {options.split!r}; expected 'reward', the held-out images, or"
            " 'train'. Test images choose nothing."
        )
    for key in ("images", "chunk"):
        if options[key] < 1:
            raise from_config.ConfigError(f"sensitivity.{key} is {options[key]}; expected >= 1.")
    with from_config.checked_values("sensitivity"):
        for name in {*options.formats, options.reference} - {FLOAT}:
            numeric_format(name)
    if not options.formats or FLOAT in options.formats:
        raise from_config.ConfigError(
            f"sensitivity.formats is {tuple(options.formats)}; expected names of formats."
        )


def run_config(config: ml_collections.ConfigDict, folder: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `folder`.

    Raises:
      ConfigError: there is no finished run, or one of another model, data set or seed: its held-out
        images would be others.
    """
    if not (folder / results.RESULT_FILE).exists() or not (folder / CONFIG_FILE).exists():
        raise from_config.ConfigError(
            f"sensitivity.checkpoint {folder} holds no finished run: it has no"
            f" {results.RESULT_FILE} and {CONFIG_FILE}. Give the --workdir of a run that has ended."
        )
    there = read_json(folder / CONFIG_FILE)
    now, then = _identity(json.loads(json.dumps(config.to_dict()))), _identity(there)
    differing = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if differing:
        listing = "; ".join(f"{k}: there {then.get(k)}, now {now.get(k)}" for k in differing)
        raise from_config.ConfigError(
            f"The run in {folder} is of another model or data ({listing}). Give its own --config"
            " and changes of it."
        )
    return ml_collections.ConfigDict(there)


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What has to agree for weights to fit and for held-out images to be held out."""
    found = {"seed": config["seed"]}
    for section in ("model", "data"):
        found |= {f"{section}.{k}": v for k, v in config[section].items() if k != "data_dir"}
    return found


def trained_variables(
    config: ml_collections.ConfigDict, folder: Path, parts: from_config.Parts
) -> Mapping[str, Any]:
    """The weights and BatchNorm statistics at the end of the run in `folder`.

    Raises:
      CheckpointError: there is no whole checkpoint, or one of another model.
      ConfigError: there is no checkpoint at all.
    """
    searched = read_json(folder / results.RESULT_FILE).get("kind") == "search"

    def initial():
        shape = parts.images.splits.image_shape
        train = init_train_state(parts.model, parts.optimizer, shape, config.seed)
        if not searched:
            return train
        space = make_space(parts.sites, config.search.space, decide=config.search.decide)
        adam = policy_optimizer(search_options(config, parts.schedule.total_steps))
        return SearchState(train, policies.init_policy(space.mask, adam))

    template = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(initial))
    restored = restore_latest(folder / CHECKPOINT_FOLDER, template)
    if restored is None:
        raise from_config.ConfigError(
            f"sensitivity.checkpoint {folder} has no checkpoint in {CHECKPOINT_FOLDER}. Give"
            " another run, or run it again."
        )
    train = restored.state.train if searched else restored.state
    return {"params": train.params, "batch_stats": train.batch_stats}


def image_batches(
    config: ml_collections.ConfigDict, images: from_config.Images
) -> Iterator[dict[str, np.ndarray]]:
    """At most `sensitivity.images` images, each once and in random order, in equal batches.

    None is filled up, because filling would count in the statistics of its batch.

    Raises:
      ConfigError: there are none.
    """
    source = getattr(images.splits, config.sensitivity.split)
    count = min(config.sensitivity.images, len(source))
    if not count:
        raise from_config.ConfigError(
            "There are no held-out images: the run was trained with data.held_out=0. Train it with"
            " data.held_out, or set sensitivity.split to 'train'."
        )
    batches = math.ceil(count / config.evaluation.batch_size)
    stream = data.train_batches(
        source, batch_size=count // batches, seed=config.seed + _SEED_OFFSET,
        mean=images.mean, std=images.std,
    )  # fmt: skip
    for batch in itertools.islice(stream, batches):
        yield {**batch, "mask": np.ones(len(batch["label"]), np.float32)}


def measure(
    config: ml_collections.ConfigDict, images: from_config.Images | None = None
) -> Sensitivity:
    """The sensitivities of the run `sensitivity.checkpoint`; `images` saves loading them again."""
    check_options(config)
    folder = Path(config.sensitivity.checkpoint)
    trained = run_config(config, folder)
    images = images or from_config.load_images(config)
    parts = from_config.build_parts(trained, images, axis_name=None)
    variables = trained_variables(trained, folder, parts)
    found = sensitivity(
        parts.model.apply, variables, parts.sites, tuple(config.sensitivity.formats),
        image_batches(config, images),
        reference=config.sensitivity.reference, chunk=config.sensitivity.chunk,
    )  # fmt: skip
    if not math.isfinite(found.reference_loss):
        raise from_config.ConfigError(
            f"The loss of {folder} is {found.reference_loss} already in the reference"
            f" {found.reference!r}. Give another run, or another reference."
        )
    return found


def sensitivity_table(found: Sensitivity) -> str:
    """Increase of the loss by site and format, as aligned text."""
    width = max(map(len, found.sites))
    lines = [f"{'loss increase':{width}}" + "".join(f"  {name:>8}" for name in found.formats)]
    for site, losses in zip(found.sites, found.loss - found.reference_loss):
        lines.append(f"{site:{width}}" + "".join(f"  {loss:8.4f}" for loss in losses))
    return "\n".join(
        [
            *lines,
            f"one site at a time, all others {found.reference}: loss {found.reference_loss:.4f},"
            f" accuracy {100 * found.reference_accuracy:.2f} % on {found.images} images",
        ]
    )


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> Sensitivity:
    """Measures, and writes sensitivity.json and sensitivity.png."""
    with lock_workdir(workdir):
        found = measure(config, images)
        claim_workdir(workdir, config.to_dict(), ignore=("log_every", "data.data_dir"))
        content = found.to_json()
        write_json(workdir / SENSITIVITY_FILE, content)
        from aqt_search.report.sensitivity_plot import sensitivity_figure  # matplotlib takes long

        temporary = workdir / f".{FIGURE_FILE}.tmp"
        temporary.write_bytes(sensitivity_figure(content))
        os.replace(temporary, workdir / FIGURE_FILE)
        return found


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    print(sensitivity_table(run(config, workdir)))
    print(f"\nWritten to {workdir}: {SENSITIVITY_FILE}, {FIGURE_FILE}")


if __name__ == "__main__":
    run_job(main)
