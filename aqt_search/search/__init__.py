"""Formats searched while weights train, by any training loop.

    space = make_space(sites, [(".*", ("int4", "int8", "e4m3"))])    # what there is to choose
    one_shot = critic(space, {"gbops": space.cost_table(cost.gbops)}, total_steps=1000)

`critic`, `policy_gradient` and `uniform` make a `Search`, four pure functions; the searchers that
judge points of weights that stay as they are stand in `aqt_search.search.searchers`.
"""

from aqt_search.search.allocation import allocate
from aqt_search.search.cost_table import CostTable
from aqt_search.search.critic import critic
from aqt_search.search.one_shot import Search, SearchState
from aqt_search.search.options import NAMED_OPTIONS, SpaceError
from aqt_search.search.pareto import pareto_front
from aqt_search.search.policy_gradient import policy_gradient
from aqt_search.search.reward import Reward
from aqt_search.search.scores import score
from aqt_search.search.space import Decision, Space, make_space
from aqt_search.search.uniform import uniform
from aqt_search.search.warm_up import warmed_up

__all__ = [
    "NAMED_OPTIONS",
    "CostTable",
    "Decision",
    "Reward",
    "Search",
    "SearchState",
    "Space",
    "SpaceError",
    "allocate",
    "critic",
    "make_space",
    "pareto_front",
    "policy_gradient",
    "score",
    "uniform",
    "warmed_up",
]
