"""What products keep for the backward pass: codes, with the gradients that values give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aqt_search as aqs
from aqt_search.models.resnet import resnet

MATMUL = (((1,), (0,)), ((), ()))


def sample(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dot(x, w, **more):
    return aqs.dot_general(x, w, MATMUL, **more)


def convolution(x, w, **more):
    images, kernel = x.reshape(2, 4, 4, -1), w.reshape(2, 2, 4, -1)
    numbers = ("NHWC", "HWIO", "NHWC")
    result = aqs.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=numbers, **more
    )
    return result.reshape(-1)


def einsum(x, w, **more):
    return aqs.einsum("ab,bc->ca", x, w, **more)


LEARNED = aqs.Quantizer("int4", calibration=aqs.lsq())
CASES = {
    "int8": ("int8", "int8"),
    "unsigned": ("uint8", "int4"),
    "floats": ("e4m3", "e2m1"),
    "wide": ("bf16", "int8"),
    "no codes": ("fp16", "int8"),
    "one side": (None, "int4"),
    "clipped": (aqs.Quantizer("int4", calibration=aqs.percentile(80.0)), "int8"),
    "zero points": (aqs.Quantizer("uint4", calibration=aqs.min_max()), "int8"),
    "centred": ("binary", "binary"),
    "per token": (aqs.Quantizer("int8", aqs.PER_TOKEN), "int8"),
    "errors": (aqs.Quantizer("int4", gradient=aqs.ewgs(0.1)), "int4"),
}
BLOCKS = {"blocks": ("mxfp4", "mxfp8"), "two levels": ("nvfp4", "nvfp4")}
RUNS = [(op, name) for op in (dot, convolution, einsum) for name in CASES]
RUNS += [(dot, name) for name in BLOCKS]


def pulled_back(op, formats, residuals, execution, dtype=np.float32):
    """The result, both gradients, and what the backward pass is kept for."""
    x, w = (sample(8, 16, seed=n).astype(dtype) for n in (0, 1))
    x, w = (np.abs(x), w.T) if op is not convolution else (x, w)
    fun = functools.partial(
        op, lhs_format=formats[0], rhs_format=formats[1], residuals=residuals, execution=execution
    )
    result, pull = jax.vjp(fun, jnp.asarray(x), jnp.asarray(w))
    incoming = sample(*result.shape, seed=2).astype(dtype)
    return (result, *pull(incoming)), jax.tree.leaves(pull)


@pytest.mark.parametrize("op, name", RUNS)
def test_gradients_are_the_same_bits(op, name):
    formats = (CASES | BLOCKS)[name]
    for dtype in (np.float32, jnp.bfloat16):
        found = jax.jit(
            lambda dtype=dtype: [
                pulled_back(op, formats, residuals, "emulated", dtype)[0]
                for residuals in ("values", "codes")
            ]
        )()
        for values, codes in zip(*found):
            assert values.dtype == codes.dtype
            np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (values, codes)))


@pytest.mark.parametrize("execution", ["int8", "bf16"])
@pytest.mark.parametrize("op", [dot, convolution, einsum])
def test_products_on_codes_keep_theirs(op, execution):
    found = [pulled_back(op, ("int8", "int4"), r, execution) for r in ("values", "codes")]
    for values, codes in zip(*(gradients for gradients, _ in found)):
        np.testing.assert_allclose(codes, values, rtol=1e-6, atol=1e-6 * np.abs(values).max())
    assert not any(x.size >= 128 and x.dtype == np.float32 for x in found[1][1])


@pytest.mark.parametrize("name, bytes_each", [("int8", 1), ("floats", 1), ("wide", 2)])
def test_what_is_kept(name, bytes_each):
    """Of 128 elements each operand: no float32 among them, and no more than the codes."""
    _, kept = pulled_back(dot, CASES[name], "codes", "emulated")
    large = [x for x in kept if x.size >= 128]
    assert all(x.dtype.itemsize <= bytes_each for x in large)
    _, values = pulled_back(dot, CASES[name], "values", "emulated")
    assert sum(x.nbytes for x in kept) < 0.6 * sum(x.nbytes for x in values if x.size >= 128)


def test_an_empty_batch_has_gradients():
    """Of weights they are sums of nothing."""
    x, w = np.zeros((0, 8), np.float32), sample(8, 4)

    def loss(w):
        return jnp.sum(dot(x, w, lhs_format="int8", rhs_format="int8", residuals="codes"))

    np.testing.assert_array_equal(jax.grad(loss)(w), np.zeros((8, 4)))


def test_bad_numbers_are_not_lost():
    """NaN in int8 codes: the gradients that it enters are NaN, as with values."""
    x, w = sample(3, 8), sample(8, 4, seed=1)
    x[1, 2] = np.nan
    clipped = aqs.Quantizer("int8", calibration=aqs.fixed(1.0))

    def loss(x, w):
        product = dot(x, w, lhs_format=clipped, rhs_format="int8", residuals="codes")
        return jnp.sum(product)

    assert np.isnan(jax.grad(loss, 1)(x, w)[2]).all()


def test_there_is_no_second_derivative():
    w = sample(8, 4)

    def loss(x):
        return jnp.sum(dot(x, w, lhs_format="int8", rhs_format="int8", residuals="codes") ** 2)

    assert np.isfinite(jax.grad(loss)(sample(2, 8))).all()
    with pytest.raises(NotImplementedError, match=r"first derivatives only.*residuals='values'"):
        jax.hessian(loss, argnums=0)(sample(2, 8))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda x: jnp.sum(jax.grad(loss)(x)))(sample(2, 8))


def test_unknown_residuals():
    message = "Unknown residuals 'code': expected one of values, codes"
    with pytest.raises(ValueError, match=message):
        dot(sample(2, 8), sample(8, 2), lhs_format="int8", residuals="code")
    for transformation in (aqs.quantize, aqs.quantize_with_state):
        with pytest.raises(ValueError, match=message):
            transformation(lambda p, x: x @ p, residuals="code")


# --- Models ---------------------------------------------------------------------------------------


def mlp(params, x):
    """Two layers of a scan, rematerialised, and one more."""

    @jax.checkpoint
    def layer(x, w):
        return jax.nn.relu(x @ w), None

    x, _ = jax.lax.scan(layer, x, params["stack"])
    return x @ params["last"]


PARAMS = {"stack": sample(2, 8, 8), "last": sample(8, 4, seed=1)}
OPTIONS = ("int3", "int4", "int8")


def gradient(assignment, residuals, options=OPTIONS, **more):
    qapply = aqs.quantize(mlp, residuals=residuals, options=options, **more)
    return jax.grad(lambda params: jnp.sum(qapply(assignment, params, sample(4, 8, seed=2)) ** 2))


def assigned(name):
    return aqs.assign(aqs.find_sites(mlp, PARAMS, sample(4, 8)), [(".*", name)])


def test_formats_that_are_traced():
    """One program for all options, jitted, under vmap, scan and remat."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(assigned, OPTIONS))
    found = {}
    for residuals in ("values", "codes"):
        mapped = jax.vmap(lambda a, r=residuals: gradient(a, r)(PARAMS))
        found[residuals] = jax.jit(mapped)(stacked)
    for values, codes in zip(*map(jax.tree.leaves, found.values())):
        np.testing.assert_allclose(codes, values, rtol=1e-6, atol=1e-6 * np.abs(values).max())


