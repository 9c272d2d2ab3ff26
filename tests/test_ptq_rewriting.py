"""Steps that rewrite parameters: the float function stays, and what they promise holds."""

import functools
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.models.mobilenet_v2 import mobilenet_v2
from aqt_search.models.resnet import resnet
from aqt_search.models.vit import ViT
from aqt_search.ptq.batch_norm_folding import fold_batch_norm
from aqt_search.ptq.bias_correction import correct_bias
from aqt_search.ptq.dataflow import dataflow
from aqt_search.ptq.equalization import equalization_scales, equalize
from aqt_search.ptq.errors import PTQError, SkippedSite
from aqt_search.ptq.smoothing import smooth
from aqt_search.ptq.static_bounds import calibrate

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)


def random_variables(model, x, **kwargs):
    """Variables with random BatchNorms; some of their scales are negative, some zero."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **kwargs))

    def leaf(path, like):
        name, rng = jax.tree_util.keystr(path), np.random.default_rng(len(str(path)) + like.size)
        if "var" in name:
            value = rng.uniform(0.5, 2, like.shape)
        elif "scale" in name:
            value = rng.normal(size=like.shape) * (rng.random(like.shape) > 0.2)
        else:
            value = rng.normal(size=like.shape) / np.sqrt(max(1, like.size / like.shape[-1]))
        return jnp.asarray(value, like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def quietly(step, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedSite)
        return step(*args, **kwargs)


def assert_same_function(apply, before, after, x, tolerance=1e-4):
    expected, found = (np.asarray(jax.jit(apply)(v, x)) for v in (before, after))
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), before, after)
    assert all(jax.tree.leaves(same))


# --- BatchNorm folding ----------------------------------------------------------------------------

FOLDED = {
    "residual": resnet(8, 3, width=0.25),
    "depthwise": mobilenet_v2(3, width=0.1, form="tiny", dropout=0.0),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_keeps_the_function_and_leaves_unit_gains(name):
    model = FOLDED[name]
    apply = functools.partial(model.apply, train=False)
    variables = random_variables(model, IMAGES)
    folded = fold_batch_norm(apply, variables, IMAGES)
    assert_same_function(apply, variables, folded, IMAGES)
    leaves = jax.tree.leaves(folded)
    flows = dataflow(apply, variables, IMAGES)
    assert sum(flow.tail.has_gain for flow in flows.values()) >= 8
    for flow in flows.values():
        np.testing.assert_allclose(flow.tail.gain.value(leaves), 1, atol=1e-6)
    # One of them by hand.
    stats, params = variables["batch_stats"]["stem_bn"], variables["params"]
    gain = np.asarray(params["stem_bn"]["scale"] / np.sqrt(stats["var"] + 1e-5))
    new = folded["params"]
    np.testing.assert_allclose(
        new["stem"]["kernel"], params["stem"]["kernel"] * gain[None, None, None], rtol=1e-5
    )
    np.testing.assert_allclose(
        folded["batch_stats"]["stem_bn"]["mean"], stats["mean"] * gain, rtol=1e-5
    )
    np.testing.assert_array_equal(new["stem_bn"]["scale"], 1)
    np.testing.assert_array_equal(new["stem_bn"]["bias"], params["stem_bn"]["bias"])
    # Nothing is left to fold.
    again = fold_batch_norm(apply, folded, IMAGES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), folded, again)


class LooseNorm(nn.Module):
    """One BatchNorm in front of any site, one behind a relu, and one behind a product."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.Dense(4, name="a")(norm(name="input_norm")(x))
        x = norm(name="after_relu")(nn.relu(x))
        return norm(name="served")(nn.Dense(3, name="b")(x))


def test_batch_norms_without_a_site_are_named():
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    variables = random_variables(LooseNorm(), x)
    with pytest.warns(SkippedSite) as caught:
        folded = fold_batch_norm(LooseNorm().apply, variables, x)
    messages = sorted(str(w.message) for w in caught)
    assert len(messages) == 2
    assert "'batch_stats/after_relu/var'" in messages[0]
    assert "'batch_stats/input_norm/var'" in messages[1]
    assert_same_function(LooseNorm().apply, variables, folded, x)
    np.testing.assert_array_equal(folded["params"]["served"]["scale"], 1)
    assert folded["params"]["after_relu"] == variables["params"]["after_relu"]


