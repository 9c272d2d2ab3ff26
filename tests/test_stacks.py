"""Layers of a scan in formats of their own, against the same layers written one after another."""

import dataclasses
import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import ptq
from aqt_search.palette.rules import select_weights
from aqt_search.search.scores import score
from aqt_search.search.space import make_space
from aqt_search.tracing.layers import layer_sites
from aqt_search.training.sensitivity import sensitivity
from aqt_search.weights.dorefa import companded_model
from aqt_search.weights.statistics import weight_statistics
from configs.base import get_config
from experiments.assignment import configured_assignment
from experiments.from_config import ConfigError
from experiments.results import policy_json

LAYERS, WIDTH = 4, 8
FORMATS = ("int4", "e4m3", "int8", "int3")


def block(p, x):
    """Attention and an MLP: x [batch, tokens, width]."""
    q, k, v = (x @ p[name] for name in ("q", "k", "v"))
    with jax.named_scope("attention"):
        mixed = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v
    x = x + mixed @ p["out"]
    return x + nn.relu(x @ p["up"]) @ p["down"]


def scanned(params, x):
    def layer(x, p):
        with jax.named_scope("blocks"):
            return block(p, x), None

    return jax.lax.scan(layer, x, params["blocks"])[0] @ params["head"]


def unrolled(params, x):
    for i in range(LAYERS):
        with jax.named_scope(f"blocks_{i}"):
            x = block(params[f"blocks_{i}"], x)
    return x @ params["head"]


def nested(params, x):
    """Two stacks of two layers, and a weight of each stack, which its layers share."""

    def stack(x, p):
        def layer(x, w):
            return jnp.tanh(x @ w + x @ p["shared"]), None

        return jax.lax.scan(layer, x, p["inner"])[0] @ p["own"], None

    return jax.lax.scan(stack, x, params["outer"])[0]


def nested_unrolled(params, x):
    for i in range(2):
        for j in range(2):
            x = jnp.tanh(
                x @ params[f"outer_{i}"][f"inner_{j}"] + x @ params[f"outer_{i}"]["shared"]
            )
        x = x @ params[f"outer_{i}"]["own"]
    return x


def weights(*shape, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)


X = np.random.default_rng(0).normal(size=(3, 5, WIDTH)).astype(np.float32)


def attention_model():
    names = {"q": 8, "k": 8, "v": 8, "out": 8, "up": 16, "down": 16}
    stacks = {
        name: weights(LAYERS, 16 if name == "down" else 8, 8 if name == "down" else n, seed=s)
        for s, (name, n) in enumerate(names.items())
    }
    head = weights(8, 3, seed=9)
    apart = {f"blocks_{i}": {n: w[i] for n, w in stacks.items()} for i in range(LAYERS)}
    return scanned, unrolled, {"blocks": stacks, "head": head}, {**apart, "head": head}


def nested_model():
    inner, shared, own = (weights(*s, 8, 8, seed=n) for n, s in enumerate([(2, 2), (2,), (2,)]))
    apart = {
        f"outer_{i}": {"inner_0": inner[i, 0], "inner_1": inner[i, 1], "shared": shared[i],
                       "own": own[i]}
        for i in range(2)
    }  # fmt: skip
    params = {"outer": {"inner": inner, "shared": shared, "own": own}}
    return nested, nested_unrolled, params, apart


MODELS = {"attention": attention_model, "nested": nested_model}


def twin_name(name):
    """The name in the unrolled model of a layer's site: "blocks/q[1]" is "blocks_1/q" there."""
    name = re.sub(r"^blocks/(.*)\[(\d)\]$", r"blocks_\2/\1", name)
    name = re.sub(r"^outer/inner\[(\d)\]\[(\d)\]$", r"outer_\1/inner_\2", name)
    # The layers of an inner scan are calls of their own, numbered from one.
    name = re.sub(
        r"^outer/shared\[(\d)\]\[(\d)\]$",
        lambda m: f"outer_{m[1]}/shared#{int(m[2]) + 1}", name,
    )  # fmt: skip
    return re.sub(r"^outer/own\[(\d)\]$", r"outer_\1/own", name)


def pair(name):
    """(scanned, its sites by layer, params), (unrolled, sites, params)."""
    one, other, params, apart = MODELS[name]()
    sites = layer_sites(aqs.find_sites(one, params, X))
    return (one, sites, params), (other, aqs.find_sites(other, apart, X), apart)


