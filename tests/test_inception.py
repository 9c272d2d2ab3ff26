"""Inception v3 against published counts and a float64 forward pass of its blocks."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.models.inception_v3 import Branch, InceptionV3, Layer, Mixed, inception_v3


@functools.cache
def variables_and_sites(model, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return variables, aqs.find_sites(model.apply, variables, images)


def published():
    return variables_and_sites(inception_v3(1000), 299)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# --- Published numbers ----------------------------------------------------------------------------


def test_parameters_are_torchvisions_without_the_auxiliary_classifier():
    # A 1x1 convolution to 128 channels and a 5x5 to 768, each with BatchNorm, and a dense layer.
    auxiliary = 768 * 128 + 2 * 128 + 25 * 128 * 768 + 2 * 768 + 768 * 1000 + 1000
    assert count(published()[0]["params"]) == 27_161_264 - auxiliary == 23_834_568


def test_variables_are_those_of_keras_with_batch_norm_scales():
    variables, _ = published()
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    scales = sum(leaf.size for path, leaf in leaves if path[-1].key == "scale")
    # Keras counts running means and variances, and its BatchNorms have no scale.
    assert count(variables) - scales == 23_851_784
    assert count(variables["batch_stats"]) == 2 * scales == 34_432


def test_macs_are_the_published_ones():
    _, sites = published()
    assert round(aqs.cost.total_macs(sites) / 1e9, 2) == 5.71  # torchvision's model table
    assert len(sites) == 94 + 1


# Szegedy et al. 2015, table 1: height, width and channels at the block's input or output.
@pytest.mark.parametrize(
    "site, shape",
    [
        ("conv2", (149, 149, 32)),
        ("conv3", (147, 147, 32)),
        ("conv4", (73, 73, 64)),
        ("conv5", (73, 73, 80)),
        ("mixed4/branch1_conv1", (35, 35, 288)),
        ("mixed5/branch1_conv1", (17, 17, 768)),
        ("mixed10/branch1_conv1", (8, 8, 1280)),
        ("mixed11/branch1_conv1", (8, 8, 2048)),
        ("head", (2048,)),
    ],
)
def test_sizes_on_the_way_are_the_papers(site, shape):
    assert published()[1][f"{site}/kernel"].lhs_shape == (1, *shape)


def test_site_names_are_the_documented_ones():
    _, sites = published()
    assert not any(site.refused for site in sites.values())
    names = [name.removesuffix("/kernel") for name in sites]
    assert names[:5] == ["stem", "conv2", "conv3", "conv4", "conv5"]
    assert names[-1] == "head"
    blocks = {i: [n for n in names if n.startswith(f"mixed{i}/")] for i in range(1, 12)}
    assert [len(blocks[i]) for i in range(1, 12)] == [7, 7, 7, 4, 10, 10, 10, 10, 6, 9, 9]
    assert blocks[10] == [
        "mixed10/branch1_conv1",
        "mixed10/branch2_conv1",
        "mixed10/branch2_conv2a",
        "mixed10/branch2_conv2b",
        "mixed10/branch3_conv1",
        "mixed10/branch3_conv2",
        "mixed10/branch3_conv3a",
        "mixed10/branch3_conv3b",
        "mixed10/branch4_conv1",
    ]


def test_width():
    params = variables_and_sites(inception_v3(3, width=0.25), 75)[0]["params"]
    assert params["stem"]["kernel"].shape == (3, 3, 3, 8)
    assert params["conv4"]["kernel"].shape[-1] == 24  # a quarter of 80, to a multiple of 8
    assert params["head"]["kernel"].shape == (512, 3)


# --- The forward pass -----------------------------------------------------------------------------

SAME_SIZE = (
    Branch((Layer(8, 1, 1),)),
    Branch((Layer(16, 3, 3),), fork=(Layer(8, 1, 3), Layer(8, 3, 1))),
    Branch((Layer(8, 1, 1),), pool="average"),
)
HALVED = (Branch((Layer(8, 1, 1), Layer(8, 3, 3, 2, "VALID"))), Branch((), pool="max"))


def filled(shapes):
    """Variables uniform in [0.1, 1]: no zero hides a mistake, and variances are positive."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.1 + 0.9 * rng.random(leaf.shape)).astype(np.float32), shapes
    )


def small_block(branches, train=False, width=1.0):
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, epsilon=1e-3)
    block = Mixed(branches, width, jnp.float32, norm)
    images = np.random.default_rng(1).standard_normal((2, 5, 6, 4), np.float32)
    return block, filled(jax.eval_shape(block.init, jax.random.key(0), images)), images


