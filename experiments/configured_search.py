"""The search of a configuration: its space, costs, targets and searcher, each made once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

import aqt_search as aqs
from aqt_search import search
from aqt_search.architecture.elastic import Elastic
from aqt_search.numerics.formats import format_name
from aqt_search.search.cost_table import CostTable
from aqt_search.search.one_shot import Search, period
from aqt_search.search.options import Choice, SpaceError, parsed_rule
from aqt_search.search.policy_gradient import REDUCTIONS
from aqt_search.search.reward import ENTROPY_SCHEDULES, REWARDS, named_reward
from aqt_search.search.space import Space, make_space
from aqt_search.search.warm_up import warmed_up
from aqt_search.training.parallel import AXIS
from aqt_search.training.search_step import MEASURES, QUALITIES
from experiments.from_config import ConfigError, checked_values, cost_function
from experiments.option_values import VALUES
from experiments.quantizers import configured_quantizers


class ConfiguredSearch(NamedTuple):
    """What a job of `config.search` works with."""

    space: Space
    costs: dict[str, CostTable]  # by name; the first is the primary one
    targets: dict[str, float]  # in the units of the costs
    plain: Space  # the same with formats as they are, without the quantizers of the configuration
    one_shot: Search | None  # None: decided once, which samples nothing
    delay_steps: int  # after which formats begin to be decided

    def first_assignment(self) -> dict[str, aqs.SiteFormats]:
        """The assignment of some point: what calibration states are made for."""
        return first_assignment(self.space)


def configured_search(
    config: ml_collections.ConfigDict,
    sites: Mapping[str, aqs.Site],
    total_steps: int,
    net: Elastic | None = None,
) -> ConfiguredSearch:
    """Everything of `config.search`, checked.

    Raises:
      ConfigError: values that cannot be, or not together.
      SpaceError: a target outside of the space.
    """
    plain = plain_space(config, sites, net)
    space = with_quantizers(config, plain)
    costs = {name: space.cost_table(cost_function(name)) for name in cost_names(config)}
    targets = checked_targets(config, sites, costs)
    with checked_values("search"):
        one_shot = _one_shot(config.search, space, costs, total_steps)
        start = period(total_steps, config.search.delay).start
        if one_shot is not None and net is not None and config.search.warm_up:
            steps = round(config.search.warm_up * total_steps)
            one_shot = warmed_up(one_shot, space, steps, config.search.warm_up_kinds)
    return ConfiguredSearch(space, costs, targets, plain, one_shot, start)


def _critic(options, space: Space, costs: Mapping[str, CostTable], total_steps: int) -> Search:
    reward = named_reward(options.reward)
    if reward.multiplies:
        raise ValueError(
            "searcher 'critic' takes from reward on which sides of a target a cost is off: expected"
            f" 'absolute' or 'one_sided' (is {options.reward!r})."
        )
    if options.temperature != 1:
        raise ValueError(
            "searcher 'critic' has a temperature of its own: leave temperature at 1 (is"
            f" {options.temperature})."
        )
    return search.critic(
        space, costs, total_steps=total_steps, delay=options.delay, samples=options.samples,
        tolerance=options.tolerance, one_sided=reward.one_sided, axis_name=AXIS,
    )  # fmt: skip


_GRADIENT_CONTROLS = (
    "reward", "beta", "delay", "samples", "cost_samples", "learning_rate", "entropy_weight",
    "entropy_schedule", "temperature", "log_probability", "tolerance",
)  # fmt: skip


def _policy_gradient(options, space: Space, costs: Mapping[str, CostTable], total_steps: int):
    if named_reward(options.reward).multiplies and options.measure == "loss":
        raise ValueError(
            f"Reward {options.reward!r} multiplies quality and cost: set measure to 'accuracy' (is"
            f" {options.measure!r})."
        )
    moving = options.advantage == "baseline"
    if options.samples == 1 and not moving:
        raise ValueError(
            "samples is 1, but advantage 'centred' compares the samples of a step: set samples to 2"
            " or more, or advantage to 'baseline'."
        )
    if options.penalty == "annealed" and not options.cost_samples:
        raise ValueError(
            "penalty 'annealed' ends as that of points whose cost alone is judged, but cost_samples"
            " is 0: set it to 2 or more, or penalty to 'sampled'."
        )
    return search.policy_gradient(
        space, costs, total_steps=total_steps, annealed=options.penalty == "annealed",
        baseline_momentum=options.baseline_momentum if moving else None, axis_name=AXIS,
        **{name: options[name] for name in _GRADIENT_CONTROLS},
    )  # fmt: skip


def _uniform(options, space: Space, costs: Mapping[str, CostTable], total_steps: int) -> Search:
    return search.uniform(
        space, costs, total_steps=total_steps, samples=options.samples,
        tolerance=options.tolerance, one_sided=named_reward(options.reward).one_sided,
        axis_name=AXIS,
    )  # fmt: skip


# By `config.search.searcher`: what trains the weights of a search, too.
ONE_SHOT: Mapping[str, Callable[..., Search]] = {
    "critic": _critic,
    "policy_gradient": _policy_gradient,
    "random": _uniform,
}


# What the named controls may be, whether the searcher has a use for them or not.
NAMED_CONTROLS: Mapping[str, Collection[str]] = {
    "searcher": (*VALUES, *ONE_SHOT),
    "reward": REWARDS,
    "quality": QUALITIES,
    "measure": MEASURES,
    "advantage": ("baseline", "centred"),
    "penalty": ("annealed", "sampled"),
    "entropy_schedule": ENTROPY_SCHEDULES,
    "log_probability": REDUCTIONS,
}


def _one_shot(
    options: ml_collections.ConfigDict, space: Space, costs: Mapping[str, Any], total_steps: int
) -> Search | None:
    if options.searcher in VALUES:
        return None
    if options.samples > 1 and options.quality == "train":
        raise ValueError(
            f"samples is {options.samples}, but quality 'train' judges the one point that the"
            " weights are trained under. Set samples to 1, or quality to 'held_out'."
        )
    return ONE_SHOT[options.searcher](options, space, costs, total_steps)


@functools.cache
def _smallest_space() -> Space:
    """A space of one decision."""
    weight, x = jax.ShapeDtypeStruct((2, 2), np.float32), jax.ShapeDtypeStruct((1, 2), np.float32)
    sites = aqs.find_sites(lambda weight, x: x @ weight, weight, x)
    return make_space(sites, ((".*", ("int4", "int8")),))


def check_controls(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for values of `config.search` that exclude one another in any space."""
    space = _smallest_space()
    with checked_values("search"):
        _one_shot(config.search, space, {"gbops": space.cost_table(aqs.cost.gbops)}, 10**6)


