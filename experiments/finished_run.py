"""The weights of a finished run, for jobs that train nothing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search.training.checkpoint import restore_latest
from aqt_search.training.loop import CHECKPOINT_FOLDER
from aqt_search.training.train_step import TrainState
from aqt_search.training.workdir import CONFIG_FILE, is_there, read_json
from configs import base
from experiments import from_config, results
from experiments.architecture import (
    ARCHITECTURE,
    choices_of,
    configured_net,
    read_policy_file,
)
from experiments.assignment import configured_assignment, read_policy
from experiments.configured_search import (
    configured_space,
    first_assignment,
    format_names,
    plain_space,
)
from experiments.job import INPUTS, JOB, claimed_identity
from experiments.quantizers import configured_quantizers
from experiments.subnet import subnet_of

_SUPERNET, SUBNET = "supernet", "subnet"  # kinds of results
_OF_SPACES = ("search", "random", _SUPERNET)  # whose weights were trained in all formats of one
WEIGHTS_FOLDER = "weights"  # of a subnet


class FinishedRun(NamedTuple):
    """A run that has ended."""

    config: ml_collections.ConfigDict
    parts: from_config.Parts
    variables: Mapping[str, Any]  # {"params": ..., "batch_stats": ...}, "scales" if any
    architecture: Mapping[str, Any] | None  # what tells the model from the configured one


def result_of(folder: Path) -> dict[str, Any] | None:
    """The result of the run in `folder`; None if it has not ended, or failed."""
    path = folder / results.RESULT_FILE
    result = read_json(path) if is_there(path) else {"error": ""}
    return None if "error" in result else result


def load(
    config: ml_collections.ConfigDict, folder: Path, images: from_config.Images | None = None
) -> FinishedRun:
    """The run in `folder`, which `config` describes; `images` saves loading them again.

    A subnet that experiments.subnets found (`points/<name>`) is one, too.

    Raises:
      ConfigError: there is no finished run, or one of another model, data set or seed.
      CheckpointError: its checkpoint is not whole.
    """
    trained = run_config(config, folder)
    images = images or from_config.load_images(config)
    there, now = _images_there(folder), images.splits.fingerprint
    if there not in (None, now):
        raise from_config.ConfigError(
            f"The run in {folder} was trained on other images (there {there}; now {now}): what it"
            " held out is not what would be held out now. Restore its data set, or train anew."
        )
    parts = from_config.build_parts(trained, images, axis_name=None)
    if _kind(folder) == SUBNET:
        return FinishedRun(trained, *_subnet_there(trained, folder, parts))
    variables = trained_state(trained, folder, parts).variables
    return FinishedRun(trained, *_as_found(trained, folder, parts, variables))


def _kind(folder: Path) -> str | None:
    return (result_of(folder) or {}).get("kind")


def ended_formats(run: FinishedRun, folder: Path) -> dict[str, aqs.SiteFormats]:
    """The formats that the run in `folder` ended with, with its quantizers."""
    names: list[str] = []
    if _kind(folder) in (*_OF_SPACES, SUBNET):  # learned step sizes have one for each format
        image_shape = run.parts.images.splits.image_shape
        whole = from_config.build_parts(run.config, run.parts.images, axis_name=None)
        net = configured_net(run.config, whole.model, image_shape)
        names = format_names(plain_space(run.config, whole.sites, net))
    formats = read_policy(folder / results.POLICY_FILE)
    return configured_quantizers(run.config, names).of_assignment(run.parts.sites, formats)


def _subnet_there(
    config: ml_collections.ConfigDict, folder: Path, parts: from_config.Parts
) -> tuple[from_config.Parts, Mapping[str, Any], Mapping[str, Any]]:
    """A subnet with the weights in `folder`, which needs no supernet any more."""
    net = configured_net(config, parts.model, parts.images.splits.image_shape)
    assert net is not None
    told = read_policy_file(folder / results.POLICY_FILE)[ARCHITECTURE]
    formats = first_assignment(configured_space(config, parts.sites, net))
    state = _zeros(lambda: from_config.initial_state(config, parts, formats))
    whole = state.variables  # of the right structure
    cut = subnet_of(parts, net, choices_of(net, told["choices"]), {}, whole)
    restored = restore_latest(folder / WEIGHTS_FOLDER, cut.variables)
    if restored is None:
        raise from_config.ConfigError(
            f"{folder} has no weights in {WEIGHTS_FOLDER}: run experiments.subnets again."
        )
    return cut.parts, restored.state, told


def _zeros(make: Callable[[], Any]) -> Any:
    """What `make` makes, with zeros in it."""
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(make))


def _as_found(
    config: ml_collections.ConfigDict,
    folder: Path,
    parts: from_config.Parts,
    variables: Mapping[str, Any],
) -> tuple[from_config.Parts, Mapping[str, Any], Mapping[str, Any] | None]:
    """The plain model that a search of the architecture found, cut out of the whole one."""
    path = folder / results.POLICY_FILE
    told = read_policy_file(path).get(ARCHITECTURE) if is_there(path) else None
    # A model that was trained by a policy has been built with its architecture.
    whole = told is not None and not config.policy
    net = configured_net(config, parts.model, parts.images.splits.image_shape) if whole else None
    if told is None or net is None:
        return parts, variables, told
    subnet = subnet_of(parts, net, choices_of(net, told["choices"]), {}, variables)
    return subnet.parts, subnet.variables, told


def _images_there(folder: Path) -> str | None:
    """The fingerprint of the images a run was trained on; None of one that kept none."""
    return read_json(folder / CONFIG_FILE).get(INPUTS, {}).get("data")


def run_config(config: ml_collections.ConfigDict, folder: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `folder`.

    Raises:
      ConfigError: there is no finished run, or one of another model, data set or seed: its held-out
        images would be others.
    """
    if result_of(folder) is None or not is_there(folder / CONFIG_FILE):
        raise from_config.ConfigError(
            f"{folder} holds no finished run: it has no {results.RESULT_FILE} without an error, or"
            f" no {CONFIG_FILE}. Give the --workdir of a run that has ended."
        )
    there = _completed(read_json(folder / CONFIG_FILE), base.get_config().to_dict())
    for key in (INPUTS, JOB):
        there.pop(key, None)
    now, then = _identity(json.loads(json.dumps(config.to_dict()))), _identity(there)
    differing = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if differing:
        listing = "; ".join(f"{k}: there {then.get(k)}, now {now.get(k)}" for k in differing)
        raise from_config.ConfigError(
            f"The run in {folder} is of another model or data ({listing}). Give its own --config"
            " and changes of it."
        )
    return ml_collections.ConfigDict(there)


