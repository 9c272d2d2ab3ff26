"""Searches formats while weights train: decides once, and trains on under the answer.

Until the delay is over the weights train under the options of most bits; where the architecture is
decided, too, in half of the steps as a random subnet, so that what is cut is missed no more than it
has to be. Then a few training images give every option its value (`experiments.option_values`: by
gradients, or one at a time), the best point that meets the targets is taken (`allocate`,
`allocate_subnet`), and the weights train to the end under it, by the same program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search import search
from aqt_search.search.elastic_allocation import allocate_subnet
from aqt_search.search.space import Space
from aqt_search.training import parallel
from aqt_search.training.loop import LoopResult, Run
from aqt_search.training.subnets import of_points
from aqt_search.training.train_step import Batch, TrainState
from experiments import from_config
from experiments.architecture import configured_net
from experiments.configured_search import configured_search
from experiments.job import Job, claim_run
from experiments.jobs.searched import Found, finish_search, probabilities_of
from experiments.option_values import VALUES, rising


class ScoredState(NamedTuple):
    """What a step reads and writes."""

    train: TrainState
    choices: jax.Array  # [decisions], int32: the point that the weights train under


def prepare(config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images) -> Job:
    """A search that decides at the end of its delay; the point is part of the state."""
    parts = from_config.build_parts(config, images)
    alone = from_config.build_parts(config, images, axis_name=None)  # scores on one device
    net = configured_net(config, parts.model, images.splits.image_shape)
    setting = configured_search(config, parts.sites, parts.schedule.total_steps, net)
    space, (name, primary) = setting.space, next(iter(setting.costs.items()))
    is_architecture = np.arange(len(space.decisions)) < (0 if net is None else len(net.decisions))
    qapply = of_points(from_config.quantized(parts.model, parallel.AXIS), net)
    update = from_config.make_update(config, parts, qapply, net)

    def step(state: ScoredState, inputs, batch: Batch):
        choices = state.choices
        if net is not None:  # the same on all replicas, whose batches are normalised together
            key = jax.random.fold_in(jax.random.key(config.seed), state.train.step)
            drawn = _random_half(space, is_architecture, choices, key)
            choices = jnp.where(state.train.step < setting.delay_steps, drawn, choices)
        train, metrics, _ = update(state.train, space.point(choices), batch)
        cost = primary.of(choices)
        return ScoredState(train, state.choices), metrics | {"cost": cost}

    def decide(state: ScoredState) -> ScoredState:
        judged = VALUES[config.search.searcher]
        values = judged(config, alone, setting.plain, state.train.variables)
        if net is not None:
            risen = rising(values, primary, is_architecture)
            choices = allocate_subnet(risen, space, primary, setting.targets[name])
        else:
            choices = search.allocate(values, setting.costs, setting.targets)
        return state._replace(choices=choices.astype(np.int32))

    def describe(state: ScoredState) -> dict[str, float]:
        chosen = np.eye(space.max_options)[parallel.unreplicate(state.choices)]
        return probabilities_of(chosen, space)

    def finish(found: LoopResult) -> dict[str, Any]:
        train, choices = found.state
        searched = Found("search", choices, train.variables, found.seconds)
        return finish_search(config, workdir, parts, setting, searched)

    state = ScoredState(
        from_config.initial_state(config, parts, setting.first_assignment()),
        space.cost_table(aqs.cost.gbops).dearest.astype(np.int32),
    )
    # Claimed last, so that a refused configuration does not keep the folder.
    identity = claim_run(workdir, config, images, "search")
    stream = from_config.training_stream(config, images)
    turns = {setting.delay_steps + 1: decide}
    run = Run(workdir, state, [stream], describe=describe, turns=turns, identity=identity)
    return Job(step, run, parts.schedule, finish)


def _random_half(
    space: Space, is_architecture: np.ndarray, choices: jax.Array, key: jax.Array
) -> jax.Array:
    """`choices` or, in half of the draws, an architecture at random with the same formats."""
    kept, random = jax.random.split(key)
    noise = jax.random.gumbel(random, space.mask.shape)
    drawn = jnp.argmax(jnp.where(space.mask, noise, -jnp.inf), axis=-1)
    return jnp.where(is_architecture & (jax.random.uniform(kept) < 0.5), drawn, choices)
