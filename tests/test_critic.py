"""The critic: against least squares, closed forms and a search through all points."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_search.search import policy as policies
from aqt_search.search.cost_table import CostTable
from aqt_search.search.critic import (
    CriticState,
    critic_over,
    groups_of,
    init_critic,
    logits_on_target,
    observe,
    pooled_values,
    temperature,
)
from aqt_search.search.one_shot import Period

AXIS = "replicas"

MASK = np.ones((6, 3), bool)
COLUMNS = np.array([[1.0, 2.0, 4.0], [0.5, 1.0, 2.0]] * 3)


def table_of(columns, mask=None):
    count, width = columns.shape
    table = np.zeros((count, width, width))
    table[:, np.arange(width), np.arange(width)] = columns
    every = np.arange(count)
    return CostTable(
        table, every, every, 0.5, np.ones((count, width), bool) if mask is None else mask
    )


def product_table():
    """Weights and activations decided apart: costs are products of two decisions' bits."""
    bits = np.array([3.0, 4.0, 8.0])
    shares = np.array([1.0, 2.0, 0.25])
    table = shares[:, None, None] * bits[:, None] * bits[None] / 16
    pairs = np.arange(6).reshape(3, 2)
    return CostTable(table, pairs[:, 0], pairs[:, 1], 0.5, MASK)


@functools.partial(jax.jit, static_argnames=("names", "one_sided"))
def _on_target(scores, log_p, targets, names, one_sided=False):
    costs = {name: TABLES[name] for name in names}
    return logits_on_target(scores, log_p, costs, targets, MASK, one_sided=one_sided)


def on_target(scores, log_p, one_sided=False, **targets):
    """`logits_on_target` for the `TABLES` named."""
    targets = {name: jnp.float32(target) for name, target in targets.items()}
    return _on_target(jnp.asarray(scores), log_p, targets, tuple(targets), one_sided)


TABLES = {
    "sum": table_of(COLUMNS),
    "products": product_table(),
    "falling": table_of(COLUMNS[:, ::-1] ** 0.5),
}


def seen(value, count, variance=1e-4):
    value, count = jnp.asarray(value, jnp.float32), jnp.asarray(count, jnp.float32)
    return CriticState(jnp.zeros_like(value), value, count, jnp.float32(variance), jnp.float32(1))


@pytest.mark.parametrize("samples", [2, 3])
def test_it_learns_what_least_squares_finds(samples):
    """Of 4000 steps; least squares on the samples' differences from their mean, in float64."""
    rng = np.random.default_rng(0)
    truth = 0.01 * rng.normal(size=MASK.shape)
    choices = rng.integers(0, 3, (4000, samples, 6))
    own = truth[np.arange(6), choices].sum(-1)
    shared = rng.normal(size=(4000, 1))  # a batch is as hard for all samples
    quality = own + shared + 0.01 * rng.normal(size=own.shape)
    x = np.eye(3)[choices]
    x = (x - x.mean(1, keepdims=True)).reshape(-1, 18)
    y = (quality - quality.mean(1, keepdims=True)).ravel()
    solved = np.linalg.lstsq(x, y, rcond=None)[0].reshape(6, 3)

    def step(state, batch):
        return observe(state, *batch, 1.0), None

    batches = choices, jnp.float32(quality)
    found = jax.jit(lambda: jax.lax.scan(step, init_critic(MASK), batches)[0])()
    value = np.asarray(found.value) - np.asarray(found.value).mean(-1, keepdims=True)
    solved -= solved.mean(-1, keepdims=True)
    # The least-squares estimate itself is off by about 0.01 sqrt(1.5 / count) = 3e-4.
    assert np.abs(value - solved).max() < 5e-4
    np.testing.assert_allclose(found.count, np.square(x).sum(0).reshape(6, 3), rtol=1e-4)
    assert found.variance == pytest.approx(1e-4, rel=0.1)  # 4000 steps: 2 % for two samples


def test_it_forgets():
    choices = jnp.array([[0] * 6, [1] * 6])
    state = init_critic(MASK)
    for _ in range(20):
        state = observe(state, choices, jnp.array([1.0, 0.0]), 0.5)
    np.testing.assert_allclose(state.count[:, 0], 1.0, rtol=1e-4)  # 0.5 / (1 - 0.5)
    assert (np.asarray(state.count[:, 2]) == 0).all()