def mixed(sites, adapt=lambda q: q):
    """Formats that differ from layer to layer, of both operands."""
    found = {}
    for name in sites:
        number = sum(ord(c) for c in name)
        specs = FORMATS[number % 4], FORMATS[(number // 4 + 1) % 4]
        found[name] = aqs.SiteFormats(*(adapt(aqs.quantizer(spec)) for spec in specs))
    return found


def for_twin(assignment):
    return {twin_name(name): formats for name, formats in assignment.items()}


def loss(y):
    return jnp.sum(jnp.sin(3 * y))


@pytest.fixture(params=MODELS, scope="module")
def twins(request):
    return pair(request.param)


# --- Names ----------------------------------------------------------------------------------------


def test_layers_are_the_sites_of_the_unrolled_model(twins):
    (_, layers, _), (_, sites, _) = twins
    assert {twin_name(name) for name in layers} == set(sites)
    for name, layer in layers.items():
        site = sites[twin_name(name)]
        for field in ("kind", "macs", "repeats", "lhs", "rhs", "out_shape"):
            ours, theirs = getattr(layer, field), getattr(site, field)
            if field in ("lhs", "rhs"):
                ours, theirs = (dataclasses.replace(o, parameter=None) for o in (ours, theirs))
            assert ours == theirs, (name, field)
    assert aqs.cost.total_macs(layers) == aqs.cost.total_macs(sites)


def test_layers_come_one_after_another():
    (_, layers, _), (_, sites, _) = pair("attention")
    assert [twin_name(name) for name in layers] == list(sites)


def test_a_rule_is_about_a_stack_or_about_single_layers():
    fun, _, params, _ = attention_model()
    sites = aqs.find_sites(fun, params, X)
    whole = aqs.assign(sites, [("blocks", "int4"), (".*", "int8")])
    assert set(whole) == set(sites)  # as ever
    rules = [(r"blocks/q\[[13]\]", "e4m3"), ("q|head", "int8"), (r"\d|/k", "int4"), ("b", None)]
    found = {name: formats.rhs for name, formats in aqs.assign(sites, rules).items()}
    assert [found[f"blocks/q[{i}]"] for i in range(4)] == [
        aqs.numeric_format(n) for n in ("int8", "e4m3", "int8", "e4m3")
    ]
    assert found["blocks/k"] == aqs.numeric_format("int4")  # whole: no rule names its layers
    assert found["blocks/v"] is None  # "\d" is no name of a layer
    inner = aqs.assign(aqs.find_sites(nested, nested_model()[2], X), [(r"\[1\]", "int4")])
    assert {n for n, f in inner.items() if f.rhs is not None} == {
        "outer/inner[1][0]", "outer/inner[1][1]", "outer/own[1]", "outer/shared[1][0]",
        "outer/shared[1][1]",
    }  # fmt: skip


def test_rules_for_layers_that_do_not_exist():
    fun, _, params, _ = attention_model()
    sites = aqs.find_sites(fun, params, X)
    with pytest.raises(aqs.RuleError, match="matches no site"):
        aqs.assign(sites, [(r"q\[4\]", "int4")])
    with pytest.raises(aqs.SiteError, match=r"'blocks/q\[4\]'.*Nearest: .*blocks/q\[3\]"):
        aqs.quantize(fun)({"blocks/q[4]": aqs.SiteFormats()}, params, X)


# --- Outputs and gradients ------------------------------------------------------------------------


def test_outputs_and_gradients_are_those_of_the_unrolled_model(twins):
    (one, layers, params), (other, _, apart) = twins
    assignment = mixed(layers)
    theirs = for_twin(assignment)
    y = jax.jit(aqs.quantize(one))(assignment, params, X)
    z = jax.jit(aqs.quantize(other))(theirs, apart, X)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aqs.quantize(one)(assignment, params, X), y, rtol=1e-5, atol=1e-5)
    assert np.abs(y - one(params, X)).max() > 0.01
    dx, dz = (
        jax.grad(lambda x, f=f, a=a, p=p: loss(aqs.quantize(f)(a, p, x)))(X)
        for f, a, p in ((one, assignment, params), (other, theirs, apart))
    )
    np.testing.assert_allclose(dx, dz, rtol=1e-4, atol=1e-4)


def test_gradients_of_weights():
    (one, layers, params), (other, _, apart) = pair("attention")
    assignment = mixed(layers)
    ours = jax.grad(lambda p: loss(aqs.quantize(one)(assignment, p, X)))(params)
    theirs = jax.grad(lambda p: loss(aqs.quantize(other)(for_twin(assignment), p, X)))(apart)
    for name, stack in ours["blocks"].items():
        for i in range(LAYERS):
            np.testing.assert_allclose(stack[i], theirs[f"blocks_{i}"][name], rtol=1e-3, atol=1e-4)


def test_formats_of_gradients_by_layer():
    (one, layers, params), (other, _, apart) = pair("attention")
    e5m2, e4m3 = map(aqs.numeric_format, ("e5m2", "e4m3"))
    assignment = {
        name: f._replace(lhs_gradient=e5m2 if i % 2 else None, rhs_gradient=e4m3 if i % 3 else e5m2)
        for i, (name, f) in enumerate(mixed(layers).items())
    }
    ours, theirs = (
        jax.grad(lambda x, f=f, a=a, p=p: loss(aqs.quantize(f)(a, p, x)))(X)
        for f, a, p in ((one, assignment, params), (other, for_twin(assignment), apart))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_layer_may_stay_as_it_is(twins):
    (one, layers, params), (other, _, apart) = twins
    names = list(layers)
    assignment = {n: f for n, f in mixed(layers).items() if names.index(n) % 3}
    y = aqs.quantize(one)(assignment, params, X)
    z = aqs.quantize(other)(for_twin(assignment), apart, X)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)


def test_a_layer_goes_before_its_stack():
    fun, _, params, _ = attention_model()
    int4, int8 = (aqs.SiteFormats(*[aqs.numeric_format(n)] * 2) for n in ("int4", "int8"))
    short = {"blocks/q": int4, "blocks/q[2]": int8}
    full = {f"blocks/q[{i}]": int8 if i == 2 else int4 for i in range(4)}
    outputs = [aqs.quantize(fun)(a, params, X) for a in (short, full)]
    np.testing.assert_array_equal(*outputs)
    sites = aqs.find_sites(fun, params, X)
    for cost in (aqs.cost.gbops, aqs.cost.weight_bytes):
        assert cost(sites, short) == cost(sites, full)


def test_layers_alike_are_the_stack(twins):
    """An assignment of the whole means what it did, and equal layers are the same program."""
    (one, layers, params), _ = twins
    formats = aqs.SiteFormats(aqs.numeric_format("int8"), aqs.numeric_format("int4"))
    whole = {site.stack: formats for site in layers.values()}
    each = dict.fromkeys(layers, formats)
    np.testing.assert_array_equal(
        aqs.quantize(one)(whole, params, X), aqs.quantize(one)(each, params, X)
    )
    frozen = [aqs.freeze(one, a, params, X) for a in (whole, each)]
    assert jax.tree.structure(frozen[0].weights) == jax.tree.structure(frozen[1].weights)


def test_vmap_over_assignments_and_traced_formats():
    (one, layers, params), _ = pair("attention")
    assignments = [
        mixed(layers),
        for_stack(mixed(layers), "e4m3"),
        for_stack(mixed(layers), "int8"),
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *assignments)
    calls = []

    def counted(assignment, x):
        calls.append(None)
        return aqs.quantize(one)(assignment, params, x)

    together = jax.jit(jax.vmap(counted, (0, None)))(stacked, X)
    one_by_one = jax.jit(counted)
    for assignment, y in zip(assignments, together):
        np.testing.assert_allclose(one_by_one(assignment, X), y, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2  # formats are data: compiled once


def for_stack(assignment, name):
    fmt = aqs.numeric_format(name)
    return {n: f._replace(rhs=dataclasses.replace(f.rhs, fmt=fmt)) for n, f in assignment.items()}


@pytest.mark.parametrize(
    "change, word",
    [
        ({"calibration": aqs.mse()}, "calibration"),
        ({"granularity": aqs.PER_TENSOR}, "granularity"),
        ({"scale_format": "e8m0"}, "scale_format"),
    ],
)
def test_layers_may_differ_in_their_format_alone(change, word):
    fun, _, params, _ = attention_model()
    spec = dataclasses.replace(aqs.quantizer("int4"), **change)
    assignment = {"blocks/q": aqs.SiteFormats(rhs=aqs.quantizer("int8")),
                  "blocks/q[2]": aqs.SiteFormats(rhs=spec)}  # fmt: skip
    with pytest.raises(aqs.SiteError, match=rf"'blocks/q\[2\]': the {word} of rhs is not that of"):
        aqs.quantize(fun)(assignment, params, X)


@pytest.mark.parametrize("site", ["blocks/q", "head"])
def test_a_table_of_formats_is_no_format(site):
    """Also where it has as many as there are layers: those have names."""
    fun, _, params, _ = attention_model()
    table = aqs.stack_formats(FORMATS)
    with pytest.raises(aqs.SiteError, match=rf"'{site}': the format of rhs is a table.*\(4,\)"):
        aqs.quantize(fun)({site: aqs.SiteFormats(rhs=table)}, params, X)


def test_keys_of_stochastic_rounding_by_layer():
    (one, layers, params), (other, _, apart) = pair("nested")
    stochastic = functools.partial(dataclasses.replace, rounding="stochastic")
    assignment = aqs.with_keys(mixed(layers, stochastic), jax.random.key(3))
    y = aqs.quantize(one)(assignment, params, X)
    z = aqs.quantize(other)(for_twin(assignment), apart, X)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)
    frozen = aqs.freeze(one, assignment, params, X)
    np.testing.assert_allclose(aqs.serve(one)(frozen, X), y, rtol=1e-5, atol=1e-5)


# --- Costs, spaces and scores ---------------------------------------------------------------------


COSTS = {
    "gbops": aqs.cost.gbops,
    "weight_bytes": aqs.cost.weight_bytes,
    "latency": functools.partial(aqs.roofline.latency_ms, chip="h100"),
}


@pytest.mark.parametrize("cost", COSTS)
def test_costs_are_those_of_the_unrolled_model(twins, cost):
    (one, layers, params), (_, sites, _) = twins
    assignment = mixed(layers)
    stacks = aqs.find_sites(one, params, X)
    for ours in (layers, stacks):  # a cost takes the stacks apart that an assignment does
        found = COSTS[cost](ours, assignment)
        assert found == pytest.approx(COSTS[cost](sites, for_twin(assignment)), rel=1e-12)
    traced = jax.jit(lambda a: COSTS[cost](stacks, a))(assignment)
    assert float(traced) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("decide", ["site", "block", "stack", "rule", "model"])
def test_a_space_offers_what_it_offers_of_the_unrolled_model(decide):
    (one, _, params), (other, sites, apart) = pair("attention")
    rules = [("head", "int8"), (".*", ("int3", "int4", "int8"))]
    ours, theirs = (
        make_space(s, rules, decide=decide) for s in (aqs.find_sites(one, params, X), sites)
    )
    assert ours.max_options == theirs.max_options
    count = {"site": 8 * LAYERS, "block": LAYERS, "stack": 8, "rule": 1, "model": 1}[decide]
    assert len(ours.decisions) == count
    if decide == "stack":
        return  # the unrolled model has none
    if decide in ("rule", "model"):
        assert set(ours.decisions[0].sites) == set(aqs.find_sites(one, params, X)) - {"head"}
    else:
        assert {tuple(sorted(twin_name(s) for s in d.sites)) for d in ours.decisions} == {
            tuple(sorted(d.sites)) for d in theirs.decisions
        }
    choices = np.random.default_rng(1).integers(0, 3, count)
    formats = ours.assignment(choices), theirs.assignment(choices)
    y, z = (aqs.quantize(f)(a, p, X) for f, a, p in zip((one, other), formats, (params, apart)))
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)
    for cost in COSTS.values():
        tables = ours.cost_table(cost), theirs.cost_table(cost)
        np.testing.assert_allclose(*(float(t.of(choices)) for t in tables), rtol=1e-5)
        np.testing.assert_allclose(*(t.range for t in tables), rtol=1e-9)
    concrete = ours.concrete_assignment(choices)
    np.testing.assert_allclose(
        aqs.quantize(one)(concrete, params, X), y, rtol=1e-5, atol=1e-5
    )  # fmt: skip


