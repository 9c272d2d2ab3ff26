"""Bounds and means from BatchNorm alone, against random draws, closed forms and calibration."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.ptq.batch_norm_folding import fold_batch_norm
from aqt_search.ptq.channel_moments import (
    NormalStatistics,
    batch_norm_statistics,
    moments_through,
    normal_moments,
    propagate,
)
from aqt_search.ptq.data_free import calibrate_data_free, correct_bias_data_free
from aqt_search.ptq.equalization import equalization_scales, equalize
from aqt_search.ptq.errors import PTQError, SkippedSite
from aqt_search.ptq.static_bounds import calibrate
from aqt_search.tracing.flat_graph import trace_graph

MEAN = np.array([-2.0, -0.3, 0.0, 0.4, 3.0])
DEVIATION = np.array([1.0, 0.5, 2.0, 0.1, 1.5])
NORMAL = normal_moments(NormalStatistics(MEAN, DEVIATION))


def pdf(x):
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def cdf(x):
    return (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def test_clipped_normal_has_the_mean_of_equation_19():
    found = moments_through(nn.relu, NORMAL)
    ratio = MEAN / DEVIATION
    expected = DEVIATION * pdf(ratio) + MEAN * cdf(ratio)
    np.testing.assert_allclose(found.mean, expected, atol=1e-5)
    square = (MEAN**2 + DEVIATION**2) * cdf(ratio) + MEAN * DEVIATION * pdf(ratio)
    np.testing.assert_allclose(found.deviation, np.sqrt(square - expected**2), atol=1e-4)
    np.testing.assert_array_equal(found.low, np.maximum(MEAN - 6 * DEVIATION, 0))
    np.testing.assert_allclose(found.high, np.maximum(MEAN + 6 * DEVIATION, 0), rtol=1e-6)


@pytest.mark.parametrize("function", [nn.relu6, nn.hard_swish, nn.leaky_relu])
def test_moments_of_other_functions_by_random_draws(function):
    draws = np.random.default_rng(0).normal(size=(400_000, 5)) * DEVIATION + MEAN
    y = np.asarray(function(jnp.asarray(draws, jnp.float32)), np.float64)
    found = moments_through(function, NORMAL)
    # Five standard errors of a mean over 400,000.
    assert (np.abs(found.mean - y.mean(0)) < 5 * y.std(0) / math.sqrt(400_000) + 1e-5).all()
    np.testing.assert_allclose(found.deviation, y.std(0), rtol=0.02, atol=1e-4)
    assert (found.low <= y.min(0) + 1e-2).all()
    assert (found.high >= y.max(0) - 1e-5).all()


class Normal(nn.Module):
    """Orthonormal products of normal data, so that what leaves a BatchNorm is normal."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        dense = functools.partial(nn.Dense, use_bias=False)
        y = nn.relu(norm(name="norm")(dense(16, name="first")(x)))
        z = norm(name="norm2")(dense(16, name="second")(y))
        return dense(3, name="head")(nn.relu(z + y))


