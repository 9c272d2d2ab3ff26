"""EfficientNet against published counts and a float64 forward pass of its block."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.models.efficientnet import EfficientNet, InvertedResidual, Stage, efficientnet
from aqt_search.models.stochastic_depth import StochasticDepth


@functools.cache
def variables_and_sites(model, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return variables, aqs.find_sites(model.apply, variables, images)


def small_model(**fields):
    """Two blocks: one with stride and without expansion, one with a shortcut."""
    stages = (Stage(1, 1, 3, 2, 4), Stage(1, 2, 3, 1, 4))
    return EfficientNet(stages, 4, 1, 8, num_classes=3, **fields)


def small_images():
    return np.random.default_rng(7).standard_normal((4, 6, 6, 3), np.float32)


def filled(shapes):
    """Variables uniform in [0.1, 1]: no zero hides a mistake, and variances are positive."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.1 + 0.9 * rng.random(leaf.shape)).astype(np.float32), shapes
    )


def small_variables():
    return filled(variables_and_sites(small_model(), 6)[0])


def recorded(kind, call):
    """The modules of a kind that a call runs."""
    found = []

    def record(run, args, kwargs, context):
        if isinstance(context.module, kind) and context.method_name == "__call__":
            found.append(context.module)
        return run(*args, **kwargs)

    with nn.intercept_methods(record):
        call()
    return found


# --- Published numbers ----------------------------------------------------------------------------


# torchvision's model table: parameters, and billion MACs at the resolution its weights are for.
@pytest.mark.parametrize(
    "variant, parameters, size, billion_macs",
    [
        ("b0", 5_288_548, 224, 0.39),
        ("b1", 7_794_184, 240, 0.69),
        ("b2", 9_109_994, 288, 1.09),
        ("b3", 12_233_232, 300, 1.83),
        ("b4", 19_341_616, 380, 4.39),
    ],
)
def test_counts_are_the_published_ones(variant, parameters, size, billion_macs):
    variables, sites = variables_and_sites(efficientnet(variant, 1000), size)
    leaves = jax.tree.leaves(variables["params"])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters
    assert round(aqs.cost.total_macs(sites) / 1e9, 2) == billion_macs


# FLIQS (arXiv 2308.03290) leaves squeeze and excitation out: 0.6 of 385.8 million MACs.
@pytest.mark.parametrize("name, gbops", [("bf16", 98.61), ("e4m3", 24.65), ("e2m1", 6.16)])
def test_b0_costs_what_fliqs_counts_without_squeeze_and_excitation(name, gbops):
    _, sites = variables_and_sites(efficientnet("b0", 1000), 224)
    inner = {n: site for n, site in sites.items() if "squeeze" in n or "excite" in n}
    outer = {n: site for n, site in sites.items() if n not in inner}
    assert len(inner) == 2 * 16
    assert round(aqs.cost.gbops(outer, aqs.assign(outer, [(".*", name)])), 2) == gbops
    # Both layers of a block have as many MACs as weights.
    assert aqs.cost.total_macs(inner) == sum(site.weight.size for site in inner.values()) == 627_200


def test_site_names_are_the_documented_ones():
    _, sites = variables_and_sites(efficientnet("b0", 10, form="cifar"), 32)
    assert not any(site.refused for site in sites.values())
    layers = ("expand", "depthwise", "squeeze", "excite", "project")
    assert list(sites) == [
        "stem/kernel",
        *(f"block1/{layer}/kernel" for layer in layers[1:]),
        *(f"block{i}/{layer}/kernel" for i in range(2, 17) for layer in layers),
        "last/kernel",
        "head/kernel",
    ]


@pytest.mark.parametrize(
    "form, size, sides",
    [
        ("imagenet", 224, [112, 56, 28, 14, 14, 7, 7]),
        ("cifar", 32, [32, 32, 16, 8, 8, 4, 4]),
    ],
)
def test_forms_shrink_the_image(form, size, sides):
    _, sites = variables_and_sites(efficientnet("b0", 10, form=form), size)
    ends = np.cumsum([1, 2, 2, 3, 3, 4, 1])
    inputs = [sites[f"block{i}/project/kernel"].lhs_shape for i in ends]
    assert [(shape[1], shape[2]) for shape in inputs] == [(side, side) for side in sides]


@pytest.mark.parametrize(
    "variant, width, stem, last, channels, dropout",
    [
        ("b0", 0.5, 16, 640, (8, 16, 24, 40, 56, 96, 160), 0.2),
        ("b4", 1.0, 48, 1792, (24, 32, 56, 112, 160, 272, 448), 0.4),
    ],
)
def test_channels(variant, width, stem, last, channels, dropout):
    model = efficientnet(variant, 10, width=width)
    assert (model.stem_channels, model.last_channels, model.dropout) == (stem, last, dropout)
    assert tuple(stage.channels for stage in model.stages) == channels
    assert efficientnet(variant, 10, dropout=0.0).dropout == 0


# --- The forward pass -----------------------------------------------------------------------------