def test_a_space_of_single_layers():
    fun, _, params, _ = attention_model()
    sites = aqs.find_sites(fun, params, X)
    space = make_space(sites, [(r"\[0\]", "int8"), ("blocks", ("int4", "int8")), ("head", None)])
    assert len(space.decisions) == 8 * (LAYERS - 1)
    fixed = space.concrete_assignment([0] * len(space.decisions))
    assert fixed["blocks/q[0]"].rhs == aqs.numeric_format("int8")
    assert fixed["blocks/q[1]"].rhs == aqs.numeric_format("int4")
    rule = make_space(sites, [(r"\[0\]", "int8"), ("blocks", ("int4", "int8"))], decide="rule")
    assert [len(d.sites) for d in rule.decisions] == [8 * (LAYERS - 1)]


@pytest.mark.parametrize("reference", [False, True])
def test_scores_are_those_of_the_unrolled_model(reference):
    (one, layers, params), (other, sites, apart) = pair("attention")
    rules = [(".*", {"weight": ("int3", "int4", "int8"), "activation": ("int8", "e4m3")})]

    def objective(y, batch):
        return jnp.mean(jnp.square(y - 1))

    formats = mixed(layers) if reference else {}
    found = []
    stacks = aqs.find_sites(one, params, X)
    for f, s, p, r in ((one, stacks, params, formats), (other, sites, apart, for_twin(formats))):
        space = make_space(s, rules)
        values = score(f, objective, p, [X, 2 * X], space, r)
        found.append({d.name: row for d, row in zip(space.decisions, values)})
    ours, theirs = found
    assert len(ours) == len(theirs)
    for name, row in ours.items():
        site, _, role = name.partition(":")
        np.testing.assert_allclose(row, theirs[f"{twin_name(site)}:{role}"], rtol=2e-3, atol=1e-9)


