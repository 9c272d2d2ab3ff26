"""Freezing and serving: what is stored, how large it is, and that it computes what was trained."""

import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import aqt_search as aqs
from aqt_search import SiteError, SiteFormats
from aqt_search.tracing.freeze import Dropped

# What XLA makes of the programs is not the question here: the least of LLVM's work will do.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def sample(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


# --- The models -----------------------------------------------------------------------------------


def filled(shapes):
    """Arrays of these shapes; positive, as variances are, where they are vectors."""
    leaves, tree = jax.tree.flatten(shapes)
    arrays = [sample(*leaf.shape, seed=seed) for seed, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [jnp.abs(a) + 0.5 if a.ndim == 1 else a for a in arrays])


class Model(NamedTuple):
    fun: Any
    params: Any
    args: tuple
    dropped: int  # parameters that nothing reads once all products are quantized


def mlp():
    def fun(params, x):
        x = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
        return x @ params["out"]

    first = {"kernel": sample(12, 16, seed=1), "bias": sample(16, seed=2)}
    return Model(fun, {"first": first, "out": sample(16, 5, seed=3)}, (sample(6, 12),), 2)


def linen(module, x, dropped):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return Model(module.apply, filled(shapes), (x,), dropped)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def linen_conv():
    x = sample(2, 4, 4, 3)
    return linen(ConvNet(), x, 3)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="mlp")(x), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Block), length=2, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return stack(name="blocks")(x, None)[0]


def linen_scan():
    x = sample(2, 5, 8)
    return linen(Transformer(), x, 5)


def remat():
    @jax.checkpoint
    def block(x, w):
        return jnp.tanh(x @ w)

    params = {"a": sample(8, 8), "b": sample(8, 8, seed=1)}
    return Model(lambda p, x: block(block(x, p["a"]), p["b"]), params, (sample(5, 8),), 2)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.conv = nnx.Conv(16, 8, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(nnx.relu(self.first(x))))


def nnx_net():
    net = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def fun(params, rest, x):
        return nnx.merge(graph, params, rest, copy=True)(x)

    return Model(fun, filled(params), (filled(rest), sample(2, 6, 8)), 2)


def cond():
    def fun(params, x):
        def left(x):
            return x @ params["left"]

        return jax.lax.cond(x[0, 0] > 100.0, left, lambda x: jnp.tanh(x @ params["right"]), x)

    return Model(fun, {"left": sample(8, 8), "right": sample(8, 8, seed=1)}, (sample(5, 8),), 2)


def while_loop():
    def fun(params, x):
        def body(carry):
            return carry[0] + 1, jnp.tanh(carry[1] @ params["w"])

        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

    return Model(fun, {"w": sample(8, 8)}, (sample(5, 8),), 1)


def lora():
    def fun(params, x):
        return x @ (params["a"] + params["up"] @ params["down"])

    params = {"a": sample(8, 8), "up": sample(8, 2, seed=1), "down": sample(2, 8, seed=2)}
    return Model(fun, params, (sample(5, 8),), 3)


def standardized():
    def fun(params, x):
        w = params["w"]
        w = (w - w.mean(0, keepdims=True)) / (w.std(0, keepdims=True) + 1e-5)
        return x @ (w * params["gain"][None])

    return Model(fun, {"w": sample(8, 8), "gain": 1 + sample(8) ** 2}, (sample(5, 8),), 2)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        return embed.attend(jnp.tanh(embed(tokens)))


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(5, name="out")(nn.Embed(11, 8, name="embed")(tokens))


def embedding(module, dropped):
    return linen(module, jnp.array([[0, 3, 10], [7, 7, 1]]), dropped)


def bf16():
    model = mlp()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model.params)
    return model._replace(params=half, args=(model.args[0].astype(jnp.bfloat16),))


def experts():
    sizes = jnp.array([4, 0, 2], jnp.int32)

    def fun(params, x):
        return jax.lax.ragged_dot(jnp.tanh(x @ params["router"]), params["experts"], sizes)

    params = {"experts": sample(3, 8, 5, seed=1), "router": sample(8, 8)}
    return Model(fun, params, (sample(6, 8),), 2)


