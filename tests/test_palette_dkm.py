"""Differentiable k-means against the formulas in float64, finite differences and its limits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.palette import (
    Palette,
    PaletteError,
    differentiable_palettes,
    palettize,
    serve,
    soft_apply,
    soft_clusters,
)
from aqt_search.tracing.rules import RuleError

RNG = np.random.default_rng(0)


def soft64(vectors, centroids, temperature, iterations):
    def shares(c):
        a = np.exp(-np.square(vectors[:, None] - c).sum(-1) / temperature)
        return a / a.sum(1, keepdims=True)

    for _ in range(iterations):
        a = shares(centroids)
        centroids = a.T @ vectors / a.sum(0)[:, None]
    return shares(centroids) @ centroids, centroids


@pytest.fixture
def in_small_parts(monkeypatch):
    """Six rows at a time of what follows, the last of them overlapping."""
    monkeypatch.setattr("aqt_search.palette.chunks.ELEMENTS", 24)


@pytest.mark.usefixtures("in_small_parts")
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dimension", [1, 2])
def test_the_formulas_and_their_gradient_by_finite_differences(dimension, iterations):
    vectors, centroids = RNG.normal(size=(29, dimension)), RNG.normal(size=(4, dimension))
    weights = RNG.normal(size=(29, dimension)), RNG.normal(size=(4, dimension))
    step = RNG.normal(size=(29, dimension)), RNG.normal(size=(4, dimension)), 0.3

    def reference(t):
        moved = [x + t * d for x, d in zip((vectors, centroids, 0.7), step)]
        return sum((w * x).sum() for w, x in zip(weights, soft64(*moved, iterations)))

    with jax.enable_x64(True):

        def loss(v, c, temperature):
            found = soft_clusters(v, c, temperature, iterations=iterations)
            return sum((w * x).sum() for w, x in zip(weights, found)), found

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (_, found), gradient = run(*map(jnp.asarray, (vectors, centroids, 0.7)))
        told = sum(float((g * d).sum()) for g, d in zip(gradient, step))
        found = jax.tree.map(np.asarray, found)
    for here, expected in zip(found, soft64(vectors, centroids, 0.7, iterations)):
        np.testing.assert_allclose(here, expected, rtol=1e-12, atol=1e-14)
    assert told == pytest.approx((reference(1e-5) - reference(-1e-5)) / 2e-5, rel=1e-7)


def test_without_temperature_it_is_lloyds_algorithm():
    vectors = RNG.normal(size=(60, 2)).astype(np.float32)
    start = vectors[:4]
    soft, moved = jax.jit(soft_clusters, static_argnames="iterations")(
        vectors, start, 1e-7, iterations=3
    )
    centroids = start
    for _ in range(3):
        own = np.square(vectors[:, None] - centroids).sum(-1).argmin(1)
        centroids = np.stack([vectors[own == j].mean(0) for j in range(4)])
    own = np.square(vectors[:, None] - centroids).sum(-1).argmin(1)
    np.testing.assert_allclose(moved, centroids, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(soft, centroids[own], rtol=1e-5, atol=1e-6)


def test_hot_palettes_have_one_colour():
    vectors = RNG.normal(size=(50, 1)).astype(np.float32)
    soft, moved = soft_clusters(vectors, vectors[:4], 1e9, iterations=1)
    np.testing.assert_allclose(soft, np.full((50, 1), vectors.mean()), atol=1e-5)
    np.testing.assert_allclose(moved, np.full((4, 1), vectors.mean()), atol=1e-5)


def test_a_centroid_that_nothing_is_near_keeps_its_place():
    vectors = RNG.normal(size=(50, 1)).astype(np.float32)
    start = np.float32([[-0.5], [0.5], [1e4]])

    def total(v):
        soft, moved = soft_clusters(v, start, 0.1)
        return soft.sum() + moved.sum(), moved

    gradient, moved = jax.jit(jax.grad(total, has_aux=True))(vectors)
    assert moved[2, 0] == 1e4
    assert np.isfinite(gradient).all()


# --- Of a model -----------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="first")(x))
        return nn.Dense(3, name="head")(x)


X = RNG.normal(size=(32, 8)).astype(np.float32)
RULES = [("head", None), (".*", {"bits": 2, "dimension": 2})]


@pytest.fixture(scope="module")
def parts():
    model = Net()
    variables = model.init(jax.random.key(0), X)
    return model, variables, aqs.find_sites(model.apply, variables, X)


def test_what_is_trained_is_what_is_stored(parts):
    """Training through soft palettes beats clustering, once the weights are stored."""
    model, variables, sites = parts
    labels = np.asarray(jnp.argmax(model.apply(variables, X), -1))
    palettes = differentiable_palettes(sites, RULES, iterations=1)
    soft = soft_apply(model.apply, palettes)

    def loss_of(logits):
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(len(X)), labels])

    @jax.jit
    def step(variables, centroids, temperature):
        def loss(v):
            logits, new = soft(v, centroids, temperature, X)
            return loss_of(logits), new

        gradient, centroids = jax.grad(loss, has_aux=True)(variables)
        return jax.tree.map(lambda w, g: w - 0.3 * g, variables, gradient), centroids

    centroids = palettes.init(variables)
    assert centroids["first/kernel"].shape == (1, 4, 2)
    trained = variables
    for number in range(150):
        trained, centroids = step(trained, centroids, 0.1 * 0.97**number)
    served = jax.jit(serve(model.apply))
    plain = served(palettize(variables, sites, RULES), X)
    learned = served(palettize(trained, sites, RULES, centroids=centroids), X)
    assert loss_of(learned) < 0.5 * loss_of(plain)
    # Cold by now: 0.1 * 0.97^150 is 0.001, so the soft weights are nearly those that are stored.
    logits, _ = soft(trained, centroids, 0.001, X)
    assert loss_of(logits) == pytest.approx(float(loss_of(learned)), abs=0.02)


def test_soft_weights_follow_the_scale_of_the_layer(parts):
    """One temperature serves all: a factor of the weights is one of the soft weights."""
    _, variables, sites = parts
    palettes = differentiable_palettes(sites, [("first", {"bits": 2})])
    start = palettes.init(variables)
    run = jax.jit(palettes.apply)
    plain, moved = run(variables, start, 0.1)
    factor = 2.0**40
    many = jax.tree.map(lambda leaf: factor * leaf, (variables, start))
    soft, scaled = run(*many, 0.1)
    kernels = [tree["params"]["first"]["kernel"] for tree in (plain, soft)]
    np.testing.assert_allclose(kernels[1], factor * kernels[0], rtol=1e-5)
    np.testing.assert_allclose(scaled["first/kernel"], factor * moved["first/kernel"], rtol=1e-5)
    for name in ("kernel", "bias"):  # not chosen: as they were
        assert plain["params"]["head"][name] is not None
        assert (plain["params"]["head"][name] == variables["params"]["head"][name]).all()


def test_stacked_layers_have_palettes_of_their_own():
    w = RNG.normal(size=(3, 4, 4)).astype(np.float32) * np.float32([1, 10, 100])[:, None, None]

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    sites = aqs.find_sites(apply, {"w": w}, jnp.zeros((1, 4)))
    palettes = differentiable_palettes(sites, [(".*", Palette(2))], iterations=2)
    start = palettes.init({"w": w})
    soft, moved = jax.jit(palettes.apply)({"w": w}, start, 0.2)
    assert moved["w"].shape == (3, 4, 1)
    for layer, first, here, new in zip(w, start["w"], soft["w"], moved["w"]):
        flat = layer.reshape(-1, 1).astype(float)
        scale = np.sqrt(np.mean(flat**2))
        expected, centroids = soft64(flat / scale, np.asarray(first, float) / scale, 0.2, 2)
        np.testing.assert_allclose(
            here.reshape(-1, 1), expected * scale, rtol=1e-4, atol=1e-5 * scale
        )
        np.testing.assert_allclose(new, centroids * scale, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s, v: differentiable_palettes(s, [("tail", Palette(2))]), ["'tail'", "Nearest"]),
        (lambda s, v: differentiable_palettes(s, [(".*", None)]), ["nothing to cluster"]),
        (lambda s, v: differentiable_palettes(s, [(".*", "2")]), ["'.*'", "'2'", "Palette"]),
        (lambda s, v: differentiable_palettes(s, RULES, iterations=0), ["iteration", "0"]),
        (
            lambda s, v: differentiable_palettes(s, RULES).init({"w": jnp.ones(3)}),
            ["'first/kernel'", "find_sites"],
        ),
        (
            lambda s, v: differentiable_palettes(s, [(".*", Palette(1, 7))]).init(v),
            ["'first/kernel'", "128", "7"],
        ),
        (lambda s, v: Palette(9), ["bits", "9", "1 to 8"]),
        (lambda s, v: Palette(2.0), ["bits", "2.0"]),
        (lambda s, v: Palette(2, 0), ["dimension", "0"]),
    ],
)
def test_bad_input_is_named(parts, call, words):
    _, variables, sites = parts
    with pytest.raises((RuleError, PaletteError)) as caught:
        call(sites, variables)
    assert all(word in str(caught.value) for word in words)