# --- Files ----------------------------------------------------------------------------------------


def test_an_assignment_by_layer_in_a_file():
    fun, _, params, _ = attention_model()
    sites = aqs.find_sites(fun, params, X)
    assignment = aqs.assign(sites, [(r"q\[0\]", "int4"), (r"q\[1\]", None), (".*", "e4m3")])
    text = json.dumps(aqs.to_json(assignment))
    read = aqs.from_json(json.loads(text))
    assert read == assignment
    np.testing.assert_array_equal(
        *(aqs.quantize(fun)(a, params, X) for a in (assignment, read))
    )  # fmt: skip


# --- Storage --------------------------------------------------------------------------------------


def stored_bytes(frozen):
    return sum(w.nbytes for sides in frozen.weights.values() for w in sides.values())


def test_stored_in_the_bytes_of_the_unrolled_model(twins):
    (one, layers, params), (other, _, apart) = twins
    assignment = mixed(layers)
    frozen = aqs.freeze(one, assignment, params, X)
    theirs = aqs.freeze(other, for_twin(assignment), apart, X)
    assert stored_bytes(frozen) == stored_bytes(theirs)
    assert stored_bytes(frozen) == aqs.cost.weight_bytes(aqs.find_sites(one, params, X), assignment)
    assert frozen.nbytes == theirs.nbytes
    y = aqs.serve(one)(frozen, X)
    np.testing.assert_allclose(y, aqs.quantize(one)(assignment, params, X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(aqs.serve(one))(frozen, X), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["asymmetric", "blocks", "wide", "partly float"])
def test_stored_layers_of_other_kinds(spec):
    (one, layers, params), _ = pair("attention")
    formats, change = {
        "asymmetric": (("uint4", "uint8"), {"calibration": aqs.min_max()}),
        "blocks": (("int4", "int3"), {"granularity": aqs.per_block(4), "scale_format": "e8m0"}),
    }.get(spec, (("int4", "bf16"), {}))
    assignment = {}
    for number, name in enumerate(layers):
        fmt = aqs.numeric_format(formats[number % 2])
        rhs = dataclasses.replace(aqs.quantizer(fmt), **change)
        if spec != "partly float" or number % 3:
            assignment[name] = aqs.SiteFormats(rhs=rhs if layers[name].weight else None)
    frozen = aqs.freeze(one, assignment, params, X)
    y = aqs.quantize(one)(assignment, params, X)
    np.testing.assert_allclose(aqs.serve(one)(frozen, X), y, rtol=1e-5, atol=1e-5)
    weights = {n: s for n, s in layers.items() if s.weight and s.stack in frozen.weights}
    of_them = {n: f for n, f in assignment.items() if n in weights}
    assert stored_bytes(frozen) == aqs.cost.weight_bytes(weights, of_them)


def test_static_bounds_by_layer(twins):
    (one, layers, params), (other, _, apart) = twins
    assignment = aqs.with_static_activations(mixed(layers), layers)
    qfun, theirs = aqs.quantize_with_state(one), aqs.quantize_with_state(other)
    state = qfun.init(assignment, params, X)
    _, state = qfun.apply(assignment, state, params, X)
    other_state = theirs.init(for_twin(assignment), apart, X)
    _, other_state = theirs.apply(for_twin(assignment), other_state, apart, X)
    y = qfun.evaluate(assignment, state, params, 2 * X)
    z = theirs.evaluate(for_twin(assignment), other_state, apart, 2 * X)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)
    frozen = aqs.freeze(one, assignment, params, X, state=state)
    np.testing.assert_allclose(aqs.serve(one)(frozen, 2 * X), y, rtol=1e-5, atol=1e-5)
    static, state = ptq.calibrate(one, mixed(layers), params, [X, 2 * X])
    apart_static, other_state = ptq.calibrate(other, for_twin(mixed(layers)), apart, [X, 2 * X])
    y = qfun.evaluate(static, state, params, X)
    z = theirs.evaluate(apart_static, other_state, apart, X)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)
    frozen = aqs.freeze(one, static, params, X, state=state)
    np.testing.assert_allclose(aqs.serve(one)(frozen, X), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", ["auto", "native", "int8", "bf16"])
def test_executions(execution):
    """Whatever the formats of the layers are, one program multiplies codes that hold them all."""
    (one, layers, params), _ = pair("attention")
    formats = in_turn(layers, ("int4", "int8"))
    y = aqs.quantize(one)(formats, params, X)
    z = aqs.quantize(one, execution=execution)(formats, params, X)
    np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4)


