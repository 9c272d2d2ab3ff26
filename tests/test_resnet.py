import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex_core

from aqt_search.models import MODELS, build
from aqt_search.models.resnet import ResidualBlock, ResNet, resnet


def abstract_variables(model, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def small_resnet(**fields):
    """Two blocks, the second with a shortcut convolution: soon compiled."""
    return ResNet((1, 1), (4, 8), stem_filters=4, num_classes=10, **fields)


def parameter_count(model, size):
    leaves = jax.tree.leaves(abstract_variables(model, size)["params"])
    return sum(math.prod(leaf.shape) for leaf in leaves)


def equations(jaxpr, names):
    """All equations of the named primitives, in sub-jaxprs too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in names:
            found.append(eqn)
        for value in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda v: isinstance(v, (jex_core.Jaxpr, jex_core.ClosedJaxpr)),
        ):
            if isinstance(value, jex_core.ClosedJaxpr):
                found += equations(value.jaxpr, names)
            elif isinstance(value, jex_core.Jaxpr):
                found += equations(value, names)
    return found


def forward_equations(model, size, names):
    variables = abstract_variables(model, size)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return equations(jax.make_jaxpr(model.apply)(variables, images).jaxpr, names)


# Published counts in millions: torchvision's model table; He et al. 2015, table 6 (CIFAR).
@pytest.mark.parametrize(
    "form, depth, classes, millions, decimals",
    [
        ("imagenet", 18, 1000, 11.69, 2),
        ("imagenet", 34, 1000, 21.80, 2),
        ("imagenet", 50, 1000, 25.557, 3),
        ("imagenet", 101, 1000, 44.549, 3),
        ("imagenet", 152, 1000, 60.193, 3),
        ("cifar", 20, 10, 0.27, 2),
        ("cifar", 32, 10, 0.47, 2),
        ("cifar", 56, 10, 0.86, 2),
    ],
)
def test_parameter_count_is_the_published_one(form, depth, classes, millions, decimals):
    count = parameter_count(resnet(depth, classes, form=form), 224 if form == "imagenet" else 32)
    assert round(count / 1e6, decimals) == millions


def test_resnet8_parameter_count_by_hand():
    # stem, three blocks of two convolutions, two 1x1 shortcuts; a BatchNorm is 2 numbers a channel
    def conv(window, n_in, n_out):
        return window * window * n_in * n_out + 2 * n_out

    expected = conv(3, 3, 16) + 2 * conv(3, 16, 16)
    expected += conv(3, 16, 32) + conv(3, 32, 32) + conv(1, 16, 32)
    expected += conv(3, 32, 64) + conv(3, 64, 64) + conv(1, 32, 64)
    assert parameter_count(resnet(8, 10), 32) == expected + 64 * 10 + 10


def test_resnet50_cost_facts():
    layers = forward_equations(
        resnet(50, 1000, form="imagenet"), 224, ("conv_general_dilated", "dot_general")
    )
    names = [eqn.primitive.name for eqn in layers]
    assert names.count("conv_general_dilated") == 53
    assert names.count("dot_general") == 1
    # every output number takes as many MACs as the kernel has numbers per output channel
    macs, weights = 0, 0
    for eqn in layers:
        kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
        macs += math.prod(out) * math.prod(kernel[:-1])
        weights += math.prod(kernel)
    assert macs == 4_089_184_256
    assert weights == 25_502_912


def test_module_names_are_the_documented_ones():
    params = abstract_variables(resnet(8, 10), 32)["params"]
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    kernels = {"/".join(k.key for k in path) for path, leaf in flat if leaf.ndim >= 2}
    assert kernels == {
        "stem/kernel",
        "stage1_block1/conv1/kernel",
        "stage1_block1/conv2/kernel",
        *(f"stage{i}_block1/{c}/kernel" for i in (2, 3) for c in ("conv1", "conv2", "shortcut")),
        "head/kernel",
    }
    assert {path[-1].key for path, _ in flat if path[0].key == "stem"} == {"kernel"}


def test_v1_5_has_its_stride_in_the_3x3_convolution():
    convs = forward_equations(resnet(50, 10, form="imagenet"), 64, ("conv_general_dilated",))
    strided = [e.invars[1].aval.shape[:2] for e in convs if e.params["window_strides"] == (2, 2)]
    # the stem, and a 3x3 and a 1x1 shortcut in each of the last three stages
    assert sorted(strided) == sorted([(7, 7)] + 3 * [(3, 3), (1, 1)])


@pytest.mark.parametrize(
    "form, stem, head", [("cifar", 8, 32), ("imagenet", 64, 256)], ids=["cifar", "imagenet"]
)
def test_width_multiplier(form, stem, head):
    depth = 8 if form == "cifar" else 18
    params = abstract_variables(resnet(depth, 10, width=0.5, form=form), 32)["params"]
    assert params["stem"]["kernel"].shape[-1] == stem
    assert params["head"]["kernel"].shape == (head, 10)


@pytest.mark.parametrize("bottleneck, out", [(False, 4), (True, 16)])
@pytest.mark.parametrize("stride", [1, 2])
def test_block_is_its_shortcut_at_initialisation(bottleneck, out, stride):
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    block = ResidualBlock(4, stride, bottleneck, jnp.float32, norm)
    channels = out if stride == 1 else 3
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, channels))
    variables = jax.jit(block.init)(jax.random.key(0), x)
    if stride == 1:
        assert "shortcut" not in variables["params"]
        expected = np.asarray(x)
    else:
        # 1x1 stride 2 by hand; running mean 0, variance 1, epsilon 1e-5
        kernel = np.asarray(variables["params"]["shortcut"]["kernel"])[0, 0]
        expected = np.asarray(x)[:, ::2, ::2] @ kernel / np.sqrt(1 + 1e-5)
    y = jax.jit(block.apply)(variables, x)
    np.testing.assert_allclose(y, np.maximum(expected, 0), rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_state():
    model = resnet(8, 10, dtype=jnp.bfloat16)
    convs = forward_equations(model, 16, ("conv_general_dilated",))
    assert len(convs) == 9
    assert all(v.aval.dtype == jnp.bfloat16 for e in convs for v in (*e.invars, *e.outvars))
    variables = abstract_variables(model, 16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, updates = jax.eval_shape(apply, variables, images)
    assert logits.shape == (2, 10)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))


def test_training_moves_the_running_statistics_by_the_momentum():
    model = small_resnet(momentum=0.75)
    images = 3.0 + jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updates = apply(variables, images)
    stem = jax.lax.conv_general_dilated(
        images,
        variables["params"]["stem"]["kernel"],
        (1, 1),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    stem = np.asarray(stem, np.float64)
    stats = updates["batch_stats"]["stem_bn"]
    np.testing.assert_allclose(stats["mean"], 0.25 * stem.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * stem.var((0, 1, 2)), rtol=1e-4)
    # evaluation leaves them alone
    evaluate = jax.jit(functools.partial(model.apply, train=False, mutable=["batch_stats"]))
    _, unchanged = evaluate(variables, images)
    jax.tree.map(np.testing.assert_array_equal, unchanged["batch_stats"], variables["batch_stats"])


def test_statistics_are_those_of_the_whole_batch_under_an_axis_name():
    images = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    whole = small_resnet()
    variables = jax.jit(whole.init)(jax.random.key(1), images)
    one = functools.partial(whole.apply, train=True, mutable=["batch_stats"])
    split = small_resnet(axis_name="batch")
    many = functools.partial(split.apply, train=True, mutable=["batch_stats"])
    logits, stats = jax.jit(one)(variables, images)
    mapped = jax.jit(jax.vmap(many, in_axes=(None, 0), axis_name="batch"))
    logits2, stats2 = mapped(variables, images.reshape(2, 4, 8, 8, 3))
    np.testing.assert_allclose(logits2.reshape(8, 10), logits, rtol=1e-3, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, jnp.stack([b, b]), rtol=1e-4, atol=1e-5),
        stats2,
        stats,
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: resnet(18, 10), ["18", "8, 20, 32, 56", "18, 29, 34, 50, 101, 152, 200"]),
        (lambda: resnet(20, 10, form="imagenet"), ["20", "18, 29, 34, 50, 101, 152, 200"]),
        (lambda: resnet(20, 10, form="cifar10"), ["cifar10", "cifar, imagenet"]),
        (lambda: resnet(20, 10, width=0.0), ["width", "0.0"]),
        (lambda: resnet(20, 10, width=float("nan")), ["width", "nan"]),
        (lambda: resnet(20, 0), ["num_classes", "0"]),
        (
            lambda: resnet(8, 10).init(jax.random.key(0), jnp.zeros((32, 32, 3))),
            ["(32, 32, 3)", "batch"],
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


# --- The zoo by name ------------------------------------------------------------------------------

FORMS = {
    "inception_v3": "imagenet",
    "mobilenet_v3_tiny": "tiny",
    "vit_tiny": "cifar",
    "deit_tiny": "cifar",
}


@pytest.mark.parametrize("name", MODELS)
def test_every_name_builds_a_network_of_the_width_asked_for(name):
    depth = name.removeprefix("resnet")
    form = "cifar" if depth in ("8", "20", "32", "56") else FORMS.get(name, "imagenet")
    model = build(name, 7, form=form, width=0.5, dtype=jnp.bfloat16, axis_name="batch")
    assert model.num_classes == 7
    assert model.dtype == jnp.bfloat16
    assert getattr(model, "axis_name", "batch") == "batch"  # transformers have no such statistics
    assert model != build(name, 7, form=form, width=1.0, dtype=jnp.bfloat16, axis_name="batch")


def test_the_resnet_of_the_pareto_paper():
    """29 layers: a stem, nine bottlenecks of three, and the classifier (arXiv 2105.03536)."""
    assert sum(resnet(29, 10, form="imagenet").stage_sizes) * 3 + 2 == 29
    assert sum(resnet(200, 10, form="imagenet").stage_sizes) * 3 + 2 == 200


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"'resnet9'.*resnet8.*mobilenet_v2.*deit_s"):
        build("resnet9", 10)
    with pytest.raises(TypeError, match="depth"):
        build("mobilenet_v2", 10, depth=3)