def windows(x, height, width, stride, padded):
    """[rows, columns, height, width, channels] of an image, with NaN outside of it."""
    if padded:
        edges = [(height // 2, height // 2), (width // 2, width // 2), (0, 0)]
        x = np.pad(x, edges, constant_values=np.nan)
    view = np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(0, 1))
    return np.moveaxis(view, 2, -1)[::stride, ::stride]


def reference_block(variables, image, branches):
    """A block in float64 numpy on [height, width, channels], in evaluation."""
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)

    def apply(x, layer, name):
        taps = windows(x, layer.height, layer.width, layer.stride, layer.padding == "SAME")
        kernel = variables["params"][name]["kernel"]
        y = np.einsum("ijhwc,hwcf->ijf", np.nan_to_num(taps), kernel)
        norm, stats = (variables[key][f"{name}_bn"] for key in ("params", "batch_stats"))
        y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-3) * norm["scale"] + norm["bias"]
        return np.maximum(y, 0)

    results = []
    for j, branch in enumerate(branches, start=1):
        x = np.asarray(image, np.float64)
        if branch.pool == "average":
            x = np.nanmean(windows(x, 3, 3, 1, True), axis=(2, 3))
        elif branch.pool == "max":
            x = windows(x, 3, 3, 2, False).max(axis=(2, 3))
        for k, layer in enumerate(branch.layers, start=1):
            x = apply(x, layer, f"branch{j}_conv{k}")
        end = f"branch{j}_conv{len(branch.layers) + 1}"
        forked = [apply(x, layer, end + letter) for letter, layer in zip("ab", branch.fork)]
        results.extend(forked or [x])
    return np.concatenate(results, -1)


@pytest.mark.parametrize("branches, shape", [(SAME_SIZE, (2, 5, 6, 32)), (HALVED, (2, 2, 2, 12))])
def test_block_is_that_of_a_float64_reference(branches, shape):
    block, variables, images = small_block(branches)
    out = jax.jit(block.apply)(variables, images)
    assert out.shape == shape
    expected = np.stack([reference_block(variables, image, branches) for image in images])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_and_an_empty_assignment_changes_nothing():
    block, variables, images = small_block(HALVED, train=True)

    def gradients(apply):
        def loss(params):
            tree = {"params": params, "batch_stats": variables["batch_stats"]}
            out, updates = apply(tree, images, mutable=["batch_stats"])
            return jnp.sum(out**2), updates

        return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(variables["params"]))

    expected = gradients(block.apply)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected[0]):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != 0), path
    quantized = gradients(functools.partial(aqs.quantize(block.apply), {}))
    jax.tree.map(np.testing.assert_array_equal, quantized, expected)


def test_smallest_image_runs():
    model = inception_v3(3, width=0.25)
    shapes, sites = variables_and_sites(model, 75)
    assert sites["mixed11/branch1_conv1/kernel"].lhs_shape[1:3] == (1, 1)
    # Kernels of mean 0: values stay in range though running statistics do not fit them.
    variables = jax.tree.map(lambda leaf: leaf - 0.55 * (leaf.ndim > 1), filled(shapes))
    images = np.random.default_rng(2).standard_normal((1, 75, 75, 3), np.float32)
    logits = jax.jit(model.apply)(variables, images)
    assert logits.shape == (1, 3)
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_state():
    variables, sites = variables_and_sites(inception_v3(3, width=0.25, dtype=jnp.bfloat16), 75)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    for name, site in sites.items():
        expected = jnp.float32 if name == "head/kernel" else jnp.bfloat16
        assert site.lhs.dtype == site.rhs.dtype == expected, name


def test_every_batch_norm_has_the_fields_of_the_model():
    found = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            norm = context.module
            found.append((norm.axis_name, norm.momentum, norm.epsilon, norm.use_running_average))
        return call(*args, **kwargs)

    model = inception_v3(3, width=0.25, axis_name="batch", momentum=0.8)
    variables, _ = variables_and_sites(inception_v3(3, width=0.25), 75)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    images = jax.ShapeDtypeStruct((2, 1, 75, 75, 3), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(jax.vmap(apply, in_axes=(None, 0), axis_name="batch"), variables, images)
    assert found == 94 * [("batch", 0.8, 1e-3, False)]


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: inception_v3(10, form="cifar"), ["cifar", "known forms: imagenet"]),
        (lambda: inception_v3(10, width=0.0), ["width", "0.0"]),
        (lambda: inception_v3(0), ["num_classes", "0"]),
        (
            lambda: InceptionV3(10).init(jax.random.key(0), jnp.zeros((75, 75, 3))),
            ["(75, 75, 3)", "batch"],
        ),
        (
            lambda: InceptionV3(10).init(jax.random.key(0), jnp.zeros((1, 80, 74, 3))),
            ["(1, 80, 74, 3)", "at least 75"],
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
