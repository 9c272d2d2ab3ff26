"""An assignment as JSON says all of it, and reads back as the same."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.quantizer import NAMED_QUANTIZERS
from experiments.assignment import read_policy
from experiments.results import policy_json

WEIGHTS = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
SITES = aqs.find_sites(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], WEIGHTS, jnp.ones((2, 4)))
ODD = aqs.NumericFormat(1, 1, -3.0, 2.0, 3)
RULES = {
    "one format": [(".*", "int4")],
    "by role": [("a", {"weight": "e2m1", "activation": "bf16"})],
    "blocks": [("a", "nvfp4"), ("b", "mxfp6_e3m2")],
    "signed": [(".*", {"weight": "int4", "activation": "int4", "unsigned": False})],
    "gradients": [(".*", {"lhs": "int8", "rhs": "int8", "rhs_gradient": "e5m2"})],
    "numbers": [("a", ODD), ("b", {"weight": aqs.Quantizer(ODD, unsigned=False)})],
}
NAMES = [
    *(f"{u}int{bits}" for u in ("", "u") for bits in range(2, 9)), "uint1", "bf16", "fp16", "fp32",
    "e2m1", "e2m3", "e3m2", "e3m3", "e4m3", "e5m2", "e8m7", "e2m0", *NAMED_QUANTIZERS,
]  # fmt: skip


def written(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("case", RULES)
def test_written_and_read(case, tmp_path):
    assignment = aqs.assign(SITES, RULES[case])
    assert aqs.from_json(written(aqs.to_json(assignment))) == assignment
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy_json(assignment)))
    assert read_policy(path) == assignment


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_told_by_its_own_meaning(name):
    spec = aqs.quantizer(name)
    (sides,) = aqs.from_json(written(aqs.to_json({"a": aqs.SiteFormats(spec, name)}))).values()
    assert aqs.quantizer(sides.lhs) == aqs.quantizer(sides.rhs) == spec


def test_formats_of_arrays_are_told_as_numbers_are():
    """A point of a space, taken at traced choices and fetched, is one."""
    fmt = jax.tree.map(np.float32, aqs.numeric_format("int4"))
    told = aqs.to_json({"a": aqs.SiteFormats(fmt, fmt)})
    assert told == {"a": {"lhs": "int4", "rhs": "int4"}}


@pytest.mark.parametrize(
    "spec", [aqs.Quantizer("int4", aqs.PER_TENSOR), aqs.Quantizer("int4", edge="half_step"),
             aqs.Quantizer("int4", calibration=aqs.mse(), unsigned=False)],
)  # fmt: skip
def test_what_has_no_name_is_refused(spec):
    with pytest.raises(aqs.AssignmentError, match=r"'a', lhs: .* has no name"):
        aqs.to_json(aqs.assign(SITES, [(".*", spec)]))


def test_jobs_leave_to_the_configuration_what_it_says():
    spec = functools.partial(aqs.Quantizer, "int4", calibration=aqs.mse())
    assignment = {"a": aqs.SiteFormats(spec(), spec(granularity=aqs.PER_TENSOR))}
    assert policy_json(assignment, aqs.PER_TENSOR) == {"a": {"lhs": "int4", "rhs": "int4"}}
    with pytest.raises(aqs.AssignmentError, match="'a', rhs"):
        policy_json(assignment)


def test_five_numbers_are_of_their_types():
    fmt = jax.tree.map(jnp.asarray, ODD)
    told = aqs.to_json({"a": aqs.SiteFormats(fmt)})
    assert json.dumps(told["a"]["lhs"]) == (
        '{"mantissa_bits": 1, "min_exponent": 1, "min_value": -3.0, "max_value": 2.0, "bits": 3}'
    )
    (back,) = aqs.from_json(told).values()
    assert list(map(type, back.lhs)) == [int, int, float, float, int]


def test_keys_are_left_out():
    keyed = aqs.Quantizer("int4", key=jax.random.key(0))
    assert aqs.to_json({"a": aqs.SiteFormats(keyed)}) == {"a": {"lhs": "int4", "rhs": None}}


@pytest.mark.parametrize(
    "formats, words",
    [
        ("int4", ["'a'", "'int4'", "SiteFormats"]),
        (aqs.SiteFormats(aqs.stack_formats(["int4", "int8"])), ["'a', lhs", "table"]),
        (aqs.SiteFormats(rhs=aqs.Quantizer("int4", edge="half_step", calibration=aqs.mse())),
         ["'a', rhs", "of int4 in calibration and edge."]),
        (aqs.SiteFormats(rhs=aqs.Quantizer(ODD, calibration=aqs.mse())),
         ["'a', rhs", "in calibration."]),
        (aqs.SiteFormats(rhs=aqs.Quantizer("int4", calibration=aqs.mse(), unsigned=False)),
         ["'a', rhs", "in calibration."]),
    ],
)  # fmt: skip
def test_what_cannot_be_told(formats, words):
    with pytest.raises(aqs.AssignmentError) as caught:
        aqs.to_json({"a": formats})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "0x" not in str(caught.value)  # nobody can read the address of a function


def test_traced_formats_are_refused():
    @jax.jit
    def told(number):
        aqs.to_json({"a": aqs.SiteFormats(rhs=ODD._replace(max_value=number))})

    with pytest.raises(aqs.AssignmentError, match=r"'a', rhs: .*traced"):
        told(3.0)


@pytest.mark.parametrize(
    "value, words",
    [
        ([], ["no JSON object", "list"]),
        ({"a": "int4"}, ["'a'", "'int4'", "format name"]),
        ({"a": {"left": "int4"}}, ["'a'", "left", '"lhs"']),
        ({"a": {"lhs": "int4"}}, ["'a'", "rhs"]),
        ({"a": {"lhs": "int99", "rhs": None}}, ["'a', lhs", "'int99'", "int2..int8"]),
        ({"a": {"lhs": None, "rhs": 4}}, ["'a', rhs", "got 4"]),
        ({"a": {"lhs": None, "rhs": {"bits": 4}}}, ["'a', rhs", "mantissa_bits", "bits"]),
        ({"a": {"lhs": None, "rhs": {"format": "x", "unsigned": True}}}, ["'a', rhs", "'x'"]),
        (
            {"a": {"lhs": None, "rhs": {"format": "int4", "unsigned": "no"}}},
            ["'a', rhs", "'unsigned' is true or false", "'no'"],
        ),
        (
            {"a": {"lhs": {"format": {"format": "int4", "unsigned": True}, "unsigned": True}}},
            ["'a'", "rhs"],
        ),
        *(
            ({"a": {"lhs": None, "rhs": ODD._asdict() | {field: number}}}, ["'a', rhs", *words])
            for field, number, words in (
                ("bits", "3", ["bits is a number", "'3'"]),
                ("bits", 2.5, ["bits is a whole number", "2.5"]),
                ("mantissa_bits", True, ["mantissa_bits is a number", "True"]),
                ("max_value", float("inf"), ["max_value is a number", "inf"]),
            )
        ),
    ],
)
def test_bad_values(value, words):
    with pytest.raises(aqs.AssignmentError) as caught:
        aqs.from_json(value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