@functools.cache
def normal_net(count=4096):
    """The net with exact running statistics on data x, which is normal."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(count, 16)).astype(np.float32)
    q, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    params = {
        "first": {"kernel": q},
        "norm": {"scale": rng.uniform(0.2, 1.5, 16), "bias": rng.normal(size=16)},
        "second": {"kernel": rng.normal(size=(16, 16)) / 4},
        "norm2": {"scale": rng.uniform(-1, 1, 16), "bias": rng.normal(size=16)},
        "head": {"kernel": rng.normal(size=(16, 3)) / 4},
    }
    product = x @ q
    stats = {"norm": {"mean": product.mean(0), "var": product.var(0)}}
    gain = params["norm"]["scale"] / np.sqrt(stats["norm"]["var"] + 1e-5)
    y = np.maximum((product - product.mean(0)) * gain + params["norm"]["bias"], 0)
    second = y @ params["second"]["kernel"]
    stats["norm2"] = {"mean": second.mean(0), "var": second.var(0)}
    variables = {"params": params, "batch_stats": stats}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), variables), x, y


APPLY = Normal().apply
RULES = [(".*", {"weight": "int4", "activation": "int8"})]
BOUNDS = {"first/kernel": 4.0}


def test_statistics_are_those_of_batch_norm():
    variables, x, _ = normal_net()
    found = batch_norm_statistics(APPLY, variables, x)
    assert set(found) == {"first/kernel", "second/kernel"}
    norm = variables["params"]["norm2"]
    np.testing.assert_allclose(found["second/kernel"].mean, norm["bias"])
    np.testing.assert_allclose(found["second/kernel"].deviation, np.abs(norm["scale"]), rtol=1e-3)
    halved = found["second/kernel"].divided_by(np.full(16, 2.0))
    np.testing.assert_allclose(halved.mean, norm["bias"] / 2)


def test_bounds_agree_with_calibration_on_data():
    variables, x, _ = normal_net()
    assignment = aqs.assign(aqs.find_sites(APPLY, variables, x), RULES)
    statistics = batch_norm_statistics(APPLY, variables, x)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    static, state = calibrate_data_free(
        APPLY, assignment, variables, shape, statistics, other_bounds=BOUNDS
    )
    _, on_data = calibrate(APPLY, assignment, variables, [x])
    assert jax.tree.structure(state) == jax.tree.structure(on_data)
    assert float(state["first/kernel"]["lhs"].high.squeeze()) == 4.0
    for name in ("second/kernel", "head/kernel"):
        ratio = float((state[name]["lhs"].high / on_data[name]["lhs"].high).squeeze())
        # 4096 normal draws of 16 channels reach between 3.3 and 5.5 deviations of the widest
        # channel; the bound is 6, of a sum of two channels at the most twice as wide.
        assert 1.0 < ratio < 6 / 3.3 * 1.2
    for name in state:
        np.testing.assert_array_equal(state[name]["rhs"].high, on_data[name]["rhs"].high)
    outputs = jax.jit(aqs.quantize_with_state(APPLY).evaluate)(static, state, variables, x)
    frozen = aqs.freeze(APPLY, static, variables, x, state=state)
    served = jax.jit(aqs.serve(APPLY))(frozen, x)
    scale = np.abs(outputs).max()
    np.testing.assert_allclose(served, outputs, atol=1e-4 * scale)


def test_bias_correction_without_data():
    variables, x, y = normal_net()
    assignment = aqs.assign(aqs.find_sites(APPLY, variables, x), RULES)
    statistics = batch_norm_statistics(APPLY, variables, x)
    static, state = calibrate_data_free(
        APPLY, assignment, variables, x, statistics, other_bounds=BOUNDS
    )
    with pytest.warns(SkippedSite) as caught:
        corrected = correct_bias_data_free(APPLY, static, state, variables, x, statistics)
    messages = sorted(str(w.message) for w in caught)
    assert len(messages) == 2
    assert "'first/kernel' as it is: no BatchNorm tells the mean" in messages[0]
    assert "'head/kernel' as it is: no bias or mean" in messages[1]
    kernel = np.asarray(variables["params"]["second"]["kernel"], np.float64)
    step = np.abs(kernel).max(0) / 7
    error = np.round(kernel / step) * step - kernel
    change = np.asarray(corrected["batch_stats"]["norm2"]["mean"], np.float64)
    change = change - variables["batch_stats"]["norm2"]["mean"]
    # Seven standard errors of E[y] over 4096 draws, summed up over 16 inputs.
    bound = 7 * np.sqrt(np.square(error).sum(0)) * y.std(0).max() / 64
    assert np.abs(change).max() > 3 * bound.max()
    assert (np.abs(change - y.mean(0) @ error) < bound).all()


class Chain(nn.Module):
    """Gives what leaves its BatchNorm, and its outputs."""

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        y = norm(nn.Dense(16, use_bias=False, name="first")(x))
        return y, nn.Dense(3, name="head")(nn.relu(y))


def test_statistics_follow_folding_and_equalization():
    variables, x, _ = normal_net()
    head = {"kernel": variables["params"]["head"]["kernel"], "bias": jnp.zeros(3)}
    params = {n: variables["params"][n] for n in ("first", "norm")} | {"head": head}
    variables = {"params": params, "batch_stats": {"norm": variables["batch_stats"]["norm"]}}

    def apply(variables, x):
        return Chain().apply(variables, x)[1]

    statistics = batch_norm_statistics(apply, variables, x)["first/kernel"]
    folded = fold_batch_norm(apply, variables, x)
    scales = equalization_scales(apply, folded, x)["first/kernel"]
    assert np.abs(np.log(scales)).max() > 0.2  # or there is nothing to follow
    statistics = statistics.divided_by(scales)
    y = np.asarray(Chain().apply(equalize(apply, folded, x), x)[0], np.float64)
    # The data are those that the running statistics were taken of.
    np.testing.assert_allclose(y.mean(0), statistics.mean, atol=1e-4)
    np.testing.assert_allclose(y.std(0), statistics.deviation, rtol=1e-3)


class Pooled(nn.Module):
    """Pooling and flattening behind a BatchNorm."""

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        y = nn.relu(norm(nn.Conv(3, (1, 1), name="conv")(x)))
        flat = nn.avg_pool(y, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        peak = nn.max_pool(y, (2, 2), (2, 2)).mean((1, 2))
        return nn.Dense(2, name="mean")(flat) + nn.Dense(2, name="peak")(peak)


def test_moments_through_pooling():
    x = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
    variables = jax.eval_shape(lambda: Pooled().init(jax.random.key(0), jnp.zeros(x.shape)))
    graph = trace_graph(Pooled().apply, variables, x)
    statistics = NormalStatistics(np.array([0.0, 1.0, 3.0]), np.array([1.0, 0.5, 0.1]))
    values = propagate(graph, {"conv/kernel": statistics})
    expected = moments_through(nn.relu, normal_moments(statistics))
    mean, peak = (
        values[graph.site_nodes()[name].inputs[0]] for name in ("mean/kernel", "peak/kernel")
    )
    np.testing.assert_allclose(mean.moments.mean, expected.mean, rtol=1e-5)
    np.testing.assert_array_equal(mean.channels.of_elements(12), np.tile(np.arange(3), 4))
    for found in (mean, peak):
        np.testing.assert_allclose(found.moments.high, expected.high, rtol=1e-5)
    assert np.isnan(peak.moments.mean).all()


def test_statistics_of_a_site_in_a_loop_are_refused():
    def apply(variables, x):
        return jax.lax.scan(lambda y, w: (y @ w, None), x, variables["w"])[0]

    graph = trace_graph(apply, {"w": jnp.zeros((2, 5, 5))}, jnp.zeros((1, 5)))
    with pytest.raises(PTQError, match=r"'w'.* inside a loop"):
        propagate(graph, {"w": NormalStatistics(MEAN, DEVIATION)})


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, ["'first/kernel'", "other_bounds"]),
        ({"other_bounds": {"frist/kernel": 1.0}}, ["frist/kernel", "first/kernel"]),
        ({"other_bounds": {"first/kernel": -1.0}}, ["first/kernel", "-1.0"]),
        ({"statistics": {"frist/kernel": None}, "other_bounds": BOUNDS}, ["frist", "first/kernel"]),
        ({"statistics": {}, "other_bounds": BOUNDS}, ["'second/kernel', 'head/kernel'"]),
    ],
)
def test_bad_input_is_named(options, words):
    variables, x, _ = normal_net(8)
    assignment = aqs.assign(aqs.find_sites(APPLY, variables, x), RULES)
    options = {"statistics": batch_norm_statistics(APPLY, variables, x)} | options
    with pytest.raises(PTQError) as caught:
        calibrate_data_free(APPLY, assignment, variables, x, **options)
    assert all(word in str(caught.value) for word in words)
