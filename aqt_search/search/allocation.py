"""The best point of additive values under additive costs, exactly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from aqt_search.search.cost_table import CostTable
from aqt_search.search.one_shot import check_costs
from aqt_search.search.options import SpaceError


def allocate(
    values: np.ndarray, costs: Mapping[str, CostTable], targets: Mapping[str, float]
) -> np.ndarray:
    """The point of largest total value whose costs are at most their targets: int [decisions].

        max over c of sum over d of values[d, c[d]]   with   cost_k(c) <= target_k for all k

    a multiple-choice knapsack, solved to the optimum by branch and bound (HiGHS, as
    `scipy.optimize.milp` calls it); with one variable for each option of a group, a pair of them
    where a group has two decisions, costs that are products of two choices are sums, too.

    Args:
      values: [decisions, max_options], higher is better, such as those of `score`; options that do
        not exist are left out.
      costs: of the space's points, by name.
      targets: the largest cost, by the same names.

    Raises:
      SpaceError: costs and targets differ in their names, costs are of several spaces, or no point
        meets all targets.
      ValueError: values of another shape, or not finite; the solver gives up.
    """
    if not costs or set(costs) != set(targets):
        raise SpaceError(
            f"allocate got costs {', '.join(costs) or 'none'}, but targets of"
            f" {', '.join(targets) or 'none'}: give a target for each cost, and at least one."
        )
    tables = list(costs.values())
    mask = tables[0].mask
    check_costs(mask, costs)
    if np.shape(values) != mask.shape or not np.all(np.isfinite(np.asarray(values)[mask])):
        raise ValueError(
            f"values have shape {np.shape(values)}; expected {mask.shape}, [decisions,"
            " max_options], finite where there is an option."
        )
    if tables[0].shares is not None:
        raise SpaceError(
            "The space decides about the architecture, too: what an option of formats costs depends"
            " on the widths around it, and is no sum that could be allocated. Search it by the"
            " critic, the policy gradient or NSGA-II, or fix the architecture."
        )
    first, second = tables[0].first, tables[0].second
    group, i, j = np.nonzero(tables[0].pairs)
    gain = np.asarray(values, float)[first[group], i]
    gain = gain + np.where(first == second, 0.0, 1.0)[group] * values[second[group], j]
    one_each = coo_array((np.ones(len(group)), (group, np.arange(len(group)))))
    limits = [
        # In shares of the target, by which the solver's tolerance of 1e-6 is one.
        LinearConstraint(
            table.table[group, i, j] / targets[name], -np.inf, 1 - table.fixed / targets[name]
        )
        for name, table in costs.items()
    ]
    scale = np.max(np.abs(gain)) or 1.0
    found = milp(
        -gain / scale, integrality=np.ones(len(group)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), *limits], options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if found.status == 2:
        reach = ", ".join(f"{n}: from {t.range[0]:.6g}" for n, t in costs.items())
        raise SpaceError(
            f"No point meets the targets {dict(targets)} together (the cheapest of each: {reach})."
        )
    if found.x is None:
        raise ValueError(f"The allocation was not solved: {found.message}")
    taken = np.flatnonzero(found.x > 0.5)
    choices = np.zeros(len(mask), int)
    choices[second[group[taken]]] = j[taken]
    choices[first[group[taken]]] = i[taken]
    return choices
