"""Pareto front and hypervolume against their definitions, written out by brute force."""

import itertools

import numpy as np
import pytest

from aqt_search.search.pareto import hypervolume, pareto_front


def dominates(a, b):
    """The definition; false as soon as an accuracy is NaN."""
    no_worse = a[0] <= b[0] and a[1] >= b[1]
    return no_worse and (a[0] < b[0] or a[1] > b[1])


def front_by_definition(costs, accuracies):
    points = list(zip(costs, accuracies))
    kept = [
        i
        for i, point in enumerate(points)
        if not np.isnan(point[1]) and not any(dominates(other, point) for other in points)
    ]
    return sorted(kept, key=lambda i: (costs[i], i))


def area_by_cells(costs, accuracies, reference_cost, reference_accuracy):
    """Cuts the plane at every coordinate and adds the cells that some point dominates."""
    xs = np.unique([c for c in [*costs, reference_cost] if c <= reference_cost])
    ys = np.unique([a for a in [*accuracies, reference_accuracy] if a >= reference_accuracy])
    area = 0.0
    for x0, x1 in itertools.pairwise(xs):
        for y0, y1 in itertools.pairwise(ys):
            if any(c <= x0 and a >= y1 for c, a in zip(costs, accuracies)):
                area += (x1 - x0) * (y1 - y0)
    return area


def random_points(seed):
    """Every third case lies on a coarse grid, so that ties are common; some accuracies are NaN."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    costs, accuracies = rng.uniform(1, 10, n), rng.uniform(0, 1, n)
    if seed % 3 == 0:
        costs, accuracies = np.round(costs / 3), np.round(accuracies, 1)
    if seed % 4 == 0:
        accuracies[rng.uniform(size=n) < 0.2] = np.nan
    return costs, accuracies


@pytest.mark.parametrize("seed", range(60))
def test_front_is_the_definition(seed):
    costs, accuracies = random_points(seed)
    assert pareto_front(costs, accuracies).tolist() == front_by_definition(costs, accuracies)


@pytest.mark.parametrize("seed", range(60))
def test_hypervolume_is_the_dominated_area(seed):
    costs, accuracies = random_points(seed)
    reference = (7.3, 0.25)  # inside the cloud: some points lie beyond it on either axis
    expected = area_by_cells(costs, accuracies, *reference)
    assert hypervolume(costs, accuracies, *reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "costs, accuracies, expected",
    [
        ([], [], []),
        ([1.0], [0.5], [0]),
        ([1.0], [np.nan], []),
        ([2, 1], [0.9, 0.5], [1, 0]),  # sorted by cost
        ([1, 1], [0.5, 0.9], [1]),  # equal cost: the more accurate one
        ([2, 1], [0.5, 0.5], [1]),  # equal accuracy: the cheaper one
        ([1, 2, 1], [0.5, 0.4, 0.5], [0, 2]),  # equal in both: both stay
        ([1, 2], [np.nan, 0.4], [1]),  # NaN dominates nothing
    ],
)
def test_small_cases(costs, accuracies, expected):
    assert pareto_front(costs, accuracies).tolist() == expected


def test_hypervolume_by_hand():
    # 2 x 0.5 from the first point, and 1 x 0.2 more above it from the second
    assert hypervolume([1, 2], [0.5, 0.7], 3.0, 0.0) == pytest.approx(1.2)
    assert hypervolume([], [], 3.0, 0.0) == 0.0
    assert hypervolume([3.0, 1.0], [0.9, 0.0], 3.0, 0.0) == 0.0


@pytest.mark.parametrize(
    "costs, accuracies, message",
    [
        ([1, 2], [0.5], r"shapes \(2,\) and \(1,\)"),
        ([[1]], [[0.5]], "vectors"),
        ([1, np.nan], [0.5, 0.6], "cost nan at index 1"),
        ([np.inf], [0.5], "cost inf at index 0"),
    ],
)
def test_bad_points_are_refused(costs, accuracies, message):
    with pytest.raises(ValueError, match=message):
        pareto_front(costs, accuracies)
    with pytest.raises(ValueError, match=message):
        hypervolume(costs, accuracies, 3.0, 0.0)


def test_reference_must_be_finite():
    with pytest.raises(ValueError, match="reference point"):
        hypervolume([1.0], [0.5], np.inf, 0.0)
