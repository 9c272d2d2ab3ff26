"""A one-shot search: four pure functions over one state, as an optimizer is two.

    one_shot = critic(space, {"gbops": space.cost_table(cost.gbops)}, total_steps=1000)
    state = one_shot.init({"gbops": target})
    # in every step of a loop that trains weights, compiled with the rest of it:
    choices = one_shot.sample(state, key)               # train under the first, judge all of them
    state, told = one_shot.update(state, choices, quality, key)
    # at the end:
    formats = space.concrete_assignment(one_shot.answer(state))

Weights and policy learn together (FLIQS, arXiv 2308.03290). A search knows no model, loss or
optimizer: whoever has a quality can search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.search import policy as policies
from aqt_search.search import replicas
from aqt_search.search.answer import most_probable, most_probable_on_target
from aqt_search.search.cost_table import CostTable
from aqt_search.search.options import SpaceError
from aqt_search.search.space import Space

SETTLED = 0.9  # the share of the search after which a critic samples its answer alone


class SearchState(NamedTuple):
    """Everything a search remembers: a pytree, to be kept, donated or mapped like any other."""

    step: jax.Array  # [], int32: updates done
    policy: Any  # what the searcher learns; `policy.logits` [decisions, max_options], float32
    targets: dict[str, jax.Array]  # [], float32: of each cost, in its units


class Search(NamedTuple):
    """A searcher: `critic`, `policy_gradient` or `uniform` make one.

    Attributes:
      init: (targets by name of cost) -> state. Raises SpaceError for a target no point can have.
      sample: (state, key) -> choices [samples, decisions], int32, drawn from the policy.
      update: (state, choices, quality [samples], key) -> (state, metrics). The quality of the
        choices sampled from this state, higher is better, all on the same examples; metrics are
        float32 scalars by name. The key may be the one sampled with. With an `axis_name`, to be
        called inside of that axis: replicas have keys, choices and qualities of their own and end
        in one state. Of a step with a quality that is not finite nothing is learned.
      answer: (state) -> choices [decisions], int32.
    """

    init: Callable[[Mapping[str, Any]], SearchState]
    sample: Callable[[SearchState, jax.Array], jax.Array]
    update: Callable[..., tuple[SearchState, dict[str, jax.Array]]]
    answer: Callable[[SearchState], jax.Array]


# Of choices [decisions], which of them decide anything: bool [decisions]; None: always all.
Active = Callable[[jax.Array], jax.Array] | None


def active_of(space: Decisions) -> Active:
    """Which decisions of a space decide anything, where that depends on the architecture."""
    return space.active if isinstance(space, Space) and space.net is not None else None


class Decisions(Protocol):
    """What a search chooses among: a `Space`, or a `CostTable` of one."""

    @property
    def mask(self) -> np.ndarray:
        """[decisions, max_options], bool: which options exist."""


class Period(NamedTuple):
    """The steps of a search: the policy rests before `start`, and a critic settles at the end."""

    start: int
    total: int

    @property
    def settles(self) -> int:
        """The step after which a critic samples its answer alone."""
        return min(self.start + math.ceil(SETTLED * (self.total - self.start)), self.total - 1)


def period(total_steps: int, delay: float) -> Period:
    """A search of `total_steps`, whose policy rests for the first share `delay` of them.

    Raises:
      ValueError: no step is left for the policy to move in.
    """
    if not 0 <= delay < 1:
        raise ValueError(f"delay is {delay}; expected a share of the steps, in [0, 1).")
    start = round(delay * total_steps)
    if start >= total_steps:
        raise ValueError(
            f"A delay of {delay} leaves none of the {total_steps} steps to move the policy in."
            " Shorten the delay or train longer."
        )
    return Period(start, total_steps)


def check_samples(samples: int, least: int, why: str) -> None:
    """Raises ValueError for fewer samples in a step than a searcher needs."""
    if samples < least:
        raise ValueError(f"samples is {samples}; expected at least {least}{why}.")


def check_tolerance(tolerance: float) -> None:
    """Raises ValueError for a tolerance that is no share of a target."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; expected a share of the targets, at least 0.")


def check_costs(mask: np.ndarray, costs: Mapping[str, CostTable]) -> None:
    """Raises SpaceError for costs that are no tables of the space with this `mask`."""
    if not isinstance(costs, Mapping):
        raise SpaceError(f"costs are {costs!r}; expected a mapping of names to cost tables.")
    for name, table in costs.items():
        if not isinstance(table, CostTable):
            raise SpaceError(
                f"costs[{name!r}] is {table!r}; expected a table, as space.cost_table({name})."
            )
        if table.mask is not mask and not np.array_equal(table.mask, mask):
            raise SpaceError(
                f"costs[{name!r}] is the table of another space: it has {len(table.mask)} decisions"
                f" with {table.mask.sum()} options, the search {len(mask)} with {mask.sum()}. Make"
                " it by the cost_table of the space that is searched."
            )


