"""The Pareto front of (cost, accuracy) points, the area it dominates, and how two compare."""

import numpy as np
from numpy.typing import ArrayLike

Front = tuple[ArrayLike, ArrayLike]  # costs [n], accuracies [n]


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


def hypervolume_interval(
    costs: ArrayLike,
    accuracies: ArrayLike,
    reference_cost: float,
    reference_accuracy: float,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval over seeds of the hypervolume of the points' means.

    A resample draws as many seeds as there are, with replacement, takes every point's mean cost and
    mean accuracy over the drawn seeds that have it (a point none of them has is left out), and
    measures the `hypervolume` of the means. The interval runs between the (1 - level) / 2 and
    (1 + level) / 2 quantiles of the resamples. Source: Efron and Tibshirani, "An introduction to
    the bootstrap", 1993, chapter 13 (the percentile interval). With few seeds it is too narrow:
    of n seeds, a resampled mean has (n - 1) / n of the variance that it should have.

    Args:
      costs: [seeds, points], any unit; not finite where a seed lacks the point.
      accuracies: [seeds, points]; NaN where a seed lacks the point.
      reference_cost, reference_accuracy: as for `hypervolume`.
      level: confidence, in (0, 1).
      resamples: number of draws.
      seed: of the draws.

    Returns:
      (low, high); both NaN with fewer than two seeds, which say nothing about the spread.

    Raises:
      ValueError: the two are not matrices of one shape, a point has an accuracy but no finite cost,
        or level, resamples or the reference is out of range.
    """
    costs, accuracies, present = _as_seed_matrices(costs, accuracies)
    if not (0 < level < 1 and resamples >= 1):
        raise ValueError(
            f"level is {level} and resamples {resamples}; expected a level between 0 and 1, such "
            "as 0.95, and at least one resample"
        )
    reference = (reference_cost, reference_accuracy)
    hypervolume([], [], *reference)  # refuses a reference that is not finite
    if len(costs) < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(costs), size=(resamples, len(costs)))
    counts = np.stack([np.bincount(draw, minlength=len(costs)) for draw in draws])
    distinct, repeats = np.unique(counts, axis=0, return_counts=True)
    areas = []
    for weights in distinct:
        total = weights @ present
        shown = total > 0
        cost, accuracy = ((weights @ v)[shown] / total[shown] for v in (costs, accuracies))
        areas.append(hypervolume(cost, accuracy, *reference))
    quantiles = np.quantile(np.repeat(areas, repeats), [(1 - level) / 2, (1 + level) / 2])
    return float(quantiles[0]), float(quantiles[1])


def accuracy_gain(front_a: Front, front_b: Front) -> float:
    """Mean of accuracy_a - accuracy_b at equal cost, over the range of costs that both cover.

    The front of each set is taken to be piecewise linear in the logarithm of the cost, and level
    from its dearest point to the dearest point of the set: a larger budget can be left unspent. The
    difference is averaged exactly over log cost. A Bjontegaard delta (ITU-T VCEG-M33, 2001) with
    straight lines where that fits cubics, which overshoot between few points. Where the ranges
    share a single cost, it is the difference there.

    Args:
      front_a, front_b: (costs, accuracies), costs positive; points whose accuracy is NaN play no
        part, dominated ones only in the range of costs.

    Returns:
      In units of accuracy, positive where a is the more accurate; NaN where the ranges do not
      overlap or a set has no point.

    Raises:
      ValueError: as `pareto_front`, or a cost is not positive.
    """
    return _mean_difference(_levelled(front_a), _levelled(front_b))


def cost_ratio(front_a: Front, front_b: Front) -> float:
    """Geometric mean of cost_a / cost_b at equal accuracy, over the accuracies that both cover.

    exp(mean of log cost_a - log cost_b), with the fronts of `accuracy_gain` read the other way:
    the log cost is piecewise linear in the accuracy. Arguments and errors as there. Below 1 where a
    is the cheaper; NaN where the ranges of accuracy do not overlap or a set has no point.
    """
    flipped = [_log_front(front)[::-1] for front in (front_a, front_b)]
    return float(np.exp(_mean_difference(*flipped)))


def dominates(front_a: Front, front_b: Front) -> float:
    """Share of b's points that some point of a dominates, in the sense of `pareto_front`.

    The coverage C(a, b) of Zitzler and Thiele (1999), but a point equal in cost and accuracy does
    not count. Points whose accuracy is NaN play no part on either side.

    Args:
      front_a, front_b: (costs, accuracies).

    Returns:
      In [0, 1]; NaN if b has no point.

    Raises:
      ValueError: as `pareto_front`.
    """
    (costs_a, accuracies_a), (costs_b, accuracies_b) = (_as_points(*f) for f in (front_a, front_b))
    known = ~np.isnan(accuracies_b)
    if not known.any():
        return float("nan")
    cost_a, cost_b = costs_a[:, None], costs_b[known]
    accuracy_a, accuracy_b = accuracies_a[:, None], accuracies_b[known]  # NaN compares as false
    no_worse = (cost_a <= cost_b) & (accuracy_a >= accuracy_b)
    better = (cost_a < cost_b) | (accuracy_a > accuracy_b)
    return float((no_worse & better).any(axis=0).mean())


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


def _as_seed_matrices(
    costs: ArrayLike, accuracies: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both as float64 [seeds, points], 0 where the seed lacks the point, and where it has it."""
    costs = np.asarray(costs, dtype=np.float64)
    accuracies = np.asarray(accuracies, dtype=np.float64)
    if costs.ndim != 2 or costs.shape != accuracies.shape:
        raise ValueError(
            "costs and accuracies must be [seeds, points] matrices of one shape, not of shapes "
            f"{costs.shape} and {accuracies.shape}"
        )
    present = ~np.isnan(accuracies)
    if np.any(present & ~np.isfinite(costs)):
        row, column = np.argwhere(present & ~np.isfinite(costs))[0]
        raise ValueError(
            f"cost {costs[row, column]} of seed {row}, point {column} is not finite, though the "
            "point has an accuracy; mend its cost"
        )
    return np.where(present, costs, 0.0), np.where(present, accuracies, 0.0), present


def _log_front(front: Front) -> tuple[np.ndarray, np.ndarray]:
    """Natural log of the costs, and accuracies, of the front: both strictly increasing."""
    costs, accuracies = _as_points(*front)
    if np.any(costs <= 0):
        index = int(np.flatnonzero(costs <= 0)[0])
        raise ValueError(
            f"cost {costs[index]} at index {index} must be positive: fronts are compared on a "
            "logarithmic scale of cost"
        )
    chosen = pareto_front(costs, accuracies)
    _, first = np.unique(costs[chosen], return_index=True)  # equal points once
    return np.log(costs[chosen][first]), accuracies[chosen][first]


def _levelled(front: Front) -> tuple[np.ndarray, np.ndarray]:
    """`_log_front`, and its last accuracy at the cost of the dearest point that has one."""
    log_costs, values = _log_front(front)
    costs, accuracies = _as_points(*front)
    dearest = np.log(costs[~np.isnan(accuracies)].max(initial=0.0) or 1.0)
    if not len(log_costs) or dearest <= log_costs[-1]:
        return log_costs, values
    return np.append(log_costs, dearest), np.append(values, values[-1])


def _mean_difference(
    curve_a: tuple[np.ndarray, np.ndarray], curve_b: tuple[np.ndarray, np.ndarray]
) -> float:
    """Mean of y_a(x) - y_b(x) over the x that both polylines (x, y), x increasing, cover."""
    (x_a, y_a), (x_b, y_b) = curve_a, curve_b
    if not (len(x_a) and len(x_b)):
        return float("nan")
    low, high = max(x_a[0], x_b[0]), min(x_a[-1], x_b[-1])
    if low > high:
        return float("nan")
    knots = np.union1d(x_a, x_b)
    knots = np.concatenate([[low], knots[(knots > low) & (knots < high)], [high]])
    gaps = np.interp(knots, x_a, y_a) - np.interp(knots, x_b, y_b)
    if low == high:
        return float(gaps[0])
    # The difference is itself linear between neighbouring knots: the trapezoids are exact.
    return float(np.sum(np.diff(knots) * (gaps[1:] + gaps[:-1]) / 2) / (high - low))
