"""Search spaces: rules to decisions, traced choices against concrete ones, and costs."""

import dataclasses
import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.formats import format_name
from aqt_search.search.options import NAMED_OPTIONS, SpaceError
from aqt_search.search.space import make_space

WEIGHT_ONLY = {"weight": "int4"}
OPTIONS = ("int4", None, {"weight": "int3", "activation": "e4m3"})


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.relu(nn.Conv(5, (3, 3), name="body")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def sites():
    image = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)
    variables = jax.eval_shape(Net().init, jax.random.key(0), image)
    return aqs.find_sites(Net().apply, variables, image)


STEM, BODY, HEAD = "stem/kernel", "body/kernel", "head/kernel"


def every_point(space):
    return itertools.product(*(range(len(d.options)) for d in space.decisions))


def as_names(formats):
    """Format names, where None and float32 are the same thing: nothing is rounded."""
    names = (
        None if f is None else format_name(jax.tree.map(np.asarray, aqs.quantizer(f).fmt))
        for f in formats[:2]
    )
    return tuple(None if name == "fp32" else name for name in names)


def test_the_first_matching_rule_holds_and_decisions_come_in_site_order(sites):
    rules = [("head", ["e4m3", "bf16"]), ("stem", "int8"), (".*", ("int4", "int8", None))]
    space = make_space(sites, rules)
    assert [(d.name, d.sites, d.labels) for d in space.decisions] == [
        (BODY, (BODY,), ("int4", "int8", "none")),
        (HEAD, (HEAD,), ("e4m3", "bf16")),
    ]
    assert list(space.fixed) == [STEM]
    assert as_names(space.fixed[STEM]) == ("int8", "int8")
    np.testing.assert_array_equal(space.mask, [[1, 1, 1], [1, 1, 0]])
    found = space.concrete_assignment([2, 1])
    assert list(found) == list(sites) == [STEM, BODY, HEAD]
    assert [as_names(f) for f in found.values()] == [("int8",) * 2, (None,) * 2, ("bf16",) * 2]
    assert found[BODY] == aqs.SiteFormats(None, None)


def test_sites_that_no_rule_matches_stay_as_they_are(sites):
    space = make_space(sites, [("body", ("int4", "int8"))])
    assert space.fixed == {STEM: aqs.SiteFormats(), HEAD: aqs.SiteFormats()}


def test_a_decision_for_each_rule(sites):
    space = make_space(sites, [("head", ("int4", "int8")), (".*", OPTIONS)], decide="rule")
    assert [(d.name, d.sites) for d in space.decisions] == [
        (".*", (STEM, BODY)),
        ("head", (HEAD,)),
    ]
    found = space.concrete_assignment([2, 0])
    assert [as_names(f) for f in found.values()] == [("e4m3", "int3")] * 2 + [("int4",) * 2]


APART = {"weight": ("int2", "int4"), "activation": ("int4", "int8", "bf16")}


def test_weights_and_activations_may_be_decided_apart(sites):
    space = make_space(sites, [("stem", "int8"), (".*", APART)])
    assert [(d.name, d.sites, d.labels) for d in space.decisions] == [
        (f"{BODY}:weight", (BODY,), ("int2", "int4")),
        (f"{BODY}:activation", (BODY,), ("int4", "int8", "bf16")),
        (f"{HEAD}:weight", (HEAD,), ("int2", "int4")),
        (f"{HEAD}:activation", (HEAD,), ("int4", "int8", "bf16")),
    ]
    found = space.concrete_assignment([0, 1, 1, 2])
    assert [as_names(f) for f in found.values()] == [
        ("int8", "int8"), ("int8", "int2"), ("bf16", "int4"),
    ]  # fmt: skip


def test_the_other_operand_may_be_fixed(sites):
    rule = {"weight": ("int2", "int4"), "activation": "int8"}
    space = make_space(sites, [("stem", None), (".*", rule)], decide="rule")
    assert [(d.name, d.sites) for d in space.decisions] == [(".*:weight", (BODY, HEAD))]
    found = space.concrete_assignment([1])
    assert [as_names(f) for f in found.values()] == [(None, None), *[("int8", "int4")] * 2]


