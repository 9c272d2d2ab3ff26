"""The answer of a policy against a search through all points."""

import itertools

import numpy as np
import pytest

from aqt_search.search.answer import most_probable, most_probable_on_target
from aqt_search.search.cost_table import CostTable


def table_of(columns):
    """Cost = sum of columns[d][choice]."""
    count, width = columns.shape
    table = np.zeros((count, width, width))
    table[:, np.arange(width), np.arange(width)] = columns
    decisions = np.arange(count)
    return CostTable(table, decisions, decisions, 0.0, np.ones((count, width), bool))


def log_probabilities(rng, shape, scale):
    logits = scale * rng.normal(size=shape)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.1, np.inf])
@pytest.mark.parametrize("seed", range(6))
def test_two_options_are_searched_through(seed, tolerance, one_sided):
    rng = np.random.default_rng(seed)
    log_p = log_probabilities(rng, (7, 2), 2.0)
    columns = {"a": rng.uniform(1, 4, size=(7, 2)), "b": rng.uniform(1, 2, size=(7, 2))}
    costs = {name: table_of(of_options) for name, of_options in columns.items()}
    targets = {"a": 17.0, "b": 10.5}
    points = np.array(list(itertools.product(range(2), repeat=7)))
    excess = [
        of_options[np.arange(7), points].sum(axis=1) / targets[name] - 1
        for name, of_options in columns.items()
    ]
    off = np.max(excess, axis=0).clip(0) if one_sided else np.max(np.abs(excess), axis=0)
    total = log_p[np.arange(7), points].sum(axis=1)
    fits = off <= max(tolerance, off.min())
    expected = points[np.argmax(np.where(fits, total, -np.inf))]
    found = most_probable_on_target(log_p, costs, targets, tolerance, one_sided=one_sided)
    np.testing.assert_array_equal(found, expected)
    if tolerance == np.inf:
        np.testing.assert_array_equal(found, most_probable(log_p))


def test_only_uncertain_decisions_give_way_and_options_that_do_not_exist_are_never_taken():
    rng = np.random.default_rng(0)
    log_p = log_probabilities(rng, (20, 3), 8.0)
    log_p[0] = [-np.inf, 0.0, -np.inf]  # one option only
    log_p[1] = [np.log(0.49), np.log(0.51), -np.inf]
    costs = {"cost": table_of(np.tile([1.0, 2.0, 4.0], (20, 1)))}
    best = np.array(most_probable(log_p))
    at_best = float(costs["cost"].of_many(best[None])[0])
    found = most_probable_on_target(log_p, costs, {"cost": at_best - 1}, 1e-6)
    expected = best.copy()
    expected[1] = 0
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(log_p[np.arange(20), found]).all()


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_policy_that_has_decided_little_answers_near_its_targets(scale, share, one_sided):
    """84 decisions, far more than are tried in all combinations; one change is at most 2 % of T."""
    rng = np.random.default_rng(3)
    log_p = log_probabilities(rng, (84, 3), scale)
    log_p[:20, 2] = -np.inf
    columns = {name: rng.uniform(1, 3, size=(84, 3)).cumsum(axis=1) for name in "ab"}
    columns = {name: np.where(np.isfinite(log_p), c, np.nan) for name, c in columns.items()}
    costs = {name: table_of(np.nan_to_num(c)) for name, c in columns.items()}
    ends = {n: (np.nanmin(c, 1).sum(), np.nanmax(c, 1).sum()) for n, c in columns.items()}
    targets = {name: low + share * (high - low) for name, (low, high) in ends.items()}
    found = np.asarray(most_probable_on_target(log_p, costs, targets, 0.02, one_sided=one_sided))
    assert np.isfinite(log_p[np.arange(84), found]).all()
    for name, table in costs.items():
        off = table.of_many(found[None])[0] / targets[name] - 1
        assert off <= 0.02 + 2e-6
        assert one_sided or off >= -0.02 - 2e-6