def uniform_rules(config: ml_collections.ConfigDict, formats: Any) -> tuple:
    """The space's rules with `formats` in place of every choice."""
    rules = []
    for pattern, spec in config.search.space:
        offered = parsed_rule(pattern, spec)
        if isinstance(offered, Choice):
            roles = {role: formats for role in offered.options}
            spec = formats if None in roles else {**offered.fixed, **roles}
        rules.append((pattern, spec))
    return tuple(rules)


def cost_names(config: ml_collections.ConfigDict) -> list[str]:
    """The costs that have a target; the first is the primary one."""
    names = [config.search.cost, *(name for name, _, _ in config.search.further_costs)]
    if len(set(names)) < len(names):
        raise ConfigError(f"search has two targets for one cost: {names}.")
    return names


def checked_targets(
    config: ml_collections.ConfigDict,
    sites: Mapping[str, aqs.Site],
    costs: Mapping[str, CostTable],
    key: str = "search.target",
) -> dict[str, float]:
    """The targets of `cost_names`, in the units of the costs.

    Args:
      costs: of the space, by name.
      key: where the primary target was given.

    Raises:
      SpaceError: no point of the space costs as much; names the key and what may be given there.
    """
    primary = (config.search.cost, config.search.target, config.search.relative_to)
    keys = (key, *["search.further_costs"] * len(config.search.further_costs))
    targets = {}
    for key, (name, target, relative_to) in zip(keys, (primary, *config.search.further_costs)):
        unit, of = 1.0, ""
        if relative_to:
            reference = aqs.assign(sites, uniform_rules(config, relative_to))
            unit, of = float(cost_function(name)(sites, reference)), f" times uniform {relative_to}"
        targets[name] = target * unit
        try:
            costs[name].check_target(targets[name])
        except SpaceError as error:
            low, high = (limit / unit for limit in costs[name].range)
            raise SpaceError(
                f"config.{key}: the {name} target {target:g}{of} is outside of the space, whose"
                f" points cost between {low:.4g} and {high:.4g}{of}. Give a target between them, or"
                " offer other formats in config.search.space."
            ) from error
    return targets


def configured_space(
    config: ml_collections.ConfigDict, sites: Mapping[str, aqs.Site], net: Elastic | None = None
) -> Space:
    """The space of `config.search`, with the quantizers of the configuration."""
    return with_quantizers(config, plain_space(config, sites, net))


def plain_space(
    config: ml_collections.ConfigDict, sites: Mapping[str, aqs.Site], net: Elastic | None = None
) -> Space:
    """The space of `config.search`, with scales of the formats alone."""
    return make_space(sites, config.search.space, decide=config.search.decide, net=net)


def with_quantizers(config: ml_collections.ConfigDict, space: Space) -> Space:
    """The space with the quantizers of the configuration."""
    quantizers = configured_quantizers(config, format_names(space))
    adapted = dataclasses.replace(space, adapt=quantizers.of_site)
    first_assignment(adapted)  # raises where they do not fit
    return adapted


def first_assignment(space: Space) -> dict[str, aqs.SiteFormats]:
    """The assignment of some point: what calibration states are made for."""
    return space.assignment(np.zeros(len(space.decisions), int))


def format_names(space: Space) -> list[str]:
    """The formats that some point of a space uses."""
    named = []
    for column in range(space.max_options):
        choices = [min(column, len(d.options) - 1) for d in space.decisions]
        for formats in space.concrete_assignment(choices).values():
            named += [format_name(aqs.quantizer(spec).fmt) for spec in formats if spec is not None]
    return list(dict.fromkeys([*named, "fp32"]))  # the option of None
