"""Subnets by masks against the models that are built like them, and what must be refused."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.architecture.channel_groups import channel_groups
from aqt_search.architecture.decisions import Times
from aqt_search.architecture.elastic import elastic
from aqt_search.architecture.errors import ArchitectureError
from aqt_search.models import build
from aqt_search.models.fitting import fitted

IMAGE = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)


@functools.cache
def drawn(name, size=16, **options):
    """A network and variables of which none is at its initial value."""
    model = build(name, 10, dropout=0.0, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            fan_in = max(1, np.prod(leaf.shape[:-1]))
            return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)
        low, high = (0.5, 1.5) if kind in ("scale", "var") else (-0.2, 0.2)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def v2_net(**more):
    model, variables = drawn("mobilenet_v2", form="tiny", windows=5)
    return model, variables, elastic(
        functools.partial(model.apply, train=False), variables, IMAGE,
        widths={
            "stem": (8, 16), "block2/project": (8, 16, 24), "block4/project": (16, 32),
            "block3/expand": (16, 40, 144), "block5/expand": Times("block4/project", (1, 2, 6)),
            "block7/expand": Times("block6/project", (1, 6)),
        },
        kernels={"block[2345]/depthwise": (1, 3, 5)},
        depths=[(("block3",), (0, 1)), (("block7",), (0, 1))], **more,
    )  # fmt: skip


def v3_net():
    model, variables = drawn(
        "mobilenet_v3_ofa", width=0.5, form="cifar", expansions=(1, *[3] * 10),
        depths=(1, *[2] * 5), windows=(3, *[5] * 10),
    )  # fmt: skip
    pairs = {(f"block{i}/expand", f"block{i}/squeeze"): ((12, 4), (24, 8)) for i in (4, 5)}
    return model, variables, elastic(
        functools.partial(model.apply, train=False), variables, IMAGE,
        widths={**pairs, "block7/expand": (8, 24), "block8/project": (24, 56)},
        kernels={"block(4|7|8|9)/depthwise": (3, 5)},
        depths=[((f"block{2 * i + 1}",), (0, 1)) for i in (1, 2, 3, 4, 5)],
    )  # fmt: skip


NETS = {"v2": v2_net, "v3": v3_net}


def random_points(net, count, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [len(decision.options) for decision in net.decisions]
    return rng.integers(0, sizes, (count, len(sizes)))


# --- Channel groups -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [("mobilenet_v2", {"form": "tiny"}, 11), ("mobilenet_v3_large", {}, 30), ("resnet20", {}, 12),
     ("efficientnet_b0", {}, 40), ("deit_ti", {}, 12)],
)  # fmt: skip
def test_groups_of_the_zoo(name, options, count):
    """The numbers counted by a separate prototype of the analysis."""
    size = 16 if options else 32 if name == "resnet20" else 224
    model = build(name, 10, **options)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    groups = channel_groups(model.apply, variables, image)
    assert sum(group.refused is None for group in groups.values()) == count
    assert "result" in groups["head/kernel"].refused


def _two_layers(between):
    """apply, params and data of dense -> between -> dense, 8 channels inside."""
    params = {
        "w": jnp.ones((4, 8)),
        "b": jnp.ones((1, 8)),
        "g": jnp.ones((1, 8)),
        "v": jnp.ones((8, 3)),
    }
    return (lambda p, x: between(p, x @ p["w"] + p["b"]) @ p["v"]), params, jnp.ones((2, 4))


SOUND = {
    "relu": lambda p, h: jax.nn.relu(h),
    "gelu": lambda p, h: jax.nn.gelu(h),
    "swish": lambda p, h: jax.nn.swish(h) * p["g"],
    "gate": lambda p, h: h * jax.nn.sigmoid(h + 1),
    "abs and sqrt": lambda p, h: jnp.sqrt(jnp.abs(h)) * p["g"],
    "transposed": lambda p, h: (h.T * p["g"].T).T,
    "where": lambda p, h: jnp.where(h > 0, h, 0.1 * h),
}
UNSOUND = {
    "sigmoid": (lambda p, h: jax.nn.sigmoid(h), r"'v' lhs is 0.5"),
    "softmax": (lambda p, h: jax.nn.softmax(h), "reduce_max"),
    "layer norm": (lambda p, h: (h - h.mean(-1, keepdims=True)) * p["g"], "reduce_sum"),
    "shifted": (lambda p, h: h + 1.0, r"'v' lhs is 1.0"),
    "concatenated": (lambda p, h: jnp.concatenate([h, h], -1)[:, 4:12], "concatenate"),
    "positions": (lambda p, h: h * jnp.arange(8.0)[None], "iota|constant"),
    "sorted": (lambda p, h: jnp.sort(h), "sort"),
    "heads": (lambda p, h: h.reshape(2, 2, 4).mean(1, keepdims=True).repeat(2, 1).reshape(2, 8),
              "reshape"),
    "rolled": (lambda p, h: jnp.roll(h, 1, -1), "slice|concatenate"),
    "divided by its size": (lambda p, h: h / jnp.abs(h), r"'v' lhs is nan"),
    "normalized weight": (
        lambda p, h: h / jnp.linalg.norm(p["w"], axis=0, keepdims=True), r"'v' lhs is nan"),
    "scaled by 1 / norm": (
        lambda p, h: h * jax.lax.rsqrt(jnp.sum(p["w"] ** 2, 0, keepdims=True)), r"'v' lhs is nan"),
    "scanned": (lambda p, h: jax.lax.scan(lambda c, _: (c * 2, None), h, None, 2)[0], "scan"),
}  # fmt: skip


@pytest.mark.parametrize("between", SOUND.values(), ids=SOUND)
def test_channels_that_can_be_cut(between):
    groups = channel_groups(*_two_layers(between))
    assert groups["w"].refused is None
    assert groups["w"].size == 8
    assert {("w", 1), ("b", 1), ("v", 0)} <= set(groups["w"].axes)


@pytest.mark.parametrize(("between", "reason"), UNSOUND.values(), ids=UNSOUND)
def test_channels_that_cannot_be_cut_say_why(between, reason):
    apply, params, x = _two_layers(between)
    groups = channel_groups(apply, params, x)
    assert re.search(reason, groups["w"].refused)
    with pytest.raises(ArchitectureError, match="cannot be cut"):
        elastic(apply, params, x, widths={"^w$": (4, 8)})


def test_a_product_of_a_weight_with_itself_is_one_group():
    params = {"w": jnp.ones((4, 8)), "u": jnp.ones((8, 8)), "v": jnp.ones((8, 3))}

    def apply(p, x):
        h = x @ p["w"]
        return h @ p["v"] + jax.nn.relu(h @ p["u"]) @ p["v"]

    groups = channel_groups(apply, params, jnp.ones((2, 4)))
    assert set(groups["w"].axes) == {("w", 1), ("u", 0), ("u", 1), ("v", 0)}


# --- Subnets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", NETS)
def test_masked_is_extracted(version):
    """Random subnets, by one program, against the models that are built like them."""
    model, variables, net = NETS[version]()
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    masked = jax.jit(lambda c: model.apply(net.variables(c, variables), images, train=False))
    for choices in random_points(net, 12 if version == "v2" else 4):
        small, cut = fitted(model, net.extract(choices, variables))
        expected = small.apply(cut, images, train=False)
        shapes = jax.eval_shape(small.init, jax.random.key(0), IMAGE)
        assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, shapes)
        np.testing.assert_allclose(masked(choices), expected, rtol=2e-5, atol=2e-5)
    assert masked._cache_size() == 1


def test_native_products_of_a_subnet_are_those_of_the_cut_model_to_the_last_bit():
    """Scales and codes are the same. No multiply-adds, which XLA rounds once or twice by shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"w": (4, 17), "v": (17, 5)}
    params = {name: jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys[1:])}
    x = jax.random.normal(keys[0], (16, 4))

    def apply(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["v"]

    widths = (1, 4, 7, 11, 16, 17)
    net = elastic(apply, params, x, widths={"^w$": widths})
    every = aqs.assign(net.sites, [(".*", "int8")])
    qapply = jax.jit(aqs.quantize(apply, execution="int8"))
    masked = jax.jit(lambda c, p, x: qapply(every, net.variables(c, p), x))
    for choice, width in enumerate(widths):
        cut = net.extract(np.asarray([choice]), params)
        assert cut["w"].shape == (4, width)
        found = masked(np.asarray([choice]), params, x)
        np.testing.assert_array_equal(found, qapply(every, cut, x))
    assert masked._cache_size() == 1


@pytest.mark.parametrize("execution", ["emulated", "int8"])
def test_quantized_subnets_are_those_of_the_extracted_model(execution):
    model, variables, net = v2_net()
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def qapply(model):
        return aqs.quantize(functools.partial(model.apply, train=False), execution=execution)

    rules = [(".*", "int8")]

    @jax.jit
    def masked(choices, variables):
        every = aqs.assign(net.sites, rules)
        return qapply(model)(every, net.variables(choices, variables), images)

    for choices in random_points(net, 3):
        small, cut = fitted(model, net.extract(choices, variables))
        sites = aqs.find_sites(functools.partial(small.apply, train=False), cut, images)
        expected = jax.jit(qapply(small))(aqs.assign(sites, rules), cut, images)
        if execution == "int8":
            # Integers are summed exactly; BatchNorm between them is a product and a sum, which the
            # compiler rounds once or twice as it vectorizes: some 20 layers of 2^-23 each.
            np.testing.assert_allclose(masked(choices, variables), expected, rtol=0, atol=3e-6)
        else:  # a rounding may fall to the other side: a step of one activation in 127
            np.testing.assert_allclose(masked(choices, variables), expected, rtol=2e-2, atol=2e-2)


def test_gradients_of_what_a_subnet_lacks_are_zero():
    model, variables, net = v2_net()
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def loss(variables, choices):
        return jnp.sum(model.apply(net.variables(choices, variables), images, train=False) ** 2)

    gradient = jax.jit(jax.grad(loss))
    for choices in random_points(net, 3):
        found = gradient(variables, choices)
        there = net.where(choices, jax.tree.map(jnp.ones_like, variables),
                          jax.tree.map(jnp.zeros_like, variables))  # fmt: skip
        jax.tree.map(lambda g, t: np.testing.assert_array_equal(g * (1 - t), 0), found, there)
        assert all(jnp.any(g != 0) for g in jax.tree.leaves(found["params"]["stem"]))


def test_subnets_are_vmapped():
    model, variables, net = v2_net()
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    points = random_points(net, 4)

    def apply(choices):
        return model.apply(net.variables(choices, variables), images, train=False)

    together = jax.jit(jax.vmap(apply))(points)
    np.testing.assert_allclose(together, [apply(c) for c in points], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", NETS)
def test_sorting_keeps_the_function_and_brings_the_important_first(version):
    model, variables, net = NETS[version]()
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    sorted_variables = net.sort(variables)
    apply = functools.partial(model.apply, train=False)
    np.testing.assert_allclose(
        apply(sorted_variables, images), apply(variables, images), rtol=1e-4, atol=1e-4
    )
    read = np.abs(sorted_variables["params"]["block7"]["project"]["kernel"]).sum((0, 1, 3))
    assert np.all(np.diff(read) <= 1e-6)
    before = np.abs(variables["params"]["block7"]["project"]["kernel"]).sum((0, 1, 3))
    assert np.any(np.diff(before) > 0)
    # Others of the same shapes, such as momenta, go with them.
    moments, expected = (
        jax.tree.map(lambda leaf: np.cos(1e3 * np.asarray(leaf)), tree)
        for tree in (variables, sorted_variables)
    )
    found = net.sort(moments, by=variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_kernel_matrices_make_smaller_windows_of_larger_ones():
    """Against the definition in float64; with the identity they are the middle."""
    model, variables, net = v2_net()
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    matrices = net.matrices()
    assert {name: [m.shape for m in own] for name, own in matrices.items()} == {
        f"block{i}/depthwise/kernel": [(9, 9), (1, 1)] for i in (2, 3, 4, 5)
    }  # fmt: skip
    apply = jax.jit(lambda c, v, m: model.apply(net.variables(c, v, m), images, train=False))
    rng = np.random.default_rng(0)
    learned = jax.tree.map(
        lambda m: m + jnp.asarray(rng.normal(size=m.shape) / 4, m.dtype), matrices
    )
    name = "block2/depthwise/kernel"
    window = [d.name for d in net.decisions].index(f"{name}:window")
    kernel = np.asarray(variables["params"]["block2"]["depthwise"]["kernel"], np.float64)
    middle = kernel[1:4, 1:4].reshape(9, -1)
    three = (np.asarray(learned[name][0], np.float64).T @ middle).reshape(3, 3, *kernel.shape[2:])
    one = np.asarray(learned[name][1], np.float64)[0, 0] * three[1:2, 1:2]
    for option, expected in enumerate((one, three, kernel)):
        choices = net.largest
        choices[window] = option
        cut = net.extract(choices, variables, learned)["params"]["block2"]["depthwise"]["kernel"]
        np.testing.assert_allclose(cut, expected, rtol=1e-5, atol=1e-6)
        small, own = fitted(model, net.extract(choices, variables, learned))
        found = apply(choices, variables, learned)
        expected = small.apply(own, images, train=False)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    plain = model.apply(net.variables(net.smallest, variables), images, train=False)
    found = apply(net.smallest, variables, matrices)
    np.testing.assert_allclose(found, plain, rtol=2e-5, atol=2e-5)


def test_the_whole_model_is_the_largest():
    _, variables, net = v2_net()
    same = net.variables(net.largest, variables)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    cut = net.extract(net.smallest, variables)["params"]
    assert "block3" not in cut
    assert cut["block5"]["expand"]["kernel"].shape == (1, 1, 16, 16)
    assert cut["block5"]["depthwise"]["kernel"].shape == (1, 1, 1, 16)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.MultiHeadDotProductAttention(2, name=f"attention{i}")(nn.LayerNorm()(x))
            h = nn.gelu(nn.Dense(16, name=f"up{i}")(nn.LayerNorm()(x)))
            x = x + nn.Dense(8, name=f"down{i}")(h)
        return nn.Dense(3, name="head")(x)


def test_a_model_from_elsewhere():
    """The hidden width of a transformer's dense layers, its attention as a block to skip."""
    model, x = Attention(), jax.random.normal(jax.random.key(0), (2, 5, 8))
    variables = model.init(jax.random.key(1), x)
    net = elastic(model.apply, variables, x, widths={"up": (4, 16)},
                  depths=[(("attention1",), (0, 1))])  # fmt: skip
    assert [d.name for d in net.decisions] == [
        "up0/kernel:width", "up1/kernel:width", "attention1:depth"
    ]  # fmt: skip
    masked = model.apply(net.variables([0, 1, 0], variables), x)
    p = net.extract([0, 1, 0], variables)["params"]
    assert p["up0"]["kernel"].shape == (8, 4)
    assert "attention1" not in p

    def norm(number, x):
        return nn.LayerNorm().apply({"params": p[f"LayerNorm_{number}"]}, x)

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"][None, None]

    attention = nn.MultiHeadDotProductAttention(2).apply({"params": p["attention0"]}, norm(0, x))
    h = x + attention
    h = h + dense("down0", nn.gelu(dense("up0", norm(1, h))))
    h = h + dense("down1", nn.gelu(dense("up1", norm(3, h))))
    np.testing.assert_allclose(masked, dense("head", h), rtol=1e-5, atol=1e-5)


# --- Bad input ------------------------------------------------------------------------------------

BAD = {
    "wider than the model": ({"widths": {"block2/expand": (96, 200)}}, "has 96 there.*1 to 96"),
    "no such group": ({"widths": {"blok2": (8, 16)}}, "'blok2' matches none of stem/kernel"),
    "no regex": ({"widths": {"block(": (8, 16)}}, "not a regular expression"),
    "the result's channels": ({"widths": {"head": (5, 10)}}, "cannot be cut.*result"),
    "no number": ({"widths": {"block2/expand": (0.5, 96)}}, "0.5.*whole numbers"),
    "one option": ({"widths": {"block2/expand": (96,)}}, "two or more"),
    "twice the same": ({"widths": {"block2/expand": (8, 8)}}, "all different"),
    "decided twice": ({"widths": {"block2/expand": (8, 16), "k2/exp": (8, 9)}}, "Two entries"),
    "expansion of many": ({"widths": {"block2/expand": Times("expand", (1, 2))}}, "expected one"),
    "expansion too large": ({"widths": {"block2/expand": Times("stem", (1, 7))}}, "112.*has 96"),
    "larger window": ({"kernels": {"block2/depthwise": (3, 7)}}, "its kernel is 3 x 3"),
    "window of another middle": ({"kernels": {"block2/depthwise": (2, 3)}}, "even"),
    "no convolution": ({"kernels": {"head": (1, 3)}}, "matches none"),
    "shapes differ": ({"depths": [(("block4",), (0, 1))]}, "'block4' cannot.*block5/expand"),
    "no such block": ({"depths": [(("block9",), (0, 1))]}, "'block9'.*Its parts are.*block7"),
    "deeper": ({"depths": [(("block3",), (0, 2))]}, "0 to 1"),
    "one block in two": ({"depths": [(("block3",), (0, 1))] * 2}, "Two entries.*'block3'"),
    "no options": ({"widths": {"block2/expand": 8}}, "'block2/expand' are 8; expected several"),
    "no windows": ({"kernels": {"block2/depthwise": 3}}, "are 3; expected several"),
    "pairs of unlike length": (
        {"widths": {("block4/exp", "block5/exp"): ((8, 16), (16,))}},
        r"\(16,\) is no .* expected 2 numbers",
    ),
    "one number for two": (
        {"widths": {("block4/exp", "block5/exp"): (8, 16)}}, "8 is no option.*expected 2 numbers"
    ),
    "window of 1 x 1": ({"kernels": {"block2": (3, 5)}}, "'block2' matches.*its kernel is 1 x 1"),
    "a block's name alone": ({"depths": [("block3", (0, 1))]}, "'block3'; expected a tuple"),
    "half a block": ({"depths": [(("block3",), (0, 0.5))]}, "numbers of blocks to keep"),
    "one group for two": (
        {"widths": {("block5/exp", "k5/exp"): ((8, 16), (16, 8))}}, "Several .* match 'block5/exp"
    ),
    "widths alone": ({"widths": ["block2/expand"]}, "widths is .* by regular expression"),
    "a number for a name": ({"widths": {3: (8, 16)}}, "3 is no key of `widths`"),
    "a number to multiply": (
        {"widths": {"block5/expand": Times(3, (1, 2))}}, "3 is no regular expression"
    ),
    "one ratio": ({"widths": {"block5/expand": Times("stem", 2)}}, "are 2; expected several"),
    "no pair": ({"depths": [("block3",)]}, "depths is .* expected pairs"),
    "a depth": ({"depths": [(("block3",), 1)]}, "different numbers of blocks"),
    "yes and no": ({"widths": {"block2/expand": (True, 8)}}, "expected several"),
    "nothing": ({}, "nothing to choose"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(options, message):
    model, variables = drawn("mobilenet_v2", form="tiny")
    with pytest.raises(ArchitectureError, match=re.compile(message, re.DOTALL)):
        elastic(functools.partial(model.apply, train=False), variables, IMAGE, **options)


def test_choices_of_another_shape_are_refused():
    _, variables, net = v2_net()
    with pytest.raises(ArchitectureError, match=r"shape \(2,\).*vmap"):
        net.variables([0, 1], variables)
    for wrong in (9, -1):
        choices = net.largest
        choices[1] = wrong
        with pytest.raises(
            ArchitectureError, match=rf"{net.decisions[1].name}' is {wrong}; .*0 to"
        ):
            net.variables(choices, variables)
    with pytest.raises(ArchitectureError, match="float32; expected numbers of options"):
        net.variables(net.largest.astype(np.float32), variables)
    for lost in ({"model": variables}, {}, None):
        with pytest.raises(ArchitectureError, match="nor anything else that is decided about"):
            net.variables(net.smallest, lost)
    for again in (net.variables, net.extract):
        with pytest.raises(ArchitectureError, match=r"shape .*; expected .* of the whole"):
            again(net.smallest, net.extract(net.smallest, variables))
    with pytest.raises(ArchitectureError, match="that of the whole"):
        net.sort(net.extract(net.smallest, variables))
    with pytest.raises(ArchitectureError, match=r"have no '.*give all of the whole"):
        net.sort({"params": variables["params"]})
    with pytest.raises(ArchitectureError, match="choices are traced"):
        jax.jit(lambda c: net.extract(c, variables))(net.largest)