# --- Equalization ---------------------------------------------------------------------------------


class Separable(nn.Module):
    """Dense, depthwise and pointwise convolutions, flattened into a head."""

    activation: object = nn.relu

    @nn.compact
    def __call__(self, x):
        f, conv = self.activation, functools.partial(nn.Conv, kernel_size=(3, 3))
        x = f(conv(8, name="dense")(x))
        x = f(conv(16, feature_group_count=8, name="depthwise")(x))  # two kernels a channel
        x = f(conv(12, feature_group_count=4, name="grouped")(x))
        x = nn.avg_pool(f(nn.Conv(6, (1, 1), name="pointwise")(x)), (2, 2), (2, 2))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def imbalanced(variables, decades=2.0):
    """The same function with channels of three layers up to a factor of 10 ** decades apart."""
    rng = np.random.default_rng(1)
    factors = {n: 10 ** rng.uniform(-decades, 0, c).astype(np.float32)
               for n, c in (("dense", 8), ("grouped", 12), ("pointwise", 6))}  # fmt: skip
    inputs = {
        "depthwise": np.repeat(factors["dense"], 2),  # [3, 3, 1, 16]
        "pointwise": factors["grouped"][:, None],  # [1, 1, 12, 6]
        "head": np.tile(factors["pointwise"], 16)[:, None],  # [96, 3]
    }

    def spread(name, layer):
        factor = factors.get(name, np.float32(1))
        shape = [1] * (layer["kernel"].ndim - 1) + [-1]
        kernel = np.asarray(layer["kernel"]) * np.reshape(factor, shape)
        divisor = inputs.get(name, np.ones(1, np.float32))
        kernel = kernel / divisor.reshape([1] * (kernel.ndim - divisor.ndim) + [*divisor.shape])
        return {"kernel": jnp.asarray(kernel), "bias": layer["bias"] * factor}

    return {"params": {n: spread(n, p) for n, p in variables["params"].items()}}


def input_ranges(kernel, groups, elements):
    """max|w| that every channel of the layer before is multiplied by, in a plain loop."""
    found = {}
    per_group, outputs = kernel.shape[-2:]
    for row, channel in enumerate(elements):
        group, place = divmod(row, per_group)
        share = outputs // groups
        part = kernel[..., place, group * share : (group + 1) * share]
        found[channel] = max(found.get(channel, 0), np.abs(part).max())
    return np.array([found[channel] for channel in sorted(found)])


def test_equalized_ranges_are_equal_and_the_function_is_kept():
    x, model = IMAGES, Separable()
    variables = imbalanced(random_variables(model, x))
    result = equalize(model.apply, variables, x, iterations=200)
    assert_same_function(model.apply, variables, result, x, 1e-5)
    kernels = {name: np.asarray(p["kernel"]) for name, p in result["params"].items()}
    layers = [("dense", 1, 3), ("depthwise", 8, 8), ("grouped", 4, 16), ("pointwise", 1, 12)]
    elements = [np.arange(8), np.arange(16), np.arange(12), np.tile(np.arange(6), 16)]
    following = [*layers[1:], ("head", 1, 96)]
    for (name, *_), (after, groups, _), channels in zip(layers, following, elements):
        outputs = np.abs(kernels[name]).reshape(-1, kernels[name].shape[-1]).max(0)
        inputs = input_ranges(kernels[after], groups, channels)
        np.testing.assert_allclose(outputs, inputs, rtol=5e-3)


def sqnr(reference, quantized):
    error = np.square(np.asarray(reference, np.float64) - quantized).mean()
    return 10 * np.log10(np.square(np.asarray(reference, np.float64)).mean() / error)


def test_equalization_rescues_one_scale_per_tensor():
    x, model = IMAGES, Separable()
    balanced = random_variables(model, x)
    variables = imbalanced(balanced)
    assert_same_function(model.apply, balanced, variables, x, 1e-5)
    per_tensor = aqs.Quantizer("int8", aqs.PER_TENSOR)
    assignment = aqs.assign(aqs.find_sites(model.apply, variables, x), [(".*", per_tensor)])
    quantized = jax.jit(aqs.quantize(model.apply))
    reference = jax.jit(model.apply)(variables, x)
    before, after, ideal = (
        sqnr(reference, quantized(assignment, v, x))
        for v in (variables, equalize(model.apply, variables, x), balanced)
    )
    # Two decades are worth up to 40 dB; half of it is far beyond chance.
    assert ideal > before + 15
    assert after > before + 15
    assert after > ideal - 3