MODELS = {
    "mlp": mlp, "linen conv": linen_conv, "linen scan": linen_scan, "remat": remat, "nnx": nnx_net,
    "cond": cond, "while": while_loop, "lora": lora, "standardized": standardized,
    "tied": functools.partial(embedding, Tied(), 1),
    "embedding": functools.partial(embedding, Embedded(), 2), "bf16": bf16,
    "experts": experts,
}  # fmt: skip


@functools.cache
def built(name):
    model = MODELS[name]()
    return model, aqs.find_sites(model.fun, model.params, *model.args)


FORMATS = {
    "int4": "int4",
    "int8": "int8",
    "e4m3": "e4m3",
    "e2m1": "e2m1",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "uint4": {"weight": "int4", "activation": "uint4"},  # what is negative is cut to 0
    "mixed": {"weight": "int4", "activation": "int8"},
    "weights only": {"weight": "int3", "activation": None},
    "zero points": {
        role: aqs.Quantizer("int8", calibration=aqs.min_max()) for role in ("weight", "activation")
    },
    "percentile": aqs.Quantizer("int6", calibration=aqs.percentile(99)),
}


def assigned(sites, formats):
    return aqs.assign(sites, [(".*", FORMATS[formats])])


def frozen_of(model, assignment, state=None):
    """Frozen in a compiled program, as op by op each operation is one."""
    return jit(lambda p: aqs.freeze(model.fun, assignment, p, *model.args, state=state))(
        model.params
    )


def trained_and_frozen(model, assignment):
    """What the training graph gives, and what is stored, from one program: compiling dominates."""

    def both(params):
        logits = aqs.quantize(model.fun)(assignment, params, *model.args)
        return logits, aqs.freeze(model.fun, assignment, params, *model.args)

    return jit(both)(model.params)


def served(model, frozen, execution="emulated"):
    return jit(aqs.serve(model.fun, execution=execution))(frozen, *model.args)