def _completed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration with the keys that came after it: their defaults are what it did."""
    merged = {**defaults, **config}
    for key, value in merged.items():
        if isinstance(defaults.get(key), dict):
            merged[key] = _completed(value, defaults[key])
    return merged


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What has to agree for weights to fit and for held-out images to be held out."""
    found = {"seed": config["seed"]}
    for section in ("model", "data"):
        found |= {f"{section}.{k}": v for k, v in config[section].items() if k != "data_dir"}
    if found["data.name"].startswith("folder:"):  # told apart by its images, not by its path
        found["data.name"] = "folder"
    return found


class Supernet(NamedTuple):
    """A run of experiments.supernet that has ended."""

    config: ml_collections.ConfigDict
    parts: from_config.Parts
    variables: Mapping[str, Any]
    matrices: Any  # of the kernels; () where smaller windows are plain middles


def load_supernet(
    config: ml_collections.ConfigDict, folder: Path, images: from_config.Images
) -> Supernet:
    """The supernet in `folder`, which `config` describes.

    Raises:
      ConfigError: there is none, or one of another model, data set or seed.
      CheckpointError: its checkpoint is not whole.
    """
    trained = run_config(config, folder)
    kind = _kind(folder)
    if kind != _SUPERNET:
        raise from_config.ConfigError(
            f"The run in {folder} is no supernet (its kind is {kind!r}): give the workdir of a"
            " finished run of experiments.supernet."
        )
    _check_same_subnets(config, trained, folder)
    parts = from_config.build_parts(trained, images, axis_name=None)
    train = trained_state(trained, folder, parts)
    return Supernet(trained, parts, train.variables, train.auxiliary)


def _check_same_subnets(
    config: ml_collections.ConfigDict, trained: ml_collections.ConfigDict, folder: Path
) -> None:
    """Raises ConfigError where a configuration describes other subnets than were trained."""
    keys = ("search.architecture", "search.architecture_rules", "search.space", "search.decide",
            "quantizers")  # fmt: skip

    def told(described: ml_collections.ConfigDict) -> dict[str, Any]:
        whole = json.loads(json.dumps(described.to_dict()))
        return {key: functools.reduce(dict.__getitem__, key.split("."), whole) for key in keys}

    there, now = told(trained), told(config)
    for key in keys:
        if there[key] != now[key]:
            raise from_config.ConfigError(
                f"config.{key} is {now[key]!r}, but the supernet in {folder} was trained with"
                f" {there[key]!r}. Give the supernet's --config and changes of it, or train another"
                " supernet."
            )


def trained_state(
    config: ml_collections.ConfigDict, folder: Path, parts: from_config.Parts
) -> TrainState:
    """The weights, statistics and what was learned beside them at the end of a run.

    Raises:
      CheckpointError: there is no whole checkpoint, or one of another model.
      ConfigError: there is no checkpoint at all.
    """
    kind = read_json(folder / results.RESULT_FILE).get("kind")
    searched = kind in _OF_SPACES
    shape = parts.images.splits.image_shape
    net = configured_net(config, parts.model, shape) if searched else None
    learned = kind == _SUPERNET and config.supernet.kernel_matrices

    # Not while it is traced: the formats of learned scales are numbers.
    assignment = (
        first_assignment(configured_space(config, parts.sites, net))
        if searched
        else configured_assignment(config, parts.sites)
    )

    def initial():
        if not searched:
            return from_config.initial_state(config, parts, assignment)
        matrices = net.matrices() if net is not None and learned else ()
        return {"train": from_config.initial_state(config, parts, assignment, matrices)}

    template = _zeros(initial)
    # Of a search the weights alone: what its policy remembers may be of another version.
    claimed = read_json(folder / CONFIG_FILE)
    identity = claimed_identity(claimed) if INPUTS in claimed else None
    checkpoints = folder / CHECKPOINT_FOLDER
    restored = restore_latest(checkpoints, template, identity=identity, part=searched)
    if restored is None:
        raise from_config.ConfigError(
            f"{folder} has no checkpoint in {CHECKPOINT_FOLDER}. Give another run, or run it again."
        )
    return restored.state["train"] if searched else restored.state
