"""PER_TOKEN: a scale for every row of an activation, by float64 references; what it gains."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import PER_TOKEN, Quantizer, ptq
from aqt_search.models.vit import ViT
from configs import digits_resnet8
from experiments import results
from experiments.assignment import configured_assignment
from experiments.quantizers import configured_quantizers

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RULES = [(".*", {"activation": Quantizer("int8", PER_TOKEN), "weight": "int8", "unsigned": False})]


def sample(*shape, seed=0):
    """Normal numbers whose rows, the last axis, differ in size a hundredfold."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-1, 1, (*shape[:-1], 1))
    return (rng.standard_normal(shape) * size).astype(np.float32)


def rounded(x, shared):
    """int8 values, float64: the axes `shared` have one scale, max|x| / 127."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(shared, keepdims=True) / 127
    return np.rint(x / scale) * scale


# --- Products -------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A function of parameters and data, and its value with quantized operands, in float64."""

    fun: Any
    params: Any
    x: np.ndarray  # a batch first
    reference: Any


def tokens():
    w = sample(16, 8, seed=1)
    return Case(
        lambda params, x: x @ params["w"], {"w": w}, sample(3, 5, 16),
        lambda x: rounded(x, 2) @ rounded(w, 0),
    )  # fmt: skip


def attention():
    """Both operands are activations: queries [batch, heads, tokens, channels]."""
    gain = np.float32(0.5)
    return Case(
        lambda params, x: jnp.einsum("bhqd,bhkd->bhqk", x, x[:, ::-1] * params["gain"]),
        {"gain": gain}, sample(2, 2, 5, 8),
        lambda x: np.einsum("bhqd,bhkd->bhqk", rounded(x, 3), rounded(x[:, ::-1] * gain, 3)),
    )  # fmt: skip


def mixed():
    """The right operand is summed over its tokens: its rows are channels."""

    def mix(params, x):
        return jnp.einsum("bqk,bkd->bqd", x, x * params["gain"])

    return Case(
        mix, {"gain": np.float32(1.0)}, sample(2, 6, 6),
        lambda x: np.einsum("bqk,bkd->bqd", rounded(x, 2), rounded(x, 1)),
    )  # fmt: skip


def convolution():
    """Pixels meet in a window, so that a row is an image."""
    w = sample(3, 2, 4, seed=1)
    numbers = ("NWC", "WIO", "NWC")
    options = {"window_strides": (1,), "padding": "VALID", "dimension_numbers": numbers}
    sizes = np.array([1.0, 30.0, 0.1], np.float32).reshape(3, 1, 1)

    def reference(x):
        x, kernel = rounded(x, (1, 2)), rounded(w, (0, 1))
        return sum(x[:, i : i + 6] @ kernel[i] for i in range(3))

    return Case(
        lambda params, x: jax.lax.conv_general_dilated(x, params["w"], **options), {"w": w},
        sample(3, 8, 2) * sizes, reference,
    )  # fmt: skip


def layers():
    """A scan through a stack of weights, whose activations have scales of each iteration."""
    w = sample(3, 8, 8, seed=1)

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    def reference(x):
        for layer in w:
            x = np.tanh(rounded(x, 1) @ rounded(layer, 0))
        return x

    return Case(apply, {"w": w}, sample(4, 8), reference)


def experts():
    """Groups of rows, each with a matrix; this product has no form on codes."""
    w, sizes = sample(2, 8, 4, seed=1), np.array([3, 1], np.int32)

    def reference(x):
        x, w_hat = rounded(x, 1), rounded(w, 1)
        return np.concatenate([x[:3] @ w_hat[0], x[3:] @ w_hat[1]])

    return Case(
        lambda params, x: jax.lax.ragged_dot(x, params["w"], sizes), {"w": w}, sample(4, 8),
        reference,
    )  # fmt: skip


CASES = {f.__name__: f for f in (tokens, attention, mixed, convolution, layers, experts)}


def assigned(case, rules=RULES):
    return aqs.assign(aqs.find_sites(case.fun, case.params, case.x), rules)


