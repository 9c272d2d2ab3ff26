"""Trains a supernet: one set of weights whose subnets all work, in all formats."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search.architecture.decisions import ArchitectureDecision
from aqt_search.architecture.subnet_sites import subnet_sites
from aqt_search.models.fitting import fitted
from aqt_search.search.space import Space
from aqt_search.training.loop import LoopResult, Run
from aqt_search.training.storage import as_path
from aqt_search.training.supernet_step import SmallestSubnet, SupernetState, make_supernet_step
from experiments import finished_run, from_config, results
from experiments.architecture import FORMATS, configured_net
from experiments.configured_search import configured_space, first_assignment
from experiments.job import Job, claim_run, run_alone
from experiments.jobs.searched import write_space


def supernet_space(config: ml_collections.ConfigDict, parts: from_config.Parts) -> Space:
    """The subnets and their formats, with the quantizers of the configuration.

    Raises:
      ConfigError: `search.architecture` is empty, or not of the model.
    """
    net = configured_net(config, parts.model, parts.images.splits.image_shape)
    if net is None:
        raise from_config.ConfigError(
            "config.search.architecture is empty, but a supernet has subnets: give the name of a"
            " space, such as 'small_mobilenet_v2', or config.search.architecture_rules."
        )
    return configured_space(config, parts.sites, net)


def prepare(config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images) -> Job:
    """Training by the sandwich rule; what random subnets are drawn from is part of the state."""
    why = "a supernet is trained in the formats of search.space"
    from_config.refuse_unread(config, ("formats", "policy"), why)
    # Replicas hold different subnets, so each normalises by its own batch.
    parts = from_config.build_parts(config, images, axis_name=None)
    if parts.range_loss is not None:
        raise from_config.ConfigError(
            "config.range_loss.rules has no place in a supernet's loss: leave it empty."
        )
    space, options = supernet_space(config, parts), config.supernet
    assert space.net is not None
    matrices = space.net.matrices() if options.kernel_matrices else ()
    step = make_supernet_step(
        from_config.quantized(parts.model, residuals=config.residuals, formats=space.formats),
        space, parts.optimizer, smallest_subnet(parts, space),
        subnets=options.subnets, distillation=options.distillation,
        label_smoothing=config.label_smoothing,
    )  # fmt: skip
    phases = allowed_by_step(config, space, parts.schedule.total_steps)

    def finish(found: LoopResult) -> dict[str, Any]:
        train = found.state.train
        write_space(workdir, space)
        choices = most_bits(space)
        formats = space.concrete_assignment(choices)
        facts = {"kind": "supernet", "steps": parts.schedule.total_steps, "seconds": found.seconds}
        ended = results.Ended(config, workdir, parts, formats, train.variables)
        return results.finish(ended, facts)

    state = from_config.initial_state(config, parts, first_assignment(space), matrices)
    if config.checkpoint:  # the whole model, whose important channels come first
        there = finished_run.load(config, as_path(config.checkpoint), images)
        if there.architecture is not None:
            raise from_config.ConfigError(
                f"The run in {config.checkpoint} is of a subnet, but a supernet starts from the"
                " whole network: give a run that was trained without config.policy, or none."
            )
        own = there.variables
        whole = {name: own[name] for name in ("params", "batch_stats") if name in own}
        state = state._replace(params=space.net.sort(whole)["params"])
    stream = from_config.training_stream(config, images)
    # Claimed last, so that a refused configuration does not keep the folder.
    identity = claim_run(workdir, config, images, "supernet")
    turns = {start + 1: functools.partial(_set_free, a) for start, a in phases.items() if start}
    first = SupernetState(state, jnp.asarray(phases[0]))
    run = Run(workdir, first, [stream], turns=turns, identity=identity)
    return Job(step, run, parts.schedule, finish)


def _set_free(allowed: np.ndarray, state: SupernetState) -> SupernetState:
    return state._replace(allowed=allowed)


def most_bits(space: Space) -> np.ndarray:
    """The largest subnet under the options that cost most."""
    return space.cost_table(aqs.cost.gbops).dearest


def smallest_subnet(parts: from_config.Parts, space: Space) -> SmallestSubnet:
    """The smallest subnet as a model of its own."""
    net = space.net
    assert net is not None
    shapes = from_config.abstract_variables(parts.model, parts.images.splits.image_shape)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), {"params": shapes["params"]})
    model, _ = fitted(parts.model, net.extract(net.smallest, zeros))
    sites = from_config.model_sites(model, parts.images.splits.image_shape)
    names = dict(zip(sites, subnet_sites(net, net.smallest), strict=True))

    def cut(params: Any, matrices: Any) -> Any:
        kept = net.extract(net.smallest, {"params": params}, matrices or None)
        return fitted(parts.model, kept)[1]["params"]

    return SmallestSubnet(from_config.quantized(model), cut, names, net.smallest)


def allowed_by_step(
    config: ml_collections.ConfigDict, space: Space, total: int
) -> dict[int, np.ndarray]:
    """By the step before which a phase starts, the options that are drawn from; the last are all.

    `supernet.phases` holds (share of the steps, kinds of decisions that are free in it).
    """
    found, start = {}, 0.0
    for share, free in config.supernet.phases:
        found[round(start * total)] = _free(space, free)
        start += share
    found[round(start * total)] = space.mask
    return found


def _free(space: Space, kinds: Collection[str]) -> np.ndarray:
    """[decisions, max_options]: all options of decisions of some kinds, of others the largest."""
    fixed = np.eye(space.max_options, dtype=bool)[most_bits(space)]
    is_free = [
        (d.kind if isinstance(d, ArchitectureDecision) else FORMATS) in kinds
        for d in space.decisions
    ]
    return np.where(np.array(is_free)[:, None], space.mask, fixed)


def run(
    config: ml_collections.ConfigDict, workdir: Path, images: from_config.Images | None = None
) -> dict[str, Any]:
    """Trains, evaluates the largest subnet and returns the result."""
    return run_alone(prepare, config, workdir, images)
