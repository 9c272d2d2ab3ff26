"""Searches formats while weights train: decides once, and trains on under the answer.

Until the delay is over the weights train under the options of most bits. Where the architecture is
decided, too, important channels are then moved to the front, as a cut keeps those. A few training
images give every option its value (`experiments.option_values`: by gradients, or one at a time),
the best point that meets the targets is taken (`allocate`, `allocate_subnet`), and the weights
train to the end under it, by the same program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search import search
from aqt_search.architecture.elastic import Elastic
from aqt_search.search.elastic_allocation import allocate_subnet
from aqt_search.training import parallel
from aqt_search.training.loop import LoopResult, Run
from aqt_search.training.subnets import of_points
from aqt_search.training.train_step import Batch, TrainState
from experiments import from_config
from experiments.architecture import configured_net
from experiments.configured_search import configured_search
from experiments.job import Job, claim_run
from experiments.jobs.searched import Found, finish_search, probabilities_of
from experiments.option_values import VALUES, about_architecture, rising


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
    kept = {"residuals": config.residuals, "formats": space.formats}
    qapply = of_points(from_config.quantized(parts.model, parallel.AXIS, **kept), net)
    update = from_config.make_update(config, parts, qapply, net)

    def step(state: ScoredState, inputs, batch: Batch):
        train, metrics, _ = update(state.train, space.point(state.choices), batch)
        cost = primary.of(state.choices)
        return ScoredState(train, state.choices), metrics | {"cost": cost}

    def decide(state: ScoredState) -> ScoredState:
        if net is not None:
            state = state._replace(train=sorted_state(net, state.train))
        judged = VALUES[config.search.searcher]
        values = judged(config, alone, setting.plain, state.train.variables)
        if net is not None:
            risen = rising(values, primary, about_architecture(space))
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


def sorted_state(net: Elastic, train: TrainState) -> TrainState:
    """The same function with important channels first, in the optimizer's state as well.

    As it is where scales are learned, which may be of single channels.
    """
    if jax.tree.leaves(train.scales):
        return train
    own = {"params": train.params, "batch_stats": train.batch_stats}
    whole = net.sort(own)
    shape = jax.tree.structure(train.params)

    def is_like(leaf):
        return jax.tree.structure(leaf) == shape

    def like(leaf):
        return net.sort(own | {"params": leaf}, by=own)["params"] if is_like(leaf) else leaf

    moments = jax.tree.map(like, train.opt_state, is_leaf=is_like)
    return train._replace(opt_state=moments, **whole)
