"""Rewards and entropy schedules against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import pytest

from aqt_search.search.reward import (
    ADDITIVE_REWARDS,
    ENTROPY_SCHEDULES,
    REWARDS,
    entropy_weight,
    penalty,
    reward,
)


@pytest.mark.parametrize(
    "name, quality, cost, beta, expected",
    [
        ("absolute", 0.8, 15.0, 2.0, 0.8 - 2 * 0.5),
        ("absolute", 0.8, 5.0, 2.0, 0.8 - 2 * 0.5),
        ("one_sided", 0.8, 15.0, 2.0, 0.8 - 2 * 0.5),
        ("one_sided", 0.8, 5.0, 2.0, 0.8),
        ("soft", 0.8, 20.0, 2.0, 0.2),
        ("soft", 0.8, 5.0, 2.0, 3.2),
        ("soft", 0.8, 20.0, 0.5, 0.8 / math.sqrt(2)),
        ("hard", 0.8, 20.0, 2.0, 0.2),
        ("hard", 0.8, 5.0, 2.0, 0.8),
        *((name, 0.8, 10.0, 3.0, 0.8) for name in REWARDS),  # on target: the quality alone
        *((name, 0.8, 37.0, 0.0, 0.8) for name in REWARDS),  # beta 0: the cost does not count
    ],
)
def test_reward(name, quality, cost, beta, expected):
    found = jax.jit(lambda q, c: reward(name, q, jnp.array([c / 10.0]), beta))(quality, cost)
    assert float(found) == pytest.approx(expected, rel=1e-6)


# Two costs, one at twice its target and one at half of it.
@pytest.mark.parametrize(
    "name, expected",
    [
        ("absolute", 0.8 - 0.5 * (1.0 + 0.5)),
        ("one_sided", 0.8 - 0.5 * 1.0),
        ("soft", 0.8),
        ("hard", 0.8 / math.sqrt(2)),
    ],
)
def test_reward_of_several_costs_for_many_points(name, expected):
    ratios = jnp.array([[2.0, 0.5], [1.0, 1.0]])
    found = reward(name, jnp.array([0.8, 0.3]), ratios, 0.5)
    assert found.tolist() == pytest.approx([expected, 0.3], rel=1e-6)


@pytest.mark.parametrize("name", ADDITIVE_REWARDS)
def test_an_additive_reward_is_the_quality_less_a_penalty(name):
    ratios = jnp.array([[2.0, 0.5], [0.9, 1.3]])
    found = reward(name, jnp.array([0.8, 0.3]), ratios, 0.5)
    expected = jnp.array([0.8, 0.3]) - penalty(name, ratios, 0.5)
    assert found.tolist() == expected.tolist()
    assert float(penalty(name, jnp.ones((1, 2)), 0.5)[0]) == 0


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "sharp"}, ["'sharp'", *REWARDS]),
        ({"beta": -0.5}, ["at least 0", "-0.5"]),
        ({"name": "absolute", "beta": -0.5}, ["at least 0", "-0.5"]),
    ],
)
def test_reward_errors(changes, words):
    arguments = {"name": "soft", "beta": 1.0} | changes
    with pytest.raises(ValueError) as caught:
        reward(quality=jnp.float32(0.5), ratios=jnp.ones(1), **arguments)
    assert all(word in str(caught.value) for word in words)


def test_a_reward_that_multiplies_has_no_penalty():
    with pytest.raises(ValueError, match=r"'soft'.*absolute, one_sided"):
        penalty("soft", jnp.ones(1), 1.0)


# The end weight is 0.4; steps 20 .. 100, so the shares of the way are 0, 1/4, 1/2, 3/4 and 1.
@pytest.mark.parametrize(
    "name, expected",
    [
        ("cosine", [0, 0.2 - 0.1 * math.sqrt(2), 0.2, 0.2 + 0.1 * math.sqrt(2), 0.4]),
        ("linear", [0, 0.1, 0.2, 0.3, 0.4]),
        ("constant", [0.4] * 5),
        ("step", [0, 0, 0.4, 0.4, 0.4]),
    ],
)
def test_entropy_weight(name, expected):
    weight = jax.jit(lambda s: entropy_weight(name, s, start=20, total=100, end_weight=0.4))
    assert [float(weight(s)) for s in (20, 40, 60, 80, 100)] == pytest.approx(expected, abs=1e-6)
    assert [float(weight(s)) for s in (0, 10, 19)] == [0, 0, 0]
    assert float(weight(1000)) == pytest.approx(0.4)


def test_the_steps_before_half_way_of_a_step_have_no_weight():
    weights = [entropy_weight("step", s, start=0, total=10, end_weight=1.0) for s in (4, 5)]
    assert [float(w) for w in weights] == [0, 1]


@pytest.mark.parametrize("name", ENTROPY_SCHEDULES)
@pytest.mark.parametrize("start, total", [(10, 10), (11, 10), (0, 0), (-1, 10)])
def test_a_delay_that_leaves_no_step(name, start, total):
    with pytest.raises(ValueError, match=rf"step {start} of {total}.*Shorten the delay"):
        entropy_weight(name, jnp.int32(0), start=start, total=total, end_weight=0.1)


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match=r"'sine'.*cosine, linear, constant, step"):
        entropy_weight("sine", jnp.int32(0), start=0, total=1, end_weight=0.1)