@pytest.mark.parametrize(
    "name, execution",
    [
        (name, execution)
        for name in CASES
        for execution in ("emulated", "int8", "bf16", "auto")
        if name != "experts" or execution in ("emulated", "auto")
    ],
)
def test_every_row_has_a_scale_of_its_own(name, execution):
    case = CASES[name]()
    found = jit(aqs.quantize(case.fun, execution=execution))(assigned(case), case.params, case.x)
    expected = case.reference(case.x)
    # Some 16 products and roundings in float32 of numbers within the largest.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-19 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_what_is_served_is_what_was_quantized(name):
    """From storage that no batch is in, at another size of the batch."""
    case = CASES[name]()
    assignment = assigned(case)
    frozen = aqs.freeze(case.fun, assignment, case.params, case.x)
    more = np.concatenate([case.x, case.x * 2]) if name != "experts" else case.x
    expected = jit(aqs.quantize(case.fun))(assignment, case.params, more)
    served = jit(aqs.serve(case.fun, execution="emulated"))(frozen, more)
    np.testing.assert_allclose(served, expected, rtol=1e-6, atol=1e-6)
    per_tensor = aqs.freeze(case.fun, assigned(case, [(".*", "int8")]), case.params, case.x)
    assert frozen.nbytes == per_tensor.nbytes  # scales of activations are stored nowhere


@pytest.mark.parametrize("name", ["tokens", "attention", "mixed", "convolution", "layers"])
def test_an_example_does_not_depend_on_its_batch(name):
    """Alone, beside others and under vmap it is the same; with a scale per tensor it is not."""
    case = CASES[name]()
    apart = {}
    for rules in (RULES, [(".*", "int8")]):
        run = functools.partial(aqs.quantize(case.fun), assigned(case, rules), case.params)
        whole, ones = jit(run)(case.x), jit(jax.vmap(lambda x, run=run: run(x[None])[0]))(case.x)
        alone = np.concatenate([jit(run)(case.x[i : i + 1]) for i in range(len(case.x))])
        apart[rules is RULES] = [
            np.abs(each - whole).max() / np.abs(whole).max() for each in (alone, ones)
        ]
    assert max(apart[True]) < 1e-6  # the order of summation
    assert min(apart[False]) > 1e-4


@pytest.mark.parametrize("execution", ["emulated", "native", "fp8"])
def test_gradients_pass_straight_through(execution):
    x, w, g = sample(5, 16), sample(16, 8, seed=1), sample(5, 8, seed=2)
    fmt = "e4m3" if execution == "fp8" else "int8"
    product = functools.partial(
        aqs.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), execution=execution,
        lhs_format=Quantizer(fmt, PER_TOKEN), rhs_format=fmt,
    )  # fmt: skip
    dx, dw = jit(lambda *o: jax.vjp(product, *o)[1](g))(x, w)
    if fmt == "int8":
        x_hat, w_hat = rounded(x, 1), rounded(w, 0)
    else:
        x_hat, w_hat = (np.asarray(v, np.float64) for v in
                        (aqs.fake_quant(x, fmt, (0,)), aqs.fake_quant(w, fmt, (1,))))  # fmt: skip
    for found, expected in ((dx, g @ w_hat.T), (dw, x_hat.T @ g)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-19 * np.abs(expected).max())


def test_outside_of_a_product_a_row_runs_along_the_last_axis():
    x = sample(2, 3, 8)
    q = Quantizer("int8", PER_TOKEN)
    np.testing.assert_allclose(aqs.fake_quant(x, q), rounded(x, 2), rtol=1e-6)
    np.testing.assert_array_equal(aqs.quantize_tensor(x, q).dequantize(), aqs.fake_quant(x, q))
    grad = jax.grad(lambda x: aqs.fake_quant(x, q).sum())(x)
    np.testing.assert_array_equal(grad, np.ones_like(x))


def test_replicas_share_no_scale_of_a_row():
    """Rows of other devices are other rows: what is sharded is what is not."""
    x, q = sample(4, 8), Quantizer("int8", PER_TOKEN, rounding="stochastic", key=jax.random.key(0))
    sharded = functools.partial(aqs.fake_quant, fmt=q, axis_name="batch")
    for mapped in (jax.vmap(sharded, axis_name="batch"), jax.pmap(sharded, "batch")):
        found = mapped(x.reshape(2, 2, 8)).reshape(4, 8)
        np.testing.assert_array_equal(found, aqs.fake_quant(x, q))


# --- Static scales, costs, configurations ---------------------------------------------------------


def test_calibration_makes_no_scale_of_a_row_static():
    case = tokens()
    assignment = assigned(case)
    sites = aqs.find_sites(case.fun, case.params, case.x)
    assert aqs.with_static_activations(assignment, sites) == assignment
    static, state = ptq.calibrate(case.fun, assignment, case.params, [case.x, 2 * case.x])
    assert static["w"].lhs == assignment["w"].lhs
    assert set(state["w"]) == {"rhs"}
    other = sample(7, 5, 16, seed=3)
    found = aqs.quantize_with_state(case.fun).evaluate(static, state, case.params, other)
    expected = case.reference(other)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-19 * np.abs(expected).max())
    frozen = aqs.freeze(case.fun, static, case.params, case.x, state=state)
    np.testing.assert_allclose(aqs.serve(case.fun)(frozen, other), found, rtol=1e-5, atol=1e-4)


