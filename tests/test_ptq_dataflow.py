"""What is found around sites, on nets whose answer is written down by hand."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_search.models.mobilenet_v2 import mobilenet_v2
from aqt_search.models.resnet import resnet
from aqt_search.models.vit import deit
from aqt_search.ptq.affine_producers import affine_producers
from aqt_search.ptq.dataflow import OUTPUT, dataflow
from aqt_search.ptq.elementwise import elementwise
from aqt_search.tracing.channels import Channels, moved
from aqt_search.tracing.flat_graph import trace_graph

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def abstract(model, x=IMAGE):
    """A model in evaluation mode, and its variables, abstract."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(x.shape)))
    return functools.partial(model.apply, train=False), variables


def leaves(tail):
    """(leaves of the gain with powers, leaves of the shifts with signs and whether gained)."""
    gain = {(f.leaf.name, f.power) for f in tail.gain.factors}
    return gain, [(s.leaf.name, s.coefficient, bool(s.through.factors)) for s in tail.shifts]


def batch_norm_tail(name):
    gain = {(f"batch_stats/{name}/var", -0.5), (f"{name}/scale", 1.0)}
    return gain, [(f"batch_stats/{name}/mean", -1.0, True), (f"{name}/bias", 1.0, False)]


def test_residual_net():
    flows = dataflow(*abstract(resnet(8, 10, width=0.25)), IMAGE)
    block = "stage2_block1"
    for conv, norm in [("conv1", "bn1"), ("conv2", "bn2"), ("shortcut", "shortcut_bn")]:
        flow = flows[f"{block}/{conv}/kernel"]
        assert leaves(flow.tail) == batch_norm_tail(f"{block}/{norm}")
        assert flow.tail.refused is None
        variance = min(flow.tail.gain.factors)
        assert variance.offset == pytest.approx(1e-5)
    (consumer,) = flows[f"{block}/conv1/kernel"].consumers
    assert consumer.site == f"{block}/conv2/kernel"
    assert [f.name for f in consumer.functions] == ["relu"]
    assert not flows[f"{block}/conv1/kernel"].obstacles
    assert "residual" in flows[f"{block}/conv2/kernel"].obstacles[0]
    stem = flows["stem/kernel"]  # read by the first block and by its shortcut
    assert [c.site for c in stem.consumers] == ["stage1_block1/conv1/kernel"]
    assert "residual" in stem.obstacles[0]
    assert flows["head/kernel"].obstacles == (OUTPUT,)
    assert leaves(flows["head/kernel"].tail) == (set(), [("head/bias", 1.0, False)])


def test_depthwise_net():
    flows = dataflow(*abstract(mobilenet_v2(10, width=0.25, form="tiny")), IMAGE)
    expand, depthwise = flows["block2/expand/kernel"], flows["block2/depthwise/kernel"]
    assert [c.site for c in expand.consumers] == ["block2/depthwise/kernel"]
    assert [c.site for c in depthwise.consumers] == ["block2/project/kernel"]
    assert [f.name for f in expand.consumers[0].functions] == ["relu6"]
    assert depthwise.axes.groups == depthwise.weight.inputs == depthwise.weight.outputs == 48
    (consumer,) = flows["last/kernel"].consumers  # through the mean over pixels
    assert consumer.site == "head/kernel"
    assert [f.positive_homogeneous for f in consumer.functions] == [False, True]


def test_transformer_producers():
    graph = trace_graph(*abstract(deit("tiny", 10, width=0.3, form="cifar")), IMAGE)
    producers, reasons = affine_producers(graph)
    found = {p.gain.name: ([s.name for s in p.shifts], [c.site for c in p.consumers])
             for p in producers}  # fmt: skip
    names = [f"block1/{n}/kernel" for n in ("query", "key", "value")]
    assert found["block1/norm1/scale"] == (["block1/norm1/bias"], names)
    assert found["block1/norm2/scale"] == (["block1/norm2/bias"], ["block1/up/kernel"])
    assert found["norm/scale"] == (["norm/bias"], ["head/kernel"])
    assert len(found) == 13
    assert set(reasons) >= {"stem/kernel", "block1/out/kernel", "block1/down/kernel"}
    assert all(not p.obstacles for p in producers)


