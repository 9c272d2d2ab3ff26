"""AdaRound and GPTQ: against actual products, every possible rounding, and nearest rounding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import PER_CHANNEL, PER_TENSOR, Quantizer
from aqt_search.models import resnet
from aqt_search.ptq import PTQError, SkippedSite, adaround, calibrate, gptq
from aqt_search.ptq.product_matrix import product_matrix
from aqt_search.ptq.reconstruction import reconstruct
from aqt_search.tracing.origins import SITE_PRIMITIVES

RNG = np.random.default_rng(0)
METHODS = {
    "adaround": functools.partial(adaround, steps=300, learning_rate=0.03),
    "gptq": functools.partial(gptq, by_energy=False, asymmetric=True),
}


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def calibrated(apply, variables, batches, spec):
    sites = aqs.find_sites(apply, variables, batches[0])
    return calibrate(apply, aqs.assign(sites, [(".*", spec)]), variables, batches)


# --- The error of a layer is quadratic in its weight ----------------------------------------------


def convolution(**options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda w, x: jax.lax.conv_general_dilated(
        x,
        w,
        **({"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": numbers} | options),
    )


IMAGES, KERNEL = (3, 6, 5, 4), (3, 2, 4, 6)
LAYERS = {
    "conv": (convolution(), IMAGES, KERNEL),
    "strides": (convolution(window_strides=(2, 3), padding="VALID"), IMAGES, KERNEL),
    "padding": (convolution(padding=((2, 0), (-1, 3))), IMAGES, KERNEL),
    "dilation": (convolution(rhs_dilation=(2, 1), padding=((2, 2), (0, 1))), IMAGES, KERNEL),
    "transposed": (convolution(lhs_dilation=(2, 2), padding=((1, 1), (1, 0))), IMAGES, KERNEL),
    "strided groups": (
        convolution(feature_group_count=2, window_strides=(2, 2)), IMAGES, (3, 2, 2, 6)
    ),
    "depthwise": (convolution(feature_group_count=4), IMAGES, (3, 3, 1, 8)),
    "other axes": (
        convolution(dimension_numbers=("NCHW", "OIHW", "NCHW")), (3, 4, 6, 5), (6, 4, 3, 2)
    ),
    "dense": (lambda w, x: x @ w, (7, 3, 5), (5, 4)),
    "weight on the left": (lambda w, x: w @ x, (5, 7), (4, 5)),
    "heads": (lambda w, x: jnp.einsum("btd,dhe->bthe", x, w), (2, 3, 5), (5, 2, 3)),
    "two axes summed": (lambda w, x: jnp.einsum("bthe,hed->btd", x, w), (2, 3, 2, 4), (2, 4, 3)),
    "batched experts": (lambda w, x: jnp.einsum("gtd,gde->gte", x, w), (2, 5, 3), (2, 3, 4)),
}  # fmt: skip


def small_integers(rng, *shape):
    """Numbers whose products and sums are exact in float32."""
    return rng.integers(-6, 7, shape).astype(np.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_a_product_is_a_product_of_matrices(name):
    layer, x_shape, w_shape = LAYERS[name]
    rng = np.random.default_rng(1)
    w, x = small_integers(rng, *w_shape), small_integers(rng, *x_shape)
    (eqn,) = (e for e in jax.make_jaxpr(layer)(w, x).eqns if e.primitive.name in SITE_PRIMITIVES)
    side = int(name != "weight on the left")
    matrix = product_matrix(eqn, side)
    inputs, weight = jax.jit(lambda x, w: (matrix.inputs(x), matrix.weight(w)))(x, w)
    out = eqn.primitive.bind(*((x, w) if side else (w, x)), **eqn.params)
    expected = np.einsum("grk,gok->gro", np.asarray(inputs), np.asarray(weight))
    np.testing.assert_array_equal(matrix.outputs(out), expected)


@pytest.mark.parametrize("name", ["strided groups", "dilation", "weight on the left"])
def test_the_quadratic_error_is_that_of_the_layers_output(name):
    layer, x_shape, w_shape = LAYERS[name]
    rng = np.random.default_rng(1)
    weight = small_integers(rng, *w_shape)
    batches = [small_integers(rng, *x_shape) for _ in range(2)]
    if name != "weight on the left":
        batches.append(batches[0][:1])

    def apply(variables, x):
        return layer(variables["w"], x)

    variables, seen = {"w": weight}, []
    spec = {"weight": Quantizer("int2", PER_TENSOR)}
    assignment, state = calibrated(apply, variables, batches, spec)

    def solve(w, grid, moments):
        seen.append((w, grid, moments))
        return grid.nearest(w)

    rounded = reconstruct(apply, assignment, state, variables, batches, solve)["w"]
    ((w, grid, moments),) = seen
    step = np.abs(weight).max()
    np.testing.assert_allclose(rounded, step * np.round(weight / step), rtol=1e-6)
    change = jax.jit(lambda u, v: [layer(u, x) - layer(v, x) for x in batches])
    squares = sum(np.square(np.asarray(d, float)).sum() for d in change(weight, rounded))
    errors = moments.error(w - grid.nearest(w))
    np.testing.assert_allclose(np.sum(errors) * moments.rows, squares, rtol=1e-5)


def test_the_asymmetric_error_is_the_distance_to_the_float_output():
    first, second, x = normal(4, 6), normal(6, 3), normal(50, 4)

    def apply(variables, x):
        return jax.nn.relu(x @ variables["a"]) @ variables["b"]

    variables, seen = {"a": first, "b": second}, []
    assignment, state = calibrated(apply, variables, [x], {"weight": "int3", "activation": "int4"})

    def solve(w, grid, moments):
        seen.append((w, grid, moments))
        return grid.nearest(w)

    rounded = reconstruct(apply, assignment, state, variables, [x], solve, names=["b"])
    ((w, grid, moments),) = seen
    served = jax.jit(aqs.quantize_with_state(apply).evaluate)(assignment, state, rounded, x)
    expected = np.square(np.asarray(served, float) - apply(variables, x)).mean(0)
    np.testing.assert_allclose(moments.error(w - grid.nearest(w))[0], expected, rtol=1e-3)


# --- Every possible rounding ----------------------------------------------------------------------


def experts(variables, x):
    """Sixteen small dense layers in one: [16, rows, 6] to [16, rows, 2]."""
    return jnp.einsum("grk,gko->gro", x, variables["w"])


@functools.cache
def small_layers():
    """Weights and correlated, positive inputs, where nearest rounding is far from the best."""
    rng = np.random.default_rng(2)
    mixed = rng.normal(size=(16, 200, 6)) @ (np.eye(6) + rng.normal(size=(16, 6, 6)) / np.sqrt(6))
    return {"w": rng.normal(size=(16, 6, 2)).astype(np.float32)}, np.maximum(mixed, 0).astype("f4")


def output_errors(weight, other, x):
    """[16, 2]: mean squared error of every output, in float64."""
    change = np.asarray(weight, float) - np.asarray(other, float)
    return np.square(np.einsum("grk,gko->gro", x.astype(float), change)).mean(1)


@pytest.mark.parametrize("fmt", ["int2", "int3", "e2m1"])
def test_the_best_of_all_roundings(fmt):
    variables, x = small_layers()
    weight = variables["w"]
    scales = np.abs(weight.astype(float)).max(1, keepdims=True) / aqs.numeric_format(fmt).max_value
    values = {"int2": np.arange(-1, 2), "int3": np.arange(-3, 4)}.get(
        fmt, np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    )
    position = np.clip(np.searchsorted(values, weight / scales, side="right"), 1, len(values) - 1)
    low, high = (values[position - up] * scales for up in (1, 0))
    on_grid = np.minimum(weight - low, high - weight) < 1e-6 * scales  # the largest of a channel
    low, high = (np.where(on_grid, weight, bound) for bound in (low, high))
    nearest = np.where(np.abs(weight - low) < np.abs(weight - high), low, high)
    choices = np.array(list(itertools.product([0, 1], repeat=6)))[:, None, :, None]
    best = np.min([output_errors(weight, low + (high - low) * c, x) for c in choices], axis=0)
    by_nearest = output_errors(weight, nearest, x)

    assignment, state = calibrated(experts, variables, [x], {"weight": Quantizer(fmt, PER_CHANNEL)})
    for name in ("adaround", "gptq"):
        rounded = METHODS[name](experts, assignment, state, variables, [x])["w"]
        codes = np.asarray(rounded, float) / scales
        distance = np.abs(codes[..., None] - values).min(-1)
        assert distance.max() < 1e-5  # on the grid
        found = output_errors(weight, rounded, x)
        assert np.all(found <= by_nearest * (1 + 1e-4))
        assert (by_nearest - found).sum() > 0.6 * (by_nearest - best).sum()  # most of what there is
        if name == "adaround":
            up = np.abs(rounded - high) < np.abs(rounded - low)
            np.testing.assert_allclose(rounded, np.where(up, high, low), atol=1e-5)
            assert np.all(found >= best * (1 - 1e-4))
            # No other choice of one element is better: a gain below 1e-5 steps does not count.
            for k in range(6):
                turned = np.where(np.arange(6)[:, None] == k, ~up, up)
                other = output_errors(weight, np.where(turned, high, low), x)
                assert np.all(other >= found - 1e-4 * by_nearest.mean())


@pytest.mark.parametrize("method", METHODS)
def test_weights_on_the_grid_and_what_is_served_stay(method):
    variables, x = small_layers()
    spec = {"weight": Quantizer("int3", PER_TENSOR, aqs.min_max()), "activation": "int8"}
    assignment, state = calibrated(experts, variables, [x], spec)
    rounded = METHODS[method](experts, assignment, state, variables, [x])
    frozen = aqs.freeze(experts, assignment, rounded, x, state=state)
    np.testing.assert_allclose(frozen.weights["w"]["rhs"].dequantize(), rounded["w"], atol=1e-5)
    if method == "adaround":
        again = METHODS[method](experts, assignment, state, rounded, [x])
        np.testing.assert_allclose(again["w"], rounded["w"], rtol=1e-5)


def test_errors_before_a_site_are_made_up_for():
    x = np.abs(normal(200, 6)) @ (np.eye(6, dtype=np.float32) + 0.5 * normal(6, 6))
    variables, batches = {"a": normal(6, 12), "b": normal(12, 4)}, [x[:100], x[100:]]

    def apply(variables, x):
        return jax.nn.relu(x @ variables["a"]) @ variables["b"]

    assignment, state = calibrated(apply, variables, batches, {"weight": "int2"})
    qfun = jax.jit(aqs.quantize_with_state(apply).evaluate)

    def error(variables_):
        return np.square(qfun(assignment, state, variables_, x) - apply(variables, x)).mean()

    plain, adjusted = (
        error(
            gptq(apply, assignment, state, variables, batches, names=["b"], asymmetric=asymmetric)
        )
        for asymmetric in (False, True)
    )
    assert adjusted < plain < error(variables)


# --- Where the weight is, and where it cannot be changed ------------------------------------------


def test_weights_are_changed_where_the_model_keeps_them():
    kernel, x = normal(4, 3, 3, 4), normal(2, 5, 5, 4)  # kept as OHWI, used as HWIO in bfloat16

    def apply(variables, x):
        w = variables["params"]["conv"]["kernel"].transpose(1, 2, 3, 0).astype(jnp.bfloat16)
        return convolution()(jax.jit(lambda w: w.reshape(3, 3, 4, 4))(w), x.astype(jnp.bfloat16))

    variables = {"params": {"conv": {"kernel": kernel}}, "state": {"step": 7}}
    assignment, state = calibrated(apply, variables, [x], {"weight": "int4"})
    rounded = gptq(apply, assignment, state, variables, [x])
    assert rounded["state"] == {"step": 7}
    found = rounded["params"]["conv"]["kernel"]
    steps = np.asarray(found) / (np.abs(kernel).max((1, 2, 3), keepdims=True) / 7)
    # bfloat16 has 8 bits: it moves a code of at most 7 by less than 7 / 256, its bound as well.
    np.testing.assert_allclose(steps, np.round(steps), atol=0.06)
    assert np.abs(steps).max() > 6.9
    assert found.dtype == kernel.dtype


def shared(variables, x):
    return (x @ variables["w"]) @ variables["w"]


def standardized(variables, x):
    return x @ (variables["w"] / jnp.std(variables["w"]))


def looped(variables, x):
    return jax.lax.scan(lambda x, _: (x @ variables["w"], None), x, length=2)[0]


def looked_up(variables, x):
    return variables["w"][x[:, 0].astype(int)]


@pytest.mark.parametrize(
    "apply, weight, message",
    [
        (shared, normal(4, 4), "'w#.' .* used elsewhere"),
        (standardized, normal(4, 4), "'w' .* computed by div"),
        (looped, normal(4, 4), "'w' .* inside a scan"),
        (looked_up, normal(4, 4), "'w' .* looks up rows"),
        (lambda variables, x: x @ variables["w"], np.zeros((4, 4), "f4"), "'w' .* weight is zero"),
    ],
    ids=["shared", "computed", "loop", "lookup", "zero"],
)
@pytest.mark.filterwarnings("ignore:.*no static bounds:aqt_search.ptq.errors.SkippedSite")
def test_sites_that_cannot_be_served_stay(apply, weight, message):
    variables, batches = {"w": weight}, [normal(3, 4)]
    assignment, state = calibrated(apply, variables, batches, {"weight": "int4"})
    with pytest.warns(SkippedSite, match=message):
        rounded = gptq(apply, assignment, state, variables, batches)
    np.testing.assert_array_equal(rounded["w"], weight)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_zero_are_rounded_to_nearest(method):
    weight, x = normal(5, 3), normal(40, 5) * np.array([1, 0, 1, 0, 1], np.float32)

    def dense(variables, x):
        return x @ variables["w"]

    assignment, state = calibrated(dense, {"w": weight}, [x], {"weight": "int3"})
    scale = np.abs(weight).max(0) / 3
    nearest = np.round(weight / scale) * scale
    for data in (x, 0 * x):
        rounded = METHODS[method](dense, assignment, state, {"w": weight}, [data])["w"]
        dead = ~np.any(data, axis=0)
        np.testing.assert_allclose(rounded[dead], nearest[dead], rtol=1e-5, atol=1e-6)


def test_bad_input():
    variables, batches = {"w": normal(4, 3)}, [normal(5, 4)]

    def dense(variables, x):
        return x @ variables["w"]

    assignment, state = calibrated(dense, variables, batches, {"weight": "int4"})
    arguments = (dense, assignment, state, variables)
    with pytest.raises(PTQError, match="at least one batch"):
        gptq(*arguments, [])
    with pytest.raises(PTQError, match=r"no site 'v'. Nearest: w"):
        adaround(*arguments, batches, names=["v"])
    with pytest.raises(PTQError, match="not finite"):
        gptq(*arguments, [np.nan * batches[0]])
    with pytest.raises(PTQError, match="at least one step; got 0"):
        adaround(*arguments, batches, steps=0)
    with pytest.raises(PTQError, match=r"above 0.*; got 0"):
        gptq(*arguments, batches, damping=0)
    uncalibrated = aqs.assign(aqs.find_sites(dense, variables, batches[0]), [("w", "int4")])
    with pytest.raises(PTQError, match="'w': its weight has no static bounds"):
        gptq(dense, uncalibrated, {}, variables, batches)


def smooth_images(count):
    """Images whose neighbouring pixels are alike, as in photographs."""
    return np.repeat(np.repeat(normal(count, 2, 2, 3), 4, 1), 4, 2) + 0.1 * normal(count, 8, 8, 3)


def test_a_residual_network_at_three_bits():
    model = resnet(8, 10, width=0.5)
    apply = jax.jit(functools.partial(model.apply, train=False))
    batches, fresh = [smooth_images(8) for _ in range(2)], smooth_images(32)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), batches[0])
    # Kernels are random, every mean, variance, scale and bias is one.
    variables = jax.tree.map(
        lambda leaf: (
            np.ones(leaf.shape, np.float32)
            if len(leaf.shape) == 1
            else normal(*leaf.shape) / np.sqrt(np.float32(np.prod(leaf.shape[:-1])))
        ),
        shapes,
    )
    sites = aqs.find_sites(apply, variables, batches[0])
    formats = aqs.assign(sites, [("stage1_block1/conv2", {"weight": "int3"})])
    assignment, state = calibrate(apply, formats, variables, batches)
    qfun = aqs.quantize_with_state(apply)

    @jax.jit
    def error(rounded):
        served = qfun.evaluate(assignment, state, rounded, fresh)
        return jnp.mean(jnp.square(served - apply(variables, fresh)))

    for method in METHODS.values():
        rounded = method(apply, assignment, state, variables, batches)
        assert error(rounded) < 0.8 * error(variables)