def test_a_weight_under_it_has_a_scale_for_every_output():
    case = tokens()
    both = assigned(case, [(".*", Quantizer("int8", PER_TOKEN))])
    own = assigned(case)
    sites = aqs.find_sites(case.fun, case.params, case.x)
    assert aqs.cost.weight_bytes(sites, both) == aqs.cost.weight_bytes(sites, own) == 16 * 8 + 4 * 8
    static, state = ptq.calibrate(case.fun, both, case.params, [case.x])
    assert state["w"]["rhs"].high.shape == (1, 8)
    for assignment, held in ((both, None), (static, state)):
        frozen = aqs.freeze(case.fun, assignment, case.params, case.x, state=held)
        scale = frozen.weights["w"]["rhs"].scale
        expected = np.abs(case.params["w"]).max(0, keepdims=True) / 127
        np.testing.assert_allclose(scale, expected, rtol=1e-6)


def test_a_configuration_says_it_of_activations():
    case = tokens()
    sites = aqs.find_sites(case.fun, case.params, case.x)
    config = digits_resnet8.get_config()
    config.formats = ((".*", "int8"),)
    plain = configured_assignment(config, sites)
    config.quantizers.activation_granularity = "token"
    assignment = configured_assignment(config, sites)
    assert assignment["w"].lhs == Quantizer("int8", PER_TOKEN)
    assert assignment["w"].rhs == Quantizer("int8")
    found = aqs.quantize(case.fun)(assignment, case.params, case.x)
    np.testing.assert_allclose(found, case.reference(case.x), rtol=0, atol=1e-3)
    # The file says formats; the granularity is the configuration's.
    granularities = configured_quantizers(config).granularities.values()
    written = results.policy_json(assignment, *granularities)
    assert written == results.policy_json(plain) == {"w": {"lhs": "int8", "rhs": "int8"}}


# --- What it gains --------------------------------------------------------------------------------


def test_error_of_a_product_is_that_of_its_scales():
    """Rounding to steps of s is off by s / sqrt(12): errors are as the root mean square of s."""
    x, w = sample(512, 64), sample(64, 64, seed=1)
    product = functools.partial(aqs.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))
    exact, bounds = x.astype(np.float64) @ w, np.abs(x).max(1)
    error = {
        name: np.linalg.norm(product(x, w, lhs_format=Quantizer("int8", granularity)) - exact)
        for name, granularity in (("tensor", aqs.PER_TENSOR), ("token", PER_TOKEN))
    }
    predicted = np.sqrt(np.mean(np.square(bounds))) / bounds.max()
    assert error["token"] / error["tensor"] == pytest.approx(predicted, rel=0.05)


def relative_error(granularity, outliers):
    """||quantized - float|| / ||float|| of the logits of a small ViT in w8a8, random weights."""
    model = ViT(channels=64, heads=2, blocks=2, patch=4, num_classes=10)
    x = np.random.default_rng(0).normal(size=(16, 16, 16, 3)).astype(np.float32)
    variables = jit(model.init)(jax.random.key(0), x[:1])
    for name, block in variables["params"].items():
        if outliers and name.startswith("block"):
            block["up"]["kernel"] = block["up"]["kernel"].at[:, 0].multiply(30)
    spec = {"activation": Quantizer("int8", granularity), "weight": "int8"}
    assignment = aqs.assign(aqs.find_sites(model.apply, variables, x), [(".*", spec)])
    exact = jit(model.apply)(variables, x)
    found = jit(aqs.quantize(model.apply))(assignment, variables, x)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def test_error_of_a_transformer():
    """The largest of 64 normal numbers is 2.4 deviations, of 17,408 (a layer's tokens) 4.1.

    Weights, a scale for 64, add as much error as tokens with a scale each, so with a scale for all
    it is about sqrt(2.4^2 + 4.1^2) / (sqrt(2) 2.4) = 1.4 times as large. A hidden unit 30 times as
    large as others is 0 in half of the tokens, and over all of them its root mean square is a
    quarter of the largest of 272: a scale for all has more than three times the error.
    """
    random, outliers = ([relative_error(g, o) for g in (aqs.PER_TENSOR, PER_TOKEN)]
                        for o in (False, True))  # fmt: skip
    assert random[0] / random[1] > 1.2
    assert outliers[0] / outliers[1] > 3