def in_turn(layers, names):
    return {
        name: aqs.SiteFormats(aqs.numeric_format("int8"), aqs.numeric_format(names[i % len(names)]))
        for i, name in enumerate(layers)
    }


def test_an_embedding_in_a_stack():
    """A lookup inside of a scan, whose table is a slice of a stack."""

    def one(params, ids):
        def layer(x, table):
            return x + table[ids], None

        return jax.lax.scan(layer, jnp.zeros((5, 4)), params["tables"])[0]

    def other(params, ids):
        x = jnp.zeros((5, 4))
        for i in range(3):
            x = x + params[f"tables_{i}"][ids]
        return x

    stack, ids = weights(3, 7, 4, seed=5), np.array([0, 3, 6, 3, 1])
    params, apart = {"tables": stack}, {f"tables_{i}": stack[i] for i in range(3)}
    formats = {i: aqs.SiteFormats(rhs=aqs.numeric_format(n)) for i, n in enumerate(FORMATS[:3])}
    assignment = {f"tables[{i}]": f for i, f in formats.items()}
    theirs = {f"tables_{i}": f for i, f in formats.items()}
    y, z = aqs.quantize(one)(assignment, params, ids), aqs.quantize(other)(theirs, apart, ids)
    np.testing.assert_allclose(y, z, rtol=1e-6, atol=1e-6)
    frozen = aqs.freeze(one, assignment, params, ids)
    assert stored_bytes(frozen) == stored_bytes(aqs.freeze(other, theirs, apart, ids))
    np.testing.assert_allclose(aqs.serve(one)(frozen, ids), y, rtol=1e-6, atol=1e-6)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(x))), None


