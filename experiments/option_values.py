"""Values of every option of a space on trained weights: what formats the network can bear."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from sklearn.isotonic import IsotonicRegression

import aqt_search as aqs
from aqt_search import data, search
from aqt_search.search.cost_table import CostTable
from aqt_search.search.searchers.points import option_costs, single_changes
from aqt_search.search.space import Space
from aqt_search.training.assignment_batch import evaluate_assignments
from aqt_search.training.loop import DivergedError
from aqt_search.training.scales import SCALES, batch_arguments
from aqt_search.training.subnets import of_points
from aqt_search.training.train_step import Batch, cross_entropy
from experiments import from_config

_SEED_OFFSET = 5_000_011  # the order of the judged images is its own
_BATCH = 64
_FOR_NETS = 8  # times the images: the noise of 512 is a loss of 0.01, as much as a width is worth


def by_gradients(
    config: ml_collections.ConfigDict,
    parts: from_config.Parts,
    space: Space,
    variables: Mapping[str, Any],
) -> np.ndarray:
    """`search.score` on about `search.score_images` training images: [decisions, max_options].

    BatchNorm takes the statistics of each batch. What a network has is no small change, as a format
    is: options of the architecture have the values of `one_at_a_time`, on eight times the images.

    Args:
      config: of a run.
      parts: made for one device.
      space: without calibrations that have state.
      variables: {"params": ..., "batch_stats": ...}; "scales" are left out.

    Raises:
      DivergedError: the gradients, or a loss, are not finite.
    """
    values = np.zeros(space.mask.shape)
    numbers = list(space.format_decisions)
    if space.net is not None:
        judged = about_architecture(space)
        values = _by_losses(config, parts, space, variables, judged, _FOR_NETS)
    if not numbers:
        return values
    of_formats = dataclasses.replace(
        space, decisions=tuple(space.format_decisions.values()), net=None
    )
    batches = judged_batches(config, parts.images)
    scores = search.score(*_model_and_loss(parts.model), _own(variables), batches, of_formats)
    values[numbers, : scores.shape[1]] = scores
    if not np.isfinite(values).all():
        raise DivergedError(
            "The gradients that formats are scored by are not finite. Try a lower learning rate or"
            " a longer warm-up, in a new --workdir."
        )
    return values


def one_at_a_time(
    config: ml_collections.ConfigDict,
    parts: from_config.Parts,
    space: Space,
    variables: Mapping[str, Any],
) -> np.ndarray:
    """Minus the increase of the loss by each option alone, all others at most bits.

    On the images of `by_gradients`, by a forward pass for each option: the reference that it is
    compared with, whose cost grows with the number of decisions.

    Raises:
      DivergedError: a loss is not finite.
    """
    architecture = about_architecture(space)
    values = _by_losses(config, parts, space, variables, ~architecture, 1)
    if space.net is not None:
        values += _by_losses(config, parts, space, variables, architecture, _FOR_NETS)
    return values


def about_architecture(space: Space) -> np.ndarray:
    """Which decisions of a space are about the architecture: bool [decisions]."""
    found = np.ones(len(space.decisions), bool)
    found[list(space.format_decisions)] = False
    return found


def _by_losses(
    config: ml_collections.ConfigDict,
    parts: from_config.Parts,
    space: Space,
    variables: Mapping[str, Any],
    judged: np.ndarray,
    times: int,
) -> np.ndarray:
    """`one_at_a_time` of decisions `judged` [decisions], on `times` the images; others are 0."""
    table = space.cost_table(aqs.cost.gbops)
    start = table.dearest
    others = space.mask & judged[:, None]
    others[np.arange(len(start)), start] = False
    choices = np.concatenate([start[None], single_changes(start, space.mask)[others]])
    batches = [
        {**batch, "mask": np.ones(len(batch["label"]), np.float32)}
        for batch in judged_batches(config, parts.images, times)
    ]
    assignments = jax.jit(jax.vmap(space.point))(choices)
    qapply = of_points(from_config.quantized(parts.model), space.net)
    losses = evaluate_assignments(qapply, assignments, _own(variables), batches).loss
    if not np.isfinite(losses).all():
        raise DivergedError("The loss of some format alone is not finite: look at the weights.")
    values = np.zeros(space.mask.shape)
    values[others] = losses[0] - losses[1:]
    return values


def rising(values: np.ndarray, costs: CostTable, decisions: np.ndarray) -> np.ndarray:
    """Isotonic regression of values on the options' costs, less that of the dearest option.

    On a few hundred images some smaller network always seems better. Where the weights are trained
    on, more is worth no less.

    Args:
      values: [decisions, max_options].
      costs: of the space.
      decisions: [decisions] of bool: those to change.
    """
    found, dear = values.copy(), option_costs(costs)
    for number in np.flatnonzero(decisions):
        there = np.flatnonzero(costs.mask[number])
        fitted = IsotonicRegression().fit_transform(dear[number, there], values[number, there])
        found[number, there] = fitted - fitted.max()
    return found


# By `config.search.searcher`, which then decides once, and `config.allocate.by`.
SCORES = "scores"
VALUES: Mapping[str, Callable[..., np.ndarray]] = {
    SCORES: by_gradients,
    "one_at_a_time": one_at_a_time,
}


def judged_batches(
    config: ml_collections.ConfigDict, images: from_config.Images, times: int = 1
) -> list[Mapping[str, np.ndarray]]:
    """About `times` `search.score_images` training images, not augmented, in equal batches."""
    wanted, there = config.search.score_images, len(images.splits.train)
    count = from_config.available("search.score_images", wanted, there, "training images")
    number, size = from_config.equal_batches(min(times * count, there), _BATCH)
    stream = data.train_batches(
        images.splits.train, batch_size=size, seed=config.seed + _SEED_OFFSET,
        mean=images.mean, std=images.std,
    )  # fmt: skip
    return list(itertools.islice(stream, number))


def _own(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if name != SCALES}


@functools.lru_cache(maxsize=4)  # the same functions for equal models, which then share programs
def _model_and_loss(model: Any) -> tuple[Callable, Callable]:
    """(apply, loss) for `search.score`, normalised by the statistics of each batch."""

    def apply(variables: Mapping[str, Any], batch: Batch) -> jax.Array:
        arguments = batch_arguments(variables, jax.random.key(0))
        logits = model.apply(variables, batch["image"], **arguments)
        return logits[0] if "mutable" in arguments else logits

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        return cross_entropy(logits, batch["label"], 0.0).mean()

    return apply, loss