def test_scales_of_one_pair():
    first, second = RNG.normal(size=(3, 4)), RNG.normal(size=(4, 2))
    first[:, 1] = 0  # a dead channel
    second[2] = 0  # one that nobody reads
    params = {"a": jnp.asarray(first, jnp.float32), "b": jnp.asarray(second, jnp.float32)}
    scales = equalization_scales(lambda p, x: (x @ p["a"]) @ p["b"], params, np.ones((1, 3)))
    r1, r2 = np.abs(first).max(0), np.abs(second).max(1)
    expected = np.ones(4)
    expected[[0, 3]] = np.sqrt(r1 * r2)[[0, 3]] / r2[[0, 3]]
    np.testing.assert_allclose(scales["a"], expected, rtol=1e-6)
    assert set(scales) == {"a"}


class Branches(nn.Module):
    """A residual branch, and a squeezed one."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(3, name="left")(x)) + x
        y = y * nn.sigmoid(nn.Dense(3, name="gate")(y))
        y = nn.Dense(4, name="twice")(y)
        return nn.Dense(2, name="one")(y) + nn.Dense(2, name="two")(y)


class Normed(nn.Module):
    """Dense, BatchNorm, Dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(4, name="first")(x))
        return nn.Dense(2, name="second")(x)


class SeveralAxes(nn.Module):
    """Heads: a kernel with several axes of outputs, and one with several of inputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="first")(x))
        x = nn.relu(nn.DenseGeneral((2, 3), name="split")(x))
        x = nn.relu(nn.DenseGeneral(4, axis=(-2, -1), name="merged")(x))
        return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize(
    "model, site, words",
    [
        (SeveralAxes(), "first", "next site 'split/kernel': its output channels are not a single"),
        (SeveralAxes(), "merged", "its inputs are several axes"),
        (Separable(nn.relu6), "grouped", "f.s x. = s f.x. does not hold.*relu6"),
        (Separable(nn.swish), "depthwise", "does not hold.*swish"),
        (Branches(), "left", "residual"),
        (Branches(), "gate", "multiplied by another value"),
        (Branches(), "twice", "one site, and enters 'one/kernel', 'two/kernel'"),
        (Normed(), "first", "not folded.*fold_batch_norm"),
    ],
)
def test_sites_that_are_not_equalized_are_named(model, site, words):
    x = IMAGES if isinstance(model, Separable) else IMAGES[:, 0, 0]
    variables = random_variables(model, x)
    with pytest.warns(SkippedSite) as caught:
        result = equalize(model.apply, variables, x)
    named = [str(w.message) for w in caught if f"'{site}/kernel' as it is" in str(w.message)]
    assert len(named) == 1
    assert re.search(words, named[0])
    assert not any("head/kernel' as" in str(w.message) for w in caught)
    assert_same_function(model.apply, variables, result, x, 1e-5)


# --- Bias correction ------------------------------------------------------------------------------


class Deep(nn.Module):
    """Gives what leaves each of its products' tails."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        first = norm(name="norm")(nn.Conv(4, (3, 3), use_bias=False, name="conv")(x))
        second = nn.Dense(5, name="dense")(nn.relu(first).reshape(x.shape[0], -1))
        return first, second, nn.Dense(3, use_bias=False, name="head")(nn.relu(second))


