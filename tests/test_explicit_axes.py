"""Meshes with explicit axes: the sharding that the float function has, in every execution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import aqt_search as aqs

P = PartitionSpec
NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def convolve(p, x, **more):
    return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", **NHWC, **more)


def attend(p, x):
    x = x @ p["w"]
    return jnp.einsum("bqd,bkd->bqk", x, x)


# The function, shape and sharding of the weight and of the data; axes "d" and "m" of two devices.
FUNCTIONS = {
    "by outputs": (lambda p, x: x @ p["w"], (64, 64), P(None, "m"), (64, 64), P()),
    "by rows": (lambda p, x: x @ p["w"], (64, 64), P(), (4, 16, 64), P("d", None, None)),
    "by terms": (
        lambda p, x: jnp.dot(x, p["w"], out_sharding=P()), (64, 64), P("m", None), (64, 64),
        P(None, "m"),
    ),
    "attention": (attend, (64, 64), P(), (4, 8, 64), P("d", None, None)),
    "convolution": (convolve, (3, 3, 32, 32), P(), (2, 4, 4, 32), P("d", None, None, None)),
    "depthwise": (
        functools.partial(convolve, feature_group_count=8), (3, 3, 1, 8), P(), (2, 4, 4, 8),
        P("d", None, None, None),
    ),
}  # fmt: skip
ZERO_POINT = aqs.Quantizer("int8", None, aqs.min_max())
SPECS = {
    "int8": {"weight": "int8", "activation": "int8"},
    "blocks": {"weight": "mxint8", "activation": "mxint8"},
    "packed": {"weight": "int4", "activation": aqs.Quantizer("int8", None, aqs.percentile(99.0))},
    "zero point": {"weight": "int8", "activation": ZERO_POINT},
    "e4m3": {"weight": "e4m3", "activation": "e4m3"},
}
EXECUTIONS = {
    "int8": ("int8", "bf16", "emulated", "native", "auto"), "blocks": ("emulated",),
    "packed": ("int8", "emulated"), "zero point": ("bf16", "emulated"), "e4m3": ("fp8",),
}  # fmt: skip
CASES = [(name, spec, e) for name in FUNCTIONS for spec, es in EXECUTIONS.items() for e in es]
CASES = CASES[: len(CASES) // len(FUNCTIONS)] + CASES[len(CASES) // len(FUNCTIONS) :: 3]


def mesh_of(kind, shape):
    return jax.make_mesh(shape, ("d", "m"), axis_types=(kind, kind))


def operands(name):
    _, weight, _, data, _ = FUNCTIONS[name]
    return tuple(
        np.random.default_rng(side).standard_normal(shape).astype(np.float32)
        for side, shape in enumerate((weight, data))
    )


def placed(name, mesh):
    _, _, of_weight, _, of_data = FUNCTIONS[name]
    w, x = (
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(operands(name), (of_weight, of_data))
    )
    return {"w": w}, x


@pytest.mark.parametrize("name, spec, execution", CASES)
def test_results_and_gradients_are_sharded_as_in_float(name, spec, execution):
    fun, _, of_weight, _, of_data = FUNCTIONS[name]
    mesh = mesh_of(AxisType.Explicit, (1, 2) if "m" in (*of_weight, *of_data) else (2, 1))
    weight, data = operands(name)
    plain = fun if name != "by terms" else lambda p, x: x @ p["w"]
    sites = aqs.find_sites(plain, {"w": weight}, data)
    assignment = aqs.assign(sites, [(".*", SPECS[spec])])
    expected = jax.jit(functools.partial(aqs.quantize(plain), assignment))({"w": weight}, data)

    def loss(params, x):
        result = aqs.quantize(fun, execution=execution)(assignment, params, x)
        return jnp.sum(result**2), result

    with jax.set_mesh(mesh):
        params, x = placed(name, mesh)
        like = jax.jit(fun)(params, x)
        (_, result), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
        frozen = jax.jit(lambda p: aqs.freeze(fun, assignment, p, x))(params)
        served = jax.jit(aqs.serve(fun, execution=execution))(frozen, x)
    assert result.sharding.spec == like.sharding.spec
    assert gradient["w"].sharding.is_equivalent_to(params["w"].sharding, weight.ndim)
    # A rounding of what attention multiplies may turn on the order of a sum.
    bound = (1e-2 if name == "attention" else 1e-5) * np.abs(expected).max()
    for found in (result, served):
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("granularity", [aqs.per_channel(0), aqs.per_block(32, 1)])
def test_fake_quant_and_storage_on_explicit_axes(granularity):
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    mesh = mesh_of(AxisType.Explicit, (1, 2))
    for calibration in (aqs.absmax(), aqs.min_max(), aqs.percentile(90.0)):
        q = aqs.Quantizer("int8", granularity, calibration)
        expected = jax.jit(lambda x, q=q: aqs.fake_quant(x, q))(x)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, NamedSharding(mesh, P(None, "m")))
            values = jax.jit(lambda x, q=q: aqs.fake_quant(x, q))(sharded)
            stored = jax.jit(lambda x, q=q: aqs.quantize_tensor(x, q))(sharded)
        assert values.sharding == sharded.sharding == stored.data.sharding
        np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("calibration", [aqs.absmax(), aqs.min_max(), aqs.percentile(90.0)])
def test_calibrations_with_state_on_explicit_axes(calibration):
    fun, mesh = FUNCTIONS["by outputs"][0], mesh_of(AxisType.Explicit, (1, 2))
    weight, data = operands("by outputs")
    q = aqs.Quantizer("int8", None, aqs.moving_average(calibration))
    spec = {"weight": "int8", "activation": q, "rhs_gradient": "e5m2"}
    assignment = aqs.assign(aqs.find_sites(fun, {"w": weight}, data), [(".*", spec)])
    stateful = aqs.quantize_with_state(fun, execution="int8")

    def loss(params, x):
        state = stateful.init(assignment, params, x)
        return jnp.sum(stateful.apply(assignment, state, params, x)[0] ** 2)

    expected = jax.jit(jax.grad(loss))({"w": weight}, data)["w"]
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss))(*placed("by outputs", mesh))["w"]
    assert gradient.sharding.spec == P(None, "m")
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("execution", ["emulated", "int8", "bf16"])
def test_automatic_axes_and_shard_map(execution):
    fun = FUNCTIONS["by outputs"][0]
    weight, data = operands("by outputs")
    sites = aqs.find_sites(fun, {"w": weight}, data)
    assignment = aqs.assign(sites, [(".*", "int8")])
    expected = aqs.quantize(fun)(assignment, {"w": weight}, data)
    quantized = functools.partial(aqs.quantize(fun, execution=execution), assignment)
    mesh = mesh_of(AxisType.Auto, (1, 2))
    params, x = placed("by outputs", mesh)
    mapped = jax.shard_map(
        quantized, mesh=mesh, in_specs=({"w": P(None, "m")}, P()), out_specs=P(None, "m")
    )
    for run in (quantized, mapped):
        np.testing.assert_allclose(jax.jit(run)(params, x), expected, rtol=0, atol=1e-4)


# --- Regions of the function's own, whose axes are left to the compiler ---------------------------


def in_region(fun, axes=("d", "m")):
    return jax.sharding.auto_axes(fun, axes=axes, out_sharding=P("d", None))


def looked_up(params, ids, region=True):
    where = {"out_sharding": P("d", None, None)} if region else {}
    return params["table"].at[ids].get(**where) @ params["w"]


def layer(x, w):
    return jnp.tanh(x @ w)


def hidden(params, x, region=True, axes=("d", "m")):
    return (in_region(layer, axes) if region else layer)(x, params["w"]) @ params["v"]


def around_a_scan(params, x, region=True):
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]

    return (in_region(scanned) if region else scanned)(x, params["stack"])


def inside_of_a_scan(params, x, region=True):
    inner = in_region(layer) if region else layer
    return jax.lax.scan(lambda x, w: (inner(x, w), None), x, params["stack"])[0]


def recurrent(params, x, region=True):
    inner = in_region(layer) if region else layer
    return jax.lax.fori_loop(0, 2, lambda _, x: inner(x, params["w"]), x)


X = np.random.default_rng(9).standard_normal((4, 8)).astype(np.float32)
REGIONS = {
    "lookup": (looked_up, np.arange(6, dtype=np.int32).reshape(2, 3)),
    "all axes": (hidden, X),
    "some axes": (functools.partial(hidden, axes=("m",)), X),
    "around a scan": (around_a_scan, X),
    "inside of a scan": (inside_of_a_scan, X),
    "recurrent": (recurrent, X),
}
TREE = {"table": (6, 8), "w": (8, 8), "v": (8, 8), "stack": (2, 8, 8)}
TREE = {
    name: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    for seed, (name, shape) in enumerate(TREE.items())
}


def of_a_region(fun, params, x, execution):
    """All that quantization makes of a function: results, and a gradient."""
    assignment = aqs.assign(aqs.find_sites(fun, params, x), [(".*", "int8")])
    static = aqs.with_static_activations(assignment, aqs.find_sites(fun, params, x))
    quantized = functools.partial(aqs.quantize(fun, execution=execution), assignment)
    stateful = aqs.quantize_with_state(fun, execution=execution)
    serve = jax.jit(aqs.serve(fun, execution=execution))
    state = stateful.init(static, params, x)
    output, state = jax.jit(functools.partial(stateful.apply, static))(state, params, x)
    frozen = [
        jax.jit(lambda p: aqs.freeze(fun, assignment, p, x))(params),
        aqs.freeze(fun, static, params, x, state=state),
    ]
    results = [
        jax.jit(quantized)(params, x), output, *(serve(f, x) for f in frozen),
        jax.jit(functools.partial(stateful.evaluate, static))(state, params, x),
    ]  # fmt: skip
    return results, jax.jit(jax.grad(lambda p: jnp.sum(quantized(p, x) ** 2)))(params)


@pytest.mark.parametrize("execution", ["emulated", "int8"])
def test_a_mesh_of_which_one_axis_is_explicit(execution):
    fun = functools.partial(hidden, region=False)
    expected, _ = of_a_region(fun, TREE, X, "emulated")
    mesh = jax.make_mesh((2, 1), ("d", "m"), axis_types=(AxisType.Explicit, AxisType.Auto))
    with jax.set_mesh(mesh):
        params = jax.device_put(TREE, NamedSharding(mesh, P()))
        x = jax.device_put(X, NamedSharding(mesh, P("d", None)))
        results, _ = of_a_region(fun, params, x, execution)
    for found, exact in zip(results, expected):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-2 * np.abs(exact).max())


@pytest.mark.parametrize("execution", ["emulated", "int8"])
@pytest.mark.parametrize("name", REGIONS)
def test_sites_in_a_region_of_automatic_axes(name, execution):
    """What it is without a mesh and without the region, sharded as in float."""
    fun, data = REGIONS[name]
    plain = functools.partial(fun, region=False)
    expected, slopes = of_a_region(plain, TREE, data, "emulated")
    mesh = mesh_of(AxisType.Explicit, (2, 1))
    with jax.set_mesh(mesh):
        params = jax.device_put(TREE, NamedSharding(mesh, P()))
        x = jax.device_put(data, NamedSharding(mesh, P("d", None)))
        like = jax.jit(fun)(params, x)
        of_float = jax.jit(jax.grad(lambda p: jnp.sum(fun(p, x) ** 2)))(params)
        results, gradient = of_a_region(fun, params, x, execution)
    # A rounding of what a layer leaves may turn on the order of a sum.
    for found, exact in zip(results, expected):
        assert found.sharding.spec == like.sharding.spec
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-2 * np.abs(exact).max())
    for found, exact, leaf in zip(*map(jax.tree.leaves, (gradient, slopes, of_float))):
        assert found.sharding.spec == leaf.sharding.spec
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-2 * np.abs(exact).max() + 1e-6)