def assert_equal_sums(actual, expected):
    """Equal up to the order of summation, which XLA chooses by the CPU: a few roundings."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        bound = 16 * np.finfo(np.float32).eps * np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=bound)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def stored_weights(frozen):
    return [q for fields in frozen.weights.values() for q in fields.values()]


def is_dropped(leaf):
    return isinstance(leaf, Dropped)


# --- The same logits ------------------------------------------------------------------------------

CASES = [
    *((name, "mixed") for name in MODELS),
    *(("mlp", formats) for formats in FORMATS if formats != "mixed"),
    *[("linen conv", "weights only"), ("linen scan", "mxfp4"), ("nnx", "zero points")],
    *[("embedding", "mxfp4"), ("embedding", "nvfp4"), ("tied", "e2m1")],
]


@pytest.mark.parametrize("name, formats", CASES)
def test_serving_gives_the_logits_of_the_training_graph(name, formats):
    model, sites = built(name)
    assignment = assigned(sites, formats)
    expected, frozen = trained_and_frozen(model, assignment)
    # XLA adds up the 1-D convolution of the NNX net in another order on some CPUs.
    compare = assert_equal_sums if name == "nnx" else assert_equal
    compare(served(model, frozen), expected)
    # All weights are quantized here, so none stays in floating point.
    dropped = [leaf for leaf in jax.tree.leaves(frozen.params, is_leaf=is_dropped) if
               is_dropped(leaf)]  # fmt: skip
    assert len(dropped) == model.dropped
    sizes = {int(np.prod(leaf.shape)) for leaf in dropped if len(leaf.shape) > 1}
    wide = [leaf for leaf in jax.tree.leaves(frozen) if leaf.dtype.itemsize > 1]
    assert all(leaf.size < min(sizes) for leaf in wide if len(leaf.shape) > 1)
    assert frozen.assignment.keys() == assignment.keys()


@pytest.mark.parametrize(
    "name, execution",
    [("mlp", "native"), ("linen conv", "native"), ("linen scan", "native"), ("mlp", "auto")],
)
def test_native_serving_differs_by_the_order_of_sums(name, execution):
    model, sites = built(name)
    attention = [(re.escape(n), None) for n in sites if n.endswith("dot_general")]
    assignment = aqs.assign(sites, [*attention, (".*", FORMATS["mixed"])])
    expected, frozen = trained_and_frozen(model, assignment)
    actual = served(model, frozen, execution)
    # Sums of some tens of float32 terms of order one.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "linen conv", "linen scan", "cond"])
def test_static_scales_are_served(name):
    model, sites = built(name)
    static = aqs.Quantizer("int8", calibration=aqs.moving_average(aqs.absmax(), 0.5))
    assignment = aqs.assign(sites, [(".*", {"weight": "int4", "activation": static})])
    qfun = aqs.quantize_with_state(model.fun)
    state = qfun.init(assignment, model.params, *model.args)
    step = jit(qfun.apply)
    for factor in (1.0, 2.0):
        data = (model.args[0] * factor,)
        _, state = step(assignment, state, model.params, *data)
    frozen = frozen_of(model, assignment, state)
    outlier = model._replace(args=(model.args[0].at[0].multiply(1e3),))
    expected = jit(qfun.evaluate)(assignment, state, model.params, *outlier.args)
    assert_equal(served(outlier, frozen), expected)
    held = {(n, f) for n, fields in frozen.state.items() for f in fields}
    assert held == {(n, "lhs") for n in sites if not n.endswith("dot_general")} | {
        (n, f) for n in sites if n.endswith("dot_general") for f in ("lhs", "rhs")
    }


def test_bounds_of_weights_come_from_the_state():
    model, sites = built("mlp")
    running = aqs.Quantizer("int4", calibration=aqs.running_max(aqs.absmax()))
    assignment = aqs.assign(sites, [(".*", {"weight": running, "activation": None})])
    qfun = aqs.quantize_with_state(model.fun)
    state = qfun.init(assignment, model.params, *model.args)
    doubled = jax.tree.map(lambda p: 2 * p, model.params)
    _, state = jit(qfun.apply)(assignment, state, doubled, *model.args)
    frozen = frozen_of(model, assignment, state)
    expected = jit(qfun.evaluate)(assignment, state, model.params, *model.args)
    assert_equal(served(model, frozen), expected)
    scale = frozen.weights["out"]["rhs"].scale
    np.testing.assert_allclose(scale, 2 * np.abs(model.params["out"]).max(0)[None] / 7, rtol=1e-6)
    assert frozen.state == {name: {} for name in sites}


# --- Under transformations ------------------------------------------------------------------------


def test_eager_jit_vmap_and_pmap_agree():
    model, sites = built("remat")
    model = model._replace(args=(sample(6, 8),))
    q = aqs.Quantizer("int8", calibration=aqs.fixed(4.0))  # a shard's scale is that of the batch
    assignment = aqs.assign(sites, [(".*", {"weight": "int4", "activation": q})])
    eager = aqs.freeze(model.fun, assignment, model.params, *model.args)
    frozen = frozen_of(model, assignment)
    assert_equal(frozen, eager)
    serve, (x,) = aqs.serve(model.fun, execution="emulated"), model.args
    expected = served(model, frozen)
    np.testing.assert_allclose(serve(frozen, x), expected, rtol=1e-6, atol=1e-6)
    rows = jit(jax.vmap(lambda row: serve(frozen, row[None])[0]))(x)
    np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-6)
    shards = jax.pmap(serve, in_axes=(None, 0))(frozen, x.reshape(2, 3, 8))
    np.testing.assert_allclose(shards.reshape(6, 8), expected, rtol=1e-6, atol=1e-6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), frozen, frozen)
    both = jit(jax.vmap(serve, (0, None)))(stacked, x)  # two frozen models at once
    np.testing.assert_allclose(both, jnp.stack([expected, expected]), rtol=1e-6, atol=1e-6)


def test_a_static_model_is_served_without_reductions():
    model, sites = built("mlp")
    static = aqs.Quantizer("int8", calibration=aqs.moving_average(aqs.absmax()))
    texts = {}
    for case, activation in (("static", static), ("dynamic", "int8")):
        assignment = aqs.assign(sites, [(".*", {"weight": "int4", "activation": activation})])
        qfun = aqs.quantize_with_state(model.fun)
        state = qfun.init(assignment, model.params, *model.args)
        _, state = qfun.apply(assignment, state, model.params, *model.args)
        # Outside of jit, where it is known that calibration has told all bounds.
        frozen = aqs.freeze(model.fun, assignment, model.params, *model.args, state=state)
        lowered = jax.jit(aqs.serve(model.fun)).lower(frozen, *model.args)
        texts[case] = lowered.compile().as_text()
    assert len(re.findall(r" reduce\(", texts["dynamic"])) >= 2
    assert not re.findall(r" reduce\(", texts["static"])


# --- Lookups --------------------------------------------------------------------------------------

# In a table of 200 rows, or of 256, which uint8 indices cannot tell from 0. Those beyond it, too.
INDICES = {
    "uint8": [0, 3, 199, 255], "int8": [0, 3, 127, -1, -128],
    "int16": [0, -1, -200, -201, 200, 300], "uint32": [0, 199, 2**31, 2**32 - 1],
    "int32": [0, -1, -200, -201, 200, 2**31 - 1, -(2**31)],
}  # fmt: skip
LOOKUPS = {
    "fill": lambda table, i: jnp.take(table, i, axis=0, mode="fill"),
    "fill with 0": lambda table, i: jnp.take(table, i, axis=0, mode="fill", fill_value=0.0),
    "fill with -7": lambda table, i: jnp.take(table, i, axis=0, mode="fill", fill_value=-7.0),
    "clip": lambda table, i: jnp.take(table, i, axis=0, mode="clip"),
    "wrap": lambda table, i: jnp.take(table, i.astype(jnp.int32), axis=0, mode="wrap"),
    "in bounds": lambda table, i: table.at[jnp.clip(i, 0, 99)].get(mode="promise_in_bounds"),
    "columns": lambda table, i: jnp.take(table.T, i, axis=1, mode="fill", fill_value=2.5),
    "vmapped": jax.vmap(lambda table, i: jnp.take(table, i, axis=0, mode="clip"), (None, 0)),
    "a row each": jax.vmap(lambda t, i: t.at[i].get(mode="fill", fill_value=0.5), (None, 0)),
}


def look_up(params, indices):
    """Every lookup with every dtype, each a site of its own."""
    found = {}
    for (name, fun), (dtype, i) in itertools.product(LOOKUPS.items(), indices.items()):
        # JAX itself counts from the end in the dtype of the indices.
        counts = jnp.issubdtype(i.dtype, jnp.unsignedinteger) or i.dtype.itemsize > 1
        if counts or name in ("wrap", "clip", "vmapped"):
            found[name, dtype] = fun(params["table"], i)
    return {"/".join(key): value for key, value in found.items()}


@pytest.mark.parametrize(
    "rows, name, dtypes", [(200, "int8", tuple(INDICES)), (256, "int4", ("uint8", "uint32"))]
)
def test_lookups_of_every_mode_and_dtype(rows, name, dtypes):
    params = {"table": sample(rows, 4)}
    indices = {dtype: jnp.asarray(np.array(INDICES[dtype], dtype)) for dtype in dtypes}
    sites = aqs.find_sites(look_up, params, indices)
    assignment = aqs.assign(sites, [(".*", {"weight": name})])
    expected = look_up({"table": aqs.fake_quant(params["table"], name, (0,))}, indices)
    assert len(sites) == len(expected) > 15

    def both(params):
        frozen = aqs.freeze(look_up, assignment, params, indices)
        return aqs.quantize(look_up)(assignment, params, indices), frozen

    quantized, frozen = jit(both)(params)
    assert_equal(quantized, expected)
    assert_equal(jit(aqs.serve(look_up))(frozen, indices), expected)


@pytest.mark.parametrize("dtype", INDICES)
@pytest.mark.parametrize("rows", [200, 256])
def test_take_counts_from_the_end_in_every_dtype(rows, dtype):
    table, indices = sample(rows, 4), np.array(INDICES[dtype], dtype)
    values = np.asarray(aqs.fake_quant(table, "int8", (0,)))
    wide = indices.astype(np.int64)
    inside = (wide >= -rows) & (wide < rows)
    expected = np.where(inside[:, None], values[np.where(inside, wide, 0)], np.nan)
    stored = aqs.quantize_tensor(table, "int8", (0,), row_axes=1)
    np.testing.assert_array_equal(aqs.take(stored, indices), expected)
    np.testing.assert_array_equal(aqs.take(table, indices, table_format="int8"), expected)


# --- What is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", ["int4", "int8", "e4m3", "mxfp4", "nvfp4", "zero points"])
@pytest.mark.parametrize("name", ["mlp", "linen conv", "linen scan", "embedding"])
def test_bytes_are_those_that_cost_counts(name, formats):
    model, sites = built(name)
    assignment = assigned(sites, formats)
    frozen = jax.eval_shape(
        lambda p: aqs.freeze(model.fun, assignment, p, *model.args), model.params
    )
    weights = stored_weights(frozen)
    stored = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for q in weights
                 for leaf in jax.tree.leaves(q))  # fmt: skip
    counted = aqs.cost.weight_bytes(sites, assignment)
    # Packed codes fill whole bytes: of every row, and of every slice of a scan.
    rows = sum(int(np.prod(q.data.shape[:-1])) for q in weights)
    assert counted <= stored <= counted + rows
    scan = 2 if name == "linen scan" else 1
    for q in weights:
        data = int(np.prod(q.data.shape)) * q.data.dtype.itemsize
        rows = int(np.prod(q.data.shape[:-1]))
        exact = scan * np.prod(q.shape) * q.fmt.bits / 8
        assert exact <= data <= exact + rows


def tied_table(params, tokens):
    return params["w"][tokens] @ params["w"].T


def called_twice(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"]


def prompt_and_loop(params, x):
    half = jnp.tanh(x @ params["w"])
    return jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["w"])), (0, half)
    )[1]


def layers_and_loop(params, x):
    """A prompt goes through scanned layers once, and each step of the loop after it does."""

    def layers(x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    return jax.lax.fori_loop(0, 2, lambda _, x: layers(x), layers(x))


def transposed_kernel(params, x):
    """Blocks along another axis of the array are another quantization."""
    return (x @ params["w"]) @ params["w"].T


def halves(params, x):
    return (x @ params["w"][0]) * (x @ params["w"][1])


TOKENS = jnp.array([[0, 3, 10], [7, 7, 1]])
# A function, its weight's shape, its data, a format, and how many copies are stored.
SHARED = {
    "a tied table": (tied_table, (11, 8), TOKENS, "int8", 1),
    "a tied table of packed codes": (tied_table, (11, 8), TOKENS, "int3", 1),
    "a tied table in mxfp4": (tied_table, (11, 32), TOKENS, "mxfp4", 1),
    "a layer that is called twice": (called_twice, (8, 8), sample(5, 8), "int4", 1),
    "a prompt and a loop": (prompt_and_loop, (8, 8), sample(5, 8), "int8", 1),
    "scanned layers": (layers_and_loop, (3, 8, 8), sample(5, 8), "int4", 1),
    "a kernel and its transpose": (transposed_kernel, (8, 8), sample(5, 8), "int4", 2),
    "per tensor": (
        transposed_kernel, (8, 8), sample(5, 8),
        aqs.Quantizer("int4", granularity=aqs.PER_TENSOR), 1,
    ),
    "halves of a parameter": (halves, (2, 8, 8), sample(5, 8), "int8", 2),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
def test_what_several_sites_use_is_stored_once(case):
    fun, shape, data, fmt, copies = SHARED[case]
    params = {"w": sample(*shape, seed=1)}
    sites = aqs.find_sites(fun, params, data)
    rule = {"weight": fmt, "activation": "int8"}
    assignment = aqs.assign(sites, [(".*", rule)])
    frozen = jit(lambda p: aqs.freeze(fun, assignment, p, data))(params)
    weights = stored_weights(frozen)
    assert len(weights) == copies
    assert is_dropped(frozen.params["w"])
    expected = jit(aqs.quantize(fun))(assignment, params, data)
    for execution in ("emulated", "auto"):
        served = jit(aqs.serve(fun, execution=execution))(frozen, data)
        np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)
    rows = sum(int(np.prod(q.data.shape[:-1])) for q in weights)
    counted = aqs.cost.weight_bytes(sites, assignment)
    if case != "a kernel and its transpose":  # which the cost takes for one
        assert counted <= frozen.nbytes <= counted + rows
    two = jax.tree.map(lambda a, b: jnp.stack([a, b]), frozen, frozen)
    both = jit(jax.vmap(aqs.serve(fun, execution="emulated"), (0, None)))(two, data)
    np.testing.assert_allclose(both[1], expected, rtol=1e-5, atol=1e-5)


class Translator(nn.Module):
    """Tied embeddings; the encoder can be called alone."""

    def setup(self):
        self.embed = nn.Embed(11, 8)
        self.encoder = nn.Dense(8)
        self.decoder = nn.Dense(8)

    def encode(self, tokens):
        return jnp.tanh(self.encoder(self.embed(tokens)))

    def decode(self, hidden):
        return self.embed.attend(jnp.tanh(self.decoder(hidden)))

    def __call__(self, tokens):
        return self.decode(self.encode(tokens))


def test_a_part_of_a_model_takes_the_formats_and_weights_of_the_whole():
    model, hidden = Translator(), sample(2, 3, 8)
    params = filled(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
    encode = functools.partial(model.apply, method="encode")
    decode = functools.partial(model.apply, method="decode")
    sites = aqs.find_sites(model.apply, params, TOKENS)
    rule = {"weight": "int4", "activation": "int8"}
    assignment = aqs.assign(sites, [("embed/embedding#2", "int8"), (".*", rule)])
    frozen = aqs.freeze(model.apply, assignment, params, TOKENS)
    for part, data, lookup in ((encode, TOKENS, True), (decode, hidden, False)):
        own = aqs.find_sites(part, params, data)
        assert "embed/embedding" in own  # once in a part: without a number
        embedding = "int4" if lookup else "int8"
        expected = aqs.assign(own, [("embed/embedding", embedding), (".*", rule)])
        plain = jit(aqs.quantize(part))(expected, params, data)
        served = jit(aqs.serve(part, execution="emulated"))(frozen, data)
        np.testing.assert_allclose(served, plain, rtol=1e-6, atol=1e-6)
        # An assignment does not tell which of the two is the lookup.
        with pytest.raises(SiteError, match=r"'embed/embedding' is none of embed/embedding#1, emb"):
            aqs.quantize(part)(assignment, params, data)
    everywhere = aqs.assign(sites, [(".*", rule)])
    own = aqs.assign(aqs.find_sites(encode, params, TOKENS), [(".*", rule)])
    np.testing.assert_array_equal(
        jit(functools.partial(aqs.quantize(encode), everywhere))(params, TOKENS),
        jit(functools.partial(aqs.quantize(encode), own))(params, TOKENS),
    )
    whole = jit(aqs.serve(model.apply, execution="emulated"))(
        aqs.freeze(model.apply, everywhere, params, TOKENS), TOKENS
    )
    np.testing.assert_allclose(
        whole, jit(aqs.quantize(model.apply))(everywhere, params, TOKENS), rtol=1e-6, atol=1e-6
    )
    for wrong in ("decoder/kernl", "encoder/bias", "elsewhere/dot_general"):
        with pytest.raises(SiteError, match=rf"names site '{wrong}', which the function does not"):
            aqs.quantize(encode)({**own, wrong: own["encoder/kernel"]}, params, TOKENS)
    part = dataclasses.replace(aqs.freeze(encode, own, params, TOKENS), params=frozen.params)
    with pytest.raises(SiteError, match=r"in codes only, at a site that.*has not: (dec|emb)"):
        aqs.serve(model.apply)(part, TOKENS)


class Pool(nn.Module):
    """Attention of learned queries to a batch, as in the heads of ViTs and in DETR."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        probe = self.param("probe", nn.initializers.normal(1.0), (1, 3, 8))
        probe = jnp.tile(probe, (len(x), 1, 1))
        probe = nn.Dropout(self.dropout, deterministic=not train)(nn.LayerNorm()(probe))
        attention = nn.MultiHeadDotProductAttention(2, name="attention")
        return nn.Dense(4, name="out")(attention(probe, x)[:, 0])