def reference_block(variables, x, stage):
    """An inverted residual block in float64 numpy, on [height, width, channels], in evaluation."""
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, stats = variables["params"], variables["batch_stats"]

    def norm(name, x):
        p, s = params[name], stats[name]
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-3) * p["scale"] + p["bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    h = x
    if stage.expansion > 1:
        h = norm("expand_bn", h @ params["expand"]["kernel"][0, 0])
        h = h * sigmoid(h)
    side = (stage.window - 1) // 2
    padded = np.pad(h, ((side, side), (side, side), (0, 0)))
    kernel = params["depthwise"]["kernel"][:, :, 0]
    rows, columns = (range(0, size, stage.stride) for size in h.shape[:2])
    h = np.array([
        [(padded[i : i + stage.window, j : j + stage.window] * kernel).sum((0, 1)) for j in columns]
        for i in rows
    ])  # fmt: skip
    h = norm("depthwise_bn", h)
    h = h * sigmoid(h)
    squeezed = dense("squeeze", h.mean((0, 1)))
    h = h * sigmoid(dense("excite", squeezed * sigmoid(squeezed)))
    y = norm("project_bn", h @ params["project"]["kernel"][0, 0])
    return x + y if x.shape == y.shape else y


@pytest.mark.parametrize(
    "stage",
    [Stage(1, 1, 3, 1, 8), Stage(1, 2, 5, 1, 8), Stage(1, 3, 3, 2, 4), Stage(1, 2, 3, 1, 4)],
    ids=["no expansion", "shortcut", "stride", "channels"],
)
def test_block_is_that_of_a_float64_reference(stage):
    norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3)
    block = InvertedResidual(stage, 0.5, jnp.float32, norm)
    images = np.random.default_rng(1).standard_normal((2, 5, 6, 8), np.float32)
    variables = filled(jax.eval_shape(block.init, jax.random.key(0), images))
    squeezed = variables["params"]["squeeze"]["kernel"].shape
    assert squeezed == (8 * stage.expansion, 2)  # a quarter of the block's input
    out = jax.jit(block.apply)(variables, images)
    expected = np.stack([reference_block(variables, image, stage) for image in images])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_and_statistics_move():
    variables, images = small_variables(), small_images()

    def loss(params):
        tree = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, updates = small_model().apply(tree, images, train=True, mutable=["batch_stats"])
        return jnp.sum(logits**2), updates["batch_stats"]

    gradients, stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    gradients = jax.device_get(gradients)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    for new, old in zip(jax.tree.leaves(stats), jax.tree.leaves(variables["batch_stats"])):
        assert np.all(new != old)


def test_an_empty_assignment_changes_nothing():
    model = small_model(stochastic_depth=0.5, dropout=0.2)
    keywords = {
        "train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(3)},
    }  # fmt: skip
    apply = jax.jit(functools.partial(model.apply, **keywords))
    quantized = jax.jit(functools.partial(aqs.quantize(model.apply), **keywords))
    expected = apply(small_variables(), small_images())
    out = quantized({}, small_variables(), small_images())
    jax.tree.map(np.testing.assert_array_equal, out, expected)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_state():
    variables, sites = variables_and_sites(small_model(dtype=jnp.bfloat16), 6)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    for name, site in sites.items():
        expected = jnp.float32 if name == "head/kernel" else jnp.bfloat16
        assert site.lhs.dtype == site.rhs.dtype == expected, name


# --- Stochastic depth and BatchNorm's fields ------------------------------------------------------


def test_stochastic_depth_where_there_is_a_shortcut():
    def init():
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        jax.eval_shape(efficientnet("b0", 10).init, jax.random.key(0), images)

    rates = [module.rate for module in recorded(StochasticDepth, init)]
    # The first of each stage's 1, 2, 2, 3, 3, 4, 1 blocks has none.
    shortcuts = [2, 4, 6, 7, 9, 10, 12, 13, 14]
    np.testing.assert_allclose(rates, [0.2 * i / 16 for i in shortcuts], atol=1e-12)


def test_a_left_out_branch_leaves_the_shortcut():
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    # Left out of four examples but once in 10^5 seeds.
    block = InvertedResidual(Stage(1, 2, 3, 1, 4), 1 - 1e-6, jnp.float32, norm)
    images = np.random.default_rng(0).standard_normal((4, 3, 3, 4), np.float32)
    variables = filled(jax.eval_shape(block.init, jax.random.key(0), images))
    train = jax.jit(functools.partial(block.apply, train=True))
    out = train(variables, images, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(out, images)
    assert np.any(np.asarray(jax.jit(block.apply)(variables, images)) != images)


def test_every_batch_norm_has_the_fields_of_the_model():
    model = small_model(axis_name="batch", momentum=0.8)
    shapes = variables_and_sites(small_model(), 6)[0]

    def trace(train):
        apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
        images = jax.ShapeDtypeStruct((2, 4, 6, 6, 3), jnp.float32)
        jax.eval_shape(jax.vmap(apply, in_axes=(None, 0), axis_name="batch"), shapes, images)

    for train in (True, False):
        norms = recorded(nn.BatchNorm, functools.partial(trace, train))
        assert len(norms) == 1 + 2 + 3 + 1
        fields = {(n.axis_name, n.momentum, n.epsilon, n.use_running_average) for n in norms}
        assert fields == {("batch", 0.8, 1e-3, not train)}


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: efficientnet("b5", 10), ["b5", "b0, b1, b2, b3, b4"]),
        (lambda: efficientnet(0, 10), ["0", "b0, b1"]),
        (lambda: efficientnet("b0", 10, form="cifar10"), ["cifar10", "imagenet, cifar"]),
        (lambda: efficientnet("b0", 10, width=-1.0), ["width", "-1.0"]),
        (lambda: efficientnet("b0", 0), ["num_classes", "0"]),
        (lambda: efficientnet("b0", 10, dropout=1.5), ["dropout", "1.5"]),
        (lambda: efficientnet("b0", 10, stochastic_depth=1.0), ["stochastic_depth", "1.0"]),
        (
            lambda: small_model().init(jax.random.key(0), jnp.zeros((6, 6, 3))),
            ["(6, 6, 3)", "batch"],
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