def test_a_traced_format_that_is_no_option_gives_nan():
    run = jax.jit(lambda assignment: gradient(assignment, "codes", ("int3", "int4"))(PARAMS))
    assert np.isfinite(run(assigned("int4"))["last"]).all()
    assert np.isnan(run(assigned("bf16"))["last"]).any()


def test_learned_bounds_learn_as_before():
    def loss(residuals):
        qfun = aqs.quantize_with_state(mlp, residuals=residuals)
        assignment = {"last": aqs.SiteFormats(LEARNED, LEARNED)}
        x = sample(4, 8, seed=2)
        state = qfun.init(assignment, PARAMS, x)
        _, state = qfun.apply(assignment, state, PARAMS, x)
        learned = jax.tree.map(jnp.asarray, state)

        def of(learned, params):
            return jnp.sum(qfun.apply(assignment, learned, params, x)[0] ** 2)

        return jax.grad(of, (0, 1), allow_int=True)(learned, PARAMS)

    values, codes = (jax.tree.leaves(loss(residuals)) for residuals in ("values", "codes"))
    for one, other in zip(values, codes):
        if one.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def planned_bytes(residuals):
    """Temporary memory of a training step as compiled; None for the float step."""
    model = resnet(20, 10, form="cifar")
    x = jax.ShapeDtypeStruct((64, 16, 16, 3), np.float32)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)
    )
    apply = model.apply
    if residuals is not None:
        sites = aqs.find_sites(functools.partial(model.apply, train=False), variables, x)
        assignment = aqs.assign(sites, [(".*", "int8")])
        apply = functools.partial(aqs.quantize(model.apply, residuals=residuals), assignment)

    def step(variables, x):
        def loss(params):
            own = variables | {"params": params}
            logits, _ = apply(own, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros(64, int)).sum()

        return jax.grad(loss)(variables["params"])

    return jax.jit(step).lower(variables, x).compile().memory_analysis().temp_size_in_bytes


def test_a_compiled_step_plans_less_memory_than_the_float_one():
    """The codes are what is alive between the passes: not in the jaxpr alone."""
    plain, values, codes = map(planned_bytes, (None, "values", "codes"))
    assert codes <= 0.85 * plain < values