# --- Ways of writing it down ----------------------------------------------------------------------

C = 4
P = {name: np.full((C,), 0.5, np.float32) for name in ("bias", "mean", "var", "scale", "beta")}
P |= {"w": np.ones((3, C), np.float32), "w2": np.ones((C, 2), np.float32)}


def row(x):
    return x[None, :]


BATCH_NORMS = {
    "linen": lambda p, y: (y - row(p["mean"])) * (jax.lax.rsqrt(row(p["var"]) + 1e-3)
                                                  * row(p["scale"])) + row(p["beta"]),
    "division": lambda p, y: (y - row(p["mean"])) / jnp.sqrt(row(p["var"]) + 1e-3)
    * row(p["scale"]) + row(p["beta"]),
    "distributed": lambda p, y: y * row(p["scale"] / jnp.sqrt(p["var"] + 1e-3))
    + row(p["beta"] - p["mean"] * (p["scale"] / jnp.sqrt(p["var"] + 1e-3))),
}  # fmt: skip


@pytest.mark.parametrize("form", BATCH_NORMS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_forms_of_batch_norm(form, wrap):
    def apply(p, x):
        return nn.relu(wrap(BATCH_NORMS[form])(p, x @ p["w"] + row(p["bias"]))) @ p["w2"]

    flow = dataflow(apply, P, np.ones((5, 3), np.float32))["w"]
    gain, shifts = leaves(flow.tail)
    assert gain == {("var", -0.5), ("scale", 1.0)}
    expected = [("bias", 1.0, True), ("mean", -1.0, True), ("beta", 1.0, False)]
    assert sorted(shifts) == sorted(expected)
    assert flow.tail.refused is None
    assert [c.site for c in flow.consumers] == ["w2"]
    # The symbols say what the function computes: gain * product + shifts.
    rng = np.random.default_rng(0)
    p = {name: rng.uniform(0.5, 2, value.shape) for name, value in P.items()}
    ordered = [p[name] for name in sorted(P)]
    product, tail = rng.normal(size=(5, C)), flow.tail
    total = tail.gain.value(ordered) * product + sum(s.value(ordered) for s in tail.shifts)
    inverse = p["scale"] / np.sqrt(p["var"] + 1e-3)
    reference = (product + p["bias"] - p["mean"]) * inverse + p["beta"]
    np.testing.assert_allclose(total, reference, rtol=1e-6)


@pytest.mark.parametrize(
    "apply, words",
    [
        (lambda p, x: (x @ p["w"] + row(p["bias"])) * jnp.sum(p["bias"]), "'bias' is used"),
        (lambda p, x: x @ p["w"] + row(p["bias"] * p["beta"]), "not one parameter"),
        (lambda p, x: x @ p["w"] + row(p["bias"]) + row(p["bias"]), "not one parameter|is used"),
    ],
)
def test_tails_that_cannot_be_changed(apply, words):
    assert re.search(words, dataflow(apply, P, np.ones((5, 3), np.float32))["w"].tail.refused)


@pytest.mark.parametrize(
    "apply, words",
    [
        (lambda p, x: (x @ p["w"]) @ p["w2"] + (x @ p["w"])[:, :2], "used in another place"),
        (lambda p, x: x @ (p["w"] / jnp.sum(p["w"])), "computed from parameters"),
        (lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ p["w"] @ w), None), x,
                                   np.ones((2, C, 3), np.float32))[0], "inside a loop"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_changed(apply, words):
    flows = dataflow(apply, P, np.ones((5, 3), np.float32))
    assert any(words in (flow.reason or "") for flow in flows.values())


def flatten(x):
    return x.reshape(x.shape[0], -1)


@pytest.mark.parametrize(
    "between, channels",
    [
        (flatten, np.tile(np.arange(C), 4)),
        (lambda y: flatten(y.transpose(0, 3, 1, 2)), np.repeat(np.arange(C), 4)),
        (lambda y: flatten(nn.max_pool(y, (2, 2))), np.arange(C)),
        (lambda y: flatten(nn.avg_pool(y, (2, 2))), np.arange(C)),
        (lambda y: jnp.mean(y, (1, 2)), np.arange(C)),
        (lambda y: jnp.max(nn.relu(y), (1, 2)), np.arange(C)),
        (lambda y: flatten(jnp.pad(y, ((0, 0), (0, 1), (0, 0), (0, 0)))), np.tile(np.arange(C), 6)),
        (lambda y: jnp.mean(y, (2, 3)), None),
        (lambda y: flatten(y)[:, 1:5], None),
    ],
)
def test_channels_through_changes_of_shape(between, channels):
    w2 = np.ones((between(jnp.zeros((1, 2, 2, C))).shape[-1], 3), np.float32)
    flow = dataflow(lambda p, x: between(x @ p["w"]) @ p["w2"], {"w": P["w"], "w2": w2},
                    np.ones((5, 2, 2, 3), np.float32))["w"]  # fmt: skip
    if channels is None:
        assert not flow.consumers
        assert "mixed, split or cut" in flow.obstacles[0]
    else:
        (consumer,) = flow.consumers
        np.testing.assert_array_equal(consumer.channels.of_elements(len(w2)), channels)


def test_reshapes_against_a_marked_array():
    """Wherever channels are said to be, an array that holds its channel's number agrees."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        shape = tuple(rng.choice([1, 2, 3, 4, 6], size=rng.integers(1, 4)))
        size = int(np.prod(shape))
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        first = int(rng.choice(divisors))
        second = int(rng.choice([d for d in divisors if (size // first) % d == 0]))
        target = (first, second, size // first // second)
        axis = int(rng.integers(len(shape)))
        graph = trace_graph(lambda v, x, t=target: x.reshape(t) + 0, {}, np.zeros(shape))
        node = next((n for n in graph.nodes.values() if n.primitive == "reshape"), None)
        if node is None:
            continue
        channels = moved(graph, node, Channels(axis, shape[axis]))
        if channels is None:
            continue
        found += 1
        index = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        marked = np.broadcast_to(index, shape).reshape(target)
        elements = channels.of_elements(target[channels.axis])
        expected = elements.reshape([-1 if a == channels.axis else 1 for a in range(3)])
        np.testing.assert_array_equal(marked, np.broadcast_to(expected, target))
    assert found > 50


FUNCTIONS = {
    "relu": (nn.relu, True),
    "leaky_relu": (nn.leaky_relu, True),
    "a scaling": (lambda x: x / 3, True),
    "relu6": (nn.relu6, False),
    "gelu": (functools.partial(nn.gelu, approximate=False), False),
    "swish": (nn.silu, False),
    "hard_swish": (nn.hard_swish, False),
    "hard_sigmoid": (nn.hard_sigmoid, False),
    "tanh": (nn.tanh, False),
    "sigmoid": (nn.sigmoid, False),
    "an elementwise function": (nn.elu, False),
}


IN_BFLOAT16 = [("leaky_relu", jnp.bfloat16), ("gelu", jnp.bfloat16)]


@pytest.mark.parametrize("name, dtype", [(name, jnp.float32) for name in FUNCTIONS] + IN_BFLOAT16)
def test_elementwise_functions(name, dtype):
    function, homogeneous = FUNCTIONS[name]
    graph = trace_graph(lambda v, x: function(x) @ v, jnp.ones((3, 2), dtype),
                        jnp.ones((5, 3), dtype))  # fmt: skip
    found = elementwise(graph, 1)  # values: the parameters, x
    assert found.result == graph.site_nodes()["params"].inputs[0]
    assert found.positive_homogeneous == homogeneous
    assert found.name == name
    x = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32) * 4
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-7
    np.testing.assert_allclose(found(x), function(x), rtol=tolerance, atol=tolerance)


def test_elementwise_needs_one_way_out():
    graph = trace_graph(lambda v, x: (nn.relu(x) @ v, x), jnp.ones((3, 2)), jnp.ones((5, 3)))
    assert elementwise(graph, 1) is None
    graph = trace_graph(
        lambda v, x: (x * nn.sigmoid(x) + v) @ v, jnp.ones((3, 3)), jnp.ones((3, 3))
    )
    assert elementwise(graph, 1).name == "swish"