def test_corrected_products_have_their_float_means():
    rng = np.random.default_rng(4)
    batches = [rng.normal(1, 1, size=(n, 4, 4, 3)).astype(np.float32) for n in (6, 3)]
    variables = random_variables(Deep(), batches[0])
    scale = variables["params"]["norm"]["scale"]
    variables["params"]["norm"]["scale"] = jnp.where(scale == 0, 0.5, scale)
    apply = Deep().apply
    sites = aqs.find_sites(apply, variables, batches[0])
    rules = [(".*", {"weight": "int2", "activation": "int8"})]
    assignment, state = calibrate(apply, aqs.assign(sites, rules), variables, batches)
    with pytest.warns(SkippedSite, match="'head/kernel' as it is: no bias or mean"):
        corrected = correct_bias(apply, assignment, state, variables, batches)
    evaluate = jax.jit(aqs.quantize_with_state(apply).evaluate)
    x = np.concatenate(batches)
    float_outputs = jax.jit(apply)(variables, x)
    before, after = (evaluate(assignment, state, v, x) for v in (variables, corrected))
    for number, axes in enumerate([(0, 1, 2), (0,)]):
        expected, old, new = (
            np.asarray(o[number], np.float64).mean(axes) for o in (float_outputs, before, after)
        )
        assert np.abs(old - expected).max() > 0.01  # or there is nothing to correct
        np.testing.assert_allclose(new, expected, atol=1e-5)
    changed = [corrected["batch_stats"]["norm"]["mean"], corrected["params"]["dense"]["bias"]]
    kept = [variables["batch_stats"]["norm"]["mean"], variables["params"]["dense"]["bias"]]
    assert not any(np.allclose(a, b) for a, b in zip(changed, kept))
    jax.tree.map(
        np.testing.assert_array_equal,
        {n: p["kernel"] for n, p in variables["params"].items() if n != "norm"},
        {n: p["kernel"] for n, p in corrected["params"].items() if n != "norm"},
    )


# --- SmoothQuant ----------------------------------------------------------------------------------

TRANSFORMER = ViT(channels=16, heads=2, blocks=1, patch=4, num_classes=3)


def with_outliers(variables):
    """Two channels of both LayerNorms thirty times as large."""
    factor = jnp.ones(16).at[jnp.array([3, 9])].set(30.0)
    block = variables["params"]["block1"]
    norms = {n: {k: factor + 0.1 if k == "scale" else factor * 0.1 for k in ("scale", "bias")}
             for n in ("norm1", "norm2")}  # fmt: skip
    return {"params": variables["params"] | {"block1": block | norms}}


def test_smoothing_moves_outliers_and_keeps_the_function():
    apply = functools.partial(TRANSFORMER.apply, train=False)
    variables = with_outliers(random_variables(TRANSFORMER, IMAGES))
    with pytest.warns(SkippedSite) as caught:
        smoothed = smooth(apply, variables, [IMAGES[:2], IMAGES[2:]])
    skipped = {re.search("site '([^']*)'", str(w.message)).group(1) for w in caught}
    assert skipped == {"stem/kernel", "block1/out/kernel", "block1/down/kernel"}
    assert_same_function(apply, variables, smoothed, IMAGES, 1e-5)
    sites = aqs.find_sites(apply, variables, IMAGES)
    rules = [("block1/(query|key|value|up)/", {"activation": "int8"}), (".*", None)]
    assignment = aqs.assign(sites, rules)
    quantized, reference = jax.jit(aqs.quantize(apply)), jax.jit(apply)(variables, IMAGES)
    before, after = (sqnr(reference, quantized(assignment, v, IMAGES))
                     for v in (variables, smoothed))  # fmt: skip
    # Outliers thirty times too large take 30 dB of the other channels; the square root is moved.
    assert after > before + 5


def test_smoothing_follows_equation_4():
    x = RNG.normal(size=(7, 5, 4)).astype(np.float32)

    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm(name="norm")(x)
            return y, nn.Dense(3, name="a")(y) + nn.Dense(3, use_bias=False, name="b")(y)

    def apply(variables, x):
        return Pair().apply(variables, x)[1]

    variables = random_variables(Pair(), x)
    norm = variables["params"]["norm"]
    norm["scale"] = jnp.asarray([2.0, 0.5, -3.0, 0.0])
    norm["bias"] = jnp.asarray([0.1, 0.0, 1.0, 0.0])  # the last channel is dead
    smoothed = smooth(apply, variables, [x], strength=0.7)
    y = np.abs(np.asarray(Pair().apply(variables, x)[0])).reshape(-1, 4).max(0)
    kernels = [np.asarray(variables["params"][n]["kernel"]) for n in "ab"]
    w = np.max([np.abs(k).max(1) for k in kernels], axis=0)
    s = np.where(y > 0, y**0.7 / w**0.3, 1)
    new = smoothed["params"]
    np.testing.assert_allclose(new["norm"]["scale"], norm["scale"] / s, rtol=1e-5)
    np.testing.assert_allclose(new["norm"]["bias"], norm["bias"] / s, rtol=1e-5)
    for name, kernel in zip("ab", kernels):
        np.testing.assert_allclose(new[name]["kernel"], kernel * s[:, None], rtol=1e-5)


