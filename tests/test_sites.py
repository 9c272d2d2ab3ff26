"""What the trace knows of operands: which are never negative, and which are rows of a table.

Flags are written out by hand, and every function is also run equation by equation on random data:
what was declared non-negative must be so.
"""

import functools

import flax.linen as nn
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import aqt_search as aqs
from aqt_search import SiteFormats
from aqt_search.costs import cost
from aqt_search.models.resnet import resnet
from aqt_search.tracing import sites as site_analysis
from aqt_search.tracing.control_flow import (
    Body,
    Call,
    Cond,
    Custom,
    Remat,
    Scan,
    While,
    control_flow,
)
from aqt_search.tracing.nonnegative import is_nonnegative_constant


def sample(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def analyzed(fun, params, *args):
    """The closed jaxpr of `fun(params, *args)`, its inputs, its sites and their paths."""
    leaves, tree = jax.tree.flatten((params, args))
    closed = jax.make_jaxpr(lambda *leaves: call(fun, jax.tree.unflatten(tree, leaves)))(*leaves)
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [site_analysis.parameter_name(path) for path, _ in paths]
    names += [None] * (len(leaves) - len(names))
    return closed, leaves, *site_analysis.analyze(closed.jaxpr, names, closed.consts)


def call(fun, params_and_args):
    params, args = params_and_args
    return fun(params, *args)


# --- An evaluator that shows the operands of every site -------------------------------------------


def evaluate(body, args, path, show):
    """Runs a body one equation at a time; `show(path, operands)` sees all of them."""
    jaxpr = body.jaxpr
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*body.consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

    for index, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        show(path + (index,), values)
        env.update(zip(eqn.outvars, step(eqn, values, path + (index,), show), strict=True))
    return [read(v) for v in jaxpr.outvars]


def step(eqn, values, here, show):
    def inside(body, args):
        return evaluate(body, args, body.under(here), show)

    match control_flow(eqn):
        case Scan() as scan:
            return step_scan(scan, values, inside)
        case While() as loop:
            test_consts, body_consts, carry = loop.split(values)
            while inside(loop.test, test_consts + carry)[0]:
                carry = inside(loop.body, body_consts + carry)
            return carry
        case Cond(branches) as cond:
            index, operands = cond.split(values)
            branch = branches[int(np.clip(int(index), 0, len(branches) - 1))]
            return inside(branch, operands)
        case Call(body) | Remat(body) | Custom(body):
            return inside(body, values)
    outputs = eqn.primitive.bind(*values, **eqn.params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def step_scan(scan, values, inside):
    consts, carry, xs = scan.split(values)
    stacked = []
    for i in range(scan.length):
        outputs = inside(scan.body, [*consts, *carry, *(x[i] for x in xs)])
        carry = outputs[: scan.carries]
        stacked.append(outputs[scan.carries :])
    return [*carry, *map(jnp.stack, zip(*stacked))]


def assert_sound(closed, leaves, sites, site_paths):
    """Evaluates; returns how many operands were declared non-negative and seen to be so."""
    seen = set()

    def show(path, operands):
        name = site_paths.get(path)
        if name is None or sites[name].refused:
            return
        for side, value in zip(sites[name].equation_sides, operands):
            if getattr(sites[name], side).nonnegative:
                assert not np.any(np.asarray(value) < 0), (name, side)
                seen.add((name, side))

    evaluate(Body(closed.jaxpr, closed.consts), leaves, (), show)
    return len(seen)


# --- Non-negative operands ------------------------------------------------------------------------

PARAMS = {"a": sample(4, 4, seed=1), "b": sample(4, 4, seed=2)}
KERNEL = {"a": sample(3, 3, 4, 4, seed=1), "b": sample(3, 3, 4, 4, seed=2)}
X, IMAGE = sample(5, 4), sample(2, 6, 6, 4)


def value(fun):
    """A function whose one site has the value of `fun(x)` for its left operand."""
    return lambda p, x: fun(x) @ p["a"]


def convolve(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def pooled(fun):
    return lambda p, x: convolve(fun(nn.relu(x)), p["a"])


def max_pool(x, window, stride, padding, base=1, dilation=1):
    def per_axis(n):
        return (1, n, n, 1)

    return jax.lax.reduce_window(
        x, -np.inf, jax.lax.max, per_axis(window), per_axis(stride),
        ((0, 0), padding, padding, (0, 0)), per_axis(base), per_axis(dilation),
    )  # fmt: skip


@jax.custom_jvp
def rectify(x):
    return jnp.where(x > 0, 1.0, 2.0) + jnp.abs(x)


rectify.defjvp(lambda primals, tangents: (rectify(*primals), tangents[0]))


@jax.custom_vjp
def passed_on(x, y):
    return x + y


passed_on.defvjp(lambda x, y: (passed_on(x, y), None), lambda _, g: (g, g))


def gated(p, x):
    """Squeeze and excitation: the gate stays non-negative, what it multiplies is signed."""
    gate = jax.nn.sigmoid(x @ p["a"])
    return gate @ p["b"], (x * gate) @ p["b"]


def separable(p, x):
    """MobileNet: 1x1, relu6, depthwise, relu6, 1x1; the last has no activation."""
    narrow = convolve(nn.relu6(x), p["a"][:1, :1])
    x = convolve(jax.nn.relu6(narrow), p["a"][:, :, :1], groups=4)
    x = convolve(jax.nn.relu6(x), p["b"][:1, :1])
    return convolve(x, p["b"])


def scan_turning_negative(p, x):
    def layer(carry, w):
        return carry - 1.0, carry @ w

    return jax.lax.scan(layer, nn.relu(x), jnp.stack([p["a"], p["b"]]))


def scan_staying(p, x):
    def layer(carry, w):
        y = nn.relu(carry @ w)
        return y, y

    x, ys = jax.lax.scan(layer, nn.relu(x), jnp.stack([p["a"], p["b"]]))
    return x @ p["a"], ys[0] @ p["b"]


def scan_swapping(p, x):
    """One iteration leaves the first carry alone; the sign reaches it only after two."""

    def layer(carry, _):
        first, second, third = carry
        return (second, third, third), first @ p["a"]

    return jax.lax.scan(layer, (nn.relu(x), nn.relu(x), x), None, length=3)


def scan_of_nothing(p, x):
    x, _ = jax.lax.scan(lambda c, _: (nn.relu(c), None), x, None, length=0)
    return x @ p["a"]


def signs_of_scanned(p, x):
    """What is scanned over and what is stacked up carries its own flag."""

    def layer(carry, row):
        return carry, (row[None] @ p["a"], -row)

    _, (y, negated) = jax.lax.scan(layer, 0.0, nn.relu(x))
    return y, negated @ p["b"]


def while_staying(p, x):
    def body(carry):
        i, x, y = carry
        return i + 1, nn.relu(x @ p["a"]), y - (y @ p["b"])

    x, y = jax.lax.while_loop(lambda c: c[0] < 3, body, (0, nn.relu(x), nn.relu(x)))[1:]
    return x @ p["a"], y @ p["b"]


def branches(left, right):
    return lambda p, x: jax.lax.cond(x.sum() > 0, left, right, x) @ p["a"]


def wrapped():
    """3 * 50 is beyond int8, and comes back negative."""
    return (jax.lax.iota(jnp.int8, 4) * jnp.int8(50)).astype(jnp.float32)[None]


def narrowed():
    return (jax.lax.iota(jnp.uint8, 4) + jnp.uint8(126)).astype(jnp.int8).astype(jnp.float32)[None]


def dropout(p, x):
    layer = nn.Dropout(0.5, deterministic=False)
    return layer.apply({}, nn.relu(x), rngs={"dropout": jax.random.key(0)}) @ p["a"]


# A function of parameters and data: which left operands of its sites, in program order, are known
# never to be negative. Data is signed.
MATRIX_CASES = {
    "data": (value(lambda x: x), [False]),
    "relu": (value(nn.relu), [True]),
    "relu6": (value(nn.relu6), [True]),
    "sigmoid": (value(nn.sigmoid), [True]),
    "hard sigmoid": (value(nn.hard_sigmoid), [True]),
    "tanh": (value(jnp.tanh), [False]),
    "tanh of relu": (value(lambda x: jnp.tanh(nn.relu(x))), [True]),
    "gelu": (value(nn.gelu), [False]),
    "silu": (value(nn.silu), [False]),
    "leaky relu": (value(nn.leaky_relu), [False]),
    "exponential": (value(jnp.exp), [True]),
    "softmax": (value(nn.softmax), [True]),
    "log softmax": (value(nn.log_softmax), [False]),
    "absolute": (value(jnp.abs), [True]),
    "square": (value(jnp.square), [True]),
    "product with itself": (value(lambda x: x * x), [True]),
    "product of two": (value(lambda x: x * x[::-1]), [False]),
    "even powers": (value(lambda x: x**2 + x**4 + x**2.0), [True]),
    "odd power": (value(lambda x: x**3), [False]),
    "power of relu": (value(lambda x: nn.relu(x) ** 3 + nn.relu(x) ** 1.5), [True]),
    "root of a mean square": (value(lambda x: jnp.sqrt((x * x).mean(0, keepdims=True))), [True]),
    "RMS norm": (value(lambda x: x * jax.lax.rsqrt((x * x).mean() + 1e-6)), [False]),
    "RMS norm of relu": (
        value(lambda x: nn.relu(x) * jax.lax.rsqrt((x * x).mean() + 1e-6)), [True],
    ),
    "difference": (value(lambda x: nn.relu(x) - nn.sigmoid(x)), [False]),
    "negation": (value(lambda x: -nn.relu(x)), [False]),
    "scaled": (value(lambda x: nn.relu(x) * 0.5 / 3.0 + 1.0), [True]),
    "scaled by a negative": (value(lambda x: nn.relu(x) * -0.5), [False]),
    "shifted down": (value(lambda x: nn.relu(x) + -1.0), [False]),
    "divided by a negative": (value(lambda x: nn.relu(x) / -3.0), [False]),
    "scaled by a parameter": (lambda p, x: (nn.relu(x) * p["b"][:1]) @ p["a"], [False]),
    "clipped": (value(lambda x: jnp.clip(x, 0, 6)), [True]),
    "clipped below zero": (value(lambda x: jnp.clip(x, -1, 6)), [False]),
    "clamped": (value(lambda x: jax.lax.clamp(0.0, x, 6.0)), [True]),
    "relu clamped": (value(lambda x: jax.lax.clamp(-1.0, nn.relu(x), 6.0)), [True]),
    "clamped to below zero": (value(lambda x: jax.lax.clamp(0.0, x, -1.0)), [False]),
    "minimum": (value(lambda x: jnp.minimum(nn.relu(x), nn.sigmoid(x))), [True]),
    "minimum with signed": (value(lambda x: jnp.minimum(nn.relu(x), x)), [False]),
    "maximum with signed": (value(lambda x: jnp.maximum(nn.relu(x), x)), [True]),
    "where": (value(lambda x: jnp.where(x > 1, nn.relu(x), 0)), [True]),
    "where with signed": (value(lambda x: jnp.where(x > 1, nn.relu(x), x)), [False]),
    "sum": (value(lambda x: jnp.cumsum(nn.relu(x), 0) + nn.relu(x).sum()), [True]),
    "product": (value(lambda x: nn.relu(x) * nn.relu(x).prod()), [True]),
    "cumulative maximum": (value(lambda x: jax.lax.cummax(nn.relu(x), 0)), [True]),
    "extrema": (value(lambda x: nn.relu(x) * nn.relu(x).max() * nn.relu(x).min()), [True]),
    "moved": (
        value(lambda x: jnp.roll(jnp.pad(nn.relu(x).T.reshape(5, 4)[::-1], 1)[1:6, :4], 1)), [True],
    ),
    "padded with a negative": (
        value(lambda x: jnp.pad(nn.relu(x), 1, constant_values=-1.0)[1:, :4]), [False],
    ),
    "broadcast, split, stacked": (
        value(lambda x: jnp.stack(jnp.split(nn.relu(x)[None, :, None, 0], 5, 1)).reshape(5, 1)
              * jnp.ones((1, 4))), [True],
    ),
    "tiled and sorted": (value(lambda x: jnp.sort(jnp.tile(nn.relu(x), 2)[:, 2:6])), [True]),
    "dynamic slice": (
        value(lambda x: jax.lax.dynamic_slice(nn.relu(x), (jnp.argmax(x[:, 0]), 0), (2, 4))),
        [True],
    ),
    "written into": (value(lambda x: jnp.zeros((9, 4)).at[2:7].set(nn.relu(x))), [True]),
    "signed written into": (value(lambda x: jnp.zeros((9, 4)).at[2:7].set(x)), [False]),
    "added into": (value(lambda x: nn.relu(x).at[np.array([0, 0])].add(1.0)), [True]),
    "signed added into": (value(lambda x: nn.relu(x).at[np.array([0])].add(x[:1])), [False]),
    "cache": (
        value(lambda x: jax.lax.dynamic_update_slice(jnp.zeros((9, 4)), nn.relu(x), (2, 0))),
        [True],
    ),
    "taken": (value(lambda x: jnp.take(nn.relu(x), np.array([1, 7]), axis=0, mode="clip")), [True]),
    "taken, filled": (
        value(lambda x: nn.relu(x).at[np.array([1, 7])].get(mode="fill", fill_value=0)), [True],
    ),
    "taken, filled with a negative": (
        value(lambda x: nn.relu(x).at[np.array([1, 7])].get(mode="fill", fill_value=-1)), [False],
    ),
    "concatenated": (value(lambda x: jnp.concatenate([nn.relu(x), x * x])), [True]),
    "concatenated with signed": (value(lambda x: jnp.concatenate([nn.relu(x), x])), [False]),
    "cast": (
        lambda p, x: nn.relu(x).astype(jnp.bfloat16) @ p["a"].astype(jnp.bfloat16), [True],
    ),
    "rounded": (value(lambda x: jnp.round(jax.lax.reduce_precision(nn.relu(x), 5, 2))), [True]),
    "marked": (
        value(
            lambda x: checkpoint_name(jax.lax.optimization_barrier(jax.device_put(nn.relu(x))), "h")
        ),
        [True],
    ),
    "gradient stopped": (value(lambda x: jax.lax.stop_gradient(nn.relu(x))), [True]),
    "comparison": (value(lambda x: (x > 0).astype(jnp.float32)), [True]),
    "one-hot": (value(lambda x: nn.one_hot(jnp.argmax(x, 1), 4)), [True]),
    "count": (value(lambda x: nn.relu(x) / jnp.arange(1.0, 5.0)[None]), [True]),
    "unsigned integers": (
        value(lambda x: jnp.abs(x).astype(jnp.uint8).astype(jnp.float32)), [True],
    ),
    "integers that wrap around": (value(lambda x: nn.relu(x) * wrapped()), [False]),
    "narrowed integers": (value(lambda x: nn.relu(x) * narrowed()), [False]),
    "integers in range": (
        value(lambda x: nn.relu(x) * jax.lax.iota(jnp.int8, 4).astype(jnp.float32)[None]), [True],
    ),
    "bits": (
        value(lambda x: jax.lax.bitcast_convert_type(
            jax.lax.bitcast_convert_type(x, jnp.uint32), jnp.float32)), [False],
    ),
    "dropout": (dropout, [True]),
    "constants": (value(lambda x: np.arange(0.0, 4.0)[None] * nn.relu(x)), [True]),
    "signed constants": (value(lambda x: np.arange(-1.0, 3.0)[None] * nn.relu(x)), [False]),
    "gates": (gated, [False, True, False]),
    "jit": (value(jax.jit(lambda x: jax.jit(nn.relu)(x) + 1.0)), [True]),
    "constants in jit": (value(jax.jit(lambda x: nn.relu(x) * np.arange(4.0)[None])), [True]),
    "remat": (
        lambda p, x: jax.checkpoint(lambda x: nn.relu(nn.relu(x) @ p["a"]))(x) @ p["b"],
        [True, True],
    ),
    "custom_jvp": (value(rectify), [True]),
    "custom_vjp": (
        lambda p, x: (passed_on(nn.relu(x), x * x) @ p["a"], passed_on(nn.relu(x), x) @ p["b"]),
        [True, False],
    ),
    "jit of remat of custom_jvp": (value(jax.jit(jax.checkpoint(rectify))), [True]),
    "vmap": (lambda p, x: jax.vmap(lambda row: nn.relu(row) @ p["a"])(x), [True]),
    "cond": (branches(nn.relu, nn.sigmoid), [True]),
    "cond with a signed branch": (branches(nn.relu, jnp.sin), [False]),
    "switch": (
        lambda p, x: jax.lax.switch(1, [nn.relu, jnp.abs, jnp.exp], x) @ p["a"], [True],
    ),
    "scan that turns negative": (scan_turning_negative, [False]),
    "scan that stays": (scan_staying, [True, True, True]),
    "scan that swaps": (scan_swapping, [False]),
    "scan of nothing": (scan_of_nothing, [False]),
    "scanned over": (signs_of_scanned, [True, False]),
    "while": (while_staying, [True, False, True, False]),
    "while that may not run": (
        value(lambda x: jax.lax.while_loop(lambda c: c.sum() < 0, nn.relu, x)), [False],
    ),
    "gradient": (
        lambda p, x: jax.value_and_grad(lambda x: jnp.sum(nn.relu(x @ p["a"]) @ p["b"]))(x),
        [False, True, False],
    ),
}  # fmt: skip

IMAGE_CASES = {
    "max pool": (pooled(lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME")), [True]),
    "max pool of signed": (lambda p, x: convolve(nn.max_pool(x, (2, 2)), p["a"]), [False]),
    "average pool": (pooled(lambda x: nn.avg_pool(x, (2, 2), (2, 2))), [True]),
    "average pool without padding": (
        pooled(lambda x: nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)), [True],
    ),
    "min pool": (
        pooled(lambda x: jax.lax.reduce_window(
            x, np.inf, jax.lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")), [True],
    ),
    "global average": (lambda p, x: nn.relu(x).mean((1, 2)) @ p["a"][0, 0], [True]),
    # The maximum of a window of nothing but padding is -inf.
    "window in the padding": (pooled(lambda x: max_pool(x, 2, 1, (2, 0))), [False]),
    "window that reaches": (pooled(lambda x: max_pool(x, 3, 1, (2, 0))), [True]),
    "window in the holes": (pooled(lambda x: max_pool(x, 1, 1, (0, 0), base=2)), [False]),
    "window over the holes": (pooled(lambda x: max_pool(x, 2, 1, (0, 0), base=2)), [True]),
    "window around": (pooled(lambda x: max_pool(x[:, :1, :1], 2, 1, (1, 1), dilation=2)), [False]),
    "separable": (separable, [True, True, True, False]),
    "image to patches": (
        lambda p, x: nn.relu(x).reshape(2, 3, 2, 3, 2, 4).transpose(0, 1, 3, 2, 4, 5)
        .reshape(18, 16) @ jnp.tile(p["a"][0, 0], (4, 1)), [True],
    ),
}  # fmt: skip

CASES = {
    **{name: (fun, PARAMS, X, flags) for name, (fun, flags) in MATRIX_CASES.items()},
    **{name: (fun, KERNEL, IMAGE, flags) for name, (fun, flags) in IMAGE_CASES.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_flags_are_those_written_down_and_hold_on_data(case):
    fun, params, x, flags = CASES[case]
    closed, leaves, sites, site_paths = analyzed(fun, params, x)
    assert [site.lhs.nonnegative for site in sites.values()] == flags
    assert not any(site.rhs.nonnegative for site in sites.values() if site.kind != "dot_general")
    for seed, scale in enumerate([1.0, 1e-30, 100.0]):
        data = jnp.asarray(scale * sample(*x.shape, seed=seed)).at[0].set(-0.0)
        if case != "while that may not run" or data.sum() > 0:
            assert_sound(closed, [*leaves[:-1], data], sites, site_paths)


def test_the_right_operand_and_other_roles():
    def fun(p, x):
        return jnp.abs(p["a"]) @ x.T, x @ jnp.exp(p["b"]), x @ np.ones((4, 4), np.float32)

    sites = analyzed(fun, PARAMS, X)[2]
    flags = [(site.lhs.nonnegative, site.rhs.nonnegative) for site in sites.values()]
    assert flags == [(True, False), (False, True), (False, True)]


def test_images_of_unsigned_integers():
    images = jnp.ones((1, 6, 6, 4), jnp.uint8)
    sites = aqs.find_sites(lambda p, x: convolve(x / 255, p["a"]), KERNEL, images)
    assert sites["a"].lhs.nonnegative
    centred = aqs.find_sites(lambda p, x: convolve(x / 255 - 0.5, p["a"]), KERNEL, images)
    assert not centred["a"].lhs.nonnegative


def test_every_convolution_of_a_resnet_but_the_first_is_fed_by_relu():
    model, images = resnet(8, 10, form="cifar"), sample(1, 8, 8, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    # Random kernels and heads; ones for what BatchNorm needs.
    variables = jax.tree.map(
        lambda v: sample(*v.shape) if v.ndim > 1 else jnp.ones(v.shape), shapes
    )
    for train in (False, True):
        fun = functools.partial(model.apply, train=train, mutable=["batch_stats"])
        sites = aqs.find_sites(fun, variables, images)
        signed = [name for name, site in sites.items() if not site.lhs.nonnegative]
        assert signed == ["stem/kernel"]
    # train=True: batch statistics are computed, too
    assert assert_sound(*analyzed(fun, variables, images)) == len(sites) - 1
    large = resnet(50, 1000, form="imagenet")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    sites = aqs.find_sites(
        large.apply, jax.eval_shape(large.init, jax.random.key(0), images), images
    )
    assert [name for name, s in sites.items() if not s.lhs.nonnegative] == ["stem/kernel"]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_weights(masked):
    model, x = nn.MultiHeadDotProductAttention(num_heads=2), sample(2, 5, 4)
    mask = nn.make_causal_mask(x[..., 0]) if masked else None
    variables = model.init(jax.random.key(0), x)
    traced = analyzed(lambda v, x: model.apply(v, x, mask=mask), variables, x)
    products = [site for site in traced[2].values() if site.weight is None]
    flags = [(site.lhs.nonnegative, site.rhs.nonnegative) for site in products]
    assert flags[0] == (False, False)  # queries and keys
    assert sorted(flags[1]) == [False, True]
    # einsum may put the weights on either side; they are those of queries over keys.
    weights = products[1].lhs if products[1].lhs.nonnegative else products[1].rhs
    assert weights.shape[-2:] == (5, 5)
    assert assert_sound(*traced) == 1


def test_products_in_functions_with_custom_rules_stay_refused():
    @jax.custom_jvp
    def product(x, w):
        return nn.relu(x @ w)

    product.defjvp(lambda p, t: (product(*p), t[0] @ p[1]))
    sites = aqs.find_sites(lambda p, x: product(x, p["a"]) @ p["b"], PARAMS, X)
    inside, after = sites.values()
    assert "custom derivative rule" in inside.refused
    assert after.refused is None
    assert after.lhs.nonnegative


# Operations on one or two 5 x 4 matrices, for programs drawn at random.
OPERATIONS = [
    nn.relu, nn.sigmoid, jnp.tanh, jnp.sin, jnp.negative, jnp.abs, jnp.square, jnp.exp, nn.softmax,
    nn.relu6, functools.partial(jnp.cumsum, axis=0), lambda x: x**3, lambda x: x[::-1],
    lambda x: x * 0.5, lambda x: x - 0.5,
    lambda x: x * -2.0, lambda x: x - x.mean(), lambda x: x / (1 + x.max()), jax.jit(nn.relu),
    lambda x: jnp.round(x).astype(jnp.int32).astype(jnp.float32), jnp.log1p, jnp.sqrt,
    lambda x: jax.lax.scan(lambda c, r: (c - r, c), x[0], x)[1],
    lambda x: jax.lax.scan(lambda c, r: (c + r, c), x[0], x)[1],
    jnp.add, jnp.subtract, jnp.multiply, jnp.divide, jnp.maximum, jnp.minimum,
    lambda x, y: jnp.where(x > y, x, y), lambda x, y: jnp.clip(x, y, 2.0),
    lambda x, y: jax.lax.cond(x.sum() > 0, lambda: x, lambda: y),
    lambda x, y: jnp.concatenate([x[:2], y[2:]]), lambda x, y: x.at[1].set(y[2]),
    lambda x, y: jax.lax.scan(lambda c, _: ((c[1], c[0]), None), (x, y), None, length=3)[0][0],
    lambda x, y: jax.lax.fori_loop(0, 2, lambda _, c: nn.relu(c) - y, x),
]  # fmt: skip


def random_program(rng):
    chosen = rng.integers(len(OPERATIONS), size=6)
    sources = rng.integers(100, size=(6, 2))

    def fun(p, x):
        values = [x]
        for number, (first, second) in zip(chosen, sources):
            # Of the latest three: a longer chain says more than a wide one.
            operands = [values[-1 - first % min(3, len(values))], values[second % len(values)]]
            operation = OPERATIONS[number]
            values.append(operation(*operands) if number >= BINARY else operation(operands[0]))
        values = [v.reshape(5, 4) for v in values[1:]]
        return [v @ p["a"] for v in values], values

    return fun


BINARY = OPERATIONS.index(jnp.add)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # casts of NaN
def test_random_programs_are_judged_soundly():
    rng, declared = np.random.default_rng(0), 0
    for _ in range(40):
        fun = random_program(rng)
        sites = aqs.find_sites(fun, PARAMS, X)
        for seed in range(2):
            _, values = fun(PARAMS, 2 * sample(5, 4, seed=seed))
            for site, operand in zip(sites.values(), values, strict=True):
                if site.lhs.nonnegative:
                    declared += 1
                    assert not np.any(np.asarray(operand) < 0), site
    assert declared > 120  # of 480 operands: the test is not empty


@pytest.mark.parametrize(
    "constant, expected",
    [
        (0, True), (-1, False), (True, True), (2.5, True), (-0.0, True), (float("-inf"), False),
        (float("nan"), True), (1j, False), (np.float32(-2), False), (jnp.bfloat16(2), True),
        (np.arange(3), True), (np.arange(-1, 3), False), (np.zeros((0, 4)), True),
        (np.ones(4096), True), (np.ones(4097), False), (jax.random.key(0), False),
    ],
)  # fmt: skip
def test_constants(constant, expected):
    assert is_nonnegative_constant(constant) is expected


def test_constants_of_a_trace_around_are_not_known():
    found = []

    def outer(bound):
        fun = value(lambda x: jnp.maximum(x, bound))
        found.append(aqs.find_sites(fun, PARAMS, X)["a"].lhs.nonnegative)
        return bound

    jax.jit(outer)(1.0)
    assert found == [False]


# --- Table lookups --------------------------------------------------------------------------------

TABLE = sample(10, 4)
IDS = jnp.array([[1, 2, 3], [4, 5, 6]], jnp.int32)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(10, 4, name="embed")
        return embed.attend(jnp.tanh(embed(ids)))


LOOKUPS = {
    "indexed": lambda t, i: t[i],
    "take": lambda t, i: jnp.take(t, i, axis=0),
    "take in clip mode": lambda t, i: jnp.take(t, i, axis=0, mode="clip"),
    "filled": lambda t, i: t.at[i].get(mode="fill", fill_value=0),
    "cast": lambda t, i: t.astype(jnp.bfloat16)[i],
    "in jit": jax.jit(lambda t, i: t[i]),
    "in remat": jax.checkpoint(lambda t, i: t[i]),
    "vmap of an index": lambda t, i: jax.vmap(lambda j: t[j])(i[0]),
    "vmap of take": lambda t, i: jax.vmap(lambda j: jnp.take(t, j, axis=0))(i),
    "in scan": lambda t, i: jax.lax.scan(lambda c, j: (c, t[j]), 0, i)[1],
}


@pytest.mark.parametrize("case", LOOKUPS)
def test_lookups_of_rows_are_sites(case):
    traced = analyzed(lambda p, i: LOOKUPS[case](p["table"], i), {"table": TABLE}, IDS)
    ((name, site),) = traced[2].items()
    assert (name, site.kind, site.macs, site.refused) == ("table", "gather", 0, None)
    assert site.weight is site.rhs
    assert (site.rhs.role, site.rhs.shape, site.rhs.channel_axes) == ("weight", (10, 4), (0,))
    assert site.rhs.scales == 10
    assert (site.lhs.role, site.lhs.dtype, site.lhs.channel_axes) == ("activation", np.int32, ())
    assert site.repeats == (2 if case == "in scan" else 1)
    # The equation's operands are (table, indices).
    seen = []
    closed, leaves, _, ((path, _),) = *traced[:3], traced[3].items()
    evaluate(
        Body(closed.jaxpr, closed.consts),
        leaves,
        (),
        lambda p, v: seen.append(v) if p == path else None,
    )
    for table, indices in seen:
        assert table.shape == site.rhs.shape
        assert indices.shape == site.lhs.shape


def positions(p, x):
    """[batch, steps, 4] in a model that is trained on whole sequences: known indices."""
    return x + p["table"][jnp.arange(x.shape[1])][None]


def position(p, x):
    """The same in a step of decoding, where the place is data."""
    return x[:, -1:] + p["table"][jnp.full((1, 1), x.shape[1]) + jnp.int32(0 * x[0, 0, 0])]


ROWS = {
    "known places": (positions, ["table"]),
    "a place that is data": (position, ["table"]),
    "in jit and remat": (jax.jit(jax.checkpoint(positions)), ["table"]),
    "in a scan": (
        lambda p, x: jax.lax.scan(lambda c, x: (c, positions(p, x)), 0, x[None])[1], ["table"],
    ),
    "relative positions": (
        lambda p, x: x @ x.swapaxes(1, 2) + p["table"][
            np.arange(3)[:, None] - np.arange(3)[None] + 3
        ][..., 0][None],
        ["dot_general", "table"],
    ),
    "a weight's rows in another order": (
        lambda p, x: x @ p["table"][np.array([3, 1, 2, 0])], ["table"],
    ),
    "both": (
        lambda p, x: x @ p["table"][np.array([3, 1, 2, 0])] + p["table"][np.arange(3)][None],
        ["table#1", "table#2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_a_lookup_wherever_their_numbers_come_from(case):
    fun, expected = ROWS[case]
    x = sample(2, 3, 4)
    sites = aqs.find_sites(fun, {"table": TABLE}, x)
    assert list(sites) == expected
    product = "weight" in case or "both" in case
    kinds = [sites[name].kind for name in expected if name.startswith("table")]
    assert kinds == {"both": ["dot_general", "gather"]}.get(
        case, ["dot_general" if product else "gather"]
    )
    int4 = aqs.assign(sites, [(".*", {"weight": "int4"})])
    values = aqs.fake_quant(TABLE, "int4", channel_axes=(0,))
    if not product:
        actual = aqs.quantize(fun)(int4, {"table": TABLE}, x)
        np.testing.assert_allclose(actual, fun({"table": values}, x), rtol=1e-5, atol=1e-5)
    frozen = aqs.freeze(fun, int4, {"table": TABLE}, x)
    np.testing.assert_allclose(
        aqs.serve(fun)(frozen, x), aqs.quantize(fun)(int4, {"table": TABLE}, x),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_lookups_along_another_axis():
    sites = aqs.find_sites(lambda t, i: t[:, i], TABLE.T, IDS)
    assert (sites["params"].rhs.shape, sites["params"].rhs.channel_axes) == ((4, 10), (1,))
    one_row = aqs.find_sites(lambda t, i: t[i], TABLE[:1], 0 * IDS)
    assert one_row["params"].rhs.channel_axes == (0,)
    deep = aqs.find_sites(lambda t, i: t[i], sample(10, 2, 3), IDS)
    assert (deep["params"].rhs.channel_axes, deep["params"].rhs.size) == ((0,), 60)


NO_LOOKUPS = {
    "rows that nothing meets": lambda t, i: t[np.array([1, 2])],
    "rows of data that are integers": lambda t, i: (t[np.array([1, 2])], i),
    "data": lambda t, i: (t * i.sum())[i],
    "integers": lambda t, i: jnp.round(t).astype(jnp.int8)[i],
    "a vector": lambda t, i: t[:, 0][i],
    "part of a row": lambda t, i: t[i, :2],
    "elements": lambda t, i: t[i, i % 4],
    "two axes": lambda t, i: t[None][0 * i, i],
    "along": lambda t, i: jnp.take_along_axis(t, jnp.tile(i.reshape(6, 1) % 4, (1, 4)), 0),
    "a table per example": lambda t, i: jax.vmap(lambda t, j: t[j])(t[None], i[:1]),
    "slices of two rows": lambda t, i: jax.vmap(lambda j: jax.lax.dynamic_slice(t, (j, 0), (2, 4)))(
        i[0]
    ),
    "unused": lambda t, i: (t[i], i)[1],
}


@pytest.mark.parametrize("case", NO_LOOKUPS)
def test_other_gathers_are_no_sites(case):
    assert aqs.find_sites(NO_LOOKUPS[case], TABLE, IDS) == {}


def test_an_embedding_layer():
    model = nn.Embed(10, 4)
    variables = model.init(jax.random.key(0), IDS)
    sites = aqs.find_sites(model.apply, variables, IDS)
    assert [(name, site.kind) for name, site in sites.items()] == [("embedding", "gather")]


def test_tied_embeddings_are_two_sites_of_one_weight():
    model = Tied()
    variables = model.init(jax.random.key(0), IDS)
    sites = aqs.find_sites(model.apply, variables, IDS)
    kinds = [(name, site.kind, site.rhs.channel_axes) for name, site in sites.items()]
    assert kinds == [
        ("embed/embedding#1", "gather", (0,)),
        ("embed/embedding#2", "dot_general", (1,)),
    ]
    assert cost.total_macs(sites) == 6 * 4 * 10
    assert cost.gbops(sites, {}) == 6 * 4 * 10 * 32 * 32 / 1e9
    int8 = SiteFormats(None, aqs.numeric_format("int8"))
    # One tensor of 10 x 4 codes and a scale per row, whichever product or lookup reads it.
    assert cost.weight_bytes(sites, dict.fromkeys(sites, int8)) == 40 + 10 * 4


def test_a_nonnegative_table_gives_nonnegative_rows():
    sites = aqs.find_sites(lambda p, i: jnp.abs(p["a"])[i] @ p["b"], PARAMS, IDS[0] % 4)
    assert [site.kind for site in sites.values()] == ["gather", "dot_general"]
    assert sites["a"].rhs.nonnegative
    assert sites["b"].lhs.nonnegative


# --- Complex numbers ------------------------------------------------------------------------------


def test_products_of_complex_numbers_are_refused_and_counted():
    """A complex product is four real ones: 64 times 64 bits are four times 32 times 32."""

    def fun(params, x):
        mixed = jnp.abs(x.astype(jnp.complex64) @ params["mix"])
        rows = params["table"][jnp.argmax(x, -1)]
        wide = jax.lax.conv_general_dilated(
            x[:, None].astype(jnp.complex64), params["taps"], (1,), "VALID"
        )
        return mixed @ params["head"] + rows.real + jnp.abs(wide).sum()

    params = {
        "mix": sample(3, 4).astype(jnp.complex64), "head": sample(4, 2),
        "table": sample(3, 2).astype(jnp.complex64), "taps": sample(1, 1, 2).astype(jnp.complex64),
    }  # fmt: skip
    x = sample(1, 3)
    sites = aqs.find_sites(fun, params, x)
    refused = {name for name, site in sites.items() if site.refused}
    assert refused == {"mix", "table", "taps"}
    assert all("complex64" in sites[name].refused for name in refused)
    with pytest.raises(aqs.SiteError, match=r"'mix'.* complex64.*formats are of real numbers"):
        aqs.assign(sites, [(".*", "int4")])
    assignment = aqs.assign(sites, [("mix|table|taps", None), (".*", "int4")])
    macs = {"mix": 12, "taps": 4}
    bits = sum(4 * 32 * 32 * n for n in macs.values()) + 8 * 4 * 4
    assert cost.gbops(sites, assignment) == pytest.approx(bits / 1e9)
    np.testing.assert_array_equal(
        aqs.quantize(fun)(aqs.assign(sites, [(".*", None)]), params, x), fun(params, x)
    )
