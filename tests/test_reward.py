"""Rewards and entropy schedules against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import pytest

from aqt_search.search.one_shot import period
from aqt_search.search.reward import (
    ENTROPY_SCHEDULES,
    REWARDS,
    Reward,
    entropy_weight_at,
    named_reward,
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
    found = jax.jit(lambda q, c: REWARDS[name].of(q, jnp.array([c / 10.0]), beta))(quality, cost)
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
    found = REWARDS[name].of(jnp.array([0.8, 0.3]), ratios, 0.5)
    assert found.tolist() == pytest.approx([expected, 0.3], rel=1e-6)


@pytest.mark.parametrize("name", [n for n, r in REWARDS.items() if not r.multiplies])
def test_an_additive_reward_is_the_quality_less_a_penalty(name):
    ratios = jnp.array([[2.0, 0.5], [0.9, 1.3]])
    found = REWARDS[name].of(jnp.array([0.8, 0.3]), ratios, 0.5)
    expected = jnp.array([0.8, 0.3]) - REWARDS[name].penalty(ratios, 0.5)
    assert found.tolist() == expected.tolist()
    assert float(REWARDS[name].penalty(jnp.ones((1, 2)), 0.5)[0]) == 0


def test_a_reward_by_name_or_of_ones_own():
    own = Reward(lambda ratios: jnp.square(ratios - 1))
    assert named_reward(own) is own
    assert float(own.of(0.8, jnp.array([2.0, 0.5]), 0.1)) == pytest.approx(0.8 - 0.1 * 1.25)
    with pytest.raises(ValueError, match=rf"'sharp'.*{', '.join(REWARDS)}"):
        named_reward("sharp")


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("beta", [-0.5, math.nan])
def test_a_weight_of_the_costs_that_cannot_be(reward, beta):
    with pytest.raises(ValueError, match=rf"beta.*{beta}.*at least 0"):
        reward.of(jnp.float32(0.5), jnp.ones(1), beta)


def test_a_reward_that_multiplies_has_no_penalty():
    with pytest.raises(ValueError, match="multiplies"):
        REWARDS["soft"].penalty(jnp.ones(1), 1.0)


@pytest.mark.parametrize("name", REWARDS)
def test_which_rewards_leave_cheap_points_alone(name):
    cheap = REWARDS[name].of(jnp.float32(0.5), jnp.array([0.5]), 1.0)
    assert (float(cheap) == 0.5) == REWARDS[name].one_sided


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
    weight_at = entropy_weight_at(name, 0.4)
    weight = jax.jit(lambda s: weight_at(s, (20, 100)))
    assert [float(weight(s)) for s in (20, 40, 60, 80, 100)] == pytest.approx(expected, abs=1e-6)
    assert [float(weight(s)) for s in (0, 10, 19)] == [0, 0, 0]
    assert float(weight(1000)) == pytest.approx(0.4)


def test_the_steps_before_half_way_of_a_step_have_no_weight():
    weights = [entropy_weight_at("step", 1.0)(s, (0, 10)) for s in (4, 5)]
    assert [float(w) for w in weights] == [0, 1]


@pytest.mark.parametrize("name", ENTROPY_SCHEDULES)
def test_a_schedule_rises_to_its_end_weight(name):
    weights = [float(entropy_weight_at(name, 0.4)(s, (20, 100))) for s in range(20, 101)]
    assert weights == sorted(weights)
    assert weights[-1] == pytest.approx(0.4)


@pytest.mark.parametrize(
    "steps, delay, message",
    [(10, 0.96, "0.96 leaves none of the 10 steps.*Shorten the delay"), (0, 0.0, "none of the 0"),
     (10, 1.0, r"delay is 1.0.*\[0, 1\)"), (10, -0.1, "delay is -0.1")],
)  # fmt: skip
def test_a_delay_that_leaves_no_step(steps, delay, message):
    with pytest.raises(ValueError, match=message):
        period(steps, delay)


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match=r"'sine'.*cosine, linear, constant, step"):
        entropy_weight_at("sine", 0.1)