class ReadTwice(nn.Module):
    """A LayerNorm whose result is added to, as well."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm")(x)
        return y + nn.Dense(4, name="dense")(y)


def test_a_layer_norm_with_another_reader_is_left():
    x = RNG.normal(size=(7, 4)).astype(np.float32)
    variables = random_variables(ReadTwice(), x)
    with pytest.warns(SkippedSite, match="'dense/kernel' as it is: .*residual"):
        smoothed = smooth(ReadTwice().apply, variables, [x])
    jax.tree.map(np.testing.assert_array_equal, smoothed, variables)


class Attention(nn.Module):
    """Flax's own attention, whose kernels have an axis of heads, behind a LayerNorm."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(x)
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)


def test_kernels_with_heads_are_smoothed():
    """[inputs, heads, channels of a head]: equation 4 in float64, over all heads and kernels."""
    x = RNG.normal(size=(2, 5, 4)).astype(np.float32)
    variables = random_variables(Attention(), x)
    norm = variables["params"]["norm"] = {
        "scale": jnp.asarray([40.0, 0.5, -3.0, 0.0]), "bias": jnp.asarray([0.1, 0.0, 1.0, 0.0])
    }  # fmt: skip
    with pytest.warns(SkippedSite, match="'attention/out/kernel' as it is") as caught:
        smoothed = smooth(Attention().apply, variables, [x], strength=0.6)
    assert len(caught) == 1
    assert_same_function(Attention().apply, variables, smoothed, x, 1e-5)
    wide = x.astype(np.float64)
    normal = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    gain, bias = (np.asarray(norm[name], np.float64) for name in ("scale", "bias"))
    y = np.abs(normal * gain + bias).max((0, 1))
    before, after = (v["params"]["attention"] for v in (variables, smoothed))
    kernels = {n: np.asarray(before[n]["kernel"], np.float64) for n in ("query", "key", "value")}
    w = np.max([np.abs(k).max((1, 2)) for k in kernels.values()], axis=0)
    s = np.where(y > 0, y**0.6 / w**0.4, 1)
    for name, kernel in kernels.items():
        expected = kernel * s.reshape(4, 1, 1)
        np.testing.assert_allclose(after[name]["kernel"], expected, rtol=1e-5)
        np.testing.assert_array_equal(after[name]["bias"], before[name]["bias"])
    found = smoothed["params"]["norm"]
    np.testing.assert_allclose(found["scale"], gain / s, rtol=1e-5)
    np.testing.assert_allclose(found["bias"], bias / s, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after["out"], before["out"])


# --- Bad input ------------------------------------------------------------------------------------


def normed(**changes):
    variables = random_variables(Normed(), np.ones((2, 3)))
    flat = {"norm/var": ("batch_stats", "norm", "var"), "kernel": ("params", "first", "kernel")}
    for name, value in changes.items():
        collection, layer, leaf = flat[name.replace("_", "/")]
        old = variables[collection][layer][leaf]
        variables[collection][layer][leaf] = jnp.full_like(old, value)
    return variables


X = np.ones((2, 3), np.float32)
APPLY = Normed().apply


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fold_batch_norm(APPLY, normed(norm_var=-1.0), X), ["first/kernel", "norm/var"]),
        (lambda: fold_batch_norm(APPLY, normed(kernel=np.nan), X), ["first/kernel", "not finite"]),
        (lambda: equalize(APPLY, normed(), X, iterations=0), ["iteration", "0"]),
        (lambda: smooth(APPLY, normed(), []), ["no calibration data"]),
        (lambda: smooth(APPLY, normed(), [X], strength=1.5), ["strength", "1.5"]),
        (lambda: smooth(APPLY, normed(kernel=np.inf), [X]), ["not finite"]),
        (lambda: correct_bias(APPLY, {}, {}, normed(), []), ["no calibration data"]),
        (lambda: correct_first(normed(), [X[:1]]), ["first/kernel", "1 value", "at least 2"]),
        (lambda: correct_first(normed(), [X * np.nan]), ["first/kernel", "not finite"]),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(PTQError) as caught:
        quietly(call)
    assert all(word in str(caught.value) for word in words)


def correct_first(variables, batches):
    sites = aqs.find_sites(APPLY, variables, X)
    assignment = aqs.assign(sites, [("first", {"weight": "int4"}), (".*", None)])
    return correct_bias(APPLY, assignment, {}, variables, batches)