class Stack(nn.Module):
    """As Flax users write it: remat inside of nn.scan."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
                       length=3)  # fmt: skip
        x, _ = scan(name="blocks")(x, None)
        return nn.Dense(3, name="head")(x)


def test_linen_scan_with_remat():
    variables = Stack().init(jax.random.key(0), X)
    sites = aqs.find_sites(Stack().apply, variables, X)
    assignment = aqs.assign(
        sites, [(r"up/kernel\[0\]", "int8"), (r"up/kernel\[1\]", "e4m3"), (".*", "int4")]
    )
    assert [n for n in assignment if "up" in n] == [f"blocks/up/kernel[{i}]" for i in range(3)]

    def by_hand(variables, x):
        params = variables["params"]
        for i, spec in enumerate(("int8", "e4m3", "int4")):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            hidden = nn.relu(product(x, p["up"], spec))
            x = x + product(hidden, p["down"], "int4", "uint4")
        return product(x, params["head"], "int4")

    def product(x, dense, spec, of_x=None):
        w = aqs.fake_quant(dense["kernel"], spec, channel_axes=(-1,))
        return aqs.fake_quant(x, of_x or spec) @ w + dense["bias"][None, None]

    y = aqs.quantize(Stack().apply)(assignment, variables, X)
    np.testing.assert_allclose(y, by_hand(variables, X), rtol=1e-5, atol=1e-5)
    ours, theirs = (
        jax.grad(lambda v, f=f: loss(f(v, X)))(variables)
        for f in (lambda v, x: aqs.quantize(Stack().apply)(assignment, v, x), by_hand)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs)


# --- Quantization after training ------------------------------------------------------------------


class Normed(nn.Module):
    """LayerNorm and two layers that add to what they get."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(y))), None


class NormedStack(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            scan = nn.scan(
                nn.remat(Normed),
                variable_axes={"params": 0}, split_rngs={"params": True}, length=3,
            )  # fmt: skip
            x, _ = scan(name="blocks")(x, None)
        else:
            for i in range(3):
                x, _ = Normed(name=f"blocks_{i}")(x, None)
        return nn.Dense(3, name="head")(x)


def restacked(apart):
    """The parameters of the scanned model, given those of the unrolled one."""
    apart = apart["params"]
    blocks = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(apart[f"blocks_{i}"] for i in range(3))
    )
    return {"params": {"blocks": blocks, "head": apart["head"]}}


METHODS = {
    "gptq": ptq.gptq,
    "adaround": functools.partial(ptq.adaround, steps=40),
    "correct_bias": ptq.correct_bias,
    "smooth": lambda apply, assignment, state, v, batches: ptq.smooth(apply, v, batches),
    "equalize": lambda apply, assignment, state, v, batches: ptq.equalize(apply, v, batches[0]),
}


@pytest.fixture(scope="module")
def normed():
    """(apply, formats and state, variables) of the unrolled model and of the scanned one."""
    one, other = NormedStack(True).apply, NormedStack(False).apply
    apart = NormedStack(False).init(jax.random.key(0), X)
    rng = np.random.default_rng(4)  # biases and gains that are not all alike
    apart = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype("f4"), apart)
    whole = restacked(apart)
    formats = {"down": "int3", "head": "int8"}
    sites = layer_sites(aqs.find_sites(one, whole, X))
    rules = [(rf"up/kernel\[{i}\]", {"weight": f, "activation": "int8"})
             for i, f in enumerate(("int3", "e2m1", "int4"))]  # fmt: skip
    rules += [(name, {"weight": f, "activation": "int8"}) for name, f in formats.items()]
    assignment = aqs.assign(sites, rules)
    batches, found = [X, 2 * X[::-1]], []
    for apply, a, v in ((other, for_linen_twin(assignment), apart), (one, assignment, whole)):
        found.append((apply, *ptq.calibrate(apply, a, v, batches), v))
    return found, batches


def for_linen_twin(assignment):
    pattern = re.compile(r"^blocks/(.*)\[(\d)\]$")
    return {pattern.sub(r"blocks_\2/\1", name): f for name, f in assignment.items()}


@pytest.mark.filterwarnings("ignore::aqt_search.ptq.errors.SkippedSite")
@pytest.mark.parametrize("method", METHODS)
def test_methods_serve_each_layer_as_those_of_the_unrolled_model(normed, method):
    (theirs, ours), batches = normed
    expected = restacked(METHODS[method](*theirs, batches))
    found = METHODS[method](*ours, batches)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
    before = ours[-1]
    changed = jax.tree.map(
        lambda a, b: [bool(np.any(x != y)) for x, y in zip(a, b)],
        found["params"]["blocks"], before["params"]["blocks"],
    )  # fmt: skip
    leaves = [layer for leaf in jax.tree.leaves(changed, is_leaf=lambda x: isinstance(x, list))
              for layer in leaf]  # fmt: skip
    assert any(leaves)
    assert jax.tree.structure(found) == jax.tree.structure(before)


@pytest.mark.filterwarnings("ignore::aqt_search.ptq.errors.SkippedSite")
def test_names_of_layers_to_round(normed):
    (_, (apply, assignment, state, variables)), batches = normed
    names = ["blocks/up/kernel[1]", "blocks/down/kernel"]
    found = ptq.gptq(apply, assignment, state, variables, batches, names=names)["params"]
    before = variables["params"]
    up, down = (
        found["blocks"][n]["kernel"] != before["blocks"][n]["kernel"] for n in ("up", "down")
    )
    assert [bool(layer.any()) for layer in up] == [False, True, False]
    assert all(layer.any() for layer in down)
    np.testing.assert_array_equal(found["head"]["kernel"], before["head"]["kernel"])
    with pytest.raises(ptq.PTQError, match=r"no site 'blocks/up/kernel\[3\]'. Nearest: blocks/up"):
        ptq.gptq(apply, assignment, state, variables, batches, names=["blocks/up/kernel[3]"])