def check_targets(costs: Mapping[str, CostTable], targets: Mapping[str, Any]) -> None:
    """Raises SpaceError if costs and targets differ in their names, or no point meets a target.

    Of targets that are traced the names alone are looked at.
    """
    if not isinstance(targets, Mapping):
        raise SpaceError(f"targets are {targets!r}; expected a mapping of costs' names to numbers.")
    if not costs or set(costs) != set(targets):
        raise SpaceError(
            f"The search has the costs {', '.join(costs) or 'none'}, but targets of"
            f" {', '.join(targets) or 'none'}: give a target for each cost, and at least one."
        )
    for name, target in targets.items():
        if isinstance(target, jax.core.Tracer):
            continue
        try:
            if np.ndim(target):
                raise TypeError(f"the target has shape {np.shape(target)}; expected one number.")
            costs[name].check_target(float(target))
        except (TypeError, ValueError) as error:
            raise SpaceError(f"{name}: {error}") from error


def first_state(
    costs: Mapping[str, CostTable], targets: Mapping[str, Any], policy: Any
) -> SearchState:
    """The state before the first step. Raises SpaceError as `check_targets`."""
    check_targets(costs, targets)
    # Copies, as the state may be donated.
    own = {name: jnp.array(target, jnp.float32) for name, target in targets.items()}
    return SearchState(jnp.int32(0), policy, own)


def log_probabilities(
    state: SearchState, mask: np.ndarray, start: int, temperature: float = 1.0
) -> jax.Array:
    """log p [decisions, max_options] that a step samples from: uniform before `start`."""
    logits = jnp.where(state.step >= start, state.policy.logits, 0.0)
    return policies.log_probabilities(logits, mask, temperature)


def cost_ratios(
    costs: Mapping[str, CostTable], targets: Mapping[str, Any], choices: jax.Array
) -> jax.Array:
    """Cost over target of `choices` [n, decisions]: [n, costs]."""
    ratios = [jax.vmap(table.of)(choices) / targets[name] for name, table in costs.items()]
    return jnp.stack(ratios, axis=-1)


def check_judged(choices: jax.Array, quality: jax.Array, samples: int, decisions: int) -> None:
    """Raises ValueError unless there is one quality for each of the choices of a step."""
    expected = (samples, decisions)
    if jnp.shape(choices) != expected or jnp.shape(quality) != expected[:1]:
        raise ValueError(
            f"update got choices of shape {jnp.shape(choices)} and a quality of shape"
            f" {jnp.shape(quality)}; expected {expected}, all that sample gave, and"
            f" {expected[:1]}: one number for each, higher is better."
        )


def told_of_step(
    costs: Mapping[str, CostTable],
    targets: Mapping[str, Any],
    log_p: jax.Array,
    choices: jax.Array,
    quality: jax.Array,
    axis_name: Hashable | None,
    active: Active = None,
) -> dict[str, jax.Array]:
    """The metrics that all searchers tell of a step.

    "quality" and "cost" are means over samples and replicas, "cost" of the first of the costs;
    "entropy" is the mean over decisions in nats, by how often they were `active` in the samples;
    "expected_cost" is that of the policy sampled from, and so is "expected_cost/<name>" for each
    further cost.
    """
    cost = cost_ratios(costs, targets, choices)[:, 0] * targets[next(iter(costs))]
    means = jax.tree.map(jnp.mean, {"quality": quality, "cost": cost})
    told = replicas.mean(means, axis_name)
    weight = None if active is None else jnp.mean(1.0 * jax.vmap(active)(choices), axis=0)
    weight = None if weight is None else replicas.mean(weight, axis_name)
    told["entropy"] = policies.mean_entropy(log_p, weight)
    for number, (name, table) in enumerate(costs.items()):
        suffix = f"/{name}" if number else ""
        told["expected_cost" + suffix] = table.expected(jnp.exp(log_p))
    return told


def answer_of(
    log_p: jax.Array,
    costs: Mapping[str, CostTable],
    targets: Mapping[str, Any],
    tolerance: float,
    one_sided: bool,
) -> jax.Array:
    """The most probable point near its targets; with tolerance 0 the most probable of all."""
    if not tolerance:
        return most_probable(log_p)
    return most_probable_on_target(log_p, costs, targets, tolerance, one_sided=one_sided)