@pytest.mark.parametrize("raw_key", [False, True])
def test_a_learned_query_does_not_know_of_the_batch_or_of_dropout(raw_key):
    model = Pool(0.5)
    batches = {size: sample(size, 5, 8, seed=size) for size in (1, 2, 7)}
    params = filled(jax.eval_shape(model.init, jax.random.key(0), batches[1]))
    sites = {n: aqs.find_sites(model.apply, params, x) for n, x in batches.items()}
    key = jax.random.PRNGKey(1) if raw_key else jax.random.key(1)
    rngs = {"dropout": key}
    trained = aqs.find_sites(model.apply, params, batches[7], train=True, rngs=rngs)
    assert "attention/query/kernel@probe" in trained
    for found in (*sites.values(), trained):
        assert list(found) == list(sites[1])
        assert {n: s.weight and s.weight.size for n, s in found.items()} == {
            n: s.weight and s.weight.size for n, s in sites[1].items()
        }
    assignment = assigned(sites[1], "mixed")
    for size, other in ((1, 7), (7, 2)):
        frozen = aqs.freeze(model.apply, assignment, params, batches[size])
        x = batches[other]
        expected = jit(aqs.quantize(model.apply))(assignment, params, x)
        for execution in ("emulated", "auto"):
            actual = jit(aqs.serve(model.apply, execution=execution))(frozen, x)
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(SiteError, match=r"random bits.*as it is in evaluation"):
        aqs.freeze(model.apply, assignment, params, batches[7], train=True, rngs=rngs)


