"""The policy against numpy, the analytic policy gradient and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aqt_search.search.policy import (
    entropy,
    init_policy,
    log_probabilities,
    log_probability,
    reinforce_loss,
    sample_many,
)

# Three decisions of 4, 2 and 3 options.
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
LOGITS = np.where(MASK, np.random.default_rng(0).normal(size=MASK.shape), 7.0).astype(np.float32)
CHOICES = np.array([2, 0, 1])
ONE_HOT = np.eye(4)[CHOICES]


def numpy_probabilities(logits, temperature=1.0):
    weights = np.where(MASK, np.exp(np.float64(logits) / temperature), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def numpy_entropy(p):
    return np.array([-sum(q * np.log(q) for q in row if q > 0) for row in p])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_probabilities_and_entropy(temperature):
    log_p = log_probabilities(LOGITS, MASK, temperature)
    p = numpy_probabilities(LOGITS, temperature)
    np.testing.assert_allclose(np.exp(log_p), p, rtol=1e-5)
    np.testing.assert_array_equal(np.isneginf(log_p), ~MASK)
    np.testing.assert_allclose(entropy(log_p), numpy_entropy(p), rtol=1e-5)
    expected = np.log(p[np.arange(3), CHOICES])
    np.testing.assert_allclose(log_probability(log_p, jnp.asarray(CHOICES)), expected, rtol=1e-4)


def test_the_first_policy_is_uniform_over_the_options_that_exist():
    policy = init_policy(MASK, optax.adam(0.1))
    log_p = log_probabilities(policy.logits, MASK)
    np.testing.assert_allclose(np.exp(log_p), MASK / MASK.sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(entropy(log_p), np.log(MASK.sum(1)), rtol=1e-6)


def test_a_decided_policy_has_no_entropy():
    decided = np.where(np.eye(4)[CHOICES] > 0, 200.0, 0.0).astype(np.float32)
    np.testing.assert_allclose(entropy(log_probabilities(decided, MASK)), 0.0, atol=1e-6)


def test_samples_follow_the_probabilities_and_never_the_mask():
    count = 20_000
    log_p = log_probabilities(LOGITS, MASK)
    drawn = np.asarray(sample_many(jax.random.key(1), log_p, count))
    assert drawn.shape == (count, 3)
    seen = np.stack([np.bincount(column, minlength=4) for column in drawn.T])
    assert not seen[~MASK].any()
    p = numpy_probabilities(LOGITS)
    # Five standard errors: a right sampler is outside for one of 12 shares in 10^5 seeds or fewer.
    bound = 5 * np.sqrt(p * (1 - p) / count) + 1e-12
    assert (np.abs(seen / count - p) <= bound).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reduce, share", [(jnp.sum, 1.0), (jnp.mean, 1 / 3)])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_gradient_is_the_policy_gradient(temperature, reduce, share, weight):
    advantage = 0.7
    options = {"mask": MASK, "temperature": temperature, "reduce": reduce}

    def loss(logits):
        return reinforce_loss(
            logits, jnp.asarray(CHOICES), jnp.float32(advantage), jnp.float32(weight), **options
        )

    p = numpy_probabilities(LOGITS, temperature)
    gain = share * advantage * (ONE_HOT - p) / temperature
    # d entropy / d z = -p (log p + entropy) / T; the loss has the mean over the three decisions.
    log_p = np.log(np.where(p > 0, p, 1.0))
    of_entropy = -p * (log_p + numpy_entropy(p)[:, None]) / temperature / 3
    expected = -gain + weight * of_entropy
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(LOGITS)))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert not gradient[~MASK].any()

    with jax.enable_x64(True):
        step = 1e-5
        for index in np.argwhere(MASK):
            bump = np.zeros_like(LOGITS, np.float64)
            bump[tuple(index)] = step
            slope = (loss(LOGITS + bump) - loss(LOGITS - bump)) / (2 * step)
            assert float(slope) == pytest.approx(gradient[tuple(index)], rel=1e-3, abs=1e-5)


def test_the_gradient_is_finite_where_the_policy_is_certain():
    certain = jnp.where(ONE_HOT > 0, 500.0, 0.0).astype(jnp.float32)
    gradient = jax.grad(reinforce_loss)(
        certain, jnp.asarray(CHOICES), jnp.float32(1.0), jnp.float32(1.0), MASK,
        temperature=1.0, reduce=jnp.sum,
    )  # fmt: skip
    np.testing.assert_array_equal(gradient, np.zeros((3, 4)))


def test_the_advantage_is_a_constant():
    def loss(advantage):
        return reinforce_loss(
            jnp.asarray(LOGITS), jnp.asarray(CHOICES), advantage, jnp.float32(0.0), MASK,
            temperature=1.0, reduce=jnp.sum,
        )  # fmt: skip

    assert float(jax.grad(loss)(0.5)) == 0.0
