"""The exact allocation against a search through all points."""

import itertools

import numpy as np
import pytest

from aqt_search.search import SpaceError, allocate
from aqt_search.search.cost_table import CostTable

MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]], bool)


def table(rng, fixed):
    """Two groups of two decisions, whose costs are no sums, and one of one decision."""
    first, second = np.array([0, 2, 4]), np.array([1, 3, 4])
    return CostTable(rng.uniform(1, 9, size=(3, 3, 3)), first, second, fixed, MASK)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e7])
@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_of_all_points(seed, names, scale):
    rng = np.random.default_rng(seed)
    costs = {name: table(rng, fixed=2.0) for name in names}
    values = np.where(MASK, rng.normal(size=MASK.shape), np.nan) * scale
    points = np.array([p for p in itertools.product(range(3), repeat=5) if p[1] < 2])
    targets = {name: np.quantile(c.of_many(points), 0.5) for name, c in costs.items()}
    fits = np.all([c.of_many(points) <= targets[n] for n, c in costs.items()], axis=0)
    total = values[np.arange(5), points].sum(axis=1)
    found = allocate(values, costs, targets)
    np.testing.assert_array_equal(found, points[np.argmax(np.where(fits, total, -np.inf))])


def test_a_large_space_stays_under_its_target():
    rng = np.random.default_rng(0)
    count, options = 300, 11
    columns = rng.uniform(1, 2, size=(count, options)).cumsum(axis=1)
    numbers = np.zeros((count, options, options))
    numbers[:, np.arange(options), np.arange(options)] = columns
    everything = np.ones((count, options), bool)
    cost = CostTable(numbers, np.arange(count), np.arange(count), 0.0, everything)
    values = -rng.uniform(size=(count, 1)) / columns
    target = 0.4 * columns[:, -1].sum()
    choices = allocate(values, {"cost": cost}, {"cost": target})
    # The best of each line of multipliers bounds the optimum from above (Everett 1963).
    bounds = [
        (values - m * columns).max(axis=1).sum() + m * target for m in np.geomspace(1e-6, 1, 400)
    ]
    rows = np.arange(count)
    assert columns[rows, choices].sum() <= target * (1 + 1e-6)
    assert values[rows, choices].sum() == pytest.approx(min(bounds), rel=2e-3)


def test_what_cannot_be_is_refused():
    rng = np.random.default_rng(0)
    cost = table(rng, fixed=0.0)
    values, costs = np.zeros((5, 3)), {"a": cost}
    with pytest.raises(SpaceError, match=r"No point meets.*cheapest of each: a: from"):
        allocate(values, costs, {"a": 0.9 * cost.range[0]})
    with pytest.raises(SpaceError, match="costs a, but targets of b"):
        allocate(values, costs, {"b": 9.0})
    with pytest.raises(SpaceError, match="at least one"):
        allocate(values, {}, {})
    with pytest.raises(ValueError, match=r"shape \(5, 2\); expected \(5, 3\)"):
        allocate(values[:, :2], costs, {"a": 20.0})
    with pytest.raises(ValueError, match="finite"):
        allocate(values + np.nan, costs, {"a": 20.0})