def test_sites_of_one_parameter_in_two_formats_are_stored_apart():
    params, x = {"w": sample(8, 8)}, sample(5, 8)
    sites = aqs.find_sites(called_twice, params, x)
    assignment = aqs.assign(sites, [("w#1", {"weight": "int8"}), ("w#2", {"weight": "int4"})])
    frozen = aqs.freeze(called_twice, assignment, params, x)
    assert [q.fmt.bits for q in stored_weights(frozen)] == [8, 4]
    assert frozen.nbytes == aqs.cost.weight_bytes(sites, assignment)


def test_a_parameter_that_is_read_elsewhere_stays():
    def fun(params, x):
        return x @ params["a"] + params["a"].sum() + (x @ params["b"]) @ params["b"].T

    params, x = {"a": sample(8, 8), "b": sample(8, 8, seed=1)}, sample(5, 8)
    sites = aqs.find_sites(fun, params, x)
    int4 = aqs.numeric_format("int4")
    everything = dict.fromkeys(sites, SiteFormats(None, int4))
    frozen = jit(lambda p: aqs.freeze(fun, everything, p, x))(params)
    assert is_dropped(frozen.params["b"])
    np.testing.assert_array_equal(frozen.params["a"], params["a"])
    one = {"b#1": SiteFormats(None, int4)}
    frozen = jit(lambda p: aqs.freeze(fun, one, p, x))(params)
    np.testing.assert_array_equal(frozen.params["b"], params["b"])
    assert set(frozen.weights) == {"b#1"}
    expected = jit(aqs.quantize(fun))(one, params, x)
    assert_equal(jit(aqs.serve(fun, execution="emulated"))(frozen, x), expected)


