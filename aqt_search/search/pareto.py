"""The Pareto front of (cost, accuracy) points, and the area it dominates."""

import numpy as np
from numpy.typing import ArrayLike


def pareto_front(costs: ArrayLike, accuracies: ArrayLike) -> np.ndarray:
    """Indices of the points that no other point dominates, sorted by cost.

    Point j dominates point i if cost_j <= cost_i and accuracy_j >= accuracy_i and at least one of
    the two is strict: lower cost and higher accuracy are better. Hence of points with equal cost
    only the most accurate remain, of points with equal accuracy only the cheapest, and points equal
    in both are all kept, in the order given. A point whose accuracy is NaN is never on the front
    and dominates nothing.

    Args:
      costs: [n], any unit, finite.
      accuracies: [n], any unit.

    Returns:
      int64 [m], m <= n.

    Raises:
      ValueError: the two are not vectors of one length, or a cost is not finite.
    """
    costs, accuracies = _as_points(costs, accuracies)
    order = np.lexsort((-accuracies, costs))  # by cost, then best accuracy first; stable
    front: list[int] = []
    for i in order[~np.isnan(accuracies[order])]:
        last = front[-1] if front else None
        better = last is None or accuracies[i] > accuracies[last]
        if better or (costs[i], accuracies[i]) == (costs[last], accuracies[last]):
            front.append(i)
    return np.asarray(front, dtype=np.int64)


def hypervolume(
    costs: ArrayLike, accuracies: ArrayLike, reference_cost: float, reference_accuracy: float
) -> float:
    """Area of the (cost, accuracy) plane that the points dominate, up to a reference point.

    The area of the union over i of the rectangles [cost_i, reference_cost] x
    [reference_accuracy, accuracy_i], in units of cost times accuracy. A point that costs at least
    the reference or is at most as accurate adds nothing; no point at all gives 0. Source: Zitzler
    and Thiele, "Multiobjective evolutionary algorithms", 1999 (the size of the space covered).

    Raises:
      ValueError: as `pareto_front`, or a reference value is not finite.
    """
    if not (np.isfinite(reference_cost) and np.isfinite(reference_accuracy)):
        raise ValueError(
            f"the reference point ({reference_cost}, {reference_accuracy}) is not finite; "
            "give the worst cost and accuracy of interest"
        )
    costs, accuracies = _as_points(costs, accuracies)
    inside = (costs < reference_cost) & (accuracies > reference_accuracy)
    costs, accuracies = costs[inside], accuracies[inside]
    front = pareto_front(costs, accuracies)
    widths = np.diff(np.append(costs[front], reference_cost))
    return float(np.sum(widths * (accuracies[front] - reference_accuracy)))


def _as_points(costs: ArrayLike, accuracies: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 vectors of one length, the costs checked to be finite."""
    costs = np.asarray(costs, dtype=np.float64)
    accuracies = np.asarray(accuracies, dtype=np.float64)
    if costs.ndim != 1 or costs.shape != accuracies.shape:
        raise ValueError(
            f"costs and accuracies must be vectors of one length, not of shapes {costs.shape} and "
            f"{accuracies.shape}"
        )
    if not np.all(np.isfinite(costs)):
        index = int(np.flatnonzero(~np.isfinite(costs))[0])
        raise ValueError(
            f"cost {costs[index]} at index {index} is not finite; drop the point or mend its cost"
        )
    return costs, accuracies