@pytest.mark.parametrize("name", NAMED_OPTIONS)
def test_named_options(sites, name):
    space = make_space(sites, [(".*", name)], decide="model")
    (decision,) = space.decisions
    assert decision.labels == NAMED_OPTIONS[name]
    bits = [aqs.numeric_format(option).bits for option in decision.options]
    assert bits == sorted(bits)
    assert bits[0] == 4
    assert bits[-1] == 16
    as_tuple = make_space(sites, [(".*", {"weight": name})], decide="model")
    assert as_tuple.decisions[0].labels == decision.labels


def of_names(names, site):
    return {name: dataclasses.replace(site, name=name) for name in names}


def test_a_decision_for_each_block(sites):
    names = ["stem/k", "block1/a/k", "block1/b/k", "block2/a/k", "head/k"]
    options = ("int4", "int8")
    whole = of_names(names, sites[BODY])
    space = make_space(whole, [("head", "int8"), (".*", options)], decide="block")
    assert [(d.name, d.sites) for d in space.decisions] == [
        ("stem", ("stem/k",)),
        ("block1", ("block1/a/k", "block1/b/k")),
        ("block2", ("block2/a/k",)),
    ]
    # What all names begin with tells nothing apart; a block of two rules has a decision for each.
    deeper = of_names([f"net/{name}" for name in names], sites[BODY])
    space = make_space(deeper, [("/a/", options), (".*", ("int2", "int8"))], decide="block")
    assert [d.name for d in space.decisions] == [
        "net/stem", "net/block1 (/a/)", "net/block1 (.*)", "net/block2", "net/head",
    ]  # fmt: skip
    assert sum(len(d.sites) for d in space.decisions) == len(names)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return x + nn.Dense(8, name="out")(nn.relu(nn.Dense(16, name="in")(x)))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for number in range(3):
            x = Layer(name=f"layer_{number}")(x)
        return nn.Dense(8, name="last")(x)


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        return embed.attend(Decoder(name="decoder")(embed(tokens)))


def test_a_block_of_a_transformer_is_a_layer():
    model, tokens = LanguageModel(), jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    sites = aqs.find_sites(model.apply, params, tokens)
    space = make_space(sites, [(".*", {"weight": ("int4", "int8")})], decide="block")
    assert {d.name: len(d.sites) for d in space.decisions} == {
        "embed:weight": 2,
        **{f"decoder/layer_{number}:weight": 6 for number in range(3)},
        "decoder:weight": 1,
    }
    # With the products of activations, whose names begin as those of the weights beside them do.
    space = make_space(sites, [(".*", ("int4", "int8"))], decide="block")
    assert [len(d.sites) for d in space.decisions] == [2, 8, 8, 8, 1]


def test_one_decision_for_the_model(sites):
    rules = [("stem", ("int4", "int8")), ("head", "int8"), (".*", ("int4", "int8"))]
    space = make_space(sites, rules, decide="model")
    assert [(d.name, d.sites) for d in space.decisions] == [("model", (STEM, BODY))]
    other = [("stem", ("int4", "bf16")), (".*", ("int4", "int8"))]
    with pytest.raises(SpaceError, match=r"'stem', '.\*' offer different"):
        make_space(sites, other, decide="model")


def test_options_by_role_name_their_operands(sites):
    space = make_space(sites, [("body", ("int8", WEIGHT_ONLY, aqs.numeric_format("e2m1")))])
    assert space.decisions[0].labels == ("int8", "weight=int4", "e2m1")
    assert as_names(space.concrete_assignment([1])[BODY]) == (None, "int4")


