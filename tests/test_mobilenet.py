"""MobileNets against published counts and against a float64 numpy forward pass."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import models
from aqt_search.costs import cost
from aqt_search.models.channels import round_channels
from aqt_search.models.mobilenet_v1 import MobileNetV1, mobilenet_v1
from aqt_search.models.mobilenet_v2 import MobileNetV2, Stage, blocks_of, mobilenet_v2
from aqt_search.models.mobilenet_v3 import Block, MobileNetV3, mobilenet_v3

PUBLISHED = {
    "v1": mobilenet_v1,
    "v2": mobilenet_v2,
    "v3-large": functools.partial(mobilenet_v3, "large"),
    "v3-small": functools.partial(mobilenet_v3, "small"),
}
BUILDERS = {**PUBLISHED, "v3-tiny": functools.partial(mobilenet_v3, "tiny")}
TINY = ("v2", "v3-tiny")
# Sooner compiled; both sides of an exact comparison use it, as bits may depend on it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def traced(name, form, width, size):
    """Shapes of the variables, and the sites at batch 1."""
    model = BUILDERS[name](1000 if form == "imagenet" else 10, form=form, width=width)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return variables, aqs.find_sites(model.apply, variables, images)


def parameter_count(name, form, width, size):
    leaves = jax.tree.leaves(traced(name, form, width, size)[0]["params"])
    return sum(math.prod(leaf.shape) for leaf in leaves)


def macs(name, form, width, size):
    return cost.total_macs(traced(name, form, width, size)[1])


# --- Published numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, width, millions",
    [
        # Howard et al. 2017 (arXiv 1704.04861), table 6.
        ("v1", 1.0, 569),
        ("v1", 0.75, 325),
        ("v1", 0.5, 149),
        ("v1", 0.25, 41),
        # TensorFlow model garden, slim/nets/mobilenet, README; 300 there at width 1 is 300.77.
        ("v2", 1.4, 582),
        ("v2", 1.0, 301),
        ("v2", 0.75, 209),
        ("v2", 0.5, 97),
        ("v3-large", 1.0, 217),
        ("v3-large", 0.75, 155),
        # torchvision, MobileNet_V3_Small_Weights: 0.057 GFLOPS. (The README counts an older net.)
        ("v3-small", 1.0, 57),
    ],
)
def test_macs_are_the_published_ones(name, width, millions):
    assert round(macs(name, "imagenet", width, 224) / 1e6) == millions


@pytest.mark.parametrize(
    "name, width, millions",
    [
        # timm, results/benchmark-infer-amp-nchw-pt291-cu128-4090.csv: all trainable parameters.
        ("v1", 1.0, 4.23),
        ("v2", 1.4, 6.11),
        ("v2", 1.0, 3.50),
        ("v2", 0.75, 2.64),
        ("v2", 0.5, 1.97),
        ("v3-large", 1.0, 5.48),
        ("v3-large", 0.75, 3.99),
        ("v3-small", 1.0, 2.54),
        ("v3-small", 0.75, 2.04),
    ],
)
def test_parameter_count_is_the_published_one(name, width, millions):
    assert round(parameter_count(name, "imagenet", width, 224) / 1e6, 2) == millions


# torchvision's documentation of the weights, num_params.
@pytest.mark.parametrize(
    "name, count", [("v2", 3_504_872), ("v3-large", 5_483_032), ("v3-small", 2_542_856)]
)
def test_parameter_count_at_width_1_is_exact(name, count):
    assert parameter_count(name, "imagenet", 1.0, 224) == count


def test_mobilenet_v1_parameters_by_hand():
    # Table 1 of the paper; a BatchNorm is 2 numbers a channel.
    channels = [32, 64, 128, 128, 256, 256, *6 * [512], 1024, 1024]
    expected = 9 * 3 * 32 + 2 * 32 + 1024 * 1000 + 1000
    for n_in, n_out in itertools.pairwise(channels):
        expected += (9 * n_in + 2 * n_in) + (n_in * n_out + 2 * n_out)
    assert expected == 4_231_976
    assert parameter_count("v1", "imagenet", 1.0, 224) == expected


def test_mobilenet_v2_under_uniform_formats():
    # The project's table of costs: 77.0 GBOPs in bf16, 19.25 in int8, 4.81 in int4.
    sites = traced("v2", "imagenet", 1.0, 224)[1]
    gbops = [
        float(cost.gbops(sites, aqs.assign(sites, [(".*", f)]))) for f in ("bf16", "int8", "int4")
    ]
    np.testing.assert_allclose(gbops, [77.0, 19.25, 4.81], atol=0.005)


# --- Structure ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels, expected",
    [
        # multiples stay; 12 is half way and goes up; 11 goes to 8, which loses too much
        *((8, 8), (32, 32), (12, 16), (11, 16), (44.8, 48), (18, 24), (33, 32), (19.2, 24)),
        *((0.1, 8), (3, 8), (134.4, 136), (8.8, 8)),
    ],
)
def test_round_channels(channels, expected):
    assert round_channels(channels) == expected


def test_round_channels_is_near_and_loses_at_most_a_tenth():
    for divisor in (1, 4, 8):
        for channels in np.arange(0.25, 400, 0.25):
            rounded = round_channels(float(channels), divisor)
            assert rounded % divisor == 0
            assert rounded >= 0.9 * channels
            assert abs(rounded - channels) < divisor


def block_sites(blocks, layers, without=()):
    names = {f"block{i}/{layer}" for i in range(1, blocks + 1) for layer in layers}
    return names - set(without)


MOBILE = ("expand", "depthwise", "project")
LARGE_SQUEEZED, SMALL_SQUEEZED = (4, 5, 6, *range(11, 16)), (1, *range(4, 12))
TINY_SQUEEZED = (4, 5, 6, 7)


def v3_sites(blocks, squeezed):
    gates = {f"block{i}/{layer}" for i in squeezed for layer in ("squeeze", "excite")}
    return block_sites(blocks, MOBILE, ["block1/expand"]) | gates | {"last", "hidden"}


@pytest.mark.parametrize(
    "name, form, body",
    [
        ("v1", "cifar", block_sites(13, ("depthwise", "pointwise"))),
        ("v2", "cifar", block_sites(17, MOBILE, ["block1/expand"]) | {"last"}),
        ("v2", "tiny", block_sites(7, MOBILE, ["block1/expand"]) | {"last"}),
        ("v3-large", "cifar", v3_sites(15, LARGE_SQUEEZED)),
        ("v3-small", "cifar", v3_sites(11, SMALL_SQUEEZED)),
        ("v3-tiny", "tiny", v3_sites(7, TINY_SQUEEZED)),
    ],
)
@pytest.mark.parametrize("width", [0.25, 1.0])
def test_sites_are_the_documented_ones_at_every_width(name, form, body, width):
    variables, sites = traced(name, form, width, 32)
    assert set(sites) == {f"{layer}/kernel" for layer in body | {"stem", "head"}}
    statistics = jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
    assert all(path[-2].key.endswith("_bn") for path, _ in statistics)
    assert sites["head/kernel"].rhs_shape[1] == 10


@pytest.mark.parametrize(
    "name, form, size, out",
    [
        *((name, "cifar", 32, 4) for name in PUBLISHED),
        *((name, "imagenet", 224, 7) for name in PUBLISHED),
        *((name, "tiny", 16, 4) for name in TINY),
        *((name, "tiny", 32, 8) for name in TINY),
    ],
)
def test_forms_shrink_the_image_as_documented(name, form, size, out):
    sites = traced(name, form, 1.0, size)[1]
    last = sites["block13/pointwise/kernel" if name == "v1" else "last/kernel"]
    assert last.lhs_shape[:3] == (1, out, out)


@pytest.mark.parametrize(
    "name, form",
    [*((name, "cifar") for name in PUBLISHED), *((name, "tiny") for name in TINY)],
)
def test_a_wider_net_costs_more(name, form):
    assert macs(name, form, 0.25, 32) < macs(name, form, 1.0, 32)
    assert parameter_count(name, form, 0.25, 32) < parameter_count(name, form, 1.0, 32)


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_form_by_hand(name):
    # (input, expansion, output, stride) of the blocks at width 1; a 16 x 16 image of 3 channels,
    # which the stem halves. Of MobileNetV3 windows of 5, and squeeze and excitation of the last 4.
    table = [(16, 1, 16, 1), (16, 6, 24, 1), (24, 6, 24, 1), (24, 6, 32, 2), (32, 6, 32, 1)]
    table += [(32, 6, 64, 1), (64, 6, 64, 1)]
    side, expected = 8, 8 * 8 * 9 * 3 * 16
    window, squeezed = (9, ()) if name == "v2" else (25, (40, 48, 48, 96))
    for number, (n_in, expansion, n_out, stride) in enumerate(table):
        hidden = n_in * expansion
        expected += side * side * n_in * hidden if expansion > 1 else 0
        side //= stride
        expected += side * side * (window * hidden + hidden * n_out)
        if squeezed and number > 2:
            expected += 2 * hidden * squeezed[number - 3]
    assert side == 4
    if name == "v2":
        expected += 4 * 4 * 64 * 256 + 256 * 10
    else:
        expected += 4 * 4 * 64 * 384 + 384 * 256 + 256 * 10
    assert macs(name, "tiny", 1.0, 16) == expected


def test_sites_after_a_relu_are_known_to_be_non_negative():
    def known(name):
        sites = traced(name, "cifar", 0.25, 32)[1]
        return {site.rsplit("/", 1)[0] for site in sites if sites[site].lhs.nonnegative}

    v1 = block_sites(13, ("depthwise", "pointwise"))
    assert known("v1") == v1 | {"head"}
    v2 = block_sites(17, ("depthwise", "project"))
    assert known("v2") == v2 | {"head"}


# --- Values ---------------------------------------------------------------------------------------


def small(version, **fields):
    """All that a network of the version can have, in few and narrow blocks: soon compiled."""
    if version == "v1":
        return MobileNetV1((8, 12), (1, 1, 2), 4, 10, **fields)
    if version == "v2":
        blocks = blocks_of((Stage(1, 6, 1, 1), Stage(3, 8, 2, 2)), 4)
        return MobileNetV2(blocks, 4, 1, 12, 10, **fields)
    blocks = (Block(3, 4, 6, False, False, 2), Block(5, 12, 6, True, True, 1))
    return MobileNetV3(blocks, 4, 2, 12, 14, 10, **fields)


VERSIONS = ("v1", "v2", "v3")


@functools.cache
def drawn(version):
    """Random variables of a small net, none at its initial value, and images."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(8, 8, 8, 3)), jnp.float32)
    shapes = jax.eval_shape(small(version).init, jax.random.key(0), images)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":  # keeps the size of activations
            value = rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
        elif kind in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.uniform(-0.2, 0.2, leaf.shape)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes), images


