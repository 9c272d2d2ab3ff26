"""What enters and leaves sites, against the model written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.products.operands import values_of
from aqt_search.ptq import PTQError, site_values

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 4)).astype(np.float32)
WEIGHTS = {
    "a": {"kernel": RNG.normal(size=(4, 6)).astype(np.float32)},
    "b": {"kernel": RNG.normal(size=(6, 6)).astype(np.float32)},
    "c": {"kernel": RNG.normal(size=(6, 3)).astype(np.float32)},
}
NAMES = ["a/kernel", "b/kernel", "c/kernel"]


def mlp(weights, x):
    """Three layers, the second under remat and the third under jit."""
    x = jax.nn.relu(x @ weights["a"]["kernel"])
    x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(weights["b"]["kernel"], x)
    return jax.jit(jnp.matmul)(x, weights["c"]["kernel"])


def scanned(weights, x):
    """The second layer twice, in a scan."""

    def layer(x, _):
        return x @ weights["b"]["kernel"], None

    return jax.lax.scan(layer, x @ weights["a"]["kernel"], length=2)[0]


def test_values_of_the_float_model():
    found = jax.jit(site_values(mlp, NAMES))({}, {}, WEIGHTS, X)
    x = X.astype(float)
    for name, activation in zip(NAMES, (lambda v: np.maximum(v, 0), np.tanh, None)):
        weight = WEIGHTS[name[0]]["kernel"]
        np.testing.assert_allclose(found[name].lhs, x, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found[name].rhs, weight)
        np.testing.assert_allclose(found[name].out, x @ weight, rtol=1e-5, atol=1e-5)
        x = activation and activation(x @ weight)


def test_values_under_formats():
    assignment = aqs.assign(aqs.find_sites(mlp, WEIGHTS, X), [("a|b", "int4")])
    values = site_values(mlp, ["b/kernel"])

    @jax.jit
    def both(weights, x):
        found = values(assignment, {}, weights, x)["b/kernel"]
        return found, tuple(map(values_of, found.operands))

    @jax.jit
    def by_hand():
        first, second = (aqs.fake_quant(WEIGHTS[k]["kernel"], "int4", (1,)) for k in ("a", "b"))
        entering = jax.nn.relu(aqs.fake_quant(X, "int4") @ first)
        return entering, aqs.fake_quant(entering, "uint4"), second

    found, taken = both(WEIGHTS, X)
    entering, expected, kernel = by_hand()
    np.testing.assert_allclose(found.lhs, entering, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.rhs, WEIGHTS["b"]["kernel"])  # not yet quantized
    np.testing.assert_allclose(taken[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(taken[1], kernel, rtol=1e-6)
    np.testing.assert_allclose(found.out, taken[0] @ taken[1], rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_is_computed():
    def flops(names, field):
        values = site_values(mlp, names)
        of = jax.jit(lambda w, x: [getattr(v, field) for v in values({}, {}, w, x).values()])
        return of.lower(WEIGHTS, X).compile().cost_analysis().get("flops", 0)

    first = 2 * 5 * 4 * 6  # of the product of the first site
    assert flops(["a/kernel"], "lhs") < first <= flops(["a/kernel"], "out") < 1.5 * first
    assert flops(["b/kernel"], "lhs") < 1.5 * first


def test_a_lookup_has_its_indices_left_and_its_table_right():
    ids = np.array([2, 0])
    found = site_values(lambda w, ids: w["table"][ids], ["table"])({}, {}, {"table": X}, ids)
    np.testing.assert_array_equal(found["table"].rhs, X)
    np.testing.assert_array_equal(found["table"].lhs.reshape(-1), ids)
    np.testing.assert_array_equal(found["table"].out, X[ids])


@pytest.mark.parametrize(
    "apply, names, message",
    [
        (mlp, ["a/kernle"], "no site 'a/kernle'. Nearest: a/kernel"),
        (mlp, "a/kernel", "sequence of names"),
        (scanned, ["a/kernel", "b/kernel"], "'b/kernel' cannot be captured: it is inside a scan"),
    ],
)
def test_bad_names(apply, names, message):
    with pytest.raises(PTQError, match=message):
        site_values(apply, names)({}, {}, WEIGHTS, X)


def test_a_state_of_another_assignment():
    with pytest.raises(aqs.SiteError, match="not of this assignment"):
        site_values(mlp, NAMES)({}, {"a/kernel": {"rhs": ()}}, WEIGHTS, X)