RULES = {
    "together": [("head", (WEIGHT_ONLY, "e2m1")), ("stem|body", OPTIONS)],
    "apart": [("head", {"weight": ("int2", "int4"), "activation": "int8"}), ("stem|body", APART)],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("decide", ["site", "rule"])
def test_traced_choices_give_the_concrete_formats_at_every_point(sites, decide, rules):
    space = make_space(sites, rules, decide=decide)
    traced = jax.jit(space.assignment)
    for choices in every_point(space):
        found, expected = traced(jnp.array(choices)), space.concrete_assignment(choices)
        assert set(found) == set(expected) == set(sites)
        for name in sites:
            assert as_names(found[name]) == as_names(expected[name]), (choices, name)
    assert traced._cache_size() == 1


def test_an_operand_that_no_option_quantizes_is_left_alone(sites):
    space = make_space(sites, [("head", (WEIGHT_ONLY, {"weight": "int8"}))])
    assert space.assignment(jnp.array([0]))[HEAD].lhs is None


COSTS = {
    "gbops": aqs.cost.gbops,
    "weight_bytes": aqs.cost.weight_bytes,
    "latency": functools.partial(aqs.roofline.latency_ms, chip="h100"),
}


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("decide", ["site", "rule"])
def test_cost_table_is_the_cost_of_the_assignment(sites, decide, rules, cost):
    space = make_space(sites, rules, decide=decide)
    costs = space.cost_table(cost)
    of = jax.jit(jax.vmap(costs.of))
    points = np.array(list(every_point(space)))
    # With concrete formats a cost is exact; `of` sums float32 numbers.
    exact = [cost(sites, space.concrete_assignment(point)) for point in points]
    np.testing.assert_allclose(of(points), exact, rtol=1e-6)
    np.testing.assert_allclose(costs.of_many(points), exact, rtol=1e-12)
    assert costs.range == pytest.approx((min(exact), max(exact)), rel=1e-12)


@pytest.mark.parametrize("body", [OPTIONS, APART], ids=["together", "apart"])
def test_expected_cost_is_the_mean_over_all_points(sites, body):
    space = make_space(sites, [("stem", "int8"), ("head", ("int4", "bf16")), ("body", body)])
    costs = space.cost_table(aqs.cost.gbops)
    rng = np.random.default_rng(0)
    p = np.where(space.mask, rng.uniform(0.1, 1.0, space.mask.shape), 0.0)
    p /= p.sum(axis=1, keepdims=True)
    mean = sum(
        np.prod(p[np.arange(len(point)), point])
        * aqs.cost.gbops(sites, space.concrete_assignment(point))
        for point in every_point(space)
    )
    found = jax.jit(costs.expected)(jnp.asarray(p, jnp.float32))
    assert float(found) == pytest.approx(mean, rel=1e-6)


def test_a_target_must_lie_in_the_range(sites):
    costs = make_space(sites, [(".*", ("int4", "int8"))]).cost_table(aqs.cost.gbops)
    low, high = costs.range
    assert high == pytest.approx(4 * low)
    for target in (low, (low + high) / 2, high):
        costs.check_target(target)
    for target in (0.99 * low, 1.01 * high, 0.0, -1.0, float("nan")):
        with pytest.raises(SpaceError, match=f"{target:.6g}.*{low:.6g} and {high:.6g}"):
            costs.check_target(target)


@pytest.mark.parametrize(
    "rules, kind, words",
    [
        ([(".*", ("int4", "int99"))], aqs.FormatError, ["'int99'"]),
        ([("stem", "int99"), (".*", ("int4", "int8"))], aqs.FormatError, ["'int99'"]),
        ([(".*", ("int4", "int8", "int4"))], SpaceError, ["'.*'", "'int4', 'int8', 'int4'"]),
        ([(".*", (None, None))], SpaceError, ["'none', 'none'"]),
        ([(".*", ("int4",))], SpaceError, ["'.*'", "'int4'", "at least two"]),
        ([(".*", ())], SpaceError, ["'.*'", "at least two"]),
        ([(".*", "int4")], SpaceError, ["nothing to choose"]),
        ([], SpaceError, ["nothing to choose"]),
        ([("tail", ("int4", "int8"))], aqs.RuleError, ["'tail'", "Nearest names"]),
        ([(".*", ("int4", "int8")), ("stem", "int8")], aqs.RuleError, ["'stem'", "never used"]),
        ([(".*", ("int4", {"weigth": "int8"}))], aqs.RuleError, ["weigth", "'weight'"]),
        ([(".*", {"weight": ("int4",)})], SpaceError, ["'.*'", "at least two"]),
        ([(".*", {"weight": ("int4", "int99")})], aqs.FormatError, ["'int99'"]),
        ([(".*", {"lhs": ("int4", "int8")})], SpaceError, ["['lhs']", "'weight' and 'activation'"]),
        (
            [(".*", {"weight": ("int4", "int8"), "unsigned": False})],
            SpaceError,
            ["['unsigned']", "'weight' and 'activation'"],
        ),
        (
            [(".*", {"weight": ("int4", {"weight": "int8"})})],
            SpaceError,
            ["to the weight", "no operands of their own"],
        ),
    ],
)
def test_errors(sites, rules, kind, words):
    with pytest.raises(kind) as caught:
        make_space(sites, rules)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_unknown_way_to_decide(sites):
    with pytest.raises(SpaceError, match=r"'layer'.*site, block, rule, model"):
        make_space(sites, [(".*", ("int4", "int8"))], decide="layer")


def test_a_decision_that_covers_no_site(sites):
    lhs = dataclasses.replace(sites[BODY].lhs, role="activation")
    product = dataclasses.replace(sites[BODY], name="attention", lhs=lhs, rhs=lhs)
    both = {**sites, "attention": product}
    rule = {"weight": ("int4", "int8")}
    with pytest.raises(
        SpaceError, match=r"'attention' decides nothing for \['attention'\].*weight"
    ):
        make_space(both, [("attention", rule), (".*", ("int4", "int8"))])
    space = make_space(both, [(".*", rule)], decide="rule")
    assert space.decisions[0].sites == (STEM, BODY, HEAD)
    assert space.assignment(np.array([0]))["attention"] == aqs.SiteFormats()


def test_a_site_that_cannot_be_quantized_is_refused_in_any_option(sites):
    refused = {**sites, BODY: dataclasses.replace(sites[BODY], refused="it is special")}
    with pytest.raises(aqs.SiteError, match=r"body/kernel.*it is special"):
        make_space(refused, [(".*", (None, "int4"))])
    space = make_space(refused, [("body", None), (".*", ("int4", "int8"))])
    assert BODY in space.fixed


def test_choices_may_be_batched_by_vmap(sites):
    space = make_space(sites, [(".*", ("int4", "int8", "e4m3"))])
    points = np.array(list(every_point(space)))
    costs = space.cost_table(aqs.cost.gbops)
    of_formats = jax.vmap(lambda c: aqs.cost.gbops(sites, space.assignment(c)))(points)
    chex.assert_shape(of_formats, (27,))
    np.testing.assert_allclose(of_formats, jax.vmap(costs.of)(points), rtol=1e-6)


ODD = aqs.NumericFormat(1.0, 1.0, -3.0, 2.0, 3.0)


@pytest.mark.parametrize(
    "options, labels",
    [
        (("int4", ODD, None), ("int4", "(1, 1, -3, 2, 3)", "none")),
        (
            [aqs.Quantizer(f, granularity=aqs.per_block(2)) for f in ("int4", "e4m3", ODD)],
            ("int4", "e4m3", "(1, 1, -3, 2, 3)"),
        ),
        (("mxfp4", aqs.quantizer("mxfp6")), ("mxfp4", "mxfp6")),
    ],
)
def test_an_option_may_be_any_format(sites, options, labels):
    """Formats without a name are told by their five numbers, quantizers by their format."""
    space = make_space(sites, [("stem", None), (".*", {"weight": options})])
    assert [d.labels for d in space.decisions] == [labels, labels]
    for column, option in enumerate(options):
        chosen = np.full(len(space.decisions), column)
        traced = jax.jit(space.assignment)(chosen)
        concrete = space.concrete_assignment(chosen)
        for name in (BODY, HEAD):
            want = aqs.quantizer("fp32" if option is None else option)
            np.testing.assert_array_equal(traced[name].rhs.fmt, np.float32(want.fmt))
            assert concrete[name].rhs is None or aqs.quantizer(concrete[name].rhs) == want


def test_equal_formats_are_no_choice_whatever_they_are_called(sites):
    with pytest.raises(SpaceError, match="two different formats"):
        make_space(sites, [(".*", ("int4", aqs.numeric_format("int4")))])