class Reference:
    """The layers in float64 numpy, in evaluation."""

    def __init__(self, variables, epsilon):
        as_float64 = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
        self.params, self.stats = as_float64["params"], as_float64["batch_stats"]
        self.epsilon = epsilon

    def conv(self, x, *path, stride=1, activation=None):
        """Convolution and BatchNorm; depthwise if its kernel has one input channel."""
        params, stats = self.params, self.stats
        for name in path[:-1]:
            params, stats = params[name], stats[name]
        kernel = params[path[-1]]["kernel"]
        window = kernel.shape[0]
        x = np.pad(x, ((0, 0), *2 * ((window // 2, window // 2),), (0, 0)))
        x = np.lib.stride_tricks.sliding_window_view(x, (window, window), axis=(1, 2))
        x = x[:, ::stride, ::stride]
        if path[-1] == "depthwise":
            x = np.einsum("bhwcij,ijc->bhwc", x, kernel[:, :, 0])
        else:
            x = np.einsum("bhwcij,ijco->bhwo", x, kernel)
        norm, moments = params[f"{path[-1]}_bn"], stats[f"{path[-1]}_bn"]
        x = (x - moments["mean"]) / np.sqrt(moments["var"] + self.epsilon)
        x = x * norm["scale"] + norm["bias"]
        return activation(x) if activation else x

    def dense(self, x, *path):
        params = functools.reduce(lambda p, name: p[name], path, self.params)
        return x @ params["kernel"] + params["bias"]

    def residual(self, x, name, stride, activation, gated=False):
        """An inverted residual block, gated by squeeze and excitation or not."""
        inputs = x
        if "expand" in self.params[name]:
            x = self.conv(x, name, "expand", activation=activation)
        x = self.conv(x, name, "depthwise", stride=stride, activation=activation)
        if gated:
            gate = np.maximum(self.dense(x.mean((1, 2), keepdims=True), name, "squeeze"), 0)
            x = x * np.clip((self.dense(gate, name, "excite") + 3) / 6, 0, 1)
        x = self.conv(x, name, "project")
        return x + inputs if x.shape == inputs.shape else x


def relu6(x):
    return np.clip(x, 0, 6)


def hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def reference_logits(version, variables, images, relu6=relu6):
    net = Reference(variables, 1e-3 if version == "v3" else 1e-5)
    x = np.asarray(images, np.float64)
    if version == "v1":
        x = net.conv(x, "stem", activation=relu6)
        for name, stride in (("block1", 1), ("block2", 2)):
            x = net.conv(x, name, "depthwise", stride=stride, activation=relu6)
            x = net.conv(x, name, "pointwise", activation=relu6)
    elif version == "v2":
        x = net.conv(x, "stem", activation=relu6)
        for name, stride in (("block1", 1), ("block2", 2), ("block3", 1)):
            x = net.residual(x, name, stride, relu6)
        x = net.conv(x, "last", activation=relu6)
    else:
        x = net.conv(x, "stem", stride=2, activation=hard_swish)
        x = net.residual(x, "block1", 2, lambda x: np.maximum(x, 0))
        x = net.residual(x, "block2", 1, hard_swish, gated=True)
        x = net.conv(x, "last", activation=hard_swish)
        return net.dense(hard_swish(net.dense(x.mean((1, 2)), "hidden")), "head")
    return net.dense(x.mean((1, 2)), "head")


@pytest.mark.parametrize("version", VERSIONS)
def test_forward_is_that_of_numpy_and_quantize_without_formats_is_the_identity(version):
    model = small(version)
    variables, images = drawn(version)
    logits = jit(model.apply)(variables, images)
    assert (logits.shape, logits.dtype) == ((8, 10), jnp.float32)
    # Float32 sums of at most 300 terms, through ten layers.
    expected = reference_logits(version, variables, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    identity = jit(functools.partial(aqs.quantize(model.apply), {}))(variables, images)
    np.testing.assert_array_equal(identity, logits)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_relu_may_take_the_place_of_relu6(version):
    variables, images = drawn(version)
    images = 30 * images
    logits = jit(small(version, activation="relu").apply)(variables, images)
    expected = reference_logits(version, variables, images, lambda x: np.maximum(x, 0))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * scale)
    assert np.abs(expected - reference_logits(version, variables, images)).max() > 0.01 * scale
    with pytest.raises(ValueError, match="swish"):
        models.build(f"mobilenet_{version}", 10, activation="swish")


@pytest.mark.parametrize("version", VERSIONS)
def test_training_moves_statistics_and_gives_gradients_to_all_parameters(version):
    model = small(version, dropout=0.5)
    variables, images = drawn(version)

    @jit
    def step(params, key):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params},
                images, train=True, mutable=["batch_stats"], rngs={"dropout": key},
            )  # fmt: skip
            return jnp.sum(jnp.sin(logits)), (logits, updates["batch_stats"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (logits, stats)), gradients = step(variables["params"], jax.random.key(0))
    for old, new in zip(jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(stats)):
        assert np.all(np.isfinite(new))
        assert np.all(old != new)
    for gradient in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient != 0)
    (_, (again, _)), _ = step(variables["params"], jax.random.key(0))
    (_, (other, _)), _ = step(variables["params"], jax.random.key(1))
    np.testing.assert_array_equal(logits, again)
    assert np.any(logits != other)  # equal with probability 2 ** -(8 * 12) or less


def training_statistics(version, images, **fields):
    model = small(version, **fields)
    return model.apply(drawn(version)[0], images, train=True, mutable=["batch_stats"])[1]


def test_statistics_are_those_of_the_whole_batch_under_an_axis_name():
    images = drawn("v1")[1]
    whole = jit(functools.partial(training_statistics, "v1"))(images)
    half = functools.partial(training_statistics, "v1", axis_name="batch")
    halves = jit(jax.vmap(half, axis_name="batch"))(images.reshape(2, 4, 8, 8, 3))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(jnp.stack([a, a]), b, rtol=1e-4, atol=1e-5),
        whole, halves,
    )  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_an_axis_name_is_that_of_a_mapped_axis(version):
    statistics = functools.partial(training_statistics, version, axis_name="replicas")
    with pytest.raises(NameError, match="replicas"):
        jax.eval_shape(statistics, drawn(version)[1])


@pytest.mark.parametrize("version", VERSIONS)
def test_dtype_is_that_of_convolutions_and_not_of_parameters_or_logits(version):
    model = small(version, dtype=jnp.bfloat16)
    images = drawn(version)[1]
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    sites = aqs.find_sites(model.apply, variables, images)
    in_float32 = {site for site in sites if sites[site].lhs.dtype == jnp.float32}
    assert in_float32 == {"head/kernel"}
    logits = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape, logits.dtype) == ((8, 10), jnp.float32)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: mobilenet_v1(10, form="tiny"), ["V1", "'tiny'", "imagenet, cifar"]),
        (lambda: mobilenet_v2(10, form="small"), ["V2", "'small'", "imagenet, cifar, tiny"]),
        (lambda: mobilenet_v3("large", 10, form="tiny"), ["V3", "'tiny'", "imagenet, cifar"]),
        (lambda: mobilenet_v3("medium", 10), ["'medium'", "large, small"]),
        (lambda: round_channels(float("inf")), ["inf", "above 0"]),
        (lambda: round_channels(0.0), ["0.0", "above 0"]),
        (lambda: round_channels(8, 0), ["divisor", "0"]),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_classes": 0}, ["num_classes", "0"]),
        ({"width": 0.0}, ["width", "0.0"]),
        ({"width": float("nan")}, ["width", "nan"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
    ],
)
def test_values_out_of_range_are_named(name, options, words):
    with pytest.raises(ValueError) as error:
        BUILDERS[name](**{"num_classes": 10, **options})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_single_image_without_a_batch_axis_is_refused(version):
    with pytest.raises(ValueError, match=r"\(32, 32, 3\).*Add a batch axis"):
        jax.eval_shape(small(version).init, jax.random.key(0), jnp.zeros((32, 32, 3)))