def test_a_stack_that_is_cast_outside_of_its_scan_is_skipped():
    """No leaf of a layer is a weight then."""

    def apply(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, jnp.tanh(params["w"]))[0]

    params = {"w": weights(3, 8, 8, seed=2)}
    assignment = aqs.assign(aqs.find_sites(apply, params, X), [("w", "int4")])
    static, state = ptq.calibrate(apply, assignment, params, [X])
    with pytest.warns(ptq.SkippedSite, match="'w' is left as it is: it is inside a scan"):
        found = ptq.gptq(apply, static, state, params, [X])
    np.testing.assert_array_equal(found["w"], params["w"])


def test_a_reversed_scan():
    """Layer i is the i-th slice, whichever runs first."""

    def one(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"], reverse=True)[0]

    def other(params, x):
        for i in reversed(range(3)):
            x = jnp.tanh(x @ params[f"w_{i}"])
        return x

    stack = weights(3, 8, 8, seed=2)
    params, apart = {"w": stack}, {f"w_{i}": stack[i] for i in range(3)}
    formats = [aqs.SiteFormats(*[aqs.numeric_format(n)] * 2) for n in FORMATS[:3]]
    ours, theirs = (
        {pattern.format(i): f for i, f in enumerate(formats)} for pattern in ("w[{}]", "w_{}")
    )
    y, z = aqs.quantize(one)(ours, params, X), aqs.quantize(other)(theirs, apart, X)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)
    frozen = aqs.freeze(one, ours, params, X)
    np.testing.assert_allclose(aqs.serve(one)(frozen, X), y, rtol=1e-5, atol=1e-6)
    found = ptq.gptq(one, *ptq.calibrate(one, ours, params, [X]), params, [X])
    expected = ptq.gptq(other, *ptq.calibrate(other, theirs, apart, [X]), apart, [X])
    for i in range(3):
        np.testing.assert_allclose(found["w"][i], expected[f"w_{i}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "formats, execution",
    [(("int4", "int8", "int3"), "int8"), (("e2m1", "e4m3", "e3m2"), "fp8")],
)
def test_mixed_stacks_are_served_in_codes(formats, execution):
    def one(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    params = {"w": weights(3, 8, 8, seed=2)}
    activation = "int8" if execution == "int8" else "e4m3"
    assignment = {
        f"w[{i}]": aqs.SiteFormats(*map(aqs.numeric_format, (activation, f)))
        for i, f in enumerate(formats)
    }
    frozen = aqs.freeze(one, assignment, params, X)
    served = functools.partial(aqs.serve(one, execution=execution), frozen)
    y = aqs.quantize(one)(assignment, params, X)
    np.testing.assert_allclose(served(X), y, rtol=1e-4, atol=1e-5)
    products = re.findall(r"(\w+)\[[\d,]*\] = dot_general", str(jax.make_jaxpr(served)(X)))
    assert products == (["i32"] if execution == "int8" else ["f32"])
    dtype = "i8" if execution == "int8" else "f8_e4m3fn"
    assert f":{dtype}[3,5,8]" in str(jax.make_jaxpr(served)(X))


WHOLE = {
    "A palette": lambda layers: select_weights(layers, [("q", 2)]),
    "A range loss": lambda layers: aqs.range_loss(layers, [("q", "r2")]),
    "Companding": lambda layers: companded_model(nn.Dense(3), layers, ["blocks/q[1]"]),
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_is_done_to_whole_parameters_takes_no_layers(what):
    fun, _, params, _ = attention_model()
    layers = layer_sites(aqs.find_sites(fun, params, X))
    with pytest.raises(aqs.SiteError, match=rf"{what} works .*'blocks/q\[0\]' is one layer"):
        WHOLE[what](layers)


def test_statistics_of_weights_by_layer(twins):
    (one, layers, params), (other, _, apart) = twins
    names = [name for name, site in layers.items() if site.weight]
    assignment = {n: f for n, f in mixed(layers).items() if n in names and names.index(n) % 4}
    found = weight_statistics(one, assignment, params, X)
    expected = weight_statistics(other, for_twin(assignment), apart, X)
    for name in assignment:
        for value, other_value in zip(found[name], expected[twin_name(name)]):
            if isinstance(value, float):
                assert value == pytest.approx(other_value, rel=1e-4, nan_ok=True)


def test_sensitivities_by_layer():
    """One decision changed after another: SQNR of each layer is of its own slice."""

    def model(variables, x, train=False):
        del train
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, variables["params"]["w"])[0]

    stack = weights(3, 8, 8, seed=2)
    variables = {"params": {"w": stack}}
    batch = {
        "image": X.reshape(-1, 8),
        "label": np.zeros(15, np.int32),
        "mask": np.ones(15, np.int32),
    }
    sites = aqs.find_sites(model, variables, batch["image"])
    found = sensitivity(model, variables, sites, ("int4",), [batch], operands="weight")
    assert found.sites == ("w[0]", "w[1]", "w[2]")
    for layer, row in zip(stack, found.sqnr_db):
        error = np.asarray(aqs.fake_quant(layer, "int4", channel_axes=(-1,))) - layer
        expected = -10 * np.log10(np.sum(np.square(error)) / np.sum(np.square(layer)))
        assert row[0] == pytest.approx(expected, abs=0.01)


def test_configured_formats_by_layer(tmp_path):
    """Rules and policy files of the jobs name layers as rules do elsewhere."""
    fun, _, params, _ = attention_model()
    sites = aqs.find_sites(fun, params, X)
    config = get_config()
    config.formats = ((r"blocks/q\[0\]", "int8"), (".*", "int4"))
    assignment = configured_assignment(config, sites)
    assert [n for n in assignment if "blocks/q" in n] == [f"blocks/q[{i}]" for i in range(4)]
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy_json(assignment)))
    config.formats, config.policy = (), str(path)
    read = configured_assignment(config, sites)
    y, z = (aqs.quantize(fun)(a, params, X) for a in (assignment, read))
    np.testing.assert_array_equal(y, z)
    text = json.loads(path.read_text())
    path.write_text(json.dumps(text | {"blocks/q[7]": text["head"]}))
    with pytest.raises(ConfigError, match=r"blocks/q\[7\]"):
        configured_assignment(config, sites)