def test_nothing_to_store():
    model, _ = built("mlp")
    frozen = aqs.freeze(model.fun, {}, model.params, *model.args)
    assert frozen.weights == {}
    assert_equal(frozen.params, model.params)
    assert_equal(served(model, frozen), jit(model.fun)(model.params, *model.args))


def test_data_may_be_abstract():
    model, sites = built("mlp")
    assignment = assigned(sites, "int4")
    abstract = jax.ShapeDtypeStruct(model.args[0].shape, np.float32)
    frozen = frozen_of(model._replace(args=(abstract,)), assignment)
    assert_equal(frozen, frozen_of(model, assignment))


def test_another_batch_size_is_served():
    model, sites = built("mlp")
    assignment = assigned(sites, "int4")
    more = model._replace(args=(sample(9, 12, seed=7),))
    expected = jit(aqs.quantize(model.fun))(assignment, model.params, *more.args)
    assert_equal(served(more, frozen_of(model, assignment)), expected)


# --- On disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, formats", [("mlp", "mxfp4"), ("linen scan", "e4m3"),
                                           ("linen conv", "static"), ("nnx", "nvfp4")])  # fmt: skip
def test_orbax_saves_and_restores(name, formats, tmp_path):
    model, sites = built(name)
    state = None
    if formats == "static":
        q = aqs.Quantizer("int8", calibration=aqs.delayed(aqs.absmax(), 3))
        assignment = aqs.assign(sites, [(".*", {"weight": "int4", "activation": q})])
        qfun = aqs.quantize_with_state(model.fun)
        state = qfun.init(assignment, model.params, *model.args)
        _, state = jit(qfun.apply)(assignment, state, model.params, *model.args)
    else:
        assignment = assigned(sites, formats)
    frozen = frozen_of(model, assignment, state)
    abstract = jax.eval_shape(
        lambda p: aqs.freeze(model.fun, assignment, p, *model.args, state=state), model.params
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "frozen", frozen)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "frozen", abstract)
    assert_equal(restored, frozen)
    assert_equal(served(model, restored), served(model, frozen))