def test_replicas_learn_together():
    choices = np.random.default_rng(1).integers(0, 3, (2, 2, 6))
    quality = np.float32([[0.1, 0.3], [0.2, -0.4]])
    run = jax.vmap(lambda c, q: observe(init_critic(MASK), c, q, 0.9, AXIS), axis_name=AXIS)
    state = jax.tree.map(np.asarray, run(choices, quality))
    for leaf in state:
        np.testing.assert_array_equal(leaf[0], leaf[1])
    own = [
        np.asarray(observe(init_critic(MASK), c, q, 0.9).count) for c, q in zip(choices, quality)
    ]
    np.testing.assert_allclose(state.count[0], sum(own), rtol=1e-6)


def test_pooling_believes_what_was_seen_often():
    rng = np.random.default_rng(0)
    value = np.array([-0.01, 0.0, 0.01]) + 0.002 * rng.normal(size=MASK.shape)
    groups = groups_of(["a"] * 6)
    centred = value - value.mean(-1, keepdims=True)
    often = pooled_values(seen(value, np.full(MASK.shape, 1e9)), groups, MASK)
    np.testing.assert_allclose(often, centred, atol=1e-6)
    seldom = pooled_values(seen(value, np.full(MASK.shape, 1.0)), groups, MASK)
    np.testing.assert_allclose(seldom, np.tile(centred.mean(0), (6, 1)), atol=1e-6)


def test_decisions_of_other_options_are_not_pooled():
    groups = groups_of([("weight", ("int4", "int8")), ("weight", ("int3", "int8")), None] * 2)
    np.testing.assert_array_equal(groups.sum(1), [2, 2, 2])
    value = np.zeros(MASK.shape)
    value[[0, 3]] = [-1, 0, 1]
    found = pooled_values(seen(value, np.ones(MASK.shape), 1e3), groups, MASK)
    np.testing.assert_allclose(found, value, atol=1e-6)


def test_options_that_do_not_exist_have_no_part():
    mask = MASK.copy()
    mask[0, 2] = False
    value = np.zeros(MASK.shape)
    value[0, 2] = 1e6
    found = pooled_values(seen(value, np.ones(MASK.shape)), groups_of(range(6)), mask)
    np.testing.assert_allclose(found[0, :2], 0, atol=1e-6)
    assert np.isfinite(found).all()
    logits = logits_on_target(found, policies.log_probabilities(jnp.zeros(MASK.shape), mask),
                              {"a": table_of(COLUMNS, mask)}, {"a": 8.0}, mask)  # fmt: skip
    p = jnp.exp(policies.log_probabilities(logits, mask))
    assert p[0, 2] == 0
    assert np.isfinite(p).all()


