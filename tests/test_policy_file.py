"""policy.json says all of an assignment made from names, and reads back as the same."""

import json

import jax.numpy as jnp
import pytest

import aqt_search as aqs
from experiments.assignment import read_policy
from experiments.results import policy_json

WEIGHTS = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
SITES = aqs.find_sites(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], WEIGHTS, jnp.ones((2, 4)))
RULES = {
    "one format": [(".*", "int4")],
    "by role": [("a", {"weight": "e2m1", "activation": "bf16"})],
    "blocks": [("a", "nvfp4"), ("b", "mxfp6_e3m2")],
    "signed": [(".*", {"weight": "int4", "activation": "int4", "unsigned": False})],
    "gradients": [(".*", {"lhs": "int8", "rhs": "int8", "rhs_gradient": "e5m2"})],
}


@pytest.mark.parametrize("case", RULES)
def test_written_and_read(case, tmp_path):
    assignment = aqs.assign(SITES, RULES[case])
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy_json(assignment)))
    assert read_policy(path) == assignment


@pytest.mark.parametrize(
    "spec", [aqs.Quantizer("int4", aqs.PER_TENSOR), aqs.Quantizer("int4", edge="half_step")]
)
def test_what_has_no_name_is_refused(spec):
    with pytest.raises(aqs.FormatError, match="has no name"):
        policy_json(aqs.assign(SITES, [(".*", spec)]))
