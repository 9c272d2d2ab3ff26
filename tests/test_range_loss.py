"""Range losses against float64 formulas, finite differences and closed forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.tracing.rules import RuleError
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.parallel import AXIS
from aqt_search.training.train_step import init_train_state, make_update
from aqt_search.weights.range_loss import (
    RANGE_LOSSES,
    kurtosis,
    l_inf,
    margin,
    range_loss,
    soft_min_max,
)

RNG = np.random.default_rng(0)
SHAPE = (5, 4)


def margin64(u, state, share=0.01):
    m = abs(state["margin"])
    return m + np.maximum(abs(u) - m, 0).mean() / share


def soft_min_max64(u, state):
    a = abs(state["temperature"])
    high, low = np.exp(a * (u - u.max())), np.exp(-a * (u - u.min()))
    return (u * high).sum() / high.sum() - (u * low).sum() / low.sum() + np.exp(5 - a)


def kurtosis64(u, state):
    centred = u - u.mean()
    return ((centred**4).mean() / (centred**2).mean() ** 2 - 1.8) ** 2


REFERENCES = {
    "l_inf": lambda u, state: abs(u).max(),
    "margin": margin64,
    "soft_min_max": soft_min_max64,
    "kurtosis": kurtosis64,
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(64, name="first")(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="head")(x)


def sites_and_params(model=None, features=SHAPE):
    model = model or Net()
    x = jnp.zeros((2, *features))
    params = model.init(jax.random.key(0), x)["params"]
    return aqs.find_sites(model.apply, {"params": params}, x), params


def one_tensor(name, w):
    """The loss of a single weight as a function of (weight, state), and its first state."""
    loss = range_loss(aqs.find_sites(lambda p, x: x @ p["w"], {"w": w}, jnp.zeros((1, len(w)))),
                      [(".*", name)])  # fmt: skip
    (state,) = loss.init({"w": w}).values()
    (site,) = loss.init({"w": w})
    return lambda w, state: loss.apply({"w": w}, {site: state}), state


@pytest.mark.parametrize("name", RANGE_LOSSES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_losses_are_the_formulas_of_weights_over_their_root_mean_square(name, scale):
    w = RNG.standard_t(3, (40, 25))
    loss, state = one_tensor(name, (scale * w).astype(np.float32))
    w = (scale * w).astype(np.float32).astype(float)
    u = (w / np.sqrt(np.mean(w**2))).ravel()
    state64 = {k: float(v[0]) for k, v in state.items()}
    expected = REFERENCES[name](u, state64)
    # A sum of 1000 terms in float32; the kurtosis is a fourth power.
    assert loss(w.astype(np.float32), state) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", RANGE_LOSSES)
def test_gradients_by_finite_differences(name):
    w = RNG.standard_t(3, (8, 5)).astype(np.float32)
    loss, state = one_tensor(name, w)
    state = jax.tree.map(lambda leaf: 0.7 * leaf, state)  # off the margin's kink at max|u|
    found = jax.grad(loss, argnums=(0, 1))(w, state)
    step = RNG.normal(size=w.shape)
    d_state = jax.tree.map(lambda leaf: np.float64(RNG.normal(size=leaf.shape)), state)

    def reference(t):
        moved = w.astype(float) + t * step
        u = (moved / np.sqrt(np.mean(moved**2))).ravel()
        values = {k: float(v[0]) + t * d_state[k][0] for k, v in state.items()}
        return REFERENCES[name](u, values)

    expected = (reference(1e-6) - reference(-1e-6)) / 2e-6
    told = (found[0] * step).sum() + sum((found[1][k] * d_state[k]).sum() for k in state)
    assert told == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", RANGE_LOSSES)
def test_the_loss_does_not_shrink_weights(name):
    """Scale invariant, so its gradient is orthogonal to the weight (Euler)."""
    w = RNG.normal(size=(30, 20)).astype(np.float32)
    loss, state = one_tensor(name, w)
    gradient = np.asarray(jax.grad(loss)(w, state), float)
    assert abs((gradient * w).sum()) <= 1e-4 * np.linalg.norm(gradient) * np.linalg.norm(w)
    assert loss(4 * w, state) == loss(w, state)  # a power of two: the same bits


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_the_best_margin_makes_the_mean_of_the_largest(share):
    u = np.abs(RNG.normal(size=1000)).astype(np.float32)
    u /= np.sqrt(np.mean(u**2))
    margins = np.linspace(0, u.max(), 2001)
    least = min(float(margin(share).apply(u, {"margin": np.float32(m)})) for m in margins)
    largest = np.sort(u)[-round(share * len(u)) :]
    assert least == pytest.approx(largest.mean(), rel=1e-3)  # the grid of margins


@pytest.mark.parametrize("name", ["margin", "kurtosis"])
def test_one_coefficient_serves_all_sizes(name):
    """Of normal weights: the mean of the largest hundredth is 2.892, the kurtosis 3."""
    expected = {"margin": 2.892, "kurtosis": (3 - 1.8) ** 2}[name]
    for n in (10_000, 1_000_000):
        u = RNG.normal(size=n).astype(np.float32)
        state = {"margin": np.float32(2.576)}  # the quantile of the largest hundredth
        # 100 values above the quantile whose deviation is about 0.3; the kurtosis' is 5 / sqrt(n).
        assert RANGE_LOSSES[name].apply(u, state) == pytest.approx(expected, abs=0.15)


def test_the_temperature_does_not_fall_to_zero():
    """Under exp(a u), normal u keep their variance of 1, so the best a is t - log 2."""
    u = np.random.default_rng(1).normal(size=200_000).astype(np.float32)
    loss = soft_min_max(1.5)
    slope = jax.grad(lambda a: loss.apply(u / np.sqrt(np.mean(u**2)), {"temperature": a}))
    # Slopes of exp(1.5 - a) = 2 times the way; the tilted variance of 200 000 is good to 0.02.
    for way in (-0.2, 0.0, 0.2):
        expected = 2 - 2 * np.exp(-way)
        assert slope(jnp.float32(1.5 - np.log(2) + way)) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("name", RANGE_LOSSES)
@pytest.mark.parametrize(
    "w", [np.zeros((4, 3)), np.full((4, 3), 0.5), np.array([[3e38, -3e38]] * 2), np.ones((1, 1))]
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_odd_weights_have_finite_losses_and_gradients(name, w, dtype):
    w = jnp.asarray(w, dtype)
    loss, state = one_tensor(name, w)
    value, gradient = jax.value_and_grad(loss)(w, state)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert gradient.dtype == dtype
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


@pytest.mark.parametrize("loss", [l_inf(), margin(), soft_min_max(), kurtosis()])
def test_descent_shortens_the_range(loss):
    w = jnp.asarray(RNG.standard_t(4, (2000,)), jnp.float32)

    def ratio(w):
        return float(jnp.max(jnp.abs(w)) / jnp.std(w))

    def of(trained):
        w, state = trained
        return loss.apply(w / jnp.sqrt(jnp.mean(jnp.square(w))), state)

    optimizer = make_optimizer("adamw", 0.01)
    trained = (w, loss.init(w / jnp.sqrt(jnp.mean(jnp.square(w)))))
    state = optimizer.init(trained)

    @jax.jit
    def step(trained, state):
        value, gradient = jax.value_and_grad(of)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return jax.tree.map(jnp.add, trained, updates), state, value

    for _ in range(300):
        trained, state, _ = step(trained, state)
    assert ratio(trained[0]) < 0.8 * ratio(w)


def test_sites_are_chosen_by_rules_and_summed():
    sites, params = sites_and_params()
    loss = range_loss(sites, [("head", None), (".*", "margin")])
    state = loss.init(params)
    assert set(state) == {"first/kernel"}
    both = range_loss(sites, [("head", l_inf()), (".*", margin())])
    alone = range_loss(sites, [("first", None), ("head", "l_inf")])
    total = loss.apply(params, state) + alone.apply(params, alone.init(params))
    assert both.apply(params, both.init(params)) == pytest.approx(float(total), rel=1e-6)


def test_stacked_layers_are_tensors_of_their_own():
    w = np.stack([RNG.normal(size=(6, 6)), RNG.standard_t(2, (6, 6))]).astype(np.float32)

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    sites = aqs.find_sites(apply, {"w": w}, jnp.zeros((1, 6)))
    loss = range_loss(sites, [(".*", "l_inf")])
    expected = sum(abs(layer).max() / np.sqrt(np.mean(layer**2)) for layer in w)
    assert loss.apply({"w": w}, loss.init({"w": w})) == pytest.approx(expected, rel=1e-5)


def test_a_shared_parameter_counts_once():
    w = RNG.normal(size=(6, 6)).astype(np.float32)
    sites = aqs.find_sites(lambda p, x: (x @ p["w"]) @ p["w"], {"w": w}, jnp.zeros((1, 6)))
    assert len(sites) == 2
    assert len(range_loss(sites, [(".*", "margin")]).init({"w": w})) == 1


def test_a_training_step_adds_it_and_learns_its_state():
    model = Net()
    sites, _ = sites_and_params(model)
    loss = range_loss(sites, [(".*", "margin")])
    optimizer = make_optimizer("sgd", 0.1, momentum=0.0, nesterov=False, weight_decay=0.5)
    state = init_train_state(model, optimizer, SHAPE, 0, loss.init)
    qapply = aqs.quantize(model.apply)
    batch = {
        "image": RNG.normal(size=(8, *SHAPE)).astype(np.float32),
        "label": np.arange(8) % 3,
    }

    def step(auxiliary_loss):
        update = make_update(qapply, optimizer, auxiliary_loss=auxiliary_loss)
        run = jax.vmap(lambda _: update(state, aqs.assign(sites, []), batch)[:2],
                       axis_name=AXIS, axis_size=1)  # fmt: skip
        return jax.tree.map(lambda leaf: leaf[0], jax.jit(run)(jnp.zeros(1)))

    plain, _ = step(None)
    new, metrics = step(lambda p, s: 0.1 * loss.apply(p, s))
    value, gradient = jax.value_and_grad(loss.apply, argnums=(0, 1))(state.params, state.auxiliary)
    assert metrics["auxiliary_loss"] == pytest.approx(0.1 * float(value), rel=1e-6)
    # rate 0.1 x coefficient 0.1; no decay on the state
    expected = jax.tree.map(lambda a, g: a - 0.01 * g, (plain.params, state.auxiliary), gradient)
    for found, wanted in zip(
        jax.tree.leaves((new.params, new.auxiliary)), jax.tree.leaves(expected)
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s: range_loss(s, [("tail", "margin")]), ["'tail'", "Nearest names"]),
        (lambda s: range_loss(s, [(".*", "l_one")]), ["'l_one'", "l_inf", "margin"]),
        (lambda s: range_loss(s, [(".*", None)]), ["no weight"]),
        (lambda s: range_loss(s, []), ["no weight"]),
        (lambda s: range_loss(s, [(".*", "l_inf")]).init({"w": 1.0}), ["no 'first/kernel'"]),
        (lambda s: margin(0.0), ["share", "0.0"]),
        (lambda s: soft_min_max(-1.0), ["temperature", "-1.0"]),
    ],
)
def test_bad_input_is_named(call, words):
    sites, _ = sites_and_params()
    with pytest.raises((RuleError, ValueError)) as caught:
        call(sites)
    assert all(word in str(caught.value) for word in words)