@pytest.mark.parametrize("formats", [("int4", None, "int8"), ("int4", "int8", "int3")])
def test_bfloat16_is_served_to_the_bit(formats):
    """Values of a step times a scale have more bits than bfloat16, in storage as in training."""

    def one(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, params["w"])

    params = {"w": jnp.asarray(weights(3, 8, 8, seed=2), jnp.bfloat16)}
    x = jnp.asarray(X, jnp.bfloat16)
    specs = [None if f is None else aqs.numeric_format(f) for f in formats]
    int8 = aqs.numeric_format("int8")
    assignment = {
        f"w[{i}]": aqs.SiteFormats(f and int8, f) for i, f in enumerate(specs) if f is not None
    }
    y, inputs = aqs.quantize(one)(assignment, params, x)
    if None in formats:
        # The second layer multiplies as it does without quantization.
        np.testing.assert_array_equal(inputs[2], jnp.tanh(inputs[1] @ params["w"][1]))
    frozen = aqs.freeze(one, assignment, params, x)
    np.testing.assert_array_equal(aqs.serve(one, execution="emulated")(frozen, x)[0], y)
    sites = aqs.find_sites(one, params, x)
    assert stored_bytes(frozen) == aqs.cost.weight_bytes(sites, assignment)


@pytest.mark.parametrize("second", [("int4", "e4m3", "int8"), ("int4", "int3", "int8"), None])
def test_a_stack_that_two_scans_go_through(second):
    """A prompt and the loop after it: stored once if the layers have the same formats in both."""

    def layers(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    def fun(params, x):
        return jax.lax.scan(lambda x, _: (layers(params, x), None), layers(params, x), None, 2)[0]

    params, first = {"w": weights(3, 8, 8, seed=2)}, ("int4", "e4m3", "int8")
    sites = aqs.find_sites(fun, params, X)
    assert list(sites) == ["w#1", "w#2"]
    specs = {"w#1": first, "w#2": second or ("int3",) * 3}
    assignment = {
        f"{name}[{i}]": aqs.SiteFormats(rhs=aqs.numeric_format(f))
        for name, formats in specs.items()
        for i, f in enumerate(formats)
    }
    frozen = aqs.freeze(fun, assignment, params, X)
    assert stored_bytes(frozen) == aqs.cost.weight_bytes(sites, assignment)
    assert (len(frozen.weights) == 1) == (second == first)
    y = aqs.quantize(fun)(assignment, params, X)
    np.testing.assert_allclose(aqs.serve(fun)(frozen, X), y, rtol=1e-5, atol=1e-6)


def test_a_stack_of_one_layer_and_of_none():
    def fun(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    int8, int4 = (aqs.SiteFormats(*[aqs.numeric_format(n)] * 2) for n in ("int8", "int4"))
    one = {"w": weights(1, 8, 8, seed=2)}
    y = aqs.quantize(fun)({"w[0]": int4}, one, X)
    np.testing.assert_array_equal(y, aqs.quantize(fun)({"w": int4}, one, X))
    frozen = aqs.freeze(fun, {"w": int8, "w[0]": int4}, one, X)
    np.testing.assert_array_equal(aqs.serve(fun, execution="emulated")(frozen, X), y)
    none = {"w": weights(0, 8, 8, seed=2)}
    sites = aqs.find_sites(fun, none, X)
    assert not layer_sites(sites)
    np.testing.assert_array_equal(aqs.quantize(fun)({"w": int4}, none, X), X)
    with pytest.raises(aqs.SiteError, match=r"'w\[0\]'"):
        aqs.quantize(fun)({"w[0]": int4}, none, X)


def test_an_operand_of_a_lookup_that_cannot_be_quantized():
    """The error is that of lookups, also of a single layer."""

    def fun(params, ids):
        return jax.lax.scan(lambda x, t: (x + t[ids], None), jnp.zeros((5, 4)), params["t"])[0]

    params, int8 = {"t": weights(3, 7, 4, seed=5)}, aqs.numeric_format("int8")
    for name in ("t", "t[1]"):
        with pytest.raises(aqs.SiteError, match="only the table can be quantized"):
            aqs.quantize(fun)({name: aqs.SiteFormats(lhs=int8)}, params, np.arange(5))
