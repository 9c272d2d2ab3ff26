"""Static bounds: against numpy, against given bounds, and on weights that lie on their grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import PER_CHANNEL, PER_TENSOR, Quantizer, per_block
from aqt_search.ptq import PTQError, SkippedSite, calibrate, static_assignment

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(size=(n, 8)).astype(np.float32) for n in (6, 6, 3)]
WEIGHTS = {
    "a": RNG.normal(size=(8, 12)).astype(np.float32),
    "b": RNG.normal(size=(12, 4)).astype(np.float32),
}


def mlp(weights, x):
    """Two layers."""
    return jax.nn.relu(x @ weights["a"]) @ weights["b"]


SITES = aqs.find_sites(mlp, WEIGHTS, BATCHES[0])


def calibrated(spec, weights=WEIGHTS, batches=BATCHES):
    assignment, state = calibrate(mlp, aqs.assign(SITES, [(".*", spec)]), weights, batches)
    evaluate = jax.jit(functools.partial(aqs.quantize_with_state(mlp).evaluate, assignment, state))
    return assignment, state, evaluate


def test_bounds_are_means_over_batches_and_those_of_the_weights():
    _, state, _ = calibrated(
        {
            "activation": Quantizer("int8", PER_TENSOR, aqs.percentile(90.0)),
            "weight": Quantizer("int4", PER_CHANNEL),
        }
    )
    expected = np.mean([np.percentile(np.abs(x.astype(float)), 90.0) for x in BATCHES])
    np.testing.assert_allclose(state["a"]["lhs"].high, [[expected]], rtol=1e-5)
    np.testing.assert_array_equal(state["a"]["rhs"].high, np.abs(WEIGHTS["a"]).max(0)[None])
    assert [state["a"][side].updates for side in ("lhs", "rhs")] == [3, 1]


def test_the_quantized_model_is_that_of_given_bounds():
    _, state, evaluate = calibrated(Quantizer("int4", PER_TENSOR))
    fixed = {
        name: aqs.SiteFormats(
            *(
                Quantizer("int4", PER_TENSOR, aqs.fixed(float(state[name][side].high.item())))
                for side in ("lhs", "rhs")
            )
        )
        for name in SITES
    }
    x = 2 * BATCHES[0]  # some of it beyond the bounds
    expected = jax.jit(functools.partial(aqs.quantize(mlp), fixed))(WEIGHTS, x)
    np.testing.assert_array_equal(evaluate(WEIGHTS, x), expected)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(Quantizer("int3", PER_TENSOR, aqs.min_max()), id="zero point"),
        pytest.param(Quantizer("e2m1", PER_CHANNEL, aqs.mse()), id="mse"),
        pytest.param(Quantizer("int2", per_block(4), aqs.percentile(95.0)), id="blocks"),
        pytest.param(Quantizer("e4m3", PER_TENSOR, aqs.mean_deviation()), id="mean_deviation"),
        pytest.param(aqs.quantizer("mxfp4"), id="mxfp4"),
        pytest.param(aqs.quantizer("nvfp4"), id="nvfp4"),
    ],
)
def test_weights_on_the_grid_stay_there(weight):
    assignment, state, _ = calibrated({"weight": weight, "activation": "int8"})
    qfun = aqs.quantize_with_state(mlp)

    @jax.jit
    def rounded_twice(weights, x):
        frozen = aqs.freeze(mlp, assignment, weights, x, state=state)
        rounded = {name: frozen.weights[name]["rhs"].dequantize() for name in SITES}
        again = aqs.freeze(mlp, assignment, rounded, x, state=state)
        codes = [
            [f.weights[name]["rhs"].codes(np.float32) for name in SITES] for f in (frozen, again)
        ]
        outputs = [qfun.evaluate(assignment, state, w, x) for w in (weights, rounded)]
        return rounded, codes, [*outputs, aqs.serve(mlp)(again, x)]

    rounded, (codes, again), (expected, *outputs) = rounded_twice(WEIGHTS, BATCHES[1])
    assert all(np.any(rounded[name] != WEIGHTS[name]) for name in SITES)
    jax.tree.map(np.testing.assert_array_equal, again, codes)
    for out in outputs:
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_calibrations_with_state_and_tables_stay():
    own = Quantizer("int8", PER_TENSOR, aqs.moving_average(aqs.absmax(), 0.5))
    made = static_assignment(aqs.assign(SITES, [("a", own), ("b", None)]), SITES)
    assert made == {"a": aqs.SiteFormats(own, own), "b": aqs.SiteFormats()}

    def embed(w, ids):
        return w["table"][ids]

    weights, ids = {"table": WEIGHTS["a"]}, np.array([0, 3])
    sites = aqs.find_sites(embed, weights, ids)
    assignment, state = calibrate(embed, aqs.assign(sites, [("table", "int4")]), weights, [ids])
    assert (state, assignment["table"].rhs) == ({}, aqs.numeric_format("int4"))


@pytest.mark.parametrize(
    "weights, batches, message",
    [
        (WEIGHTS, [], "at least one batch, got none"),
        (WEIGHTS, BATCHES[0], "sequence of batches"),
        (WEIGHTS, iter(BATCHES), "sequence of batches"),
        (WEIGHTS, [BATCHES[0], BATCHES[0][:0]], "Batch 1 .* is empty"),
        (WEIGHTS, [BATCHES[0], np.nan * BATCHES[0]], "'a': its lhs is not finite in batch 1"),
        (WEIGHTS | {"b": np.inf * WEIGHTS["b"]}, BATCHES[:1], "'b': its rhs is not finite"),
    ],
    ids=["none", "an array", "an iterator", "an empty batch", "NaN in data", "infinite weight"],
)
def test_bad_data(weights, batches, message):
    with pytest.raises(PTQError, match=message):
        calibrated("int8", weights, batches)


def test_operands_that_are_zero_throughout_get_no_static_bounds():
    dead = WEIGHTS | {"a": -np.abs(WEIGHTS["a"])}  # with positive inputs nothing passes the relu
    batches = [np.abs(x) for x in BATCHES]
    with pytest.warns(SkippedSite, match="'b': its lhs is zero in all"):
        _, state, evaluate = calibrated("int4", dead, batches)
    assert {name: set(sides) for name, sides in state.items()} == {
        "a": {"lhs", "rhs"},
        "b": {"rhs"},
    }
    # A scale of its own for each batch: data that reaches the site later is quantized sensibly.
    out = evaluate(dead, -BATCHES[0])
    assert np.abs(out - mlp(dead, -BATCHES[0])).max() < 0.5 * np.abs(out).max()

    with pytest.warns(SkippedSite, match="'b': its rhs is zero in all"):
        _, state, evaluate = calibrated("int4", WEIGHTS | {"b": 0 * WEIGHTS["b"]})
    assert set(state["b"]) == {"lhs"}
    assert not np.any(evaluate(WEIGHTS | {"b": 0 * WEIGHTS["b"]}, BATCHES[0]))

    own = Quantizer("int8", PER_TENSOR, aqs.running_max(aqs.absmax()))
    with pytest.raises(PTQError, match=r"'a': its lhs is zero in all .* has no bounds"):
        calibrated({"activation": own}, batches=[jnp.zeros((2, 8))])


def test_blocks_that_a_calibration_cannot_fill():
    with pytest.raises(ValueError, match="need full blocks"):
        calibrated({"weight": Quantizer("int4", per_block(5), aqs.percentile(99.0))})
