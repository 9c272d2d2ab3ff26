"""Executions measured site by site, and functions that run by them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs

QUICK = 0.01  # seconds: enough to see what is measured


def sample(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layers(params, x):
    """Two products alike, one of another shape, and a lookup."""
    x = jax.nn.relu(x + jnp.take(params["table"], jnp.zeros(4, int), axis=0))
    x = jax.nn.relu(x @ params["one"])
    x = jax.nn.relu(x @ params["two"])
    return x @ params["last"]


PARAMS = {
    "table": sample(5, 8), "one": sample(8, 8, seed=1), "two": sample(8, 8, seed=2),
    "last": sample(8, 3, seed=3),
}  # fmt: skip
X = sample(4, 8, seed=4)


def scanned(params, x):
    def body(x, w):
        return jax.nn.relu(x @ w), None

    return jax.lax.scan(body, x, params["stack"])[0]


def assigned(fun, params, x, fmt="int8"):
    return aqs.assign(aqs.find_sites(fun, params, x), [(".*", fmt)])


@pytest.fixture(scope="module")
def record():
    return aqs.measure_executions(layers, assigned(layers, PARAMS, X), PARAMS, X, seconds=QUICK)


def test_every_product_is_measured(record):
    assert set(record["executions"]) == {"one", "two", "last"}
    for name, times in record["milliseconds"].items():
        assert {"emulated", "int8", "bf16"} <= set(times)
        assert record["executions"][name] == min(times, key=times.get)
    assert record["milliseconds"]["one"] == record["milliseconds"]["two"]  # measured together
    assert record["backend"] == jax.default_backend()
    assert record["jax"] == jax.__version__


def test_the_record_is_a_small_json_that_execution_takes(record):
    text = json.dumps(record)
    assert len(text) < 2000
    executions = json.loads(text)["executions"]
    assignment = assigned(layers, PARAMS, X)
    expected = aqs.quantize(layers)(assignment, PARAMS, X)
    frozen = aqs.freeze(layers, assignment, PARAMS, X)
    stateful = aqs.quantize_with_state(layers, execution=executions)
    for found in (
        aqs.quantize(layers, execution=executions)(assignment, PARAMS, X),
        aqs.serve(layers, execution=executions)(frozen, X),
        stateful.apply(assignment, {}, PARAMS, X)[0],
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_each_site_runs_as_it_is_told():
    assignment = assigned(layers, PARAMS, X)
    told = {"one": "int8", "two": "emulated"}  # and last is left to "auto"
    run = jax.jit(lambda params: aqs.quantize(layers, execution=told)(assignment, params, X))
    program = run.lower(PARAMS).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len([line for line in products if "(tensor<4x8xf32>" in line]) == 2
    assert any("xi8>" in line for line in products)


@pytest.mark.parametrize("purpose", ["serving", "training"])
def test_layers_of_a_scan_and_static_scales(purpose):
    params, x = {"stack": sample(3, 8, 8)}, sample(4, 8)
    sites = aqs.find_sites(scanned, params, x)
    assignment = aqs.with_static_activations(aqs.assign(sites, [(".*", "int8")]), sites)
    qfun = aqs.quantize_with_state(scanned)
    _, state = qfun.apply(assignment, qfun.init(assignment, params, x), params, x)
    record = aqs.measure_executions(
        scanned, assignment, params, x, purpose=purpose, state=state, seconds=QUICK
    )
    assert list(record["executions"]) == ["stack"]
    assert record["purpose"] == purpose
    with pytest.raises(aqs.SiteError, match="calibration state is not of this assignment"):
        aqs.measure_executions(scanned, assignment, params, x, purpose=purpose, seconds=QUICK)


def test_arrays_may_be_abstract_and_formats_without_codes():
    """float16 has no form on codes: it runs in floating point."""
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (PARAMS, X))
    assignment = assigned(layers, PARAMS, X, "fp16")
    record = aqs.measure_executions(layers, assignment, *abstract, seconds=QUICK)
    assert set(record["executions"].values()) <= {"emulated", "auto"}
    training = aqs.measure_executions(
        layers, assignment, *abstract, purpose="training", seconds=QUICK
    )
    assert set(training["executions"].values()) == {"emulated"}
    empty = aqs.measure_executions(layers, {}, *abstract, seconds=QUICK)
    assert empty["executions"] == {}


def test_values_of_stored_weights_are_measured_as_they_are_served():
    """Weights alone in int8: emulated serving turns them back, auto reads them as they lie."""
    assignment = assigned(layers, PARAMS, X, {"weight": "int8", "activation": None})
    record = aqs.measure_executions(layers, assignment, PARAMS, X, seconds=QUICK)
    assert all(set(times) == {"emulated", "auto"} for times in record["milliseconds"].values())


def test_what_is_wrong_is_said():
    assignment = assigned(layers, PARAMS, X)
    with pytest.raises(ValueError, match="Unknown purpose 'speed': expected one of serving, train"):
        aqs.measure_executions(layers, assignment, PARAMS, X, purpose="speed")
    for transformation in (aqs.quantize, aqs.quantize_with_state, aqs.serve):
        with pytest.raises(ValueError, match="Unknown execution 'int9' of site 'one'"):
            transformation(layers, execution={"one": "int9"})
    with pytest.raises(aqs.SiteError, match="none of its sites is in this function: 'other'"):
        aqs.quantize(layers, execution={"other": "int8"})(assignment, PARAMS, X)
    with pytest.raises(ValueError, match="expected a positive number"):
        aqs.measure_executions(layers, assignment, PARAMS, X, seconds=0)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda p: aqs.measure_executions(layers, assignment, p, X))(PARAMS)
    with pytest.raises(ValueError, match=r'expected its record\["executions"\]'):
        aqs.serve(layers, execution={"executions": {}, "milliseconds": {}})
    with pytest.raises(TypeError, match=r"expected a sequence of formats, \['int8'\]"):
        aqs.quantize(layers, residuals="codes", options="int8")
