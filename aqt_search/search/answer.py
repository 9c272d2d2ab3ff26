"""The point that a searched policy answers with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from aqt_search.search.cost_table import CostTable

_OPEN_DECISIONS = 12  # 2^12 points are looked at


def most_probable(log_p: np.ndarray) -> np.ndarray:
    """The most probable option of every decision; int [decisions].

    Args:
      log_p: [decisions, max_options], -inf where there is no option.
    """
    return np.argmax(log_p, axis=-1)


def most_probable_on_target(
    log_p: np.ndarray,
    costs: Mapping[str, CostTable],
    targets: Mapping[str, float],
    tolerance: float,
    *,
    one_sided: bool = False,
) -> np.ndarray:
    """The most probable point whose costs are all within `tolerance` of their targets.

    A policy that ends decided may still end a few per cent off its target, where a decision that
    was nearly even fell to the other side. Looked at are the points in which the 12 decisions that
    are least certain take one of their two best options, and all others their best. Where none of
    these is within the tolerance, the answer is the most probable of those that are nearest, by the
    largest |C / T - 1|.

    Args:
      log_p: [decisions, max_options], -inf where there is no option.
      costs: of the space's points, by name.
      targets: of each cost.
      tolerance: largest |C / T - 1|, at least 0; infinity gives the most probable point.
      one_sided: whether costs below their targets are as good as on them.

    Returns:
      int [decisions].
    """
    order = np.argsort(-log_p, axis=-1, kind="stable")
    best = np.take_along_axis(log_p, order, axis=-1)
    margins = best[:, 0] - best[:, 1]
    least_certain = np.argsort(margins, kind="stable")[:_OPEN_DECISIONS]
    least_certain = least_certain[np.isfinite(margins[least_certain])]
    flips = np.array(list(itertools.product((0, 1), repeat=len(least_certain))), int)
    ranks = np.zeros((len(flips), len(log_p)), int)
    ranks[:, least_certain] = flips
    points = order[np.arange(len(log_p)), ranks]
    excess = [table.of_many(points) / targets[name] - 1 for name, table in costs.items()]
    off = np.max(np.maximum(excess, 0) if one_sided else np.abs(excess), axis=0)
    # A hair of slack keeps sums in another order from telling equal costs apart.
    fits = off <= max(tolerance, off.min()) * (1 + 1e-9)
    lost = flips @ margins[least_certain]
    return points[np.argmin(np.where(fits, lost, np.inf))]
