"""Rules to assignments: which rule wins, whose formats, and what a mistake is told."""

import jax.numpy as jnp
import pytest

import aqt_search as aqs
from aqt_search import RuleError, SiteFormats

INT4, INT8, E4M3 = (aqs.numeric_format(name) for name in ("int4", "int8", "e4m3"))


@pytest.fixture(scope="module")
def sites():
    """Sites stem/kernel, block1/kernel, block2/kernel (a weight on the left), head/kernel, dot."""

    def fun(params, x):
        x = x @ params["stem"]["kernel"] @ params["block1"]["kernel"]
        x = (params["block2"]["kernel"] @ x.T).T
        return (x @ x.T) @ params["head"]["kernel"]

    kernel = {"kernel": jnp.ones((4, 4))}
    found = aqs.find_sites(
        fun, dict.fromkeys(["stem", "block1", "block2", "head"], kernel), jnp.ones((4, 4))
    )
    assert list(found) == [
        "stem/kernel", "block1/kernel", "block2/kernel", "dot_general", "head/kernel",
    ]  # fmt: skip
    return found


def both(fmt):
    return SiteFormats(fmt, fmt)


def test_first_match_wins_and_unmatched_sites_stay(sites):
    assignment = aqs.assign(sites, [("stem|head", "int8"), ("block1", "e4m3"), ("block", "int4")])
    assert assignment == {
        "stem/kernel": both(INT8),
        "block1/kernel": both(E4M3),
        "block2/kernel": both(INT4),
        "dot_general": SiteFormats(),
        "head/kernel": both(INT8),
    }
    assert list(assignment) == list(sites)
    assert aqs.assign(sites, []) == dict.fromkeys(sites, SiteFormats())


def test_none_protects_a_site(sites):
    assignment = aqs.assign(sites, [("head", None), (".*", "int4")])
    assert assignment["head/kernel"] == SiteFormats()
    assert assignment["stem/kernel"] == both(INT4)


def test_patterns_are_searched_anywhere_and_may_be_anchored(sites):
    assert aqs.assign(sites, [("kernel$", "int4")])["dot_general"] == SiteFormats()
    anchored = aqs.assign(sites, [("^block1/kernel$", "int4"), ("block[12]", "int8")])
    assert anchored["block1/kernel"] == both(INT4)
    assert anchored["block2/kernel"] == both(INT8)


@pytest.mark.parametrize(
    "spec, right, left, two_activations",
    [
        ("int4", both(INT4), both(INT4), both(INT4)),
        (INT4, both(INT4), both(INT4), both(INT4)),
        ({"lhs": "int8", "rhs": "int4"}, *[SiteFormats(INT8, INT4)] * 3),
        ({"rhs": "int4"}, *[SiteFormats(None, INT4)] * 3),
        (SiteFormats(INT8, None), *[SiteFormats(INT8, None)] * 3),
        (
            {"activation": "int8", "weight": "int4"},
            SiteFormats(INT8, INT4), SiteFormats(INT4, INT8), both(INT8),
        ),
        ({"weight": INT4}, SiteFormats(None, INT4), SiteFormats(INT4, None), SiteFormats()),
        (
            {"activation": "e4m3", "weight": None},
            SiteFormats(E4M3), SiteFormats(None, E4M3), both(E4M3),
        ),
    ],
)  # fmt: skip
def test_formats_by_side_and_by_role(sites, spec, right, left, two_activations):
    assignment = aqs.assign(sites, [(".*", spec)])
    assert assignment["stem/kernel"] == right
    assert assignment["block2/kernel"] == left
    assert assignment["dot_general"] == two_activations


def test_a_constant_takes_the_format_of_weights():
    constant = jnp.ones((4, 4))
    found = aqs.find_sites(lambda params, x: x @ constant, {}, jnp.ones((4, 4)))
    assignment = aqs.assign(found, [(".*", {"weight": "int4", "activation": "int8"})])
    assert list(assignment.values()) == [SiteFormats(INT8, INT4)]


@pytest.mark.parametrize(
    "rules, message",
    [
        (
            [("blok1/kernel", "int4")],
            r"'blok1/kernel' matches no site\. Nearest.*: block1/kernel",
        ),
        ([("^stm/.*", "int4")], "matches no site.*stem/kernel"),
        ([("Stem", "int4")], "'Stem' matches no site"),
        (
            [(".*", "int4"), ("head", "int8")],
            "'head' is never used.*head/kernel.*narrower",
        ),
        ([("stem", "int4"), ("stem", "int4")], "'stem' is never used"),
        ([("st(em", "int4")], r"'st\(em' is no regular expression"),
        ([("stem", {"left": "int4"})], r"take the keys 'lhs' and 'rhs'.*got \['left'\]"),
        ([("stem", {"lhs": "int4", "weight": "int4"})], r"got \['lhs', 'weight'\]"),
        ([("stem", {})], r"got \[\]"),
        ((".*", "int4"), r"A rule is '\.\*'; expected a pair"),
        ([("stem", "int4", "int8")], r"'int8'\); expected a pair"),
        ([(None, "int4")], r"None, 'int4'\); expected a pair"),
        ("int4", r"Rules are 'int4'; expected pairs"),
    ],
)
def test_wrong_rules(sites, rules, message):
    with pytest.raises(RuleError, match=message):
        aqs.assign(sites, rules)


def test_wrong_formats(sites):
    with pytest.raises(aqs.FormatError, match="Unknown format 'int0'"):
        aqs.assign(sites, [("stem", "int0")])
    with pytest.raises(aqs.FormatError, match="got 8"):
        aqs.assign(sites, [("stem", {"lhs": 8})])


def test_a_function_without_sites():
    assert aqs.assign({}, []) == {}
    with pytest.raises(RuleError, match="the function has no sites"):
        aqs.assign({}, [("head", "int4")])


def test_quantizers_block_formats_and_options(sites):
    mx = aqs.assign(sites, [("stem", "mxfp4")])["stem/kernel"]
    assert mx == both(aqs.quantizer("mxfp4"))
    spec = {"weight": "int4", "activation": "int8", "unsigned": False, "lhs_gradient": "int8"}
    kept = aqs.assign(sites, [("stem", spec)])["stem/kernel"]
    signed = [aqs.Quantizer(name, unsigned=False) for name in ("int8", "int4", "int8")]
    assert kept == SiteFormats(*signed)
    assert aqs.assign(sites, [("stem", kept)])["stem/kernel"] == kept
    for wrong in ({"unsigned": False}, {"weight": "int4", "unsigned": 3}):
        with pytest.raises(RuleError, match="unsigned"):
            aqs.assign(sites, [("stem", wrong)])


def test_of_a_lookup_the_table_is_quantized():
    sites = aqs.find_sites(lambda t, i: t[i], jnp.ones((10, 4)), jnp.array([1, 2]))
    for spec in ("int8", {"weight": "int8", "activation": "int4"}):
        assert list(aqs.assign(sites, [(".*", spec)]).values()) == [SiteFormats(None, INT8)]
