"""Fronts, hypervolumes and comparisons against their definitions, written out by brute force."""

import itertools

import numpy as np
import pytest

from aqt_search.search.pareto import (
    accuracy_gain,
    cost_ratio,
    dominates,
    hypervolume,
    hypervolume_interval,
    pareto_front,
)


def beats(a, b):
    """The definition; false as soon as an accuracy is NaN."""
    no_worse = a[0] <= b[0] and a[1] >= b[1]
    return no_worse and (a[0] < b[0] or a[1] > b[1])


def front_by_definition(costs, accuracies):
    points = list(zip(costs, accuracies))
    kept = [
        i
        for i, point in enumerate(points)
        if not np.isnan(point[1]) and not any(beats(other, point) for other in points)
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


# ---- the interval over seeds ----


def seeds_of_a_front(seed, seeds=3, points=5):
    """[seeds, points]: noisy copies of one front, with a seed lacking a point in every other."""
    rng = np.random.default_rng(seed)
    costs = 2.0 ** np.arange(points) * rng.uniform(0.8, 1.2, (seeds, points))
    accuracies = 0.7 + 0.05 * np.arange(points) + rng.normal(0, 0.03, (seeds, points))
    if seed % 2:
        costs[1, 2] = accuracies[1, 2] = np.nan
    return costs, accuracies


def every_resample(costs, accuracies, reference):
    """Hypervolumes of all seeds ** seeds draws, each as likely as another; sorted."""
    areas = []
    for draw in itertools.product(range(len(costs)), repeat=len(costs)):
        drawn = [[costs[list(draw), i], accuracies[list(draw), i]] for i in range(costs.shape[1])]
        known = [(c[~np.isnan(a)], a[~np.isnan(a)]) for c, a in drawn]
        means = [(c.mean(), a.mean()) for c, a in known if len(a)]
        areas.append(area_by_cells(*zip(*means), *reference))
    return np.sort(areas)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level", [0.95, 0.6])
def test_interval_is_that_of_all_resamples(seed, level):
    costs, accuracies = seeds_of_a_front(seed)
    reference = (20.0, 0.6)
    exact = every_resample(costs, accuracies, reference)
    tail = (1 - level) / 2
    slack = 4 * np.sqrt(tail * (1 - tail) / 2000)  # four standard errors of a share of 2000 draws
    low, high = hypervolume_interval(costs, accuracies, *reference, level=level)
    for bound, share in ((low, tail), (high, 1 - tail)):
        assert np.mean(exact < bound - 1e-9) <= share + slack
        assert np.mean(exact <= bound + 1e-9) >= share - slack


def test_interval_of_many_seeds_is_the_normal_one():
    rng = np.random.default_rng(0)
    accuracies = rng.normal(0.8, 0.05, (200, 1))
    error = 2.0 * accuracies.std() / np.sqrt(200)  # the area is 2 x (mean accuracy - 0.1)
    low, high = hypervolume_interval(np.ones((200, 1)), accuracies, 3.0, 0.1)
    centre = 2.0 * (accuracies.mean() - 0.1)
    # A 2.5 % quantile of 2000 normal draws has a standard error of 0.06 deviations; four of them.
    assert (low - centre) / error == pytest.approx(-1.96, abs=0.25)
    assert (high - centre) / error == pytest.approx(1.96, abs=0.25)


def test_interval_needs_two_seeds_and_is_repeatable():
    costs, accuracies = seeds_of_a_front(0)
    assert np.isnan(hypervolume_interval(costs[:1], accuracies[:1], 20.0, 0.6)).all()
    assert np.isnan(hypervolume_interval(costs[:0], accuracies[:0], 20.0, 0.6)).all()
    same = np.repeat(costs[:1], 3, axis=0), np.repeat(accuracies[:1], 3, axis=0)
    area = hypervolume(costs[0], accuracies[0], 20.0, 0.6)
    assert hypervolume_interval(*same, 20.0, 0.6) == pytest.approx((area, area))
    twice = [hypervolume_interval(costs, accuracies, 20.0, 0.6, seed=5) for _ in range(2)]
    assert twice[0] == twice[1]


@pytest.mark.parametrize(
    "costs, accuracies, options, message",
    [
        ([1.0], [0.5], {}, r"not of shapes \(1,\)"),
        ([[1.0]], [[0.5, 0.6]], {}, r"\(1, 1\) and \(1, 2\)"),
        ([[1.0, np.nan]], [[0.5, 0.6]], {}, "cost nan of seed 0, point 1"),
        ([[1.0]], [[0.5]], {"level": 95}, "level is 95"),
        ([[1.0]], [[0.5]], {"resamples": 0}, "resamples 0"),
        ([[1.0]], [[0.5]], {"reference_cost": np.inf}, "reference point"),
    ],
)
def test_bad_intervals_are_refused(costs, accuracies, options, message):
    options = {"reference_cost": 3.0, "reference_accuracy": 0.0} | options
    with pytest.raises(ValueError, match=message):
        hypervolume_interval(costs, accuracies, **options)


# ---- two fronts ----


def two_random_fronts(seed):
    (costs_a, accuracies_a), (costs_b, accuracies_b) = random_points(seed), random_points(seed + 99)
    return (costs_a + 1, accuracies_a), (costs_b + 1, accuracies_b)  # the coarse grid holds a 0


def polyline(costs, accuracies):
    """log cost and accuracy of the front by definition, equal points once."""
    points = sorted(
        {(np.log(costs[i]), accuracies[i]) for i in front_by_definition(costs, accuracies)}
    )
    return np.array(points).reshape(-1, 2).T


def levelled(line, costs, accuracies):
    """The line as it goes on to the dearest point whose accuracy is known."""
    known = [cost for cost, accuracy in zip(costs, accuracies) if not np.isnan(accuracy)]
    return np.c_[line, [np.log(max(known)), line[1, -1]]] if known else line


def mean_by_grid(curve_a, curve_b, cells=20_000):
    low, high = (pick(a, b) for pick, a, b in ((max, curve_a[0][0], curve_b[0][0]),
                                              (min, curve_a[0][-1], curve_b[0][-1])))  # fmt: skip
    if low > high:
        return np.nan
    x = low + (high - low) * (np.arange(cells) + 0.5) / cells
    return np.mean(np.interp(x, *curve_a) - np.interp(x, *curve_b))


@pytest.mark.parametrize("seed", range(40))
def test_comparisons_are_means_over_the_common_range(seed):
    fronts = two_random_fronts(seed)
    lines = [polyline(*front) for front in fronts]
    level = [levelled(line, *front) for line, front in zip(lines, fronts)]
    expected = mean_by_grid(*level) if all(map(np.size, level)) else np.nan
    # The midpoint rule is exact but in the cells of the knots: at most 80 of 20,000.
    assert accuracy_gain(*fronts) == pytest.approx(expected, abs=2e-4, nan_ok=True)
    flipped = [line[::-1] for line in lines]
    expected = np.exp(mean_by_grid(*flipped)) if all(map(np.size, lines)) else np.nan
    assert cost_ratio(*fronts) == pytest.approx(expected, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("seed", range(40))
def test_dominated_share_is_the_definition(seed):
    front_a, front_b = two_random_fronts(seed)
    points_b = [point for point in zip(*front_b) if not np.isnan(point[1])]
    beaten = [any(beats(other, point) for other in zip(*front_a)) for point in points_b]
    expected = np.mean(beaten) if beaten else np.nan
    assert dominates(front_a, front_b) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("shift, factor", [(0.03, 1.0), (0.0, 0.25), (-0.02, 3.0)])
def test_shifted_logarithmic_fronts(shift, factor):
    """accuracy = 0.5 + 0.1 ln cost, moved up by `shift` and along by `factor`: by hand."""
    costs = np.geomspace(1, 64, 13)
    accuracies = 0.5 + 0.1 * np.log(costs)
    moved = (costs * factor, accuracies + shift)
    gain = shift - 0.1 * np.log(factor)
    assert accuracy_gain(moved, (costs, accuracies)) == pytest.approx(gain)
    assert accuracy_gain((costs, accuracies), moved) == pytest.approx(-gain)
    ratio = factor * np.exp(-shift / 0.1)
    assert cost_ratio(moved, (costs, accuracies)) == pytest.approx(ratio)
    assert cost_ratio((costs, accuracies), moved) == pytest.approx(1 / ratio)


def test_dominated_points_and_repeats_play_no_part():
    front = ([1.0, 4.0], [0.5, 0.7])
    dearer = ([1.0, 4.0, 16.0], [0.5, 0.7, 0.6])  # level from 4 to 16
    assert accuracy_gain(dearer, ([4.0, 16.0], [0.6, 0.6])) == pytest.approx(0.1)
    padded = ([1.0, 2.0, 4.0, 1.0, 3.0], [0.5, 0.4, 0.7, 0.5, np.nan])
    other = ([2.0, 4.0], [0.5, 0.8])
    # at cost 2 they hold 0.6 and 0.5, at cost 4 they hold 0.7 and 0.8
    assert accuracy_gain(padded, other) == accuracy_gain(front, other) == pytest.approx(0.0)
    assert cost_ratio(padded, other) == cost_ratio(front, other)


def test_ranges_that_meet_in_a_point_or_not_at_all():
    one, line = ([2.0], [0.9]), ([1.0, 4.0], [0.5, 0.7])
    assert accuracy_gain(one, line) == pytest.approx(0.3)  # the line holds 0.6 at cost 2
    assert np.isnan(cost_ratio(one, line))  # and nothing at 0.9
    assert cost_ratio(([4.0], [0.6]), line) == pytest.approx(2.0)
    assert np.isnan(accuracy_gain(([5.0, 6.0], [0.9, 1.0]), line))
    empty = ([], [])
    assert np.isnan([accuracy_gain(empty, line), cost_ratio(line, empty)]).all()
    assert dominates(empty, line) == 0.0
    assert np.isnan(dominates(line, empty))
    assert dominates(line, line) == 0.0  # equal points do not dominate each other


@pytest.mark.parametrize("compare", [accuracy_gain, cost_ratio])
def test_costs_on_a_logarithmic_scale_are_positive(compare):
    with pytest.raises(ValueError, match=r"cost 0\.0 at index 1 must be positive"):
        compare(([1.0, 0.0], [0.5, 0.6]), ([1.0], [0.5]))


@pytest.mark.parametrize("compare", [accuracy_gain, cost_ratio, dominates])
def test_bad_fronts_are_refused(compare):
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\)"):
        compare(([1.0, 2.0], [0.5]), ([1.0], [0.5]))
    with pytest.raises(ValueError, match="cost nan at index 0"):
        compare(([1.0], [0.5]), ([np.nan], [0.5]))
