"""The transformation: one table of models under every JAX transformation, then names and refusals.

Every model is built around its products, so the same code with `aqs.dot_general` and
`aqs.conv_general_dilated` in their place is the reference for the quantized function.
"""

import collections
import functools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import aqt_search as aqs
from aqt_search import SiteError, SiteFormats

# What XLA makes of the programs is not the question here: the least of LLVM's work will do.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

NAMES = ["int3", "int4", "int8", "uint8", "e2m1", "e4m3", "e5m2", "bf16"]


class Products(NamedTuple):
    dot_general: Any
    conv_general_dilated: Any

    def matmul(self, x, w):
        return self.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


PLAIN = Products(jax.lax.dot_general, jax.lax.conv_general_dilated)


def quantized_products(lhs, rhs):
    formats = {"lhs_format": lhs, "rhs_format": rhs}
    return Products(
        functools.partial(aqs.dot_general, **formats),
        functools.partial(aqs.conv_general_dilated, **formats),
    )


def sample(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def square(count=1, size=4):
    weights = sample(count, size, size, seed=1) / size**0.5
    return weights if count > 1 else weights[0]


# --- The models -----------------------------------------------------------------------------------


class Model(NamedTuple):
    fun: Any
    params: Any
    args: tuple


def plain_mlp(products):
    def fun(params, x):
        x = jnp.tanh(
            products.matmul(x, params["hidden"]["kernel"]) + params["hidden"]["bias"][None]
        )
        return products.matmul(x, params["out"])

    hidden = {"kernel": square(), "bias": sample(4, seed=2)}
    return Model(fun, {"hidden": hidden, "out": sample(4, 3, seed=3)}, (sample(5, 4),))


def plain_scan(products):
    def fun(params, x):
        def layer(x, w):
            y = jnp.tanh(products.matmul(x, w))
            return y, y.sum()

        x, sums = jax.lax.scan(layer, x, params["layers"])
        last, _ = jax.lax.scan(layer, x, params["layers"], reverse=True)
        return last, sums

    return Model(fun, {"layers": square(3)}, (sample(5, 4),))


def plain_cond(products):
    def fun(params, x):
        def left(x):
            return products.matmul(x, params["left"])

        x = jax.lax.cond(x[0, 0] > 100.0, left, lambda x: products.matmul(x, params["right"]), x)
        return jax.lax.switch(2, [left, jnp.sin, lambda x: products.matmul(x, params["third"])], x)

    weights = {"left": square(), "right": 2 * square(), "third": 3 * square()}
    return Model(fun, weights, (sample(5, 4),))


def plain_while(products):
    def fun(params, x):
        def body(carry):
            i, x = carry
            return i + 1, jnp.tanh(products.matmul(x, params["w"]))

        def test(carry):
            return (carry[0] < 3) & (products.matmul(carry[1], params["test"]).sum() < 1e9)

        return jax.lax.while_loop(test, body, (0, x))[1]

    return Model(fun, {"w": square(), "test": square()}, (sample(5, 4),))


def plain_fori(products):
    def fun(params, x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(products.matmul(x, params["w"])), x)

    return Model(fun, {"w": square()}, (sample(5, 4),))


def plain_nested(products):
    """jit in remat in scan in cond in jit."""

    def fun(params, x):
        @jax.checkpoint
        def block(x, w):
            inner = jax.jit(lambda x, w: jnp.tanh(products.matmul(x, w)))
            return inner(inner(x, w), params["shared"])

        def loop(x):
            return jax.lax.scan(lambda x, w: (block(x, w), None), x, params["layers"])[0]

        return jax.jit(lambda x: jax.lax.cond(x.sum() < 1e9, loop, jnp.cos, x))(x)

    return Model(fun, {"layers": square(3), "shared": square()}, (sample(5, 4),))


def plain_custom_rules(products):
    """Custom derivatives between the products are kept; these are wrong on purpose."""

    @jax.custom_vjp
    def triple(x):
        return 3 * x

    triple.defvjp(lambda x: (3 * x, None), lambda _, g: (7 * g,))

    def fun(params, x):
        return products.matmul(triple(jax.nn.relu(products.matmul(x, params["a"]))), params["b"])

    return Model(fun, {"a": square(), "b": square()}, (sample(5, 4),))


def plain_convolution(products):
    def fun(params, x):
        convolve = functools.partial(
            products.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = convolve(x, params["kernel"], (2, 2), "SAME")
        return convolve(x, params["depthwise"], (1, 1), "VALID", feature_group_count=4)

    params = {"kernel": sample(3, 3, 2, 4, seed=1), "depthwise": sample(2, 2, 1, 4, seed=2)}
    return Model(fun, params, (sample(2, 8, 8, 2),))


def plain_bf16(products):
    model = plain_mlp(products)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model.params)
    return Model(model.fun, half, (model.args[0].astype(jnp.bfloat16),))


class ConvNet(nn.Module):
    products: Products
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(
            nn.Conv, conv_general_dilated=self.products.conv_general_dilated, use_bias=False
        )
        x = conv(4, (3, 3), name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name, name="bn")(x)
        x = conv(4, (3, 3), strides=2, feature_group_count=2, name="grouped")(nn.relu(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3, dot_general=self.products.dot_general, name="head")(x)


@functools.cache
def conv_variables():
    return jax.jit(ConvNet(PLAIN).init, static_argnums=2)(
        jax.random.key(0), jnp.ones((1, 8, 8, 3)), False
    )


def linen_conv(products, axis_name=None):
    model, x = ConvNet(products, axis_name), sample(4, 8, 8, 3)

    def fun(variables, x, key):
        return model.apply(variables, x, True, mutable=["batch_stats"], rngs={"dropout": key})

    return Model(fun, conv_variables(), (x, jax.random.key(1)))


class Block(nn.Module):
    products: Products

    @nn.compact
    def __call__(self, x, _=None):
        dot = self.products.dot_general
        attention = nn.MultiHeadDotProductAttention(
            num_heads=2, qkv_dot_general=dot, out_dot_general=dot, name="attention"
        )
        x = x + attention(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], dot_general=dot, name="mlp")(x), None


class Transformer(nn.Module):
    products: Products
    form: str

    @nn.compact
    def __call__(self, x):
        if self.form == "scan":
            stack = nn.scan(
                nn.remat(Block), length=2, variable_axes={"params": 0}, split_rngs={"params": True}
            )
            return stack(self.products, name="blocks")(x, None)[0]
        block = nn.remat(Block) if self.form == "remat" else Block
        return block(self.products, name="block")(x)[0]


@functools.cache
def transformer_variables(form):
    return jax.jit(Transformer(PLAIN, form).init)(jax.random.key(0), jnp.ones((2, 5, 4)))


def linen_transformer(form, products):
    model = Transformer(products, form)
    return Model(model.apply, transformer_variables(form), (sample(2, 5, 4),))


class NnxNet(nnx.Module):
    def __init__(self, products, rngs):
        linear = functools.partial(nnx.Linear, dot_general=products.dot_general, rngs=rngs)
        self.blocks = nnx.List([linear(4, 4), linear(4, 4)])
        self.conv = nnx.Conv(
            4, 4, (3,), conv_general_dilated=products.conv_general_dilated, rngs=rngs
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = linear(4, 3)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.head(self.norm(self.conv(x)))


@functools.cache
def plain_nnx_net():
    return NnxNet(PLAIN, nnx.Rngs(0))


def nnx_net(products):
    # abstract: the parameters are those of the plain net for any products
    graph, _, _ = nnx.split(nnx.eval_shape(lambda: NnxNet(products, nnx.Rngs(0))), nnx.Param, ...)
    _, params, rest = nnx.split(plain_nnx_net(), nnx.Param, ...)

    def fun(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)  # statistics are updated in place
        y = model(x)
        return y, nnx.state(model, nnx.BatchStat)

    return Model(fun, params, (rest, sample(2, 6, 4)))


MODELS = {
    "mlp": plain_mlp,
    "scan": plain_scan,
    "cond": plain_cond,
    "while": plain_while,
    "fori": plain_fori,
    "nested": plain_nested,
    "custom rules": plain_custom_rules,
    "convolution": plain_convolution,
    "bf16": plain_bf16,
    "linen conv": linen_conv,
    "linen attention": functools.partial(linen_transformer, "plain"),
    "linen remat": functools.partial(linen_transformer, "remat"),
    "linen scan": functools.partial(linen_transformer, "scan"),
    "nnx": nnx_net,
}
# Compiling dominates: where one transformer can speak for all it is that with remat and scan.
DISTINCT = [name for name in MODELS if name not in ("linen attention", "linen remat")]
# Products of two activations: the reference has none, so they are left as they are there.
ATTENTION = re.compile("dot_general$")


@functools.cache
def built(name):
    model = MODELS[name](PLAIN)
    return model, aqs.find_sites(model.fun, model.params, *model.args)


def uniform(sites, lhs, rhs):
    """One pair of formats for every product with a weight, signed as written."""
    formats = SiteFormats(*(aqs.Quantizer(name, unsigned=False) for name in (lhs, rhs)))
    return {name: SiteFormats() if ATTENTION.search(name) else formats for name in sites}


def random_assignments(sites, count):
    """Formats drawn from a table, as arrays, for all operands of all sites."""
    rng, table = np.random.default_rng(0), aqs.stack_formats(NAMES)

    def draw(_):
        index = rng.integers(len(NAMES))
        return jax.tree.map(lambda column: column[index], table)

    return [{name: SiteFormats(draw(0), draw(1)) for name in sites} for _ in range(count)]


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(actual, expected, tolerance=1e-5):
    """Differs by the order of float32 sums of a few terms only."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
            )


def total(outputs):
    """A scalar of all floating outputs, to differentiate."""
    leaves = [a for a in jax.tree.leaves(outputs) if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in leaves)


# --- Every model under every transformation -------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_identity_is_exact(name):
    model, sites = built(name)
    expected = jit(model.fun)(model.params, *model.args)
    for assignment in ({}, dict.fromkeys(sites, SiteFormats())):
        qfun = functools.partial(aqs.quantize(model.fun), assignment)
        assert_equal(jit(qfun)(model.params, *model.args), expected)
    if not name.startswith("linen"):  # op by op it is the same programs, but slow to compile
        assert_equal(qfun(model.params, *model.args), model.fun(model.params, *model.args))


@pytest.mark.parametrize("formats", [("e4m3", "int4")])
@pytest.mark.parametrize("name", MODELS)
def test_formats_are_applied_as_a_model_written_with_our_products_does(name, formats):
    model, sites = built(name)
    reference = MODELS[name](quantized_products(*formats))
    expected = jit(reference.fun)(reference.params, *reference.args)
    actual = jit(aqs.quantize(model.fun))(uniform(sites, *formats), model.params, *model.args)
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert_close(actual, expected)
    plain = jit(model.fun)(model.params, *model.args)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(plain), actual))


@pytest.mark.parametrize("name", DISTINCT)
def test_jit_equals_eager_and_compiles_once(name):
    model, sites = built(name)
    traces = []

    def counted(params, *args):
        traces.append(None)
        return model.fun(params, *args)

    jitted = jit(aqs.quantize(counted))
    assignments = random_assignments(sites, 50)
    outputs = [jitted(assignment, model.params, *model.args) for assignment in assignments]
    assert len(traces) == jitted._cache_size() == 1
    # bf16 sums round at 2^-8, in an order that fusion changes.
    tolerance = 0.03 if name == "bf16" else 1e-5
    eager = aqs.quantize(model.fun)(assignments[0], model.params, *model.args)
    assert_close(outputs[0], eager, tolerance)


@pytest.mark.parametrize("name", DISTINCT)
def test_vmap_over_assignments_equals_the_loop(name):
    model, sites = built(name)
    assignments = random_assignments(sites, 4)

    def qfun(assignment):
        return jax.tree.leaves(aqs.quantize(model.fun)(assignment, model.params, *model.args))

    loop = jax.tree.map(lambda *rows: jnp.stack(rows), *map(jit(qfun), assignments))
    stacked = jax.tree.map(lambda *columns: jnp.stack(columns), *assignments)
    batched = jit(jax.vmap(qfun))(stacked)
    assert_close(batched, loop, 0.03 if name == "bf16" else 1e-5)


@pytest.mark.parametrize("name", [n for n in [*DISTINCT, "linen remat"] if n != "while"])
def test_gradients(name):
    model, sites = built(name)
    reference = MODELS[name](quantized_products("int8", "int4"))

    def loss(fun, params):
        return total(fun(params, *model.args))

    quantized = functools.partial(aqs.quantize(model.fun), uniform(sites, "int8", "int4"))
    value, gradient = jit(jax.value_and_grad(functools.partial(loss, quantized)))(model.params)
    expected = jit(jax.value_and_grad(functools.partial(loss, reference.fun)))(reference.params)
    tolerance = 0.05 if name == "bf16" else 1e-4
    assert_close(jax.tree.leaves((value, gradient)), jax.tree.leaves(expected), tolerance)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        if re.search("left|batch_stats|key.*bias", jax.tree_util.keystr(path)):
            continue  # not taken; statistics; softmax does not see a shift of all its inputs
        assert np.abs(np.asarray(leaf, np.float32)).max() > 0, path


@pytest.mark.parametrize("name", ["mlp", "nested", "linen conv"])
def test_value_and_gradient_inside_remat(name):
    model, sites = built(name)
    quantized = functools.partial(aqs.quantize(model.fun), uniform(sites, "int8", "int4"))

    def step(params):
        return jax.value_and_grad(lambda p: total(quantized(p, *model.args)))(params)

    expected = jit(step)(model.params)
    assert_close(jit(jax.checkpoint(step))(model.params), expected, 1e-4)


# A custom_vjp function has no forward derivative.
@pytest.mark.parametrize("name", [n for n in DISTINCT if n != "custom rules"])
def test_forward_derivative(name):
    model, sites = built(name)
    reference = MODELS[name](quantized_products("int8", "int4"))

    def push(fun, params):
        def out(params):
            return total(fun(params, *model.args))

        tangent = jax.tree.map(lambda p: jnp.cos(p.astype(jnp.float32)).astype(p.dtype), params)
        return jax.jvp(out, (params,), (tangent,))

    quantized = functools.partial(aqs.quantize(model.fun), uniform(sites, "int8", "int4"))
    actual = jit(functools.partial(push, quantized))(model.params)
    expected = jit(functools.partial(push, reference.fun))(reference.params)
    assert_close(actual, expected, 0.1 if name == "bf16" else 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_names_are_stable(name):
    model, sites = built(name)
    again = aqs.find_sites(model.fun, model.params, *model.args)
    assert list(again.items()) == list(sites.items())
    abstract = jax.eval_shape(lambda: (model.params, model.args))
    assert aqs.find_sites(model.fun, abstract[0], *abstract[1]) == sites
    seen = []

    def under(params, *args):
        seen.append(list(aqs.find_sites(model.fun, params, *args)))
        return total(params)

    with jax.named_scope("outside"):
        jax.jit(jax.grad(under) if name != "while" else under)(model.params, *model.args)
    batched = jax.tree.map(lambda p: p[None], model.params)
    jax.vmap(under, (0,) + (None,) * len(model.args))(batched, *model.args)
    assert seen == [list(sites)] * 2


def test_names():
    names = {name: list(built(name)[1]) for name in MODELS}
    assert names["mlp"] == ["hidden/kernel", "out"]
    assert names["scan"] == ["layers#1", "layers#2"]
    assert names["cond"] == ["right", "left#1", "left#2", "third"]
    assert names["while"] == ["test", "w"]
    assert names["nested"] == ["layers", "shared"]
    assert names["linen conv"] == ["stem/kernel", "grouped/kernel", "head/kernel"]
    assert names["nnx"] == ["blocks/0/kernel", "blocks/1/kernel", "conv/kernel", "head/kernel"]
    block = ["query/kernel", "key/kernel", "value/kernel", "dot", "dot", "out/kernel"]
    for form, prefix in (("attention", "block"), ("scan", "blocks")):
        found = names[f"linen {form}"]
        assert found[-1] == f"{prefix}/mlp/kernel"
        for name, part in zip(found, block):
            if part == "dot":
                assert name.startswith(f"{prefix}/attention/")
                assert name.endswith("/dot_general")
            else:
                assert name == f"{prefix}/attention/{part}"
    assert names["linen remat"] == names["linen attention"]


# --- pmap and mapped axes -------------------------------------------------------------------------


def test_pmap_with_batch_norm_and_shared_scales_gives_the_result_of_one_device():
    model, sites = built("linen conv")
    sharded = linen_conv(PLAIN, axis_name="batch")
    images, key = model.args
    whole = aqs.quantize(model.fun)
    shard = aqs.quantize(sharded.fun, axis_name="batch")
    assignment = uniform(sites, "int8", "int4")
    _, expected = whole(assignment, model.params, images, key)
    mapped = jax.pmap(functools.partial(shard, assignment), "batch", in_axes=(None, 0, None))
    # Logits differ, as each shard draws its own dropout; the statistics see both layers before it.
    _, statistics = mapped(model.params, images.reshape(2, 2, 8, 8, 3), key)
    for device in range(2):
        assert_close(jax.tree.map(lambda s, d=device: s[d], statistics), expected)


def test_an_axis_that_is_not_bound_is_named():
    sites = built("linen conv")[1]
    sharded = linen_conv(PLAIN, axis_name="batch")
    with pytest.raises(SiteError, match=r"mapped axis that is not bound.*axis_sizes=\{'name': 1\}"):
        aqs.find_sites(sharded.fun, sharded.params, *sharded.args)
    with pytest.raises(SiteError, match="batch"):
        aqs.quantize(sharded.fun)({}, sharded.params, *sharded.args)
    found = aqs.find_sites(sharded.fun, sharded.params, *sharded.args, axis_sizes={"batch": 2})
    assert found == sites


def test_each_replica_runs_its_own_assignment():
    model, sites = built("linen conv")
    assignments = random_assignments(sites, 2)
    qfun = aqs.quantize(model.fun)
    stacked = jax.tree.map(lambda *columns: jnp.stack(columns), *assignments)
    mapped = jax.pmap(qfun, in_axes=(0, None, None, None))(stacked, model.params, *model.args)
    for device, assignment in enumerate(assignments):
        expected = jax.jit(qfun)(assignment, model.params, *model.args)
        assert_close(jax.tree.map(lambda leaf, d=device: leaf[d], mapped), expected)


def test_other_name_errors_are_not_taken_for_an_axis():
    with pytest.raises(NameError, match="missing"):
        aqs.find_sites(lambda params, x: missing, jnp.ones(3), jnp.ones(3))  # noqa: F821


# --- What is a site, and what it is called --------------------------------------------------------


def sites_of(fun, params, *args):
    return aqs.find_sites(fun, params, *args)


X, W = sample(5, 4), square()

# A function of weights {a, b} and data, the roles and names of its sites.
WEIGHTS = {
    "cast": (lambda p, x: x.astype(jnp.bfloat16) @ p["a"].astype(jnp.bfloat16), ["a"]),
    "reshape": (lambda p, x: x @ p["a"].reshape(2, 8).reshape(4, 4), ["a"]),
    "transpose": (lambda p, x: x @ p["a"].T, ["a"]),
    "in jit": (lambda p, x: x @ jax.jit(jnp.transpose)(p["a"]), ["a"]),
    "standardized": (lambda p, x: x @ ((p["a"] - p["a"].mean()) / p["a"].std()), ["a"]),
    "gain": (lambda p, x: x @ (p["a"] * p["gain"][None]), ["a"]),
    "low-rank sum": (lambda p, x: x @ (p["a"] + p["up"] @ p["down"]), ["a"]),
    "product of two": (lambda p, x: x @ (p["up"] @ p["down"]), ["down@up"]),
    "chosen": (lambda p, x: x @ jax.lax.cond(True, jnp.sin, jnp.cos, p["a"]), ["a"]),
    "summed in a scan": (
        lambda p, x: x @ jax.lax.scan(lambda c, w: (c + w[None], None), p["a"], p["b"])[0],
        ["a"],
    ),
    "shared": (lambda p, x: x @ p["a"] @ p["a"], ["a#1", "a#2"]),
    "tied": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["a"].T, ["a#1", "a#2"]),
}
PARAMS = {
    "a": square(), "b": 2 * square(), "gain": jnp.ones(4), "up": sample(4, 2), "down": sample(2, 4),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_what_depends_on_parameters_alone_is_a_weight(case):
    fun, names = WEIGHTS[case]
    sites = sites_of(fun, PARAMS, X)
    assert list(sites) == names
    for site in sites.values():
        assert (site.lhs.role, site.rhs.role) == ("activation", "weight")
        assert site.weight is site.rhs
        assert site.rhs.parameter == re.split("[#@]", names[0])[0]
        assert (site.lhs.channel_axes, site.rhs.channel_axes) == ((), (1,))


def test_roles_of_other_operands():
    constant = np.ones((4, 4), np.float32)
    sites = sites_of(lambda p, x: (x @ constant, x.T @ x, p @ x.T, p @ p), W, X)
    assert list(sites) == ["dot_general#1", "dot_general#2", "params"]
    roles = [(site.lhs.role, site.rhs.role) for site in sites.values()]
    assert roles == [
        ("activation", "constant"), ("activation", "activation"), ("weight", "activation"),
    ]  # fmt: skip
    weight_first = sites["params"]
    assert weight_first.weight is weight_first.lhs
    assert (weight_first.lhs.channel_axes, weight_first.rhs.channel_axes) == ((0,), ())
    data_dependent = sites_of(lambda p, x: x @ (p * x.mean()), W, X)
    assert [site.rhs.role for site in data_dependent.values()] == ["activation"]
    chosen_by_data = sites_of(lambda p, x: x @ jnp.where(x.sum() > 0, p, -p), W, X)
    assert [site.rhs.role for site in chosen_by_data.values()] == ["activation"]


def test_a_site_knows_its_shapes_and_work():
    sites = built("scan")[1]
    first = sites["layers#1"]
    assert (first.kind, first.lhs_shape, first.rhs_shape) == ("dot_general", (5, 4), (4, 4))
    assert (first.macs, first.repeats, first.rhs.copies) == (5 * 4 * 4, 3, 3)
    assert [site.repeats for site in built("while")[1].values()] == [None, None]
    assert [site.repeats for site in built("nested")[1].values()] == [3, 3]
    # fori_loop with fixed bounds is a scan.
    assert [site.repeats for site in built("fori")[1].values()] == [3]
    convolution = built("convolution")[1]
    assert convolution["kernel"].macs == 2 * 4 * 4 * 4 * 3 * 3 * 2
    assert convolution["depthwise"].macs == 2 * 3 * 3 * 4 * 2 * 2
    nested = sites_of(
        lambda p, x: jax.lax.scan(
            lambda x, w: (jax.lax.scan(lambda x, v: (x @ v, None), x, w)[0], None), x, p
        )[0],
        square(6).reshape(2, 3, 4, 4), X,
    )  # fmt: skip
    assert [(site.repeats, site.rhs.copies) for site in nested.values()] == [(6, 6)]


def dead_in_scan(p, x):
    def body(carry, _):
        live, dead = carry
        return (live @ p["a"], dead @ p["b"]), None

    return jax.lax.scan(body, (x, x), None, length=2)[0][0]


def dead_in_call(wrap):
    def fun(p, x):
        return wrap(lambda x: (x @ p["a"], x @ p["b"]))(x)[0]

    return fun


DEAD = {
    "plain": lambda p, x: (x @ p["a"], x @ p["b"])[0],
    "chain": lambda p, x: (x @ p["a"], jnp.tanh(x @ p["b"]).sum())[0],
    "jit": dead_in_call(jax.jit),
    "remat": dead_in_call(jax.checkpoint),
    "jit in remat": dead_in_call(lambda f: jax.checkpoint(jax.jit(f))),
    "scan": dead_in_scan,
    "branch": lambda p, x: jax.lax.cond(
        x.sum() > 0, lambda x: (x @ p["a"], x @ p["b"]), lambda x: (x, x), x
    )[0],
}


@pytest.mark.parametrize("case", DEAD)
def test_dead_products_are_no_sites(case):
    sites = sites_of(DEAD[case], PARAMS, X)
    assert list(sites) == ["a"]
    outputs = aqs.quantize(DEAD[case])(uniform(sites, "int4", "int4"), PARAMS, X)
    assert outputs.shape == (5, 4)


def test_a_carry_that_feeds_another_keeps_its_product():
    def fun(p, x):
        def body(carry, _):
            first, second = carry
            return (first + second, second @ p["a"]), None

        return jax.lax.scan(body, (x, x), None, length=2)[0][0]

    assert list(sites_of(fun, PARAMS, X)) == ["a"]


def test_integer_products_are_no_sites():
    assert (
        sites_of(lambda p, x: x @ p, jnp.ones((4, 4), jnp.int32), jnp.ones((5, 4), jnp.int32)) == {}
    )


def test_numbered_names_stay_unique():
    params = {"w": W, "w#1": W}
    sites = sites_of(lambda p, x: x @ p["w"] @ p["w"] @ p["w#1"], params, X)
    assert len(sites) == 3
    assert collections.Counter(s.rhs.parameter for s in sites.values()) == {"w": 2, "w#1": 1}


@pytest.mark.parametrize(
    "params, names",
    [
        (W, ["params"]),
        ({"a": {"kernel": W}}, ["a/kernel"]),
        ((W, {"b": W}), ["0", "1/b"]),
        ([W, [W]], ["0", "1/0"]),
        (FrozenDict({"params": {"a": {"kernel": W}}}), ["a/kernel"]),
        ({"params": {"a": W}, "lora": {"a": W}}, ["lora/a", "a"]),
    ],
)
def test_parameters_in_any_container(params, names):
    def fun(params, x):
        for w in jax.tree.leaves(params):
            x = x @ w
        return x

    sites = sites_of(fun, params, X)
    assert list(sites) == names
    quantized = aqs.quantize(fun)(uniform(sites, "int8", "int8"), params, X)
    assert quantized.shape == (5, 4)


def test_train_and_eval_have_the_same_names():
    model = ConvNet(PLAIN)
    variables = built("linen conv")[0].params
    train = functools.partial(model.apply, mutable=["batch_stats"])
    rngs = {"dropout": jax.random.key(0)}
    images = sample(1, 8, 8, 3)
    trained = aqs.find_sites(train, variables, images, True, rngs=rngs)
    evaluated = aqs.find_sites(model.apply, variables, images, train=False)
    assert list(trained) == list(evaluated)


def test_a_site_of_one_tensor_takes_two_formats():
    formats = SiteFormats(aqs.numeric_format("int8"), aqs.numeric_format("int3"))
    actual = aqs.quantize(lambda p, x: x.T @ x)({"dot_general": formats}, {}, X)
    expected = jnp.asarray(aqs.fake_quant(X, "int8")).T @ aqs.fake_quant(X, "int3")
    np.testing.assert_array_equal(actual, expected)


def test_weight_on_the_left():
    formats = SiteFormats(aqs.numeric_format("int4"), aqs.numeric_format("e4m3"))
    actual = aqs.quantize(lambda w, x: jnp.dot(w, x))({"params": formats}, W, X.T)
    expected = aqs.fake_quant(W, "int4", (0,)) @ aqs.fake_quant(X.T, "e4m3")
    np.testing.assert_array_equal(actual, expected)


def test_one_side_may_stay_as_it_is():
    formats = SiteFormats(None, aqs.numeric_format("int4"))
    actual = aqs.quantize(lambda w, x: x @ w)({"params": formats}, W, X)
    np.testing.assert_array_equal(actual, X @ aqs.fake_quant(W, "int4", (1,)))


def test_a_function_that_differentiates_inside():
    def step(params, x):
        return jax.grad(lambda p: jnp.sum(jnp.sin(jnp.tanh(x @ p["a"]) @ p["b"])))(params)

    sites = sites_of(step, PARAMS, X)
    assert {site.rhs.parameter for site in sites.values()} >= {"a", "b"}
    assert all(site.refused is None for site in sites.values())
    assert_equal(aqs.quantize(step)({}, PARAMS, X), step(PARAMS, X))
    quantized = aqs.quantize(step)(uniform(sites, "int8", "int8"), PARAMS, X)
    assert jax.tree.structure(quantized) == jax.tree.structure(PARAMS)


# --- Refusals -------------------------------------------------------------------------------------


@jax.custom_vjp
def product_with_vjp(x, w):
    return x @ w


product_with_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def product_with_jvp(x, w):
    return x @ w


product_with_jvp.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))


def in_shard_map(p, x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(lambda x: x @ p["a"], mesh=mesh, in_specs=spec, out_specs=spec)(x)


def in_pmap(p, x):
    return jax.pmap(lambda x: x @ p["a"])(x[None])


def ragged(p, x):
    """Groups of terms of the sum: every group has a product of its own, [groups, rows, columns]."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), (1,), ())
    sizes = jnp.array([x.shape[1]], jnp.int32)
    return jax.lax.ragged_dot_general(x, p["a"], sizes, numbers)[0]


def test_products_in_groups_of_rows_are_those_of_their_experts():
    sizes, x = [3, 0, 2], sample(5, 4)
    p = {"a": sample(3, 4, 6, seed=1)}

    def fun(p, x):
        return jax.lax.ragged_dot(x, p["a"], jnp.array(sizes, jnp.int32))

    assignment = aqs.assign(aqs.find_sites(fun, p, x), [("a", {"lhs": "int8", "rhs": "int4"})])
    rows, matrices = aqs.fake_quant(x, "int8"), aqs.fake_quant(p["a"], "int4", channel_axes=(0, 2))
    expert = np.repeat(np.arange(3), sizes)
    expected = np.stack([row @ matrices[e] for row, e in zip(np.float64(rows), expert)])
    np.testing.assert_allclose(aqs.quantize(fun)(assignment, p, x), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda p: aqs.quantize(fun)(assignment, p, x).sum())(p)["a"]
    sums = [np.float64(rows)[expert == e].sum(0) for e in range(3)]  # straight-through
    np.testing.assert_allclose(gradient, np.stack(sums)[..., None] * np.ones(6), rtol=1e-5)


def test_a_scale_for_each_channel_is_one_for_all_groups_of_a_batch():
    """With batch groups each result is of several images, so they share what the product sums over:
    quantize and the operation of its own have one rule."""
    x, p = sample(4, 5, 5, 3), {"a": sample(2, 2, 3, 6, seed=1)}
    how = {
        "window_strides": (1, 1), "padding": "VALID", "batch_group_count": 2,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }  # fmt: skip
    q = aqs.Quantizer("int4", aqs.PER_CHANNEL)

    def fun(p, x):
        return jax.lax.conv_general_dilated(x, p["a"], **how)

    assignment = {"a": SiteFormats(q, q)}
    own = aqs.conv_general_dilated(x, p["a"], **how, lhs_format=q, rhs_format=q)
    np.testing.assert_allclose(aqs.quantize(fun)(assignment, p, x), own, rtol=1e-6, atol=1e-6)
    expected = fun(
        {"a": aqs.fake_quant(p["a"], "int4", channel_axes=(3,))}, aqs.fake_quant(x, "int4")
    )
    np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5)


REFUSED = {
    "custom_vjp": (lambda p, x: product_with_vjp(x, p["a"]), "custom derivative rule"),
    "custom_jvp": (lambda p, x: product_with_jvp(x, p["a"]), "custom derivative rule"),
    "custom_vjp in jit in scan": (
        lambda p, x: jax.lax.scan(
            lambda x, _: (jax.jit(product_with_vjp)(x, p["a"]), None), x, None, length=2
        )[0],
        "custom derivative rule",
    ),
    "shard_map": (in_shard_map, "inside 'shard_map'"),
    "pmap": (in_pmap, "inside '"),
    "ragged_dot_general": (ragged, "no quantized form"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_entered_is_refused_by_name(case):
    fun, reason = REFUSED[case]
    sites = sites_of(fun, PARAMS, X)
    ((name, site),) = sites.items()
    assert reason in site.refused
    formats = SiteFormats(aqs.numeric_format("int8"))
    with pytest.raises(SiteError, match=f"Site {name!r} cannot be quantized.*{reason}"):
        aqs.quantize(fun)({name: formats}, PARAMS, X)
    with pytest.raises(SiteError, match=f"quantizes site {name!r}, which cannot be"):
        aqs.assign(sites, [(".*", "int8")])
    assert aqs.assign(sites, [(".*", None)]) == {name: SiteFormats()}
    for assignment in ({}, {name: SiteFormats()}):
        outputs = aqs.quantize(fun)(assignment, PARAMS, X)
        np.testing.assert_array_equal(outputs, fun(PARAMS, X))


def test_wrong_assignments():
    model, _ = built("mlp")
    qfun = aqs.quantize(model.fun)
    int8 = aqs.numeric_format("int8")
    cases = [
        (
            {"hidden/kernle": SiteFormats(int8)},
            "'hidden/kernle', which.*Nearest: hidden/kernel",
        ),
        ({"out": int8}, r"Site 'out' is assigned NumericFormat.*expected SiteFormats\(lhs, rhs\)"),
        ({"out": "int8"}, "Site 'out' is assigned 'int8'; expected SiteFormats"),
        ({"out": None}, "Site 'out' is assigned None; expected SiteFormats"),
        ({"out": SiteFormats("int8", 4)}, "Site 'out'.*4"),
    ]
    for assignment, message in cases:
        with pytest.raises(SiteError, match=message):
            qfun(assignment, model.params, *model.args)
    with pytest.raises(SiteError, match="it has no sites"):
        aqs.quantize(lambda p, x: x)({"out": SiteFormats()}, 1.0, X)


def test_arguments_that_are_no_arrays_stay_python_values():
    def fun(params, x, scale, *, flip, activation):
        assert isinstance(scale, float)
        assert flip is True
        return activation(x @ params.T if flip else x @ params) * scale

    options = {"flip": True, "activation": jnp.tanh}
    assert list(aqs.find_sites(fun, W, X, 2.0, **options)) == ["params"]
    expected = fun(W, X, 2.0, **options)
    np.testing.assert_array_equal(aqs.quantize(fun)({}, W, X, 2.0, **options), expected)


def test_outputs_keep_their_tree():
    def fun(params, x):
        return {"y": x @ params, "none": None, "pair": (x, 1)}

    formats = {"params": SiteFormats(aqs.numeric_format("int8"))}
    outputs = aqs.quantize(fun)(formats, W, X)
    assert outputs["none"] is None
    assert outputs["pair"][1] == 1
    assert aqs.quantize(fun).__name__ == "fun"