def test_files_are_as_small_as_the_codes(tmp_path):
    params, x = {"a": sample(256, 256), "b": sample(256, 256, seed=1)}, sample(4, 256)

    def fun(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    assignment = aqs.assign(aqs.find_sites(fun, params, x), [(".*", "int4")])
    frozen = jit(lambda p: aqs.freeze(fun, assignment, p, x))(params)
    sizes = []
    with ocp.StandardCheckpointer() as checkpointer:
        for name, tree in (("float", params), ("frozen", frozen)):
            checkpointer.save(tmp_path / name, tree)
            checkpointer.wait_until_finished()
            files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
            sizes.append(sum(path.stat().st_size for path in files))
    assert frozen.nbytes == 2 * (256 * 256 // 2 + 256 * 4)
    # A checkpoint has some kilobytes of metadata.
    assert sizes[1] <= frozen.nbytes + 32 * 1024 < 0.25 * sizes[0]


# --- Refusals -------------------------------------------------------------------------------------


def test_a_weight_that_a_loop_changes_is_refused():
    def fun(params, x):
        def step(carry, _):
            x, w = carry
            return (jnp.tanh(x @ w), 0.9 * w), None

        return jax.lax.scan(step, (x, params["w"]), None, length=2)[0][0]

    params, x = {"w": sample(4, 4)}, sample(5, 4)
    assignment = aqs.assign(aqs.find_sites(fun, params, x), [(".*", {"weight": "int4"})])
    with pytest.raises(SiteError, match=r"rhs weight of site 'w'.*earlier iteration.*outside"):
        aqs.freeze(fun, assignment, params, x)
    frozen = aqs.freeze(fun, {"w": SiteFormats(aqs.numeric_format("int8"))}, params, x)
    assert frozen.weights == {}


def test_wrong_arguments():
    model, sites = built("mlp")
    freeze = functools.partial(aqs.freeze, model.fun)
    assignment = assigned(sites, "int4")
    with pytest.raises(aqs.FormatError, match="freeze needs a concrete format"):
        jax.jit(freeze)(assignment, model.params, *model.args)
    with pytest.raises(aqs.FormatError, match="12 bits and no storage dtype"):
        freeze({"out": SiteFormats(None, aqs.numeric_format("e5m6"))}, model.params, *model.args)
    with pytest.raises(SiteError, match=r"names site 'kernel'.*Nearest"):
        freeze({"kernel": assignment["out"]}, model.params, *model.args)
    static = aqs.Quantizer("int8", calibration=aqs.delayed(aqs.absmax()))
    stateful = aqs.assign(sites, [(".*", {"weight": "int4", "activation": static})])
    with pytest.raises(SiteError, match=r"'first/kernel': the calibration of lhs has state.*Pass"):
        freeze(stateful, model.params, *model.args)
    with pytest.raises(ValueError, match="Unknown execution 'fast'"):
        aqs.serve(model.fun, execution="fast")
    frozen = frozen_of(model, assignment)
    alone = dataclasses.replace(frozen, params={"out": frozen.params["out"]})
    with pytest.raises(SiteError, match="names site 'first/kernel', which the function does not"):
        aqs.serve(lambda p, x: x @ p["out"])(alone, sample(5, 16))


def test_a_state_of_something_else_is_refused():
    model, sites = built("mlp")
    static = aqs.Quantizer("int8", calibration=aqs.delayed(aqs.absmax()))
    stateful = aqs.assign(sites, [(".*", {"weight": "int4", "activation": static})])
    state = aqs.quantize_with_state(model.fun).init(stateful, model.params, *model.args)
    wrong = state | {"elsewhere": state["out"]}
    with pytest.raises(SiteError, match="elsewhere"):
        aqs.freeze(model.fun, stateful, model.params, *model.args, state=wrong)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_stochastic_activations_are_frozen_with_their_key(make_key):
    model, sites = built("mlp")
    q = aqs.Quantizer("int4", rounding="stochastic")
    rules = [(".*", {"weight": "int4", "activation": q})]
    serve = jit(aqs.serve(model.fun, execution="emulated"))
    for seed in (3, 4):
        assignment = aqs.with_keys(aqs.assign(sites, rules), make_key(seed))
        expected, frozen = trained_and_frozen(model, assignment)
        assert_equal(serve(frozen, *model.args), expected)
    assert serve._cache_size() == 1  # keys are data