@pytest.mark.parametrize("name", ["sum", "products"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_the_expected_cost_is_the_target(name, share, scale):
    table = TABLES[name]
    low, high = table.range
    target = low + share * (high - low)
    scores = scale * np.random.default_rng(0).normal(size=MASK.shape).astype(np.float32)
    logits = jnp.zeros(MASK.shape)
    for _ in range(8):  # marginal costs of products follow the policy
        log_p = policies.log_probabilities(logits, MASK)
        logits = on_target(scores, log_p, **{name: target})
        found = table.expected(jnp.exp(policies.log_probabilities(logits, MASK)))
        assert float(found) == pytest.approx(target, rel=1e-3)


def test_the_policy_is_the_best_of_its_entropy_and_cost():
    """No other distribution of the same expected cost has a larger mean score plus entropy."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=MASK.shape).astype(np.float32)
    target = 9.0
    log_p = policies.log_probabilities(jnp.zeros(MASK.shape), MASK)
    logits = on_target(scores, log_p, sum=target)
    p = np.asarray(jnp.exp(policies.log_probabilities(logits, MASK)), float)

    def objective(p):
        return (p * scores).sum() - (p * np.log(p)).sum()

    best = objective(p)
    for _ in range(200):
        other = p * np.exp(0.05 * rng.normal(size=p.shape))
        other /= other.sum(-1, keepdims=True)
        # Mixed with a cheaper or a dearer one until the cost is the target again.
        end = np.eye(3)[np.full(6, 0 if (other * COLUMNS).sum() > (p * COLUMNS).sum() else 2)]
        gap = (other * COLUMNS).sum() - (p * COLUMNS).sum()
        mix = gap / (gap + ((p - end) * COLUMNS).sum())
        other = (1 - mix) * other + mix * end + 1e-12
        assert objective(other) < best + 1e-4


@pytest.mark.parametrize("one_sided", [False, True])
def test_a_target_that_does_not_bind(one_sided):
    """Best scores at the cheapest options: a one-sided target leaves them alone."""
    scores = np.tile(np.float32([5.0, 0.0, 0.0]), (6, 1))
    table, target = TABLES["sum"], 15.0
    log_p = policies.log_probabilities(jnp.zeros(MASK.shape), MASK)
    logits = on_target(scores, log_p, one_sided, sum=target)
    cost = float(table.expected(jnp.exp(policies.log_probabilities(logits, MASK))))
    plain = float(table.expected(jnp.exp(policies.log_probabilities(scores, MASK))))
    assert cost == pytest.approx(plain if one_sided else target, rel=1e-3)


def test_of_two_one_sided_targets_only_the_tight_one_binds():
    scores = np.tile(np.float32([0.0, 0.0, 5.0]), (6, 1))  # dear in one cost, cheap in the other
    log_p = policies.log_probabilities(jnp.zeros(MASK.shape), MASK)
    logits = on_target(scores, log_p, True, sum=9.0, falling=12.0)
    p = jnp.exp(policies.log_probabilities(logits, MASK))
    assert float(TABLES["sum"].expected(p)) == pytest.approx(9.0, rel=1e-3)
    assert float(TABLES["falling"].expected(p)) < 12.0


def test_two_targets_are_met_together():
    a, b = TABLES["sum"], TABLES["falling"]
    wanted = policies.log_probabilities(
        jnp.asarray(np.random.default_rng(2).normal(size=MASK.shape), jnp.float32), MASK
    )
    targets = {"sum": a.expected(jnp.exp(wanted)), "falling": b.expected(jnp.exp(wanted))}
    log_p = policies.log_probabilities(jnp.zeros(MASK.shape), MASK)
    logits = jnp.zeros(MASK.shape)
    for _ in range(10):  # of steps of a search, each from the last one's scores
        logits = on_target(logits, log_p, **targets)
    p = jnp.exp(policies.log_probabilities(logits, MASK))
    assert float(a.expected(p)) == pytest.approx(float(targets["sum"]), rel=2e-3)
    assert float(b.expected(p)) == pytest.approx(float(targets["falling"]), rel=2e-3)


STEPS, START, TARGET, TOLERANCE = 600, 100, 7.0, 0.03


@functools.cache
def searcher(one_sided):
    """A search whose quality is a sum over decisions, plus noise."""
    one_shot = critic_over(
        MASK, groups_of(["a"] * 6), {"a": table_of(COLUMNS)}, total_steps=STEPS,
        delay=START / STEPS, samples=2, tolerance=TOLERANCE, one_sided=one_sided,
        memory=1 / (0.002 * STEPS), axis_name=None,
    )  # fmt: skip

    def run(truth, noise, seed):
        def step(state, number):
            key = jax.random.fold_in(jax.random.key(seed), number)
            log_p = policies.log_probabilities(state.policy.logits, MASK)
            choices = one_shot.sample(state, key)
            quality = truth[np.arange(6)[None], choices].sum(1)
            quality += noise * jax.random.normal(jax.random.fold_in(key, 1), (2,))
            state, _ = one_shot.update(state, choices, quality, key)
            return state, (log_p, choices, one_shot.answer(state))

        return jax.lax.scan(step, one_shot.init({"a": TARGET}), jnp.arange(STEPS))

    return jax.jit(run)


def searched(seed, noise, one_sided=False):
    """(truth, log-probabilities, samples and answer of every step, the last state)."""
    gains = 0.02 * np.random.default_rng(seed).random((6, 2))
    truth = np.concatenate([np.zeros((6, 1)), np.cumsum(gains, 1)], 1).astype(np.float32)
    state, seen = searcher(one_sided)(truth, noise, seed)
    return truth, *map(np.asarray, seen), state


def test_a_search_rests_then_stays_on_target_then_settles():
    table = table_of(COLUMNS)
    _, log_p, choices, answers, state = searched(0, 0.02)
    assert (log_p[: START + 1] == log_p[0]).all()
    np.testing.assert_allclose(np.exp(log_p[0]), 1 / 3, rtol=1e-6)
    settles = Period(START, STEPS).settles
    assert settles == 550
    for p in np.exp(log_p[START + 1 : settles + 1 : 40]):
        assert float(table.expected(p)) == pytest.approx(TARGET, rel=1e-3)
    assert (choices[settles + 1 :] == answers[-1]).all()
    assert (answers[settles:] == answers[-1]).all()
    # It has an answer on target at any time after the delay, not only at the end.
    off = np.abs(table.of_many(answers[START + 1 :]) / TARGET - 1)
    assert off.max() <= TOLERANCE
    assert state.step == STEPS


@pytest.mark.parametrize("one_sided", [False, True])
def test_a_search_finds_nearly_the_best_point(one_sided):
    """A step's noise is as large as a gain; the middle one of all points that fit loses 1."""
    points = np.array(list(itertools.product(range(3), repeat=6)))
    costs = table_of(COLUMNS).of_many(points)
    lost = []
    for seed in range(8):
        truth, _, _, answers, _ = searched(seed, 0.01, one_sided=one_sided)
        values = truth[np.arange(6), points].sum(1)
        off = costs / TARGET - 1
        fits = off <= TOLERANCE if one_sided else np.abs(off) <= TOLERANCE
        found = truth[np.arange(6), answers[-1]].sum()
        span = values[fits].max() - np.median(values[fits])
        lost.append((values[fits].max() - found) / span)
    assert np.mean(lost) < 0.5


def test_an_update_has_no_loop_and_no_branch_and_few_kernels():
    """Each would be a round trip on a GPU; a bisection for one cost had 30, a phase a switch."""
    one_shot = critic_over(
        MASK, groups_of(["a"] * 6), {"a": table_of(COLUMNS)}, total_steps=STEPS, delay=0.25,
        samples=2, tolerance=TOLERANCE, one_sided=False, memory=0.5, axis_name=None,
    )  # fmt: skip
    state = one_shot.init({"a": TARGET})
    choices = one_shot.sample(state, jax.random.key(0))
    lowered = jax.jit(one_shot.update).lower(state, choices, jnp.zeros(2), jax.random.key(0))
    text = lowered.compile().as_text()
    assert not re.findall(r" (while|conditional)\(", text)
    entry = text[text.index("ENTRY") :]
    kernels = re.findall(r" (fusion|call|custom-call|dot|sort|reduce|gather|scatter)\(", entry)
    assert len(kernels) <= 120


def test_very_short_searches_settle_too():
    for total in (1, 2, 5):
        assert Period(0, total).settles == total - 1
    assert Period(30, 40).settles == 39


def test_jacobi_steps_do_not_overshoot():
    """Many decisions correct one residual: without the constant their sum would diverge."""
    mask = np.ones((200, 2), bool)
    rng = np.random.default_rng(0)
    truth = 0.01 * rng.normal(size=mask.shape).astype(np.float32)

    def step(state, choices):
        quality = jnp.asarray(truth)[np.arange(200)[None], choices].sum(1)
        return observe(state, choices, quality, 1.0), None

    choices = rng.integers(0, 2, (3000, 2, 200))
    found = jax.jit(lambda: jax.lax.scan(step, init_critic(mask), choices)[0])()
    difference = np.asarray(found.value[:, 1] - found.value[:, 0])
    correlation = np.corrcoef(difference, truth[:, 1] - truth[:, 0])[0, 1]
    assert correlation > 0.95


def test_the_constants_are_as_documented():
    spread = temperature(jnp.tile(jnp.array([-1.0, 0.0, 1.0]), (6, 1)), MASK, jnp.float32(0))
    assert float(spread) == pytest.approx(4 * np.sqrt(2 / 3), rel=1e-4)
    last = temperature(jnp.tile(jnp.array([-1.0, 0.0, 1.0]), (6, 1)), MASK, jnp.float32(1))
    assert float(last) == pytest.approx(0.02 * np.sqrt(2 / 3), rel=1e-4)
